"""The reverse SDE: its exact steps for any noise level tau, and score_sde's predictors.

For every tau(lambda) >= 0 the reverse-time SDE

    dx = [f x - (1 + tau^2) / 2 g^2 score] dt + tau g dW

has the marginals of the forward process: tau = 0 is the probability flow, tau = 1 the reverse SDE
(Song et al. 2021; Xue et al., "SA-Solver", 2023). With tau constant in a step of
half-log-SNR length h it is integrated exactly, but for the prediction, in two ways:

    x0    x' = (sigma' / sigma) exp(-tau^2 h) x + alpha' k int_0^h exp(-k (h - s)) x0 ds
               + sigma' sqrt(1 - exp(-2 tau^2 h)) z,                  k = 1 + tau^2
    eps   x' = (alpha' / alpha) x - sigma' k int_0^h exp(h - s) eps ds
               + tau sigma' sqrt(exp(2 h) - 1) z
"""

from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.arrays import is_concrete
from jaxdiff.grids import Grid
from jaxdiff.solvers import clocks
from jaxdiff.solvers.clocks import Level, coordinate
from jaxdiff.solvers.phi import interpolation_weights
from jaxdiff.solvers.tableau import Row, Tableau, Update, assemble, check_ends

TauLaw = float | Callable[[Any, Any, Any], Any]


class Step(NamedTuple):
    """x' = carry x + sum_k weights_k m_k + noise z; `noise` is None where there is none."""

    carry: Any
    weights: list[Any]
    noise: Any


def is_zero(tau: Any) -> bool:
    """Whether tau is 0, as far as the host can see."""
    return is_concrete(tau) and bool(np.all(np.asarray(tau) == 0))


def noise_levels(
    grid: Grid, tau: TauLaw, window: tuple[float, float] = (0.0, np.inf)
) -> list[Any]:  # fmt: skip
    """tau of every step: the law at the step's end, 0 outside `window` and in a step to sigma = 0.

    Arguments:
      tau: a number, or a function of the level (t, alpha, sigma).
      window: where tau is not 0, as (lowest, highest) sigma / alpha of a step's end, inclusive.

    Raises ValueError for a negative tau, or a window that is no interval; TypeError for a law that
    is neither. A grid from data to noise takes tau = 0 only.
    """
    xp = grid.xp
    number = isinstance(tau, Real) or (hasattr(tau, "dtype") and np.shape(tau) == ())
    if isinstance(tau, bool) or not (number or callable(tau)):
        raise TypeError(f"tau must be a number or a function of (t, alpha, sigma), got {tau!r}")
    low, high = window
    if not 0 <= low < high:
        raise ValueError(f"window must be (lowest, highest) sigma / alpha, got {window!r}")
    out = []
    for i in range(grid.steps):
        end = grid.node(i + 1)
        if grid.ends[1] and i == grid.steps - 1:
            out.append(0.0)
            continue
        here = tau(*end) if callable(tau) else tau
        if (low, high) != (0.0, np.inf):
            rho = end[2] / end[1]
            here = xp.where((rho >= low) & (rho <= high), here, 0.0)
        if is_concrete(here):
            here = float(here)
            if not 0 <= here < np.inf:
                raise ValueError(f"tau must be finite and not negative, got {here} at node {i + 1}")
        if grid.backward and not is_zero(here):
            raise ValueError(f"a grid from data to noise takes tau = 0, got {here}")
        out.append(here)
    return out


def exact_step(
    xp: Any, level: Level, end: Level, places: list[Level], integrand: str, tau: Any
) -> Step:
    """The step between two levels with alpha, sigma > 0, x0 or eps a polynomial in lambda.

    The polynomial goes through the predictions at `places`, weights in their order.
    """
    start = coordinate(xp, "lambda", level)
    h, k = coordinate(xp, "lambda", end) - start, 1.0 + tau**2
    offsets = [coordinate(xp, "lambda", place) - start for place in places]
    if integrand == "x0":
        # In units of 1 / k the kernel is exp(-(h - s)).
        found = interpolation_weights([k * offset for offset in offsets], k * h, -1.0)
        weights = [end[1] * w for w in found]
    else:
        weights = [-end[2] * k * w for w in interpolation_weights(offsets, h, 1.0)]
    carry, noise = linear_part(xp, level, end, integrand, tau)
    return Step(carry, weights, noise)


def linear_part(xp: Any, level: Level, end: Level, integrand: str, tau: Any) -> tuple[Any, Any]:
    """(carry, noise) of the step between two levels with alpha, sigma > 0; noise as in `Step`."""
    h = coordinate(xp, "lambda", end) - coordinate(xp, "lambda", level)
    squared, quiet = tau**2, is_zero(tau)
    if integrand == "x0":
        carry = end[2] / level[2] * (1.0 if quiet else xp.exp(-squared * h))
        share = -xp.expm1(-2.0 * squared * h)
    else:
        carry, share = end[1] / level[1], squared * xp.expm1(2.0 * h)
    if quiet:
        return carry, None
    if is_concrete(share):
        return carry, end[2] * xp.sqrt(share)
    # Where share is 0 its root's derivative counts as 0.
    positive = share > 0
    return carry, end[2] * xp.where(positive, xp.sqrt(xp.where(positive, share, 1.0)), 0.0)


