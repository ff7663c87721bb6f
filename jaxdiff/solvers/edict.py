"""EDICT: two coupled states that invert each other."""

from typing import Any

import numpy as np
from jaxtyping import ArrayLike

from jaxdiff.arrays import is_concrete, namespace
from jaxdiff.grids import Grid
from jaxdiff.solvers.clocks import carry, weights
from jaxdiff.solvers.tableau import Row, Tableau, Update, assemble, check_ends


def edict(grid: Grid, p: ArrayLike = 0.93, alternate: bool = True) -> Tableau:
    """EDICT: DDIM on two copies x, y of the state, each with the noise predicted at the other.

    Wallace, Gokul & Naik, "EDICT: Exact Diffusion Inversion via Coupled Transformations" (2023). With
    DDIM's step  a x + b eps,  both evaluations at the level t that the step leaves,

        x <- a x + b eps(y, t),       y <- a y + b eps(x, t)          with the new x,
        x <- p x + (1 - p) y,         y <- p y + (1 - p) x            with the new x,

    from x = y = x_T; the result is x. Each line has an exact inverse, which
    `edict(grid, p).inverse()` runs; entered with an image, both of its states are that image. The
    pair's difference shrinks by p^2 a step (for `eps` that does not vary), so the inverse multiplies
    rounding errors by 1 / p^2 a step, and with p = 1, which mixes nothing, the copies drift apart:
    the authors take 0.93 at 50 steps. Two evaluations a step, order 1. sigma = 0 at the end is
    supported, alpha = 0 is not.

    Arguments:
      p: in (0, 1], the weight of the mixing layers.
      alternate: in every other step y is updated first, as in the authors' code (`leapfrog_steps`);
        False updates x first in all.

    Raises TypeError or ValueError for a p that is no number in (0, 1], ValueError for a grid from data
    to noise: encode by `edict(grid).inverse()` there.
    """
    if is_concrete(p):
        if isinstance(p, bool) or not isinstance(p, ArrayLike) or np.ndim(p):
            raise TypeError(f"p must be a number, got {p!r}")
        if not 0 < p <= 1:
            raise ValueError(f"p must be in (0, 1], got {p!r}")
    if grid.backward:
        raise ValueError(
            "edict runs from noise to data; from data to noise run its exact inverse, "
            "edict(grid).inverse(), on the grid from noise to data"
        )
    check_ends(grid, "edict", noise=False, data=True)
    xp = namespace(grid.t, grid.alpha, grid.sigma, p)
    rows, nodes = [], [(0, 0)]
    for i in range(grid.steps):
        level, end = grid.node(i), grid.node(i + 1)
        a = carry(xp, "eps", level, end)
        b = weights(grid, level, end, [level], "eps")[0]
        x_first = not (alternate and i % 2)
        # Registers: (the state to evaluate, the state to update), then (the new one, the other).
        rows.append(Row(level, [Update([0.0, a], [b]), Update([1.0])]))
        early, late = (1.0, 0.0, 0.0), (0.0, a, b)
        x, y = (early, late) if x_first else (late, early)
        x = _mix(p, x, y)
        y = _mix(p, y, x)
        # The next step evaluates at y if it updates x first; the result is x.
        y_next = i + 1 < grid.steps and not (alternate and (i + 1) % 2)
        pair = (y, x) if y_next else (x, y)
        rows.append(Row(level, [Update(state[:2], state[2:]) for state in pair]))
        nodes.append((2 * i + 2, int(y_next)))
    return assemble(rows, "eps", xp, nodes=nodes)


def _mix(p: Any, state: Any, other: Any) -> tuple[Any, ...]:
    return tuple(p * u + (1.0 - p) * v for u, v in zip(state, other))
