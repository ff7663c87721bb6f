"""DDRM: diffusion in the singular basis of the measurement.

Kawar, Elad, Ermon & Song, "Denoising Diffusion Restoration Models" (2022). In the coordinates V^T x
of the operator A = U diag(s) V^T the measurement is a noised number of its own for every coordinate
that it sees, y_i = (U^T y)_i / s_i with standard deviation noise_std / s_i. Where the state is
noisier than that it is drawn around y_i, where it is not the measurement tells which way its noise
points.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from jaxdiff.denoisers import Denoiser
from jaxdiff.grids import Grid
from jaxdiff.integrator import Carry, Control, RowInfo
from jaxdiff.inverse.measurement import Measurement
from jaxdiff.inverse.spectral import SpectralControl, check_spectral
from jaxdiff.solvers.clocks import check_number
from jaxdiff.solvers.first_order import ddim
from jaxdiff.solvers.tableau import Tableau
from jaxdiff.solvers.travel import ends, visits


def ddrm(
    denoiser: Denoiser, grid: Grid, measurement: Measurement, eta: ArrayLike = 0.85,
    eta_b: ArrayLike = 1.0,
) -> tuple[Tableau, Control]:  # fmt: skip
    """(tableau, control) of DDRM: `sample(denoiser, tableau, x_T, key, control=control)`.

    With rho = sigma' / alpha' where the step leads and std_i = noise_std / s_i, x_i' / alpha' is

        not seen:      x0_i + rho (sqrt(1 - eta^2) eps_i + eta z_i)
        rho <  std_i:  x0_i + rho (sqrt(1 - eta^2) (y_i - x0_i) / std_i + eta z_i)
        rho >= std_i:  (1 - eta_b) x0_i + eta_b y_i + sqrt(rho^2 - eta_b^2 std_i^2) z_i

    and the first state is drawn as the measurement has it, where sigma / alpha >= std_i: x_i =
    alpha y_i + sqrt(sigma^2 - alpha^2 std_i^2) z_i with z = V^T x_T / sigma, x_T being what
    `sample` gets.

    Arguments:
      denoiser: the one that is sampled: a single prediction, or ("x0", "eps").
      grid: from noise to data; the published sampler has 20 steps.
      eta, eta_b: in [0, 1], may be traced.

    Without noise and with eta_b = 1 the result is consistent, A x_0 = y, where the grid ends at
    sigma = 0 (the published code's last step takes the network's x_0 there). Takes the operator's
    spectrum. Raises TypeError or ValueError for arguments that are not these.
    """
    check_spectral(denoiser, grid, measurement, "ddrm")
    check_number("eta", eta, 0.0, 1.0)
    check_number("eta_b", eta_b, 0.0, 1.0)
    control = DDRM(
        measurement, measurement.operator.spectrum(), ends(grid, visits(grid.steps, 1, 1)),
        (jnp.asarray(eta), jnp.asarray(eta_b)), denoiser.prediction,
    )  # fmt: skip
    # Its rows are rewritten by the control; full renewal, so that each draws noise.
    return ddim(grid, 1.0, outputs=2, noise_scale="full"), control


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DDRM(SpectralControl):
    """The control of `ddrm`."""

    def before(self, aux: Any, row: RowInfo, x: Array, key: Any) -> tuple[Array, Any]:
        """The first state, drawn around the measurement."""

        def drawn(x):
            seen, noise = self.seen(x), self.spectrum.right(x)
            alpha, sigma = (jnp.asarray(c, x.dtype) for c in (row.alpha, row.sigma))
            # alpha std, which is 0 at alpha = 0 for what is seen
            std = alpha * jnp.where(jnp.isinf(seen.std), 0.0, seen.std)
            known = jnp.isfinite(seen.std) & (std <= sigma)
            left = jnp.sqrt(jnp.maximum(1.0 - (std / sigma) ** 2, 0.0))
            return self.spectrum.right_back(jnp.where(known, alpha * seen.y + left * noise, noise))

        return jax.lax.cond(row.index == 0, drawn, lambda x: x, x), aux

    def after(
        self, aux: Any, row: RowInfo, x: Array, out: Any, z: Any, carry: Carry, key: Any
    ) -> tuple[Carry, Any]:
        """The row's step, as `ddrm` has it."""
        x0, eps = self.pair(out, x, row.alpha, row.sigma)
        seen, z = self.seen(x), self.spectrum.right(z)
        alpha, sigma, _, _ = self.levels(row.index, x)
        eta, eta_b = (c.astype(x.dtype) for c in self.strengths)
        rho, along = sigma / alpha, jnp.sqrt(1.0 - eta**2)
        blind, below = jnp.isinf(seen.std), seen.std > rho
        std = jnp.where(below, jnp.where(blind, 1.0, seen.std), 1.0)
        direction = jnp.where(blind, eps, (seen.y - x0) / std)
        unsure = x0 + rho * (along * direction + eta * z)
        std = jnp.where(below, 0.0, seen.std)
        left = jnp.sqrt(jnp.maximum(rho**2 - (eta_b * std) ** 2, 0.0))
        sure = (1.0 - eta_b) * x0 + eta_b * seen.y + left * z
        state = self.spectrum.right_back(alpha * jnp.where(below, unsure, sure))
        return carry._replace(registers=(state,)), aux
