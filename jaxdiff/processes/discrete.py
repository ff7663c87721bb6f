"""Discrete DDPM schedules bridged to continuous time, and zero terminal SNR."""

from typing import Any

import numpy as np
from jaxtyping import ArrayLike

from jaxdiff.arrays import is_concrete
from jaxdiff.processes.base import (
    Process,
    VariancePreserving,
    floating,
    half_log_snr_of_log_alpha,
    register,
    softplus,
    static,
)


@register
class DDPM(VariancePreserving):
    """See `ddpm`. `table` holds lambda at t = 0, 1, ..., num_steps - 1."""

    table: ArrayLike
    t_min: float = static(0.0)
    t_max: float = static(999.0)

    def half_log_snr(self, t):
        xp, t = floating(t, self)
        return xp.interp(t, xp.arange(self.table.shape[0]), self.table)

    def time(self, half_log_snr):
        xp, lam = floating(half_log_snr, self)
        return xp.interp(-lam, -self.table, xp.arange(self.table.shape[0]) * 1.0)

    def log_alpha_rate(self, t):
        # alpha^2 = sigmoid(2 lambda), so d log(alpha) / dt = sigma^2 d lambda / dt; the slope of
        # lambda at an integer is the one to its right (at the last, to its left).
        xp, t = floating(t, self)
        left = xp.clip(xp.floor(t), 0, self.table.shape[0] - 2).astype(int)
        table = xp.asarray(self.table)
        return self.sigma(t) ** 2 * (table[left + 1] - table[left])


@register
class ZeroTerminalSNR(VariancePreserving):
    """See `zero_terminal_snr`."""

    base: VariancePreserving
    t_min: float = static()
    t_max: float = static()
    noise_time: float | None = static()
    data_time: float | None = static()

    def _ends(self):
        """(F, L, 1 - F): the base's alpha at the clean end and at t_max."""
        last = self.base.alpha(self.t_max)
        if self.data_time is not None:
            return 1.0, last, 0.0
        first = self.base.alpha(0.0)
        return first, last, self.base.sigma(0.0) ** 2 / (1.0 + first)

    def _levels(self, xp, t):
        """(alpha', 1 - alpha'), the latter without the cancellation near the clean end."""
        first, last, rest = self._ends()
        alpha = self.base.alpha(t)
        # Rounding may leave a compiled alpha(t_max) an ulp below `last`.
        above = xp.where(alpha > last, alpha - last, 0.0)
        left = self.base.sigma(t) ** 2 / (1.0 + alpha)
        return above * first / (first - last), (first * left - last * rest) / (first - last)

    def alpha(self, t):
        xp, t = floating(t, self)
        return self._levels(xp, t)[0]

    def sigma(self, t):
        xp, t = floating(t, self)
        alpha, left = self._levels(xp, t)
        return xp.sqrt(left * (1.0 + alpha))

    def half_log_snr(self, t):
        xp, t = floating(t, self)
        alpha, left = self._levels(xp, t)
        with np.errstate(divide="ignore"):
            return xp.log(alpha) - 0.5 * xp.log(left * (1.0 + alpha))

    def time(self, half_log_snr):
        xp, lam = floating(half_log_snr, self)
        first, last, rest = self._ends()
        alpha = xp.exp(-0.5 * softplus(xp, -2.0 * lam))
        left = xp.exp(-softplus(xp, 2.0 * lam)) / (1.0 + alpha)
        base = alpha * (first - last) / first + last
        base_left = (last * rest + left * (first - last)) / first
        with np.errstate(divide="ignore"):
            return self.base.time(xp.log(base) - 0.5 * xp.log(base_left * (1.0 + base)))

    def log_alpha_rate(self, t):
        xp, t = floating(t, self)
        last, alpha = self.base.alpha(self.t_max), self.base.alpha(t)
        inside = alpha > last
        slope = xp.where(inside, self.base.log_alpha_rate(t), -np.inf)
        return slope * xp.where(inside, alpha / xp.where(inside, alpha - last, 1.0), 1.0)


def _cosine_betas(num_steps: int) -> np.ndarray:
    u = np.arange(num_steps + 1) / num_steps
    bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1.0 - bar[1:] / bar[:-1], 0.999)


# schedule name -> (default beta_start, default beta_end, betas)
_DDPM_SCHEDULES = {
    "linear": (1e-4, 0.02, np.linspace),
    "scaled_linear": (0.00085, 0.012, lambda a, b, n: np.linspace(a**0.5, b**0.5, n) ** 2),
    "squaredcos": (None, None, lambda a, b, n: _cosine_betas(n)),
}


