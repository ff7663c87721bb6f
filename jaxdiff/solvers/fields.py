"""The probability flow as dy / dz = linear y + slope m, in any clock z and scaling of the state."""

from typing import Any

from jaxdiff.grids import Grid
from jaxdiff.processes import Process
from jaxdiff.solvers.clocks import Level, check_choice, coordinate, half_log_snr_at, scale

# clock -> (integrand, supports alpha = 0, its stages may lie in a step to sigma = 0)
CLOCKS = {
    "rho": ("eps", False, True),
    "lambda": ("eps", False, False),
    "tau": ("flow", True, True),
    "angle": ("v", True, True),
    "kappa": ("x0", True, False),
    "rho2": ("eps", False, False),
}


class Field:
    """dy / dz = linear y + slope m with y = x / size, in the clock z.

    `clock` and `scaling` as `runge_kutta` takes and documents them; `integrand` is what m is,
    `pure_noise` whether alpha = 0 is supported. Raises ValueError or TypeError for other options.
    """

    def __init__(self, grid: Grid, clock: str | Process, scaling: str | None):
        self.grid, self.clock, self.scaling, self.time = grid, clock, scaling, None
        self.name = repr(clock) if isinstance(clock, str) else type(clock).__name__
        if scaling is not None:
            check_choice("scaling", scaling, ("none", "vp"))
        if isinstance(clock, Process):
            self.time = clock
        elif not isinstance(clock, str):
            raise TypeError(f"clock must be a name or a process, got {type(clock).__name__}")
        else:
            check_choice("clock", clock, (*CLOCKS, "t"))
        if clock == "t":
            if grid.process is None:
                raise ValueError("clock 't' needs a grid from a process: this one is from arrays")
            self.time = grid.process
        self.exact = self.time is None and scaling is None
        facts = CLOCKS["rho2" if self.time is not None else clock]
        self.integrand, self.pure_noise, self.to_zero = facts
        if not self.exact:
            self.integrand, self.pure_noise = "eps", False

    def check_last(self, last: str) -> None:
        """Raise ValueError unless the clock admits this step to sigma = 0."""
        endless = self.clock in ("lambda", "kappa") if self.time is None else (
            self.time.data_time is None
        )
        if (last == "full" and not self.to_zero) or (last == "clock" and endless):
            raise ValueError(
                f"last={last!r} needs a clock that is finite at sigma = 0"
                f"{', as is its rate' if last == 'full' else ''}, not {self.name}"
            )

    def coordinate(self, level: Level) -> Any:
        """z at levels, all with sigma > 0 or all with sigma = 0."""
        xp = self.grid.xp
        if self.clock == "t":
            return level[0]
        if self.time is not None:
            return self.time.time(coordinate(xp, "lambda", level))
        rho = self.clock == "rho2"
        return coordinate(xp, "rho", level, 2.0) if rho else coordinate(xp, self.clock, level)

    def level(self, z: Any) -> Level:
        """The level (t, alpha, sigma) where the clock shows z."""
        xp = self.grid.xp
        if self.clock == "t":
            return z, self.time.alpha(z), self.time.sigma(z)
        if self.time is not None:
            return self.grid.at(self.time.half_log_snr(z))
        if self.clock == "rho2":
            return self.grid.at(-0.5 * xp.log(z))
        return self.grid.at(half_log_snr_at(xp, self.clock, z))

    def size(self, level: Level) -> Any:
        """x / y at levels."""
        xp, (_, alpha, sigma) = self.grid.xp, level
        if self.exact:
            return scale(xp, self.integrand, level)
        if self.scaling == "vp":
            return xp.hypot(alpha, sigma)
        if self.scaling == "none":
            return alpha
        return 1.0 if self.clock == "t" else alpha / self.time.alpha(self.coordinate(level))

    def slopes(self, level: Level) -> tuple[Any, Any]:
        """(linear, slope) at levels with sigma > 0."""
        xp, (_, alpha, sigma) = self.grid.xp, level
        if self.exact and self.integrand != "eps":
            return 0.0, 1.0 / scale(xp, "v", level) if self.integrand == "v" else 1.0
        rho = sigma / alpha
        if self.time is not None:
            z = self.coordinate(level)
            drift, variance = self.time.rates(z)
            rate = 0.5 * rho * variance / self.time.sigma(z) ** 2
        else:
            rate = {
                "rho": 1.0, "lambda": -rho, "tau": (1.0 + rho) ** 2, "angle": 1.0 + rho**2,
                "kappa": -(rho**2),
            }.get(self.clock, 0.5 / rho)  # fmt: skip
        # y = s x / alpha: dy / dz = (d log s / dz) y + s (d rho / dz) eps.
        if self.exact or self.scaling == "none":
            return 0.0, rate
        if self.scaling == "vp":
            return -rho * rate / (1.0 + rho**2), rate / xp.hypot(1.0, rho)
        return drift, self.time.alpha(z) * rate
