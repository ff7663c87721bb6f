"""RePaint: inpainting with an unconditional model, by replacement and resampling.

Lugmayr, Danelljan, Romero, Yu, Timofte & Van Gool, "RePaint: Inpainting using Denoising Diffusion
Probabilistic Models" (2022). After every step the known pixels are those of a noised known image,

    x <- m (alpha x_known + sigma z) + (1 - m) x,

which alone leaves the rest out of harmony with them: so the sampler goes back up by `length` steps
and down again, `repeats` times (algorithm 1 is length = 1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from jaxdiff.arrays import is_concrete
from jaxdiff.grids import Grid
from jaxdiff.integrator import Carry, Control, RowInfo
from jaxdiff.noise import normal
from jaxdiff.solvers.first_order import ddpm
from jaxdiff.solvers.tableau import Tableau
from jaxdiff.solvers.travel import time_travel, visits


def repaint(
    grid: Grid, known: Float[ArrayLike, "*sample"], mask: ArrayLike, length: int = 10,
    repeats: int = 10, base: Callable[[Grid], Tableau] = ddpm,
) -> tuple[Tableau, Control]:  # fmt: skip
    """(tableau, control) of RePaint: `sample(denoiser, tableau, x_T, key, control=control)`.

    Arguments:
      grid: from noise to data; the paper's has 250 steps.
      known: the image, [batch, ...] or one sample's shape; only what the mask keeps is looked at.
      mask: 1 where it is known, 0 elsewhere, of a shape that broadcasts against the state.
      length, repeats: how far to go back, and how often each step is taken
        (`jaxdiff.solvers.time_travel`). The paper's settings, jump_length = jump_n_sample = 10,
        take 2,410 evaluations on 250 steps; repeats = 1 is plain replacement.
      base: a builder of the step, of one row and one register; the paper's is DDPM's.

    The known pixels of the result are the known image's where the grid ends at sigma = 0. This is
    the paper's algorithm; its code replaces before the network is called, which is the same but
    after the last step. Raises ValueError for a mask with other values than 0 and 1, shapes that do
    not broadcast, a known pixel that is not finite, another base, and as `time_travel` does.
    """
    if is_concrete(mask) and not np.all(np.isin(np.asarray(mask), (0, 1))):
        raise ValueError(f"a mask is 0 or 1 (1: known), got values {np.unique(np.asarray(mask))}")
    try:
        np.broadcast_shapes(np.shape(mask), np.shape(known))
    except ValueError:
        raise ValueError(
            f"a mask of shape {np.shape(mask)} does not fit an image of shape {np.shape(known)}"
        ) from None
    if is_concrete(mask, known) and not np.all(np.isfinite(np.where(mask, known, 0.0))):
        raise ValueError("what is known must be finite where the mask is 1")
    tableau, nodes = time_travel(grid, repeats, length, base), visits(grid.steps, repeats, length)
    if tableau.registers != 1 or tableau.rows != len(nodes):
        raise ValueError(
            f"repaint takes a base of one register and one row a step, got {tableau.registers} "
            f"registers and {tableau.rows} rows for {len(nodes)} steps"
        )
    _, alpha, sigma = grid.node(nodes[:, 2])
    return tableau, Replacement(known, mask, alpha, sigma)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Replacement(Control):
    """After every row the known pixels are noised ones; `alpha`, `sigma` [rows]: where it ends."""

    known: Array
    mask: Array
    alpha: Array
    sigma: Array

    def init(self, x: Array) -> None:
        """Raise ValueError unless the image and the mask broadcast against the state."""
        shapes = np.shape(self.known), np.shape(self.mask), np.shape(x)
        try:
            fits = np.broadcast_shapes(*shapes) == shapes[2]
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"repaint: an image of shape {shapes[0]} and a mask of shape {shapes[1]} do not fit "
                f"a state of shape {shapes[2]}"
            )

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
