"""DDNM and DDNM+: the denoised x_0 gets its range space from the measurement.

Wang, Yu & Zhang, "Zero-Shot Image Restoration Using Denoising Diffusion Null-Space Model" (2023).
Without noise any x_0 is made consistent by

    x_0' = A^+ y + (I - A^+ A) x_0,

the network decides on the null space alone: `ddnm`, a function from denoisers to denoisers. With
noise that would copy it into x_0: `ddnm_plus` moves each singular direction only as far as the
noise of the measurement fits into the noise that the state is to have anyway.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from jaxdiff.denoisers import Denoiser, check_single, wrap
from jaxdiff.grids import Grid
from jaxdiff.integrator import Carry, Control, RowInfo
from jaxdiff.inverse.measurement import Measurement, check_measurement, same_shape
from jaxdiff.inverse.spectral import SpectralControl, check_spectral
from jaxdiff.predictions import convert
from jaxdiff.solvers.clocks import check_number
from jaxdiff.solvers.first_order import ddim
from jaxdiff.solvers.tableau import Tableau
from jaxdiff.solvers.travel import ends, time_travel, visits


def ddnm(denoiser: Denoiser, measurement: Measurement, keep_eps: bool = True) -> Denoiser:
    """DDNM: x_0 made consistent, x_0' = x_0 + A^+ (y - A x_0). For measurements without noise.

    Arguments:
      denoiser: any single prediction.
      measurement: its noise_std is not looked at; noise of y ends in x_0.
      keep_eps: predict ("x0", "eps"), eps that of the state as it is, for
        `ddim(grid, eta, outputs=2, noise_scale="full")`, which with eta = 0.85 is the published
        sampler; False predicts x_0' alone, for any tableau.

    Where the operator's `pinv` is exact and the grid ends at sigma = 0, A x_0 = y in the result
    (and y must be in A's range). On a tableau of `jaxdiff.solvers.time_travel` it is algorithm 2
    (the published code goes back up from its last x_0 rather than from the state). One evaluation
    a call. Raises TypeError for anything but a Measurement.
    """
    check_single(denoiser, "ddnm")
    check_measurement(measurement, "ddnm")
    prediction = ("x0", "eps") if keep_eps else "x0"
    return wrap(_DDNM(denoiser.prediction, keep_eps), denoiser, measurement, prediction)


@dataclasses.dataclass(frozen=True)
class _DDNM:
    prediction: str
    keep_eps: bool

    def __call__(self, evaluate, measurement, x, levels, cond):
        t, alpha, sigma = levels
        same_shape(measurement, x, "ddnm")
        out = evaluate(x, t, alpha, sigma, cond).astype(x.dtype)
        x0 = convert(out, x, self.prediction, "x0", alpha, sigma)
        x0 = x0 + measurement.operator.pinv(measurement.residual(x0))
        if not self.keep_eps:
            return x0
        return x0, convert(out, x, self.prediction, "eps", alpha, sigma)


def ddnm_plus(
    denoiser: Denoiser, grid: Grid, measurement: Measurement, eta: ArrayLike = 0.85,
    length: int = 1, repeats: int = 1,
) -> tuple[Tableau, Control]:  # fmt: skip
    """(tableau, control) of DDNM+: `sample(denoiser, tableau, x_T, key, control=control)`.

    In the coordinates of V (A = U diag(s) V^T), with y_i = (U^T y)_i / s_i and a step to (a', s'):

        x_i' = a' ((1 - l) x0_i + l y_i) + n_i,
        s' >= a' noise_std / s_i:  l = 1,   n = sqrt(s'^2 - (a' noise_std / s_i)^2) z
        otherwise:                 l = sqrt(1 - eta^2) s' s_i / (a' noise_std),   n = eta s' z
        not seen:                  l = 0,   n = s' (sqrt(1 - eta^2) eps + eta z)

    so that a seen coordinate of the state has the noise of its level, the measurement's included,
    as far as that goes. noise_std = 0 is `ddnm`'s sampler.

    Arguments:
      denoiser: the one that is sampled, unwrapped (a single prediction, or ("x0", "eps") of a
        clipped one).
      grid: from noise to data; the published sampler has 100 steps.
      eta: in [0, 1], may be traced.
      length, repeats: `jaxdiff.solvers.time_travel`'s, once around by default.

    Takes the operator's spectrum. Raises TypeError or ValueError for arguments that are not these.
    """
    check_spectral(denoiser, grid, measurement, "ddnm_plus")
    check_number("eta", eta, 0.0, 1.0)
    # Its rows are rewritten by the control; full renewal, so that each draws noise.
    base = functools.partial(ddim, eta=1.0, outputs=2, noise_scale="full")
    way = ends(grid, visits(grid.steps, repeats, length))
    control = DDNMPlus(
        measurement, measurement.operator.spectrum(), way, jnp.asarray(eta), denoiser.prediction
    )
    return time_travel(grid, repeats, length, base), control


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DDNMPlus(SpectralControl):
    """The control of `ddnm_plus`."""

    def after(
        self, aux: Any, row: RowInfo, x: Array, out: Any, z: Any, carry: Carry, key: Any
    ) -> tuple[Carry, Any]:
        """The row's step as `ddnm_plus` has it, and the way up after it."""
        x0, eps = self.pair(out, x, row.alpha, row.sigma)
        seen, z = self.seen(x), self.spectrum.right(z)
        alpha, sigma, factor, climb = self.levels(row.index, x)
        eta = self.strengths.astype(x.dtype)
        along = jnp.sqrt(1.0 - eta**2)
        std = alpha * seen.std
        blind, below = jnp.isinf(std), std > sigma
        exact = self.measurement.noise_std == 0
        share = along * sigma / jnp.where(below, std, 1.0)
        share = jnp.where(blind, 0.0, jnp.where(below, share, 1.0))
        left = jnp.sqrt(jnp.maximum(sigma**2 - jnp.where(below, 0.0, std) ** 2, 0.0))
        plain = blind | exact
        drawn = jnp.where(plain | below, eta * sigma, left)
        kept = jnp.where(plain, along * sigma, 0.0)
        moved = alpha * ((1.0 - share) * x0 + share * seen.y) + kept * eps
        # The step's noise and that of the way up are one normal.
        noise = jnp.hypot(factor * drawn, climb)
        state = self.spectrum.right_back(factor * moved + noise * z)
        return carry._replace(registers=(state,)), aux