def end_step(grid: Grid, i: int, integrand: str, tau: Any) -> Step:
    """Step i from alpha = 0 or to sigma = 0, of first order: the limits of `exact_step`.

    From alpha = 0 (x0 only) x' = alpha' x0 + sigma' z for tau > 0: the state says nothing of the
    data. To sigma = 0 tau is 0, and x' = alpha' x0.
    """
    xp, level, end = grid.xp, grid.node(i), grid.node(i + 1)
    if grid.ends[1] and i == grid.steps - 1:
        found = clocks.weights(grid, level, end, [level], integrand)
        return Step(clocks.carry(xp, integrand, level, end), found, None)
    if is_zero(tau):
        return Step(end[2] / level[2], [end[1]], None)
    traced = not is_concrete(tau)
    carry = xp.where(tau > 0, 0.0, end[2] / level[2]) if traced else 0.0
    return Step(carry, [end[1]], xp.where(tau > 0, end[2], 0.0) if traced else end[2])


def step(grid: Grid, i: int, places: list[Level], integrand: str, tau: Any) -> Step:
    """Step i of a grid through the predictions at `places`: `exact_step`, or `end_step`."""
    if at_end(grid, i):
        return end_step(grid, i, integrand, tau)
    return exact_step(grid.xp, grid.node(i), grid.node(i + 1), places, integrand, tau)


def at_end(grid: Grid, i: int) -> bool:
    """Whether step i starts at alpha = 0 or ends at sigma = 0."""
    return (grid.ends[0] and i == 0) or (grid.ends[1] and i == grid.steps - 1)


def noise_clock(xp: Any, integrand: str, level: Level, end: Level) -> tuple[Any, Any]:
    """exp(2 lambda) ("x0") or exp(-2 lambda) ("eps") at both ends of a row's noise."""
    if integrand == "x0":
        return (level[1] / level[2]) ** 2, (end[1] / end[2]) ** 2
    return (level[2] / level[1]) ** 2, (end[2] / end[1]) ** 2


def step_clock(grid: Grid, i: int, integrand: str) -> tuple[Any, Any]:
    """`noise_clock` of step i, 0 where it draws no noise: in a step to sigma = 0."""
    if grid.ends[1] and i == grid.steps - 1:
        return 0.0, 0.0
    return noise_clock(grid.xp, integrand, grid.node(i), grid.node(i + 1))


def path_form(integrand: str, taus: list[Any]) -> str | None:
    """The Brownian path on which noise of these tau lives; None where all are 0.

    In the "eps" form a step's noise is tau times the path's increment. In the "x0" form it is that
    only where tau = 1: for another, noise within the step has the weight exp(tau^2 lambda), not
    exp(lambda), and the increment stands for it with an error of higher order (strong order 1).
    """
    return None if all(is_zero(tau) for tau in taus) else integrand


def euler_maruyama(grid: Grid, tau: float = 1.0) -> Tableau:
    """Euler-Maruyama on the reverse SDE in the process's own time.

        x' = x + (t' - t) [f x - (1 + tau^2) / 2 g^2 score] + tau g sqrt(t - t') z

    with f, g at t: the predictor of Song et al., "Score-Based Generative Modeling through SDEs"
    (2021), who take tau = 1, or 0 (`probability_flow`), and uniform t. The step to sigma = 0 is the
    denoised state. One evaluation a step, weak and strong order 1. Needs a grid from a process, and
    alpha > 0 at the noise end. Raises ValueError for a negative tau or a grid from arrays.
    """
    check_ends(grid, "euler_maruyama", noise=False, data=True)
    taus, (f, g2) = noise_levels(grid, tau), grid.rates()

    def rule(i):
        dt = grid.t[i + 1] - grid.t[i]
        return 1.0 + dt * f[i], -dt * g2[i]

    return _predictor(grid, taus, rule)


def reverse_diffusion(grid: Grid, tau: float = 1.0) -> Tableau:
    """The reverse-diffusion predictor: the forward kernel's own discretisation, reversed.

    With the kernel from t' to t, x_t = a x_t' + s z, a = alpha / alpha' and s^2 = sigma^2 - a^2
    sigma'^2,

        x' = (2 - a) x + (1 + tau^2) / 2 s^2 score + tau s z

    (Song et al. 2021, who take tau = 1, or 0; on their grids a^2 = 1 - beta for VP). For VE, where
    a = 1, it is `ddpm(variance="fixed_large")`; for VP it has 2 - a where that has 1 / a. Their
    ancestral sampling predictor is `ddpm`: "fixed_small" for VE, "fixed_large" for VP. The step to
    sigma = 0 is the denoised state. One evaluation a step, weak and strong order 1. Takes any grid
    with alpha > 0. Raises ValueError for a negative tau.
    """
    check_ends(grid, "reverse_diffusion", noise=False, data=True)
    taus = noise_levels(grid, tau)

    def rule(i):
        (_, alpha, sigma), (_, alpha1, sigma1) = grid.node(i), grid.node(i + 1)
        a = alpha / alpha1
        return 2.0 - a, (sigma - a * sigma1) * (sigma + a * sigma1)

    return _predictor(grid, taus, rule)


def _predictor(grid: Grid, taus: list[Any], rule: Callable[[int], tuple[Any, Any]]) -> Tableau:
    """x' = carry x + (1 + tau^2) / 2 v score + tau sqrt(v) z with (carry, v) = rule(i)."""
    xp, rows, form = grid.xp, [], path_form("eps", taus)
    for i, tau in enumerate(taus):
        level, end = grid.node(i), grid.node(i + 1)
        if at_end(grid, i):
            carry, found, noise = end_step(grid, i, "eps", tau)
            rows.append(Row(level, [Update([carry], found, noise)]))
            continue
        carry, variance = rule(i)
        noise = None if is_zero(tau) else tau * xp.sqrt(variance)
        pull = -0.5 * (1.0 + tau**2) * variance / level[2]
        clock = noise_clock(xp, "eps", level, end) if form else None
        rows.append(Row(level, [Update([carry], [pull], noise)], clock))
    return assemble(rows, "eps", xp, brownian=form)
