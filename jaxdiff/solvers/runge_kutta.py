"""Classical Runge-Kutta methods for the probability flow, in any of its clocks."""

from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import diffrax
import numpy as np

from jaxdiff.grids import Grid
from jaxdiff.processes import Process
from jaxdiff.solvers.clocks import Level, check_choice
from jaxdiff.solvers.exponential_rk import first_order_row, from_blocks, rows_of
from jaxdiff.solvers.fields import Field
from jaxdiff.solvers.sigma import Churn, rho_clock
from jaxdiff.solvers.tableau import Row, Tableau, Update, assemble, check_ends


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
    grid: Grid, method: str | diffrax.ButcherTableau | Sequence[Any] = "rk4",
    clock: str | Process = "rho", last: str = "euler", scaling: str | None = None,
    s_churn: float = 0.0, s_min: float = 0.0, s_max: float = np.inf, s_noise: float = 1.0,
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
        "rho2" = (sigma / alpha)^2     x / alpha                      eps / (2 rho)
        "t", the grid's process's      x                              F x + g^2 / (2 sigma) eps

    with F x, g the drift and diffusion of the process: there the linear part stays in f. A process
    of `jaxdiff.processes` as clock gives its t and its F, g, at the same sigma / alpha, whatever
    process the grid has. One evaluation a stage; the order is the method's. `euler` is this with
    "euler" in "rho", and `heun` with "heun" in "rho" or "tau". rhoRK-DEIS: Zhang & Chen, "Fast
    Sampling of Diffusion Models with Exponential Integrator" (2023). Karras et al. (2022) compare
    Euler and `two_stage_method` (algorithm 3) in the t of a VP schedule (that of a `vp_linear`), of
    their VE schedule ("rho2") and of EDM ("rho"), with VP's scaling or none.

    Arguments:
      method: "euler", "midpoint", "heun", "ralston"; "heun3", "kutta3", "van_der_houwen3",
        "ssprk3", "bogacki_shampine" (Ralston's third-order method); "rk4", "rk38"; "dopri5",
        "tsit5" (6 evaluations), "dopri8" (13; stages for the error estimate alone are left out);
        or a `diffrax.ButcherTableau`, or arrays (a [s, s], b [s], c [s]).
      last: the step to sigma = 0. "euler": first order in the integrand's own clock, one evaluation
        (EDM's rule). "clock": Euler in the clock itself, which for y = s(rho) x / alpha with a
        linear part, and in "rho2", does not end at x0 (EDM's ablation does that). "full": with all
        stages, in "rho", "tau" or "angle"; a stage at sigma = 0 itself needs a network that
        predicts the integrand. These two need a clock that is finite there.
      scaling: y other than in the table, at the price of a linear part: "none" is x / alpha, "vp"
        the state of variance-preserving processes, x / hypot(alpha, sigma).
      s_churn, s_min, s_max, s_noise: churn as in `euler`, the network evaluated after the noise.

    alpha = 0 at the noise end is supported in "tau", "angle" and "kappa", without `scaling` and
    churn. Raises ValueError for other options, an implicit method, or arrays that are no consistent
    explicit one; TypeError for a method or clock that is none of these.
    """
    field = Field(grid, clock, scaling)
    check_choice("last", last, ("euler", "clock", "full"))
    butcher = _butcher(method)
    field.check_last(last)
    pure_noise = field.pure_noise and not s_churn
    check_ends(grid, f"runge_kutta in clock {field.name}", noise=pure_noise, data=True)
    churn = Churn(grid, s_churn, s_min, s_max, s_noise)
    whole = grid.steps - int(grid.ends[1] and last != "full")
    blocks = _steps(field, np.arange(whole), butcher, churn)
    if whole < grid.steps and last == "clock":
        blocks += _steps(field, np.array([whole]), _butcher("euler"), churn)
    elif whole < grid.steps:
        level = churn.level(whole)
        blocks.append([first_order_row(grid, whole, whole + 1, field.integrand, level)])
    if not churn.on:
        return from_blocks(grid, blocks, field.integrand)
    rows, nodes = [], [(0, 1)]
    for i, (*inner, row) in enumerate(blocks):
        arrived, alpha = row.updates[0], grid.alpha[i + 1]
        s, m = ([c / alpha for c in part] for part in (arrived.s, arrived.m))
        rows += [*inner, row._replace(updates=churn.enter(i + 1, s, m, arrived))]
        nodes.append((len(rows), 1))
    return assemble(rows, field.integrand, grid.xp, nodes=nodes, start=churn.start())


def _steps(
    field: Field, starts: np.ndarray, butcher: Butcher, churn: Churn
) -> list[list[Row]]:
    if not len(starts):
        return []
    grid, (a, b, c) = field.grid, butcher
    level, end = (tuple(v[i] for v in grid.node(slice(None))) for i in (starts, starts + 1))
    if churn.on:
        level = tuple(np.array(column) for column in zip(*(churn.level(i) for i in starts)))
    start, stop = field.coordinate(level), field.coordinate(end)

    def at(fraction: float) -> Level:
        if fraction in (0.0, 1.0):
            return end if fraction else level
        return field.level(start + fraction * (stop - start))

    levels, first = [at(fraction) for fraction in c], field.size(level)
    # Of a stage's y and of its f: the share of the y that the step left from, and the weights of m.
    kept, column, found, stages = 1.0, [], [], []
    for i, place in enumerate(levels):
        linear, slope = field.slopes(place)
        found.append((linear * kept, [*(linear * w for w in column), slope]))
        target, row = (end, b) if i + 1 == len(b) else (levels[i + 1], a[i + 1])
        step = stop - start
        kept = 1.0 + step * sum(weight * f for weight, (f, _) in zip(row, found))
        column = [
            step * sum(row[j] * found[j][1][k] for j in range(k, i + 1)) for k in range(i + 1)
        ]
        size = field.size(target)
        stages.append((size / first * kept, [size * w for w in column]))
    return rows_of(levels, stages)


def two_stage_method(place: float = 1.0) -> Butcher:
    """The explicit method of order 2 with its second stage at `place`, a number above 0.

    y' = y + H ((1 - 1 / (2 place)) f(y) + f(y + place H f(y)) / (2 place)): "heun" at 1, "ralston"
    at 2/3, "midpoint" at 1/2; `alpha` of Karras et al. (2022), algorithm 3. Raises ValueError for a
    place that is not positive, TypeError for anything but a number.
    """
    if isinstance(place, bool) or not isinstance(place, Real):
        raise TypeError(f"place must be a number, got {place!r}")
    if not 0 < place < np.inf:
        raise ValueError(f"place must be positive and finite, got {place!r}")
    return _filled(((float(place),),), (1.0 - 0.5 / place, 0.5 / place), (0.0, float(place)))


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
