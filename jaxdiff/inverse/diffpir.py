"""DiffPIR: x_0 goes through the measurement's proximal map and is then partly noised anew.

Zhu, Zhang, Liang, Cao, Wen, Timofte & Van Gool, "Denoising Diffusion Models for Plug-and-Play Image
Restoration" (2023). Half-quadratic splitting with the diffusion model as its denoiser: at the level
(alpha, sigma), whose x_0 counts as known up to sigma / alpha,

    x_0' = argmin_u |y - A u|^2 + c |u - x_0|^2 = x_0 + A^T (A A^T + c)^{-1} (y - A x_0),
    c = strength (noise_std alpha / sigma)^2,      eps' = (x - alpha x_0') / sigma,
    x <- alpha' x_0' + sigma' (sqrt(1 - zeta) eps' + sqrt(zeta) z).

The first line is a function from denoisers to denoisers, `diffpir`; the last a tableau,
`partial_renewal`.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import ArrayLike

from jaxdiff.arrays import is_concrete
from jaxdiff.denoisers import Denoiser, check_single, wrap
from jaxdiff.grids import Grid
from jaxdiff.inverse.measurement import Measurement, check_measurement, same_shape
from jaxdiff.predictions import convert
from jaxdiff.solvers.clocks import check_number, check_order
from jaxdiff.solvers.first_order import posterior_share
from jaxdiff.solvers.tableau import Row, Tableau, Update, assemble, check_ends


def diffpir(
    denoiser: Denoiser, measurement: Measurement, strength: ArrayLike = 1.0,
    guidance: ArrayLike = 1.0, least_std: ArrayLike = 1e-3,
) -> Denoiser:  # fmt: skip
    """DiffPIR's denoiser: x_0 + guidance (prox(x_0) - x_0), prox as the module has it. Predicts x0.

    Arguments:
      denoiser: any single prediction.
      measurement: its operator's `solve` is called once; no spectrum, and no Jacobian of the
        network.
      strength: lambda on the prior's side, at least 0. The published code has images in [-1, 1] and
        noise_std in units of [0, 1], half of what it is here: its lambda is 4 strength. Its script
        runs lambda = 7 (strength 1.75) with zeta = 0.3, and makes no data step at its last level.
      guidance: in [0, 1]; 1 is the paper's.
      least_std: what a smaller noise_std counts as, positive (the published 0.001 of images in [0, 1]
        is 0.002 of those in [-1, 1]).

    For Gaussian data of covariance (sigma / alpha)^2 I around x_0 and strength 1, prox is the
    posterior mean. Any tableau takes it. Operators whose `solve` iterates need a grid that starts
    at alpha > 0 (c = 0 there). Raises TypeError or ValueError for arguments that are not these.
    """
    check_single(denoiser, "diffpir")
    check_measurement(measurement, "diffpir")
    check_number("strength", strength)
    check_number("guidance", guidance, 0.0, 1.0)
    check_number("least_std", least_std)
    if is_concrete(least_std, measurement.noise_std) and not (least_std or measurement.noise_std):
        raise ValueError("without noise least_std must be positive, got 0")
    strengths = (measurement, strength, guidance, least_std)
    return wrap(_DiffPIR(denoiser.prediction), denoiser, strengths, "x0")


@dataclasses.dataclass(frozen=True)
class _DiffPIR:
    prediction: str

    def __call__(self, evaluate, strengths, x, levels, cond):
        measurement, strength, guidance, least_std = strengths
        t, alpha, sigma = levels
        same_shape(measurement, x, "diffpir")
        out = evaluate(x, t, alpha, sigma, cond).astype(x.dtype)
        x0 = convert(out, x, self.prediction, "x0", alpha, sigma)
        std = jnp.maximum(measurement.noise_std, least_std)
        ridge = strength * (std * alpha / sigma) ** 2
        operator = measurement.operator
        step = operator.adjoint(operator.solve(measurement.residual(x0), ridge))
        return x0 + jnp.asarray(guidance, x.dtype) * step


def partial_renewal(
    grid: Grid, zeta: ArrayLike = 0.3, eta: ArrayLike = 0.0, repeats: int = 1
) -> Tableau:
    """DiffPIR's step, for any denoiser: noise of which a share of the variance is renewed.

        x' = alpha' x_0 + sqrt(1 - zeta) (sqrt(sigma'^2 - s^2) eps + s z_1) + sqrt(zeta) sigma' z_2,
        s = eta sigma' sqrt(1 - exp(-2 h)),

    the two draws as one. zeta = 0 is DDIM with its eta, zeta = 1 renews all noise (the published
    code takes 0.1 to 1 for its tasks and eta = 0; its s has the single step's beta in place of 1 -
    exp(-2 h), which differ where it skips). With `repeats` every step but the last is taken that
    often, by the forward process back up in between.

    Raises ValueError for a zeta or an eta outside [0, 1], and a grid from data to noise.
    """
    check_ends(grid, "partial_renewal", noise=True, data=True)
    check_number("zeta", zeta, 0.0, 1.0)
    check_number("eta", eta, 0.0, 1.0)
    check_order(repeats, None, "repeats")
    if grid.backward:
        raise ValueError("partial_renewal runs from noise to data")
    xp, rows, nodes = grid.xp if is_concrete(zeta, eta) else jnp, [], [(0, 0)]
    for i in range(grid.steps):
        (_, a, s), (_, a1, s1) = grid.node(i), grid.node(i + 1)
        if grid.ends[1] and i == grid.steps - 1:
            rows.append(Row(grid.node(i), [Update([0.0], [a1])]))
        else:
            renewed = zeta + (1.0 - zeta) * eta**2 * posterior_share(grid, i)
            along, noise = s1 * xp.sqrt(1.0 - renewed), s1 * xp.sqrt(renewed)
            down = Update([along / s], [a1 - along * a / s], noise)
            if repeats > 1 and i < grid.steps - 1:
                up = xp.hypot(noise * a / a1, xp.sqrt(s**2 - (s1 * a / a1) ** 2))
                again = Update([down.s[0] * a / a1], [down.m[0] * a / a1], up)
                rows += [Row(grid.node(i), [again])] * (repeats - 1)
            rows.append(Row(grid.node(i), [down]))
        nodes.append((len(rows), 0))
    return assemble(rows, "x0", xp, nodes=nodes)
