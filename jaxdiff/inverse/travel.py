"""Time travel: going back to noisier levels and down again, for tableaux of one row a step.

A sampler that forces a state towards a measurement leaves what it did not touch out of step with
it.
Going back up by the forward process and down once more lets the network mend that: RePaint's
resampling (Lugmayr et al. 2022, `get_schedule_jump` of its code), DDNM's time travel (Wang et al.
2023).
As the forward process is linear, going up belongs to the row before it: no evaluation, and one draw
of noise for both.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxdiff.arrays import is_concrete, namespace
from jaxdiff.grids import Grid
from jaxdiff.inverse.strengths import check_count
from jaxdiff.solvers.tableau import Tableau


def visits(steps: int, length: int = 10, repeats: int = 10) -> Int[np.ndarray, "rows 3"]:
    """The nodes of every row: (evaluated at, stepped to, left at), for a grid of `steps` steps.

    Counted from the data, every `length`-th node but those in the first `length` steps is a place
    to go back from: the first repeats - 1 times that a step leads there, the row goes on up by
    `length` nodes. repeats = 1 is the plain grid. Rows: about steps repeats. RePaint's jump_length
    and jump_n_sample, DDNM's travel_length and travel_repeat.

    Raises ValueError unless 1 <= length < steps (for repeats > 1) and repeats >= 1.
    """
    steps, length = check_count("steps", steps), check_count("length", length)
    if check_count("repeats", repeats) > 1 and length >= steps:
        raise ValueError(f"length must be less than the {steps} steps of the grid, got {length}")
    # Levels counted from the data: 0 is the last that is evaluated, -1 the data.
    left = dict.fromkeys(range(0, steps - length, length), repeats - 1)
    rows, level = [], steps - 1
    while level >= 0:
        to = end = level - 1
        if left.get(to, 0) > 0:
            left[to] -= 1
            end = to + length
        rows.append((level, to, end))
        level = end
    return steps - 1 - np.asarray(rows)


class Ends(NamedTuple):
    """Where every row of a journey leads: the level it steps to, and the way up from there.

    x_step stands at (alpha, sigma); then x = factor x_step + climb z. All [rows]; factor = 1 and
    climb = 0 without a way up.
    """

    alpha: Any
    sigma: Any
    factor: Any
    climb: Any


def ends(grid: Grid, nodes: Int[np.ndarray, "rows 3"]) -> Ends:
    """The levels of `visits` on a grid."""
    xp = grid.xp
    _, a, s = grid.node(nodes[:, 1])
    _, a1, s1 = grid.node(nodes[:, 2])
    up = nodes[:, 2] < nodes[:, 1]
    factor = xp.where(up, a1 / a, 1.0)
    square = xp.where(up, s1**2 - (factor * s) ** 2, 1.0)
    return Ends(a, s, factor, xp.where(up, xp.sqrt(square), 0.0))


def time_travel(tableau: Tableau, grid: Grid, length: int = 10, repeats: int = 10) -> Tableau:
    """`tableau`, with every step taken `repeats` times or so: see `visits`.

    From the state x that a step leaves at (a, s) up to (a', s') by the forward process,

        x' = (a' / a) x + sqrt(s'^2 - (a' s / a)^2) z.

    Arguments:
      tableau: of one row a step, one register and no history, built on `grid`: `ddim`, `ddpm`, and
        `ddim(grid, eta, outputs=2, noise_scale="full")` for DDNM.

    Raises ValueError for another tableau, a grid from data to noise, and as `visits` does.
    """
    single = tableau.registers == tableau.history == 1 and tableau.rows == grid.steps
    plain = tableau.start.C is None and tableau.start.d is None and tableau.d is None
    if not (single and plain and np.ndim(tableau.A) == 3):
        raise ValueError(
            "time_travel takes a tableau of one row a step, one register and no history, whose "
            "coefficients are numbers, built on the same grid"
        )
    if grid.backward:
        raise ValueError("time_travel takes a grid from noise to data")
    nodes = visits(grid.steps, length, repeats)
    way, xp = ends(grid, nodes), namespace(tableau, grid)
    first = nodes[:, 0]
    picked = {
        f: getattr(tableau, f)[first] for f in ("u", "w", "t", "alpha", "sigma", "active")
    }  # fmt: skip
    up = nodes[:, 2] < nodes[:, 1]
    noise, drawn = None, up
    if tableau.C is not None or up.any():
        own = xp.zeros(len(nodes)) if tableau.C is None else tableau.C[first, 0]
        noise = xp.hypot(way.factor * own, way.climb)[:, None]
        drawn = up | (np.asarray(own) != 0) if is_concrete(own) else np.ones_like(up)
    # The node of every state; the solution at a node is the last state there.
    arrived = np.append(0, nodes[:, 2])
    last = [(int(np.flatnonzero(arrived == k)[-1]), 0) for k in range(len(grid))]
    return dataclasses.replace(
        tableau, A=way.factor[:, None, None] * tableau.A[first],
        B=way.factor[:, None, None, None] * tableau.B[first], C=noise, **picked,
        draw=np.maximum(np.cumsum(drawn) - 1, 0).astype(np.int32), clock=None, brownian=None,
        nodes=np.asarray(last, np.int32),
    )  # fmt: skip
