"""RePaint: inpainting with an unconditional model, by replacement and resampling.

Lugmayr, Danelljan, Romero, Yu, Timofte & Van Gool, "RePaint: Inpainting using Denoising Diffusion
Probabilistic Models" (2022). After every step the known pixels are those of a noised known image,

    x <- m (alpha x_known + sigma z) + (1 - m) x,

which alone leaves the rest out of harmony with them: so the sampler goes back up by `length` steps
and down again, `repeats` times (algorithm 1 is length = 1).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from jaxdiff.arrays import is_concrete
from jaxdiff.grids import Grid
from jaxdiff.integrator import Carry, Control, RowInfo
from jaxdiff.inverse.travel import time_travel, visits
from jaxdiff.noise import normal
from jaxdiff.solvers.first_order import ddpm
from jaxdiff.solvers.tableau import Tableau


def repaint(
    grid: Grid, known: Float[ArrayLike, "*sample"], mask: ArrayLike, length: int = 10,
    repeats: int = 10, tableau: Tableau | None = None,
) -> tuple[Tableau, Control]:  # fmt: skip
    """(tableau, control) of RePaint: `sample(denoiser, tableau, x_T, key, control=control)`.

    Arguments:
      grid: from noise to data; the paper's has 250 steps.
      known: the image, [batch, ...] or one sample's shape; only what the mask keeps is looked at.
      mask: 1 where it is known, 0 elsewhere, of a shape that broadcasts against the state.
      length, repeats: how far to go back, and how often each step is taken (`visits`). The paper's
        settings, jump_length = jump_n_sample = 10, take some 4,500 evaluations on 250 steps;
        repeats = 1 is plain replacement.
      tableau: the step, of one row and one register; DDPM's by default.

    The known pixels of the result are the known image's where the grid ends at sigma = 0. This is
    the paper's algorithm; its code replaces before the network is called, which is the same but
    after the last step. Raises ValueError for a mask with other values than 0 and 1, shapes that do
    not broadcast, and as `time_travel` does.
    """
    if is_concrete(mask) and not np.all(np.isin(np.asarray(mask), (0, 1))):
        raise ValueError(f"a mask is 0 or 1 (1: known), got values {np.unique(np.asarray(mask))}")
    try:
        np.broadcast_shapes(np.shape(mask), np.shape(known))
    except ValueError:
        raise ValueError(
            f"a mask of shape {np.shape(mask)} does not fit an image of shape {np.shape(known)}"
        ) from None
    steps = time_travel(ddpm(grid) if tableau is None else tableau, grid, length, repeats)
    _, alpha, sigma = grid.node(visits(grid.steps, length, repeats)[:, 2])
    return steps, Replacement(known, mask, alpha, sigma)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Replacement(Control):
    """After every row the known pixels are noised known ones; `alpha`, `sigma` [rows]: where it
    ends."""

    known: Array
    mask: Array
    alpha: Array
    sigma: Array

    def after(
        self, aux: Any, row: RowInfo, x: Array, out: Any, z: Any, carry: Carry, key: Any
    ) -> tuple[Carry, Any]:
        """(carry with the known pixels, aux); the noise is this control's own."""
        if key is None:
            raise ValueError("RePaint noises what is known: sample needs key=")
        alpha, sigma = (jnp.asarray(c, x.dtype)[row.index] for c in (self.alpha, self.sigma))
        noised = alpha * jnp.asarray(self.known, x.dtype) + sigma * normal(key, x)
        state = jnp.where(jnp.asarray(self.mask) > 0, noised, carry.registers[0])
        return carry._replace(registers=(state,)), aux
