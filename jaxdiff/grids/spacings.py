"""Spacings: nodes over a process's span, even in some variable of the noise level."""

from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np

from jaxdiff.arrays import is_concrete, namespace
from jaxdiff.grids.grid import Grid, check, check_steps, from_times, make, on_host, span_ends
from jaxdiff.processes import Process


def span(process: Process, steps: Any, t_max: Any, t_min: Any, end: str) -> tuple[Any, ...]:
    """The process and the span's ends, on the host where known; fractions 0..1 of the nodes."""
    check(process, end)
    check_steps(steps)
    t_max = process.t_max if t_max is None else t_max
    t_min = process.t_min if t_min is None else t_min
    process, t_max, t_min = on_host((process, t_max, t_min))
    if is_concrete(t_max, t_min) and not t_max > t_min:
        raise ValueError(f"need t_max > t_min, got {t_max!r} and {t_min!r}")
    # With a separate last node at sigma = 0 the span carries one node less.
    nodes = steps if end == "zero" else steps + 1
    return process, t_max, t_min, np.linspace(0.0, 1.0, nodes)


def uniform(
    process: Process, steps: int, *, t_max: Any = None, t_min: Any = None, end: str = "t_min"
) -> Grid:
    """Nodes uniform in t from t_max to t_min (the process's span by default)."""
    return power(process, steps, 1.0, t_max=t_max, t_min=t_min, end=end)


def power(
    process: Process, steps: int, exponent: float = 2.0, *,
    t_max: Any = None, t_min: Any = None, end: str = "t_min",
) -> Grid:  # fmt: skip
    """Nodes uniform in t^(1 / exponent)."""
    process, t_max, t_min, u = span(process, steps, t_max, t_min, end)
    if is_concrete(exponent) and not exponent > 0:
        raise ValueError(f"the exponent must be positive, got {exponent!r}")
    exponent = on_host(exponent)
    inverse = 1.0 / exponent
    t = (t_max**inverse + u * (t_min**inverse - t_max**inverse)) ** exponent
    return _from_span(process, t, t_max, t_min, end)


def quadratic(
    process: Process, steps: int, *, t_max: Any = None, t_min: Any = None, end: str = "t_min"
) -> Grid:
    """Nodes uniform in sqrt(t): DDIM's quadratic spacing (Song et al. 2021)."""
    return power(process, steps, 2.0, t_max=t_max, t_min=t_min, end=end)


def half_log_snr(
    process: Process, steps: int, *, t_max: Any = None, t_min: Any = None, end: str = "t_min"
) -> Grid:
    """Nodes uniform in lambda (DPM-Solver's default spacing; Lu et al. 2022)."""
    process, t_max, t_min, u = span(process, steps, t_max, t_min, end)
    first, last = _finite_lam(process, t_max, t_min)
    t = process.time(first + u * (last - first))
    return _from_span(process, t, t_max, t_min, end)


def karras(
    process: Process, steps: int, rho: float = 7.0, *,
    t_max: Any = None, t_min: Any = None, end: str = "t_min",
) -> Grid:  # fmt: skip
    """Nodes uniform in (sigma / alpha)^(1 / rho) (Karras et al. 2022, equation 5)."""
    process, t_max, t_min, u = span(process, steps, t_max, t_min, end)
    first, last = _finite_lam(process, t_max, t_min)
    if is_concrete(rho) and not rho > 0:
        raise ValueError(f"rho must be positive, got {rho!r}")
    rho = on_host(rho)
    xp = namespace(first, last, rho)
    a, b = xp.exp(-first / rho), xp.exp(-last / rho)
    t = process.time(-rho * xp.log(a + u * (b - a)))
    return _from_span(process, t, t_max, t_min, end)


def logistic(
    process: Process, steps: int, exponent: float = 0.75, center: float = 1.0, *,
    t_max: Any = None, t_min: Any = None, end: str = "t_min",
) -> Grid:  # fmt: skip
    """Nodes uniform in u = 1 / (1 + (center alpha / sigma)^exponent).

    u is a logistic function of lambda: the steps are densest, in lambda, where sigma / alpha =
    center, and grow toward both ends, where the flow is close to linear. Choose center of about the
    spread of the data, for there the denoiser decides between modes. exponent = 1 is rectified
    flow's uniform time, `shifted` by center; toward 0 it becomes `half_log_snr`. With 5 to 8
    evaluations from EDM's sigma = 80 it is the best spacing found here (benchmarks/quality.py).
    Ends at alpha = 0 and sigma = 0 are u = 1 and 0. Raises ValueError unless both are positive.
    """
    of_span = span(process, steps, t_max, t_min, end)
    if is_concrete(exponent, center) and not (exponent > 0 and center > 0):
        raise ValueError(f"exponent and center must be positive, got {exponent!r} and {center!r}")
    exponent, center = on_host((exponent, center))

    def level(xp, z):
        return 0.5 - 0.5 * xp.tanh(0.5 * exponent * z)

    def inverse(xp, u):
        return (xp.log1p(-u) - xp.log(u)) / exponent

    return _even(of_span, end, level, inverse, center, exponent)