def ddpm(
    schedule: str = "linear",
    num_steps: int = 1000,
    beta_start: float | None = None,
    beta_end: float | None = None,
    betas: ArrayLike | None = None,
) -> DDPM:
    """A discrete DDPM schedule bridged to continuous time: t in [0, num_steps - 1].

    At an integer t, alpha^2 = prod_{i <= t} (1 - beta_i), exactly the discrete model; between
    integers lambda is linear in t (Karras et al. 2022 interpolate log sigma so for their
    "iDDPM" networks). A network trained on integer timesteps therefore takes t as it is.

    `schedule`: "linear" (Ho et al. 2020; 1e-4 to 0.02), "scaled_linear" (latent diffusion; betas
    whose square roots are linear, 0.00085 to 0.012), "squaredcos" (Nichol & Dhariwal 2021, betas
    capped at 0.999); or give `betas`, shape [num_steps]. Raises ValueError for anything else.
    """
    if betas is None:
        if schedule not in _DDPM_SCHEDULES:
            raise ValueError(f"unknown schedule {schedule!r}; choose from {list(_DDPM_SCHEDULES)}")
        start, end, function = _DDPM_SCHEDULES[schedule]
        if start is None and (beta_start is not None or beta_end is not None):
            raise ValueError(f"schedule {schedule!r} takes no beta_start or beta_end")
        if num_steps < 2:
            raise ValueError(f"num_steps must be at least 2, got {num_steps!r}")
        start = start if beta_start is None else beta_start
        end = end if beta_end is None else beta_end
        if start is not None and not (0 < start < 1 and 0 < end < 1):
            raise ValueError(f"beta_start and beta_end must lie in (0, 1), got {start!r}, {end!r}")
        betas = function(start, end, num_steps)
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or betas.size < 2 or not np.all((betas > 0) & (betas < 1)):
        raise ValueError(f"betas must be a vector of at least 2 numbers in (0, 1), got {betas}")
    log_alpha = 0.5 * np.cumsum(np.log1p(-betas))
    table = half_log_snr_of_log_alpha(np, log_alpha)
    return DDPM(table=table, t_min=0.0, t_max=float(betas.size - 1))


def zero_terminal_snr(process: VariancePreserving) -> ZeroTerminalSNR:
    """Shift and scale alpha so that it is 0 at t_max and unchanged at the clean end.

    alpha'(t) = (alpha(t) - alpha(t_max)) alpha(0) / (alpha(0) - alpha(t_max)), and sigma'^2 = 1 -
    alpha'^2 (Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", 2024,
    algorithm 1). Raises TypeError for a process that does not preserve variance.
    At the first node an eps or score network says nothing about x_0: use v, x0 or flow.
    """
    if not isinstance(process, VariancePreserving):
        raise TypeError(
            f"zero_terminal_snr takes a variance-preserving process, got {type(process).__name__}"
        )
    return ZeroTerminalSNR(
        base=process, t_min=process.t_min, t_max=process.t_max,
        noise_time=process.t_max, data_time=process.data_time,
    )  # fmt: skip


def is_discrete(process: Process) -> bool:
    """Whether the process is a `DDPM`, or one with zero terminal SNR: its levels are a table's."""
    while isinstance(process, ZeroTerminalSNR):
        process = process.base
    return isinstance(process, DDPM)


def check_times(process: Process, t: Any) -> None:
    """Raise ValueError for known times outside a discrete process's table, which clamps them."""
    if is_discrete(process) and is_concrete(t):
        if not np.all((np.asarray(t) >= process.t_min) & (np.asarray(t) <= process.t_max)):
            raise ValueError(f"times must lie in [{process.t_min:g}, {process.t_max:g}], got {t}")


def check_half_log_snr(process: Process, half_log_snr: Any) -> None:
    """As `check_times`, for half-log-SNRs."""
    if is_discrete(process) and is_concrete(process, half_log_snr):
        low, high = (float(process.half_log_snr(t)) for t in (process.t_max, process.t_min))
        lam = np.asarray(half_log_snr)
        if not np.all((lam >= low - 1e-9) & (lam <= high + 1e-9)):
            raise ValueError(
                f"half-log-SNR {half_log_snr} lies outside the process's [{low:.6g}, {high:.6g}]"
            )
