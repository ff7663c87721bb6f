"""What a sampler must be for weights along its path to mean something, read off its table.

In y = x / alpha and v = sigma^2 / alpha^2 the noised density obeys the heat equation, and every sampler
of the library's family of SDEs, deterministic ones among them, makes steps

    y' = y + D s(y, v) + sqrt(N) z,      D = ((v - v') + N) / 2 to the order of the step,

N = tau^2 (v - v'). That is all the weights of `jaxdiff.steering.corrector` need; the Ito estimator
of `jaxdiff.steering.superposition` needs tau = 1 too. On the density exp(<s, y>), whose score is the
same everywhere and at every level, any tableau can be run on the host, coefficient by coefficient: that
gives D and N of its steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.arrays import is_concrete
from jaxdiff.grids import Grid
from jaxdiff.integrator import Carry
from jaxdiff.predictions import PREDICTIONS
from jaxdiff.rows import at, scale
from jaxdiff.solvers.tableau import Tableau


def variances(grid: Grid, tableau: Tableau, what: str) -> tuple[np.ndarray, np.ndarray]:
    """v where each row evaluates and where the next one does (or the grid ends), each [rows].

    Raises TypeError or ValueError for a traced table, one that is not of this grid, a grid from alpha
    = 0 or from data to noise, or a sampler that goes back up in noise (restarts, churn).
    """
    if not isinstance(grid, Grid) or not isinstance(tableau, Tableau):
        raise TypeError(
            f"expected a grid and a tableau, got {type(grid).__name__} and {type(tableau).__name__}"
        )
    if not is_concrete(grid, tableau):
        raise ValueError(f"{what} reads the tableau on the host: build it outside jit and vmap")
    if grid.backward or grid.ends[0]:
        raise ValueError(
            f"{what} needs a grid from noise to data with alpha > 0 at the noise end: give it a t_max"
        )
    start = (np.asarray(grid.sigma) / np.asarray(grid.alpha)) ** 2
    here = (np.asarray(tableau.sigma) / np.asarray(tableau.alpha)) ** 2
    if np.ndim(tableau.nodes) != 2 or len(tableau.nodes) != len(grid):
        raise ValueError(f"the tableau is not of this grid of {len(grid)} nodes")
    if not np.isclose(here[0], start[0], rtol=1e-6) or not np.all(here >= start[-1] * (1 - 1e-6)):
        raise ValueError("the tableau does not evaluate the denoiser on this grid")
    after = np.append(here[1:], start[-1])
    after[int(np.sum(tableau.active)) - 1 :] = start[-1]
    if np.any(after > here * (1 + 1e-6)):
        row = int(np.argmax(after > here * (1 + 1e-6)))
        raise ValueError(
            f"{what} takes a sampler whose noise only falls; row {row} goes back up (a restart, or "
            "churn)"
        )
    return here, np.minimum(after, here)


def steps(grid: Grid, tableau: Tableau) -> tuple[np.ndarray, np.ndarray]:
    """(D, N) of each step of the grid, [steps], in y; see this module."""
    if np.ndim(tableau.A) != 3:
        raise ValueError("need a tableau of scalar coefficients")
    if tableau.start.C is not None or not isinstance(tableau.start.S, np.ndarray):
        raise ValueError("need a tableau that starts at x_T itself")
    eps, draws, count = PREDICTIONS.index("eps"), max(tableau.draws, 1), tableau.registers
    states = np.zeros((count, 2 + draws))  # what stands in a register of x_T, s, and each noise
    states[:, 0] = tableau.start.S
    score = np.zeros(2 + draws)
    history = np.zeros((tableau.history, tableau.outputs, 2 + draws))
    found = [states]
    for r in range(tableau.rows):
        score[1] = -tableau.sigma[r] / tableau.alpha[r]
        u, w = tableau.u[r, :, eps, None], tableau.w[r, :, eps, None]
        history = np.concatenate([(u * score + w * states[0])[None], history[:-1]])
        states = tableau.A[r] @ states + np.einsum("ikp,kpc->ic", tableau.B[r], history)
        if tableau.C is not None:
            states[:, 2 + tableau.draw[r]] += tableau.C[r]
        found.append(states)
    nodes = np.asarray(tableau.nodes)
    y = np.stack([found[r][i] for r, i in nodes]) / np.asarray(grid.alpha)[:, None]
    # What a step adds to the factor times the state it began with; the factor is 1 but for its order.
    added = y[1:] - (y[1:, :1] / y[:-1, :1]) * y[:-1]
    return added[:, 1], np.sum(added[:, 2:] ** 2, 1)


def check_family(grid: Grid, tableau: Tableau, what: str) -> None:
    """Raise ValueError unless every step is one of the family of SDEs, to the order of the step."""
    v = (np.asarray(grid.sigma) / np.asarray(grid.alpha)) ** 2
    drift, noise = steps(grid, tableau)
    wanted = 0.5 * (v[:-1] - v[1:] + noise)
    off = np.abs(drift / wanted - 1.0)
    allowed = 0.05 + 0.5 * np.log(v[:-1] / np.maximum(v[1:], 0.1 * v[:-1]))
    if np.any(off > allowed):
        i = int(np.argmax(off / allowed))
        raise ValueError(
            f"{what} takes samplers of dx = [f x - (1 + tau^2) / 2 g^2 score] dt + tau g dW, any tau; "
            f"step {i} moves {drift[i] / wanted[i]:.3g} times as far along the score as its noise "
            "asks for"
        )


def allowed_rows(tableau: Tableau, rows: Sequence[int] | None) -> np.ndarray:
    """Booleans [rows]; all if None. Raises ValueError for a row that the tableau lacks."""
    allowed = np.zeros(tableau.rows, bool)
    wanted = list(range(tableau.rows) if rows is None else rows)
    for r in wanted:
        if isinstance(r, bool) or not isinstance(r, (int, np.integer)) or not 0 <= r < len(allowed):
            raise ValueError(f"rows must be among 0..{tableau.rows - 1}, got {r!r}")
    allowed[wanted] = True
    return allowed


def regrown(carry: Carry, noise: Any, z: Any, index: jax.Array) -> Carry:
    """The carry of the chosen ancestors, each with the noise of its own place in the batch.

    As if resampled before the row's noise was drawn, so that copies part at once. `noise`: the row's
    C, [registers], or None; z: its draw.
    """
    chosen = carry.gather(index)
    if z is None or noise is None:
        return chosen
    fresh = jax.tree.map(lambda a: a - a[index], z)
    registers = tuple(
        jax.tree.map(jnp.add, s, scale(at(noise, i), fresh))
        for i, s in enumerate(chosen.registers)
    )
    return chosen._replace(registers=registers)
