"""DDIM and DDPM: first-order steps from one node to the next."""

from typing import Any

import numpy as np
from jaxtyping import ArrayLike

from jaxdiff.arrays import is_concrete, namespace
from jaxdiff.grids import Grid
from jaxdiff.solvers.tableau import Row, Tableau, Update, assemble, check_ends


def posterior_share(grid: Grid, i: int) -> Any:
    """1 - exp(-2 h), h the step's half-log-SNR length: the share of noise that step i may renew."""
    return -grid.xp.expm1(2.0 * (grid.lam[i] - grid.lam[i + 1]))


def x0_clock(grid: Grid, i: int) -> tuple[Any, Any]:
    """exp(2 lambda) at both ends of step i (0 where the step draws no noise, at sigma = 0)."""
    snr = grid.xp.exp(2.0 * grid.lam)
    last = grid.ends[1] and i == grid.steps - 1
    return (0.0, 0.0) if last else (snr[i], snr[i + 1])


def ddim(
    grid: Grid, eta: ArrayLike = 0.0, outputs: int = 1, noise_scale: str = "posterior"
) -> Tableau:
    """DDIM: x' = alpha' x0 + sqrt(sigma'^2 - s^2) eps + s z,  s = eta sigma' sqrt(1 - exp(-2 h)).

    Song, Meng & Ermon, "Denoising Diffusion Implicit Models" (2021), for any
    (alpha, sigma): 1 - exp(-2 h) is their (1 - abar / abar') / (1 - abar). eta = 0 is deterministic,
    the first-order exponential integrator; eta = 1 is DDPM with the small variance. One evaluation a
    step, order 1. Every grid end is supported; from alpha = 0 the network must predict v, x0 or flow
    (diffusers returns NaN with an eps network, and with eta = 1 wherever sigma'^2 - s^2, which is 0
    there, rounds below 0).

    Arguments:
      eta: noise, in [0, 1] (larger while s <= sigma'); an array may be traced.
      outputs: 2 takes x0 and eps separately, for a denoiser that predicts ("x0", "eps") such as
        `clip_x0(denoiser, keep_eps=True)`.
      noise_scale: "posterior" as above; "full" sets s = eta sigma': eta = 1 then renews all noise,
        x' = alpha' x0 + sigma' z, the multistep sampler of consistency models (Song et al. 2023,
        algorithm 1), which has no limit as steps are added.
    """
    if noise_scale not in ("posterior", "full"):
        raise ValueError(f"noise_scale must be 'posterior' or 'full', got {noise_scale!r}")
    if isinstance(outputs, bool) or outputs not in (1, 2):
        raise ValueError(f"outputs must be 1 or 2, got {outputs!r}")
    concrete = is_concrete(eta)
    if concrete:
        if isinstance(eta, bool) or not isinstance(eta, ArrayLike):
            raise TypeError(f"eta must be a number or an array, got {eta!r}")
        eta = np.asarray(eta, np.float64)
        if not np.all(eta >= 0):
            raise ValueError(f"eta must not be negative, got {eta}")
    noisy = not concrete or bool(np.any(eta > 0))
    if grid.backward and noisy:
        raise ValueError(f"a grid from data to noise takes eta = 0, got {eta}")
    check_ends(grid, "ddim", noise=True, data=True)
    clocked = noisy and noise_scale == "posterior"
    xp = namespace(grid.t, grid.alpha, grid.sigma, eta)
    rows = []
    for i in range(grid.steps):
        (_, a, s), (_, a1, s1) = grid.node(i), grid.node(i + 1)
        z, along = None, s1
        # No noise in a step to sigma = 0, where the derivative of the root would be 0 / 0.
        if noisy and not (grid.ends[1] and i == grid.steps - 1):
            share = posterior_share(grid, i) if noise_scale == "posterior" else 1.0
            z = eta * s1 * xp.sqrt(share)
            if is_concrete(z, s1) and np.any(z > s1):
                raise ValueError(f"eta = {eta} asks for more noise than sigma at node {i + 1}")
            # Factored: at eta = 1 with "full" the root is that of a constant 0, without a derivative.
            along = s1 * xp.sqrt(1.0 - eta**2 * share)
        if outputs == 1:
            update = Update([along / s], [a1 - along * a / s], z)
        else:
            update = Update([0.0], [(a1, along)], z)
        rows.append(Row(grid.node(i), [update], x0_clock(grid, i) if clocked else None))
    integrand = "x0" if outputs == 1 else ("x0", "eps")
    return assemble(rows, integrand, xp, brownian="x0" if clocked else None)


def ddpm(grid: Grid, variance: str = "fixed_small") -> Tableau:
    """DDPM ancestral sampling: the Gaussian posterior q(x' | x, x0) with x0 as predicted.

    With a = alpha / alpha':  mean = a (sigma' / sigma)^2 x + alpha' (1 - exp(-2 h)) x0, and variance

        fixed_small    sigma'^2 (1 - exp(-2 h))     the posterior's own (beta tilde)
        fixed_large    sigma^2  (1 - exp(-2 h))     the forward step's (beta)

    Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models" (2020).
    No noise in a step to sigma = 0 (diffusers adds the forward step's in such a step from t > 0 with
    "fixed_large"; its "fixed_large_log" is NaN). One evaluation a step, weak order 1; every grid end is
    supported.
    """
    if variance not in ("fixed_small", "fixed_large"):
        raise ValueError(f"variance must be 'fixed_small' or 'fixed_large', got {variance!r}")
    if grid.backward:
        raise ValueError("ddpm runs from noise to data only")
    xp, rows = grid.xp, []
    for i in range(grid.steps):
        (_, a, s), (_, a1, s1) = grid.node(i), grid.node(i + 1)
        share = posterior_share(grid, i)
        size = s1 if variance == "fixed_small" else s
        last = grid.ends[1] and i == grid.steps - 1
        z = None if last else size * xp.sqrt(share)
        update = Update([a / a1 * (s1 / s) ** 2], [a1 * share], z)
        rows.append(Row(grid.node(i), [update], x0_clock(grid, i)))
    return assemble(rows, "x0", xp, brownian="x0")
