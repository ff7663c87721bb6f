"""Classical Runge-Kutta methods for the probability flow, in any of its clocks."""

from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import diffrax
import numpy as np

from jaxdiff.grids import Grid
from jaxdiff.solvers.clocks import Level, check_choice, coordinate, half_log_snr_at, scale
from jaxdiff.solvers.exponential_rk import first_order_row, from_blocks, rows_of
from jaxdiff.solvers.sigma import Churn, rho_clock
from jaxdiff.solvers.tableau import Row, Tableau, Update, assemble, check_ends

# clock -> (integrand, supports alpha = 0, its stages may lie in a step to sigma = 0)
CLOCKS = {
    "rho": ("eps", False, True),
    "lambda": ("eps", False, False),
    "tau": ("flow", True, True),
    "angle": ("v", True, True),
    "kappa": ("x0", True, False),
}


class Butcher(NamedTuple):
    """An explicit Runge-Kutta method: a [s, s] strictly lower triangular, b [s], c [s]."""

    a: Any
    b: Any
    c: Any


_ROWS = {  # (a without its zeros, b)
    "euler": ((), (1.0,)),
    "heun3": (((1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4)),
    "kutta3": (((1 / 2,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6)),
    "van_der_houwen3": (((8 / 15,), (1 / 4, 5 / 12)), (1 / 4, 0.0, 3 / 4)),
    "ssprk3": (((1.0,), (1 / 4, 1 / 4)), (1 / 6, 1 / 6, 2 / 3)),
    "rk4": (((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
    "rk38": (
        ((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
        (1 / 8, 3 / 8, 3 / 8, 1 / 8),
    ),
}
_DIFFRAX = {
    "midpoint": diffrax.Midpoint,
    "heun": diffrax.Heun,
    "ralston": diffrax.Ralston,
    "bogacki_shampine": diffrax.Bosh3,
    "dopri5": diffrax.Dopri5,
    "tsit5": diffrax.Tsit5,
    "dopri8": diffrax.Dopri8,
}
METHODS = (*_ROWS, *_DIFFRAX)


def runge_kutta(
    grid: Grid, method: str | diffrax.ButcherTableau | Sequence[Any] = "rk4", clock: str = "rho",
    last: str = "euler",
) -> Tableau:  # fmt: skip
    """Any explicit Runge-Kutta method for dy / dclock = f, in the clock of choice.

    Stage i stands at clock + c_i H, H the step's length in the clock:

        y_i = y + H sum_{j < i} a_ij f_j,    y' = y + H sum_j b_j f_j.

    For every process (see `jaxdiff.solvers.clocks`; flow is eps - x0):

        clock                          y                              f
        "rho" = sigma / alpha          x / alpha                      eps         EDM; rhoRK-DEIS
        "lambda" = log(alpha / sigma)  x / alpha                      -rho eps
        "tau" = sigma / (alpha+sigma)  x / (alpha + sigma)            flow        rectified flow
        "angle" = atan2(sigma, alpha)  x / hypot(alpha, sigma)        v / hypot(alpha, sigma)
        "kappa" = alpha / sigma        x / sigma                      x0

    One evaluation a stage; the order is the method's. Without churn `euler` is this with "euler" in
    "rho", and `heun` with "heun" in "rho" or "tau". rhoRK-DEIS: Zhang & Chen, "Fast Sampling of
    Diffusion Models with Exponential Integrator" (2023).

    Arguments:
      method: "euler", "midpoint", "heun", "ralston"; "heun3", "kutta3", "van_der_houwen3",
        "ssprk3", "bogacki_shampine" (Ralston's third-order method); "rk4", "rk38"; "dopri5",
        "tsit5" (6 evaluations), "dopri8" (13; stages for the error estimate alone are left out);
        or a `diffrax.ButcherTableau`, or arrays (a [s, s], b [s], c [s]).
      last: the step to sigma = 0. "euler": first order, one evaluation (EDM's rule). "full": with
        all stages, in "rho", "tau" or "angle", whose clocks are finite there; a stage at sigma = 0
        itself needs a network that predicts the integrand.

    alpha = 0 at the noise end is supported in "tau", "angle" and "kappa". Raises ValueError for
    other options, an implicit method, or arrays that are no consistent explicit one; TypeError for
    a method that is none of these.
    """
    check_choice("clock", clock, tuple(CLOCKS))
    check_choice("last", last, ("euler", "full"))
    butcher = _butcher(method)
    integrand, pure_noise, to_zero = CLOCKS[clock]
    if last == "full" and not to_zero:
        raise ValueError(f"last='full' needs a clock that is finite at sigma = 0, not {clock!r}")
    check_ends(grid, f"runge_kutta in clock {clock!r}", noise=pure_noise, data=True)
    whole = grid.steps - int(grid.ends[1] and last == "euler")
    blocks = _steps(grid, np.arange(whole), butcher, clock, integrand)
    blocks += [[first_order_row(grid, i, i + 1, integrand)] for i in range(whole, grid.steps)]
    return from_blocks(grid, blocks, integrand)


def _steps(
    grid: Grid, starts: np.ndarray, butcher: Butcher, clock: str, integrand: str
) -> list[list[Row]]:
    if not len(starts):
        return []
    xp, (a, b, c) = grid.xp, butcher
    level, end = (tuple(v[i] for v in grid.node(slice(None))) for i in (starts, starts + 1))
    start, stop = (coordinate(xp, clock, place) for place in (level, end))

    def at(fraction: float) -> Level:
        if fraction in (0.0, 1.0):
            return end if fraction else level
        return grid.at(half_log_snr_at(xp, clock, start + fraction * (stop - start)))

    levels, slopes, stages = [at(fraction) for fraction in c], [], []
    for i, place in enumerate(levels):
        if clock == "lambda":
            slopes.append(-place[2] / place[1])
        else:
            slopes.append(1.0 / scale(xp, "v", place) if integrand == "v" else 1.0)
        target, row = (end, b) if i + 1 == len(b) else (levels[i + 1], a[i + 1])
        size = scale(xp, integrand, target)
        step = size * (stop - start)
        column = [step * weight * slope for weight, slope in zip(row, slopes)]
        stages.append((size / scale(xp, integrand, level), column))
    return rows_of(levels, stages)


def _butcher(method: Any) -> Butcher:
    if isinstance(method, str):
        check_choice("method", method, METHODS)
        if method in _DIFFRAX:
            return _from_diffrax(_DIFFRAX[method].tableau)
        lower, b = _ROWS[method]
        return _filled(lower, b, [0.0, *(sum(row) for row in lower)])
    if isinstance(method, diffrax.ButcherTableau):
        return _from_diffrax(method)
    if not isinstance(method, Sequence) or len(method) != 3:
        raise TypeError(
            "method must be a name, a diffrax.ButcherTableau or arrays (a, b, c), got "
            f"{type(method).__name__}"
        )
    a, b, c = (np.asarray(part, np.float64) for part in method)
    if b.ndim != 1 or a.shape != (b.size, b.size) or c.shape != b.shape:
        raise ValueError(
            f"a, b and c must have shapes [s, s], [s] and [s], got {a.shape}, {b.shape}, {c.shape}"
        )
    if np.any(np.triu(a) != 0):
        raise ValueError("an explicit method has a strictly lower triangular a")
    if not (np.allclose(a.sum(1), c) and np.isclose(b.sum(), 1.0)):
        raise ValueError(
            f"the rows of a must sum to c and b to 1, got {a.sum(1)} for c={c} and {b.sum()}"
        )
    return Butcher(a, b, c)


def _filled(lower: Sequence[Any], b: Any, c: Any) -> Butcher:
    a = np.zeros((len(b), len(b)))
    for i, row in enumerate(lower):
        a[i + 1, : i + 1] = row
    return Butcher(a, np.asarray(b, np.float64), np.asarray(c, np.float64))


def _from_diffrax(tableau: diffrax.ButcherTableau) -> Butcher:
    if tableau.a_diagonal is not None:
        raise ValueError("the method must be explicit, got an implicit ButcherTableau")
    a, b, c = _filled(tableau.a_lower, tableau.b_sol, [0.0, *tableau.c])
    # Stages at the end that only the error estimate uses.
    used = int(np.flatnonzero(b)[-1]) + 1
    return Butcher(a[:used, :used], b[:used], c[:used])


def kdpm2(
    grid: Grid, r: float = 0.5, s_churn: float = 0.0, s_min: float = 0.0, s_max: float = np.inf,
    s_noise: float = 1.0,
) -> Tableau:  # fmt: skip
    """KDPM2 ("DPM2"): the midpoint rule in rho with its stage halfway in log rho.

    With y = x / alpha, rho = sigma / alpha and m = rho^(1 - r) rho'^r,

        y_m = y + (m - rho) eps
        y'  = y + (rho' - rho) ((1 - 1 / (2 r)) eps + eps(y_m, m) / (2 r))

    k-diffusion's sample_dpm_2 (r = 1/2; Katherine Crowson's), diffusers' KDPM2DiscreteScheduler,
    and diff-sampler's dpm_2 for other r in (0, 1]. Without churn the same map as
    `dpm_solver_singlestep` of order 2 with r1 = r, DPM-Solver-2; churn as in `euler`. Two
    evaluations a step, one in the step to sigma = 0, order 2. Needs alpha > 0 at the noise end.
    """
    if isinstance(r, bool) or not isinstance(r, Real):
        raise TypeError(f"r must be a number, got {r!r}")
    if not 0 < r <= 1:
        raise ValueError(f"r must be in (0, 1], got {r!r}")
    check_ends(grid, "kdpm2", noise=False, data=True)
    churn, xp = Churn(grid, s_churn, s_min, s_max, s_noise), grid.xp
    rows, nodes = [], [(0, int(churn.on))]
    for i in range(grid.steps):
        (alpha, rho), (alpha1, rho1) = rho_clock(churn.level(i)), rho_clock(grid.node(i + 1))
        step, level = rho1 - rho, churn.level(i)
        if grid.ends[1] and i == grid.steps - 1:
            rows.append(Row(level, [Update([alpha1 / alpha], [alpha1 * step])] * (1 + churn.on)))
            nodes.append((len(rows), 0))
            continue
        middle = grid.at(-(1.0 - r) * xp.log(rho) - r * xp.log(rho1))
        alpha_m, rho_m = rho_clock(middle)
        to_middle = Update([alpha_m / alpha], [alpha_m * (rho_m - rho)])
        found = [0.5 / r * step, (1.0 - 0.5 / r) * step]
        solution = Update([0.0, alpha1 / alpha], [alpha1 * w for w in found])
        rows.append(Row(level, [to_middle, Update([1.0])]))
        rows.append(Row(middle, churn.enter(i + 1, [0.0, 1.0 / alpha], found, solution)))
        nodes.append((len(rows), int(churn.on)))
    return assemble(rows, "eps", xp, nodes=nodes, start=churn.start())
