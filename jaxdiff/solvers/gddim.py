"""gDDIM: DDIM and DEIS where every component of the state has its own signal level."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxdiff.grids import Grid
from jaxdiff.predictions import PREDICTIONS, affine
from jaxdiff.solvers.clocks import QUADRATURE, check_order, gauss
from jaxdiff.solvers.reverse_sde import is_zero, noise_levels
from jaxdiff.solvers.tableau import Row, Tableau, Update, assemble, check_ends

HIGHEST_ORDER = 4


def gddim(
    grid: Grid, order: int = 1, tau: float = 0.0, scaling: Callable[[Any], Any] | None = None
) -> Tableau:
    """gDDIM for a diagonal process: y = a(t) y0 + sigma(t) eps with a an array like the state.

    With a(t) = alpha(t) scaling(t) and rho = sigma / a, component by component, the probability
    flow is d(y / a) = eps drho, so that

        y' = (a' / a) y + a' int_rho^rho' P drho

    with P the polynomial in lambda = log(alpha / sigma) through the last `order` noise predictions,
    integrated exactly. Zhang, Tao & Chen, "gDDIM: Generalized Denoising Diffusion Implicit Models"
    (2022), for the blurring diffusion model of Hoogeboom & Salimans (2022): y is the cosine
    transform of the image, scaling(t) the damping of each frequency (there their code takes order
    1; their polynomials elsewhere are in t). With noise (order 1), h = log(rho / rho') and y0 as
    predicted,

        y' = a' y0 + sigma' exp(-tau^2 h) eps + sigma' sqrt(1 - exp(-2 tau^2 h)) z

    Without scaling the process is isotropic and gDDIM nothing new: order 1 is the first-order
    `sa_solver` of this tau, and `ddim` with eta^2 (1 - exp(-2 h)) = 1 - exp(-2 tau^2 h) (eta = tau
    at 0 and 1); higher orders are `exponential_adams` of eps in lambda. One evaluation a step,
    order min(order, 2), its start being a ramp; weak order 1 with noise.

    Arguments:
      order: 1 to 4; 1 with noise.
      tau: noise, the paper's lambda; 0 is deterministic.
      scaling: t -> array that broadcasts against one sample, positive; None for 1.

    Needs alpha > 0 at the noise end; the step to sigma = 0 is a' y0. The denoiser's predictions are
    in y: eps, or y0 and the others with a for alpha. Raises ValueError for other options.
    """
    check_order(order, HIGHEST_ORDER)
    if callable(tau):
        raise TypeError(f"tau must be a number, got {tau!r}")
    if scaling is not None and not callable(scaling):
        raise TypeError(f"scaling must be a function of t or None, got {scaling!r}")
    check_ends(grid, "gddim", noise=False, data=True)
    xp, taus = grid.xp, noise_levels(grid, tau)
    if order > 1 and not all(is_zero(tau) for tau in taus):
        raise ValueError(f"gddim of order {order} takes tau = 0, got {tau!r}")

    def signal(t: Any, alpha: Any) -> Any:
        return alpha if scaling is None else alpha * xp.asarray(scaling(t))

    def signals_at(t: Any, alpha: Any) -> Any:
        if scaling is None:
            return alpha
        return xp.stack([signal(time, size) for time, size in zip(t, alpha)])

    rows, signals, seen = [], [], []
    for i, tau in enumerate(taus):
        (t, alpha, sigma), (t1, alpha1, sigma1) = grid.node(i), grid.node(i + 1)
        a, a1, lam = signal(t, alpha), signal(t1, alpha1), grid.lam[i]
        signals.append(a)
        seen = [lam, *seen][:order]
        noise, last = None, grid.ends[1] and i == grid.steps - 1
        if order == 1 or last:
            along = sigma1
            if not is_zero(tau):
                h = xp.log(a1) - xp.log(a) + xp.log(sigma) - xp.log(sigma1)
                along = sigma1 * xp.exp(-(tau**2) * h)
                noise = sigma1 * xp.sqrt(-xp.expm1(-2.0 * tau**2 * h))
            found = [along - a1 * sigma / a]
        else:
            points, measure = gauss(xp, lam, grid.lam[i + 1], QUADRATURE)
            times, inner, sigmas = grid.at(points)
            inner = signals_at(times, inner)
            rhos = sigmas.reshape(-1, *[1] * (inner.ndim - 1)) / inner
            found = _weights(seen, grid.lam[i + 1], sigma / a, sigma1 / a1, points, measure, rhos)
            found = [a1 * w for w in found]
        rows.append(Row(grid.node(i), [Update([a1 / a], found, noise)]))
    tableau = assemble(rows, "eps", xp)
    if scaling is None:
        return tableau
    # Conversions to eps, and the levels that come with the rows, by component.
    shape = np.broadcast_shapes(*(np.shape(a) for a in signals))
    alpha = xp.stack([xp.broadcast_to(a, shape) for a in signals])
    sigma = tableau.sigma.reshape(-1, *[1] * len(shape))
    u, w = (
        xp.stack([affine(source, "eps", alpha, sigma)[j] for source in PREDICTIONS], 1)[:, None]
        for j in (0, 1)
    )
    return dataclasses.replace(tableau, u=u, w=w, alpha=alpha)


def _weights(
    seen: list[Any], stop: Any, rho: Any, rho1: Any, points: Any, measure: Any, rhos: Any
) -> list[Any]:
    """Weights of the predictions at half-log-SNR `seen`, newest first, in int P drho.

    In Newton's basis N_k(u) = prod_(j < k) (u - seen_j), 0 at the start for k > 0, by parts:
    int N_k drho = N_k(stop) rho' - int N_k' rho du.
    """
    moments = [rho1 - rho]
    value, slope, at_stop = 1.0 + 0.0 * points, 0.0 * points, 1.0
    for node in seen[:-1]:
        value, slope, at_stop = value * (points - node), value + slope * (points - node), (
            at_stop * (stop - node)
        )  # fmt: skip
        inner = (measure * slope).reshape(-1, *[1] * (rhos.ndim - 1)) * rhos
        moments.append(at_stop * rho1 - inner.sum(0))
    # The k-th divided difference is a combination of the newest k + 1 predictions.
    out = []
    for j, own in enumerate(seen):
        total, product = 0.0, 1.0
        for k, node in enumerate(seen):
            if k != j:
                product = product * (own - node)
            if k >= j:
                total = total + moments[k] / product
        out.append(total)
    return out
