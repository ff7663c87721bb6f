"""COW: Cyclic One-Way diffusion, a picture grown around a given piece of one.

Wang, Yang, Qi, Wu, Ma, Wu, Chen & Cai, "Diffusion in Diffusion: Cyclic One-Way Diffusion for
Text-Vision-Conditioned Generation" (2023). Replacement leaves the surroundings little time to take
the condition in. Here they go round: from a seed, the condition on a plain background inverted to a
middle level t_1, a number of times by fresh noise up to t_2 and by the sampler with eta = 1 down
again, and before every evaluation the condition's region is that of its own inversion. So
information flows out of the region and none into it. A last pass leads from t_1 to the data.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from jaxdiff.arrays import is_concrete
from jaxdiff.denoisers import Denoiser
from jaxdiff.editing.edit_friendly import as_data
from jaxdiff.grids import Grid
from jaxdiff.integrator import Control, RowInfo
from jaxdiff.sampling import sample
from jaxdiff.solvers.clocks import check_order
from jaxdiff.solvers.combine import concatenate
from jaxdiff.solvers.first_order import ddim
from jaxdiff.solvers.tableau import Start, Tableau
from jaxdiff.solvers.travel import part


def cyclic_sde(
    grid: Grid, cycles: int = 10, low: float = 0.5, high: float = 0.7, eta: float = 1.0,
    final_eta: float = 0.1,
) -> Tableau:  # fmt: skip
    """`cycles` times up from t_1 to t_2 by noise and down by DDIM; then down to the data.

    It starts from a state at t_1 and ends at the grid's last node. Evaluations: cycles times the
    steps from t_2 to t_1, and those from t_1 on.

    Arguments:
      grid: from noise to data, down from t_2 at least; steps above t_2 are left out.
      cycles: at least 0.
      low, high: t_1 and t_2; the nodes of nearest t. The paper's are 0.5 and 0.7 of the whole.
      eta, final_eta: DDIM's, in the cycles and in the last pass.

    Raises ValueError unless two different nodes of a grid from noise to data, both with alpha,
    sigma > 0, are t_2 and t_1.
    """
    top, bottom = _nodes(grid, low, high)
    check_order(cycles, None, "cycles", 0)
    (_, a1, s1), (_, a2, s2) = grid.node(bottom), grid.node(top)
    up = Start(np.array([a2 / a1]), np.array([np.sqrt(s2**2 - (s1 * a2 / a1) ** 2)]))
    down = ddim(part(grid, top, bottom), eta)
    # The start's noise is draw 0.
    cycle = dataclasses.replace(down, start=up, draw=down.draw + np.int32(eta > 0))
    return concatenate([cycle] * cycles + [ddim(part(grid, bottom, grid.steps), final_eta)])


def cyclic_one_way(
    denoiser: Denoiser, grid: Grid, condition: Float[ArrayLike, "batch ..."], mask: ArrayLike,
    key: Array, cond: Any = None, background: ArrayLike = 0.0, cycles: int = 10, low: float = 0.5,
    high: float = 0.7, last: float = 0.4, eta: float = 1.0, final_eta: float = 0.1,
) -> Float[Array, "batch ..."]:  # fmt: skip
    """A picture around what `condition` shows under `mask`; see the module.

    Arguments:
      denoiser: any, guided or not.
      grid: from noise at t_2 or above to data with sigma > 0 (DDIM inversion starts there); the
        published code's has 10 steps for its whole range.
      condition: the picture, [batch, ...], looked at under the mask alone.
      mask: 1 where the condition is, else 0, of a shape that broadcasts against it.
      key: one key, or one per sample.
      cond: of the denoiser, in the inversion as well.
      background: what the seed has around the condition, broadcasting against it: the paper's is
        grey.
      last: the region is overwritten once more in the last pass, at the node of this time; it must
        lie below `low`, and be no lower than the last step's start.
      cycles, low, high, eta, final_eta: of `cyclic_sde`.

    Evaluations: the inversion's up to t_2, and those of `cyclic_sde`. The region's states come from
    the inversion of the seed (the published code inverts the condition as an image of its own, of
    another size, which a network for one size of image cannot). Raises ValueError for a mask that
    is not 0 and 1, shapes that do not fit, and times that are none.
    """
    condition = as_data(condition)
    if is_concrete(mask) and not np.all(np.isin(np.asarray(mask), (0, 1))):
        raise ValueError(f"a mask is 0 or 1 (1: given), got values {np.unique(np.asarray(mask))}")
    if grid.ends[1]:
        raise ValueError("cyclic_one_way inverts from the data: give the grid a last sigma above 0")
    tableau = cyclic_sde(grid, cycles, low, high, eta, final_eta)
    top, bottom = _nodes(grid, low, high)
    again = _nearest(grid, last)
    if not bottom < again < grid.steps:
        raise ValueError(f"last = {last} is no node between low = {low} and the last step")
    mask = jnp.asarray(mask) > 0
    seed = jnp.where(mask, condition, jnp.asarray(background, condition.dtype))
    if seed.shape != condition.shape:
        raise ValueError(
            f"a mask of shape {mask.shape} and a background of shape {np.shape(background)} do not fit "
            f"a condition of shape {condition.shape}"
        )
    back = ddim(part(grid, top, grid.steps).reversed())
    states = sample(denoiser, back, seed, cond=cond, save="nodes")[::-1]
    nodes = np.tile(np.arange(top, bottom), cycles)
    nodes = np.concatenate([nodes, np.arange(bottom, grid.steps)])
    final = np.arange(len(nodes)) >= cycles * (bottom - top)
    chosen = ~final | (nodes == bottom) | (nodes == again)
    control = Overwritten(states, mask, nodes - top, chosen)
    return sample(denoiser, tableau, states[bottom - top], key=key, cond=cond, control=control)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Overwritten(Control):
    """Before the network is evaluated, what is under the mask becomes that of a stored state.

    Attributes: `states` [nodes, batch, ...]; `mask`, booleans; of every row `nodes`, whose state,
    and `chosen`, whether.
    """

    states: Array
    mask: Array
    nodes: Int[ArrayLike, " rows"]
    chosen: ArrayLike

    def before(self, aux: Any, row: RowInfo, x: Array, key: Any) -> tuple[Array, Any]:
        """(the state with the stored region, aux)."""
        node, chosen = (jnp.asarray(a)[row.index] for a in (self.nodes, self.chosen))
        return jnp.where(self.mask & chosen, self.states[node].astype(x.dtype), x), aux


def _nearest(grid: Grid, time: float) -> int:
    return int(np.argmin(np.abs(np.asarray(grid.t) - time)))


def _nodes(grid: Grid, low: float, high: float) -> tuple[int, int]:
    """The nodes of t_2 and t_1; raises where they are none."""
    if grid.backward or grid.xp is not np:
        raise ValueError("cyclic diffusion takes a grid of known levels from noise to data")
    top, bottom = _nearest(grid, high), _nearest(grid, low)
    inside = top >= int(grid.ends[0]) and bottom < grid.steps
    if not (low < high and top < bottom and inside):
        raise ValueError(
            f"low = {low} and high = {high} must be two times of the grid with alpha > 0, which has "
            f"t from {grid.t[0]:.4g} to {grid.t[-1]:.4g} in {grid.steps} steps"
        )
    return top, bottom
