"""Time travel: back up by the forward process and down again, block by block of a grid.

What pushes a state towards something, a measurement or an energy, leaves the rest of it out of
step. Going back to noisier levels and down once more lets the network mend that: the resampling of
Lugmayr et al., "RePaint" (2022), the time travel of Wang et al., "DDNM" (2023) and of Yu et al.,
"FreeDoM" (2023), and the self-recurrence of Bansal et al., "Universal Guidance for Diffusion
Models" (2023). Without a push it leaves the distribution as it is. (`restart` goes back over one
interval of noise levels.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxdiff.grids import Grid
from jaxdiff.solvers.clocks import check_order
from jaxdiff.solvers.combine import concatenate
from jaxdiff.solvers.first_order import ddpm
from jaxdiff.solvers.tableau import Start, Tableau


def time_travel(
    grid: Grid, repeats: int | Sequence[int], length: int = 1,
    base: Callable[[Grid], Tableau] = ddpm,
) -> Tableau:  # fmt: skip
    """`base`, with blocks of `length` steps taken several times, in between up again by noise:

        x' = (alpha' / alpha) x + sqrt(sigma'^2 - (alpha' sigma / alpha)^2) z

    from a block's end (alpha, sigma) to its start (alpha', sigma'), the forward process. The last
    step is a block of its own; the others count from there towards the noise, and what is left
    there is a first, shorter block. With length = 1 every step is a block.

    Arguments:
      grid: from noise to data.
      repeats: how often each block is taken, at least 1: a number for all of `length` steps but the
        last step, which is RePaint's and DDNM's schedule (their jump_length and jump_n_sample,
        travel_length and travel_repeat); or one number a block, as FreeDoM, which repeats the
        middle ones alone, and universal guidance, which repeats the last step too.
      length: of a block in steps, at least 1, and less than the grid's where `repeats` is a number
        above 1.
      base: a builder, called on pieces of the grid; a multistep one starts anew at every visit of a
        block that is taken several times, and after it.

    Evaluations: the sum of the blocks' times their repeats; the way up has none, and its noise and
    that of the row before are drawn as one. Node solutions are those of the last visit.

    Raises ValueError for counts that do not fit, or a grid from data to noise.
    """
    if grid.backward:
        raise ValueError("time_travel takes a grid from noise to data")
    runs = []
    for first, last, count in _blocks(grid.steps, repeats, length):
        if runs and count == runs[-1][2] == 1:
            runs[-1] = (runs[-1][0], last, 1)
        else:
            runs.append((first, last, count))
    pieces, arrived = [], [0]
    for first, last, count in runs:
        block = part(grid, first, last)
        piece = base(block)
        pieces.append(concatenate([piece, *[_again(piece, block)] * (count - 1)]))
        # The state that a way up leads to stands at the block's first node.
        down = [*range(first + 1, last + 1)]
        arrived += ([*down[:-1], first] * (count - 1)) + down
    table = concatenate(pieces)
    place = {node: i for i, node in enumerate(arrived)}
    return dataclasses.replace(table, nodes=table.nodes[[place[k] for k in range(len(grid))]])


def visits(steps: int, repeats: int | Sequence[int], length: int = 1) -> Int[np.ndarray, "rows 3"]:
    """The nodes of every row of `time_travel`, for a base of one row a step, and `steps` steps.

    (evaluated at, stepped to, left at): the last two differ where the row goes on up. Raises as
    `time_travel` does.
    """
    rows = []
    for first, last, count in _blocks(steps, repeats, length):
        down = [(i, i + 1, i + 1) for i in range(first, last)]
        rows += [*down[:-1], (last - 1, last, first)] * (count - 1) + down
    return np.asarray(rows)


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
    """The levels of `visits` on a grid, for controls that rewrite the rows."""
    _, a, s = grid.node(nodes[:, 1])
    up = nodes[:, 2] < nodes[:, 1]
    return Ends(a, s, *_way_up(grid.xp, (a, s), grid.node(nodes[:, 2])[1:], up))


def part(grid: Grid, first: int, last: int) -> Grid:
    """The steps from node `first` to node `last`, as a grid."""
    keep = slice(first, last + 1)
    reached = (grid.ends[0] and first == 0, grid.ends[1] and last == grid.steps)
    nodes = {name: getattr(grid, name)[keep] for name in ("t", "alpha", "sigma")}
    return dataclasses.replace(grid, **nodes, ends=reached)


def _blocks(steps: int, repeats: int | Sequence[int], length: int) -> list[tuple[int, int, int]]:
    """(first node, last node, how often) of every block."""
    check_order(steps, None, "steps")
    check_order(length, None, "length")
    edges = [*dict.fromkeys((0, *range((steps - 1) % length, steps, length), steps))]
    blocks = [*zip(edges, edges[1:])]
    if np.ndim(repeats) == 0:
        check_order(repeats, None, "repeats")
        if repeats > 1 and length >= steps:
            raise ValueError(
                f"length must be less than the {steps} steps of the grid, got {length}"
            )
        whole = [last - first == length and last < steps for first, last in blocks]
        repeats = [int(repeats) if w else 1 for w in whole]
    if len(repeats) != len(blocks):
        raise ValueError(
            f"repeats must be a number or {len(blocks)}, one a block; got {len(repeats)}"
        )
    for i, count in enumerate(repeats):
        check_order(count, None, f"repeats[{i}]")
    return [(*block, int(count)) for block, count in zip(blocks, repeats)]


def _way_up(
    xp: Any, low: tuple[Any, Any], high: tuple[Any, Any], up: Any = True
) -> tuple[Any, Any]:
    """Factor and noise of the forward process from (alpha, sigma) to a noisier pair, where `up`."""
    (a, s), (a1, s1) = low, high
    factor = xp.where(up, a1 / a, 1.0)
    square = xp.where(up, s1**2 - (factor * s) ** 2, 1.0)
    return factor, xp.where(up, xp.sqrt(square), 0.0)


def _again(piece: Tableau, block: Grid) -> Tableau:
    """A block's tableau, entered from its own end: first up by noise to its start."""
    xp, start = block.xp, piece.start
    factor, climb = _way_up(xp, block.node(block.steps)[1:], block.node(0)[1:])
    noise, draw = xp.abs(start.S) * climb, piece.draw
    if start.C is not None:
        noise = xp.hypot(noise, start.C)
    elif piece.C is not None:
        draw = draw + np.int32(1)  # the start's noise is number 0
    return dataclasses.replace(piece, start=Start(start.S * factor, noise, start.d), draw=draw)
