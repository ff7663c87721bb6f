"""Round trips with samplers that have an exact inverse."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.arrays import is_concrete
from jaxdiff.denoisers import Denoiser
from jaxdiff.integrator import State
from jaxdiff.inversion.roots import check_memoryless
from jaxdiff.sampling import sample
from jaxdiff.solvers.inverse import entry, recovery
from jaxdiff.solvers.tableau import Tableau


def invert(
    denoiser: Denoiser, tableau: Tableau, state: State, key: jax.Array | None = None,
    noise: Any = None, cond: Any = None, adjoint: Any = None, started: bool = True,
) -> State:  # fmt: skip
    """The `State` before a sampler's first row, from the one after its last: exact to rounding.

        state = sample(denoiser, tableau, x_T, save="state")         state.registers[0] is x_0
        before = invert(denoiser, tableau, state)                    before.registers[0] is x_T
        again = sample(denoiser, tableau, None, state=before)        again is x_0

    Arguments:
      tableau: the forward sampler, not its inverse, of those that have one (`tableau.inverse()`).
      state: the whole state after the last row; methods with pairs need both of them. For a sample
        that did not come from the sampler, say what the registers hold: EDICT's both hold the sample,
        `State((x_0, x_0), ())`; of BDIA and BELM the second holds the state one node earlier, which
        their builders on `grid.reversed()` make by a step of DDIM, as they encode.
      key, noise, cond, adjoint: as the forward run had them; noise is used in the reverse order.
      started: whether the forward run began with x_T; False for one from a `State`, whose registers
        were not those of the tableau's start.

    If row 0 rests on the start (`jaxdiff.solvers.recovery`), the result's registers are S_i x_T.
    Raises ValueError if the tableau has no inverse (with started=False: none of row 0), for another
    number of registers than the state's, fewer draws made than the tableau makes, or a denoiser with
    memory; TypeError for anything but a `State` (`sample(save="state")`).
    """
    check_memoryless(denoiser, "invert")
    if not isinstance(state, State):
        raise TypeError(
            f"invert takes the whole State, of sample(save='state'), got {type(state).__name__}: one "
            "sample does not tell the other registers"
        )
    back = tableau.inverse()
    recovery(tableau, started)
    if len(state.registers) != tableau.registers:
        raise ValueError(
            f"the state has {len(state.registers)} registers, the tableau {tableau.registers}"
        )
    if noise is None and is_concrete(state.draws) and state.draws < tableau.draws:
        raise ValueError(
            f"the forward run made {tableau.draws} draws or more, the state says {state.draws}: set its "
            "draws, or pass noise="
        )
    matrix, shift = entry(tableau)
    registers = tuple(_combine(row, offset, state.registers) for row, offset in zip(matrix, shift))
    made = jnp.asarray(state.draws) - (0 if tableau.C is None else 1)
    entered = state._replace(registers=registers, history=(), draws=made)
    found = sample(
        denoiser, back, None, key, noise, cond, save="state", adjoint=adjoint, state=entered
    )
    if back.draws:
        found = found._replace(draws=found.draws - 1)
    return found


def _combine(row: np.ndarray, offset: float, registers: tuple[Any, ...]) -> Any:
    """sum_j row_j s_j + offset; a register that is picked alone stays bit for bit."""
    terms = [(c, s) for c, s in zip(row, registers) if c != 0]

    def leaf(*leaves):
        leaves = [a if c == 1 else jnp.asarray(c, a.dtype) * a for (c, _), a in zip(terms, leaves)]
        total = sum(leaves[1:], leaves[0])
        return total if offset == 0 else total + jnp.asarray(offset, total.dtype)

    return jax.tree.map(leaf, *(s for _, s in terms))