def arctan(
    process: Process, steps: int, std: float = 1.0, *,
    t_max: Any = None, t_min: Any = None, end: str = "t_min",
) -> Grid:  # fmt: skip
    """Nodes uniform in arctan(sigma / (alpha std)), of data with standard deviation `std`.

    On Gaussian data DDIM's step makes the spread the cosine of the step in this angle of what it
    should be, so that no other nodes are as good: the first result of Sabour et al., "Align Your
    Steps" (2024). With std = 1 the angle is that of (alpha, sigma), the clock of v. Ends at alpha =
    0 and sigma = 0 are angles pi / 2 and 0. Raises ValueError unless std is positive.
    """
    of_span = span(process, steps, t_max, t_min, end)
    if is_concrete(std) and not (np.ndim(std) == 0 and 0 < std < np.inf):
        raise ValueError(f"std must be a positive number, got {std!r}")

    def level(xp, z):
        # arctan(exp(-z)), whose derivative at z = +-infinity is 0 and not 0 / 0.
        return 0.25 * np.pi - xp.arctan(xp.tanh(0.5 * z))

    def inverse(xp, u):
        return -xp.log(xp.tan(u))

    return _even(of_span, end, level, inverse, on_host(std))


def _even(
    of_span: tuple[Any, ...], end: str, level: Callable, inverse: Callable, center: Any,
    exponent: Any = 1.0,
) -> Grid:  # fmt: skip
    """Nodes even in level(xp, z), z = lambda + log(center), which is finite where lambda is not."""
    process, t_max, t_min, fractions = of_span
    first, last = process.half_log_snr(t_max), process.half_log_snr(t_min)
    xp = namespace(first, last, center, exponent)
    shift = xp.log(center)
    # An end may be infinite in lambda: u is right there, and what its inverse gives is not used.
    u_first, u_last = (level(xp, lam + shift) for lam in (first, last))
    inner = (0 < fractions) & (fractions < 1)
    u = xp.where(inner, u_first + fractions * (u_last - u_first), 0.5)
    t = process.time(inverse(xp, u) - shift)
    return _from_span(process, t, t_max, t_min, end)


def _from_span(process, t, t_max, t_min, end):
    """`from_times` with the span's ends put in exactly."""
    xp = namespace(t, t_max, t_min)
    place = np.zeros(t.shape, int)
    place[-1], place[0] = 2, 1  # a single node is the noise end
    t = xp.where(place == 1, t_max, xp.where(place == 2, t_min, t))
    return from_times(process, t, end, span_ends(process, t_max, t_min, end))


def _finite_lam(process: Process, t_max: Any, t_min: Any) -> tuple[Any, Any]:
    first, last = process.half_log_snr(t_max), process.half_log_snr(t_min)
    if is_concrete(first, last) and not (np.isfinite(first) and np.isfinite(last)):
        raise ValueError(
            f"half-log-SNR is infinite at an end of [t_min={t_min}, t_max={t_max}]: give t_max "
            "with alpha > 0, t_min with sigma > 0 (end='zero' adds a last step to sigma = 0)"
        )
    return first, last


def truncated_karras(
    process: Process, steps: int, nodes: int = 12, rho: float = 7.0, stop: int = 8,
    exponent: float = 1.2,
) -> Grid:  # fmt: skip
    """`steps` steps over the first part of a Karras grid, respaced in time.

    The times of the first node and of node `stop` of `karras` with `nodes` nodes and `rho` are the
    ends of a grid even in t^(1 / exponent): a sampler on it stops at a positive sigma, where the
    detail that is left out costs the most steps (add `solvers.denoise_to_zero` for x0 there). Found
    in the code of "Hyperparameters are all you need" (2025): 8 steps take the defaults, 5 and 6
    steps nodes=8, rho=5, stop=6, 4 steps stop=5. Raises ValueError unless 0 < stop < nodes, whole
    numbers.
    """
    whole_numbers = all(isinstance(n, (int, np.integer)) for n in (stop, nodes))
    if not whole_numbers or not 0 < stop < nodes:
        raise ValueError(
            f"need 0 < stop < nodes, whole numbers, got stop={stop!r}, nodes={nodes!r}"
        )
    whole = karras(process, nodes - 1, rho)
    return power(process, steps, exponent, t_max=whole.t[0], t_min=whole.t[stop])


def shifted(grid: Grid, shift: Any) -> Grid:
    """`grid` with its inner nodes moved toward noise (shift > 1) or toward data (shift < 1).

    With tau = sigma / (alpha + sigma) mapped to u = 1 at the first node and 0 at the last, u becomes

        shift u / (1 + (shift - 1) u),

    on a whole rectified-flow grid the resolution-dependent timestep shift of Esser et al., "Scaling
    Rectified Flow Transformers" (2024). Levels are those of `Grid.at`; the ends stay. Raises
    TypeError unless shift is a number; ValueError unless it is positive and finite, and for a
    backward grid.
    """
    number = isinstance(shift, Real) and not isinstance(shift, bool)
    if not number and not (hasattr(shift, "dtype") and np.shape(shift) == ()):
        raise TypeError(f"shift must be a number, got {shift!r}")
    if grid.backward or (is_concrete(shift) and not 0 < shift < np.inf):
        raise ValueError(f"need a grid from noise to data and a finite shift > 0, got {shift!r}")
    if is_concrete(shift) and shift == 1:
        return grid
    xp = namespace(grid, shift)
    tau = grid.sigma / (grid.alpha + grid.sigma)
    u = (tau - tau[-1]) / (tau[0] - tau[-1])
    moved = tau[-1] + shift * u / (1.0 + (shift - 1.0) * u) * (tau[0] - tau[-1])
    inner = grid.at(xp.log1p(-moved[1:-1]) - xp.log(moved[1:-1]))
    nodes = [
        xp.concatenate([a[:1], b, a[-1:]]) for a, b in zip(grid.node(slice(None)), inner)
    ]  # fmt: skip
    return make(*nodes, grid.process, grid.ends)
