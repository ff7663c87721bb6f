"""DPS and MCG: the gradient of the measurement's error through the network.

Chung, Kim, McCann, Klasky & Ye, "Diffusion Posterior Sampling for General Noisy Inverse Problems"
(2023); Chung, Sim, Ryu & Ye, "Improving Diffusion Models for Inverse Problems using Manifold
Constraints" (2022). Both take p(y | x_t) for p(y | x_0 = x_0hat), as if x_0 were known once x_t is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from jaxdiff.arrays import is_concrete
from jaxdiff.denoisers import Denoiser
from jaxdiff.grids import Grid
from jaxdiff.integrator import Carry, Control, RowInfo
from jaxdiff.inverse.measurement import Measurement, same_shape
from jaxdiff.inverse.tweedie import add, corrected, guide, norms
from jaxdiff.noise import normal
from jaxdiff.solvers.clocks import check_number
from jaxdiff.solvers.first_order import ddpm
from jaxdiff.solvers.tableau import Tableau
from jaxdiff.solvers.travel import Ends, ends, visits


def dps(denoiser: Denoiser, measurement: Measurement, scale: ArrayLike = 1.0) -> Denoiser:
    """DPS's likelihood as a score: log p(y | x_t) = log N(y; A x_0hat, noise_std^2 I). Predicts x0.

        x_0 = x_0hat - scale (sigma^2 / alpha) grad_x |y - A x_0hat|^2 / (2 noise_std^2)

    Equations 15 and 16 of the paper, for any tableau; scale = 1 is the approximation itself. It takes
    the uncertainty of x_0 given x_t for 0, so at large sigma it is far too strong, and stiff where
    noise_std is small: `dps_step` is what the paper samples with. One evaluation and one pullback a
    call. Raises ValueError for a measurement without noise, or a negative scale.
    """
    check_number("scale", scale)
    built = guide(denoiser, measurement, _score, scale, "dps")
    if is_concrete(measurement.noise_std) and measurement.noise_std == 0:
        raise ValueError("dps divides by the measurement's noise_std, which is 0: use dps_step")
    return built


def _score(measurement, scale, residual, at):
    return scale * residual / measurement.noise_std**2


def dps_step(denoiser: Denoiser, measurement: Measurement, zeta: ArrayLike = 1.0) -> Denoiser:
    """The step that DPS publishes, x' = ddpm(x, x_0hat) - zeta grad_x |y - A x_0hat|.

    Predicts (x_0hat, the correction): sample it with `corrected(ddpm(grid))`, or any other tableau of
    one register (algorithm 1: the norm is not squared, so the correction has the length of the
    pulled-back direction whatever the error is). zeta is per step: the published 0.3 to 1 belong to
    1,000 steps of images in [-1, 1]. Norms are each sample's own (the published code's is that of its
    batch of one). One evaluation and one pullback a call.
    """
    check_number("zeta", zeta)
    return add(denoiser, measurement, _norm, zeta, "dps_step")


def _norm(measurement, zeta, residual, at):
    return zeta * residual / norms(residual)


def mcg(
    denoiser: Denoiser, grid: Grid, measurement: Measurement, zeta: ArrayLike = 1.0,
    tableau: Tableau | None = None,
) -> tuple[Denoiser, Tableau, Control]:  # fmt: skip
    """(denoiser, tableau, control) of MCG: DPS's step, then projection onto the noised measurement.

        x'' = ddpm(x, x_0hat) - zeta grad_x |y - A x_0hat|,
        x'  = x'' - A^+ (A x'' - (alpha' y + sigma' A z))

    with alpha', sigma' of the node that the step leads to. Within the measured range the state is a
    noised y whatever the noise of y itself: like the paper, for measurements without noise.
    `sample(denoiser, tableau, x_T, key, control=control)`.

    Arguments:
      grid: from noise to data.
      zeta: the paper's alpha; the norm's gradient as in its code for inpainting (which noises y to the
        row's own level, a step too much).
      tableau: the step, built on `grid`, of one row a step and one register; DDPM's by default.

    One evaluation and one pullback a row. A x_0 = y in the result where the grid ends at sigma = 0 and
    y is in A's range.
    """
    stepped = dps_step(denoiser, measurement, zeta)
    if not isinstance(grid, Grid) or grid.backward:
        raise ValueError(f"mcg takes a grid of jaxdiff.grids from noise to data, got {grid!r}")
    base = ddpm(grid) if tableau is None else tableau
    if base.rows != grid.steps:
        raise ValueError(f"the tableau has {base.rows} rows for the {grid.steps} steps of the grid")
    way = ends(grid, visits(grid.steps, 1, 1))
    return stepped, corrected(base), NoisyProjection(measurement, way)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class NoisyProjection(Control):
    """After every row, x - A^+ (A x - (alpha' y + sigma' A z)); the control of `mcg`."""

    measurement: Measurement
    ends: Ends

    def init(self, x: Array) -> None:
        """Raise ValueError for a state of another shape than the operator takes."""
        same_shape(self.measurement, x, "mcg")

    def after(
        self, aux: Any, row: RowInfo, x: Array, out: Any, z: Any, carry: Carry, key: Any
    ) -> tuple[Carry, Any]:
        """The state that a row leaves, projected."""
        (state,) = carry.registers
        alpha, sigma = (
            jnp.asarray(c, x.dtype)[row.index] for c in (self.ends.alpha, self.ends.sigma)
        )
        known = alpha * self.measurement.batched(len(x)).astype(x.dtype)
        operator = self.measurement.operator
        apart = known - operator(state - sigma * normal(key, state))
        return carry._replace(registers=(state + operator.pinv(apart),)), aux
