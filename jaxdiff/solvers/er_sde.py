"""ER-SDE-Solver: data predictions extrapolated in sigma / alpha, under any law of the noise."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxdiff.arrays import is_concrete
from jaxdiff.grids import Grid
from jaxdiff.solvers.clocks import check_choice, check_order
from jaxdiff.solvers.first_order import x0_clock
from jaxdiff.solvers.tableau import Row, Tableau, Update, assemble, check_ends

_QUADRATURE, _RIEMANN, _SMALLEST_VARIANCE = 24, 100, 1e-6
# log(phi(rho) / rho) and its limit at rho = infinity (None where phi grows too slowly there).
_SCALES: dict[str, tuple[Callable[[Any, Any], Any], float | None]] = {
    "ode": (lambda xp, rho: 0.0 * rho, 0.0),
    "sde": (lambda xp, rho: xp.log(rho), np.inf),
    "sde_1": (lambda xp, rho: xp.log(xp.exp(-1.0 / rho) + 10.0), float(np.log(11.0))),
    "sde_2": (lambda xp, rho: 0.5 * xp.log(rho), np.inf),
    "sde_3": (lambda xp, rho: 1.5 * xp.log(rho), np.inf),
    "sde_4": (
        lambda xp, rho: xp.log(xp.log1p(100.0 * rho**1.5) / np.log(10.0)) - 0.1 * xp.log(rho), None
    ),
    "sde_5": (lambda xp, rho: xp.logaddexp(rho**0.3, np.log(10.0) + 0.0 * rho), np.inf),
}  # fmt: skip
NOISE_SCALES = tuple(_SCALES)


def er_sde(
    grid: Grid, order: int = 3, noise_scale: str | Callable[[Any], Any] = "sde_5",
    variant: str = "exact",
) -> Tableau:  # fmt: skip
    """ER-SDE-Solver-1, -2 and -3: exact steps of the extended reverse SDE in rho = sigma / alpha.

    With y = x / alpha and a noise scale phi(rho), r = phi(rho') / phi(rho),

        y' = r y + phi(rho') int_rho'^rho phi'(u) / phi(u)^2 P(u) du + sqrt(rho'^2 - r^2 rho^2) z

    with P the polynomial in rho through the last `order` data predictions, integrated exactly. Cui
    et al., "Elucidating the Solution Space of Extended Reverse-Time SDE for Diffusion Models"
    (2023). phi = rho^(1 + tau^2) is the reverse SDE with noise tau; "ode" is `exponential_adams` of
    x0 in rho. One evaluation a step, weak order min(order, 2).

    Arguments:
      order: evaluations that P goes through, 1 to 3 (grown from 1 over the first steps).
      noise_scale: a function of rho, phi(rho) / rho positive and not decreasing, or one of

        ode      rho                     the probability flow
        sde      rho^2                   the reverse SDE
        sde_1    rho (exp(-1 / rho) + 10)
        sde_2    rho^1.5
        sde_3    rho^2.5
        sde_4    rho^0.9 log10(1 + 100 rho^1.5)    (rho below about 1000, where it is valid)
        sde_5    rho (exp(rho^0.3) + 10)           the official default

      variant: "exact"; or "published", the official code's: the integrals by 100 left rectangles,
        Taylor's formula of the second degree with divided differences for derivatives, which
        interpolates two predictions and misses the third, and no noise in a step where that of y
        has a variance below 1e-6.

    From alpha = 0 (not for "sde_4" or a function) and to sigma = 0 the step is of first order.
    Raises ValueError for other options, and where phi(rho) / rho decreases from a node to a noisier
    one.
    """
    check_order(order, 3)
    check_choice("variant", variant, ("exact", "published"))
    if not callable(noise_scale):
        check_choice("noise_scale", noise_scale, NOISE_SCALES)
    xp = grid.xp
    excess, limit = _SCALES.get(noise_scale, (None, None)) if not callable(noise_scale) else (
        lambda xp, rho: xp.log(noise_scale(rho)) - xp.log(rho), None
    )  # fmt: skip
    check_ends(grid, f"er_sde with noise scale {noise_scale!r}", noise=limit is not None, data=True)
    quiet, published = noise_scale == "ode", variant == "published"
    if grid.backward and not quiet:
        raise ValueError(f"a grid from data to noise takes noise_scale 'ode', got {noise_scale!r}")
    rows, seen = [], []
    for i in range(grid.steps):
        (_, alpha, sigma), (_, alpha1, sigma1) = grid.node(i), grid.node(i + 1)
        if grid.ends[1] and i == grid.steps - 1:
            rows.append(Row(grid.node(i), [Update([0.0], [alpha1])], (0.0, 0.0)))
            continue
        rho1, pure_noise = sigma1 / alpha1, grid.ends[0] and i == 0
        gain1, gain = excess(xp, rho1), limit if pure_noise else excess(xp, sigma / alpha)
        noise = None
        if not quiet:
            share = -xp.expm1(2.0 * (gain1 - gain))
            if is_concrete(share) and not share >= 0:
                raise ValueError(
                    f"noise_scale {noise_scale!r} grows more slowly than rho between nodes {i} and "
                    f"{i + 1}: phi(rho) / rho must not decrease"
                )
            noise = sigma1 * xp.sqrt(share)
            if published:
                drop = rho1**2 * share < _SMALLEST_VARIANCE
                noise = xp.where(drop, 0.0, noise) if not is_concrete(drop) else (
                    None if drop else noise
                )
        carry = sigma1 / sigma * xp.exp(gain1 - gain)
        if pure_noise:
            rows.append(Row(grid.node(i), [Update([carry], [alpha1], noise)], x0_clock(grid, i)))
            continue
        rho = sigma / alpha
        seen = [rho, *seen][:order]
        whole = -xp.expm1(gain1 - gain + xp.log(rho1 / rho))
        found = _weights(xp, seen, rho1, whole, excess, published)
        update = Update([carry], [alpha1 * w for w in found], noise)
        rows.append(Row(grid.node(i), [update], x0_clock(grid, i)))
    return assemble(rows, "x0", xp, brownian="x0" if noise_scale == "sde" else None)


def _weights(
    xp: Any, seen: Sequence[Any], rho1: Any, whole: Any, excess: Callable, published: bool
) -> list[Any]:
    """Weights of the predictions at the levels `seen`, newest first, in the step to rho1.

    In Newton's basis N_k(u) = prod_(j < k) (u - rho_j), by parts:
    phi(rho') int phi' / phi^2 N_k du = N_k(rho') + int phi(rho') / phi(u) N_k'(u) du  for k > 0.
    """
    rho = seen[0]
    if len(seen) == 1:
        return [whole]
    if published:
        u = rho1 + np.arange(_RIEMANN) / _RIEMANN * (rho - rho1)
        measure = (rho - rho1) / _RIEMANN * xp.ones(_RIEMANN)
    else:
        # Gauss quadrature in log u.
        points, measure = np.polynomial.legendre.leggauss(_QUADRATURE)
        half = 0.5 * xp.log(rho / rho1)
        u = rho1 * xp.exp(half * (1.0 + points))
        measure = half * measure * u
    # phi(rho') / phi(u)
    measure = measure * xp.exp(excess(xp, rho1) - excess(xp, u)) * rho1 / u
    slope = rho1 - rho + measure.sum()
    first = slope / (rho - seen[1])
    weights = [whole + first, -first]
    if len(seen) == 3:
        # Taylor's formula expands both factors at rho.
        other = rho if published else seen[1]
        bend = (rho1 - rho) * (rho1 - other) + (measure * (2.0 * u - rho - other)).sum()
        second = bend / (rho - seen[2])
        new, old = second / (rho - seen[1]), second / (seen[1] - seen[2])
        weights = [weights[0] + new, weights[1] - new - old, old]
    return weights
