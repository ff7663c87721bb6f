"""Restart sampling: go back to a higher noise level and come down again, several times."""

import dataclasses
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.grids import Grid
from jaxdiff.solvers.combine import concatenate
from jaxdiff.solvers.sigma import heun
from jaxdiff.solvers.tableau import Start, Tableau
from jaxdiff.solvers.travel import part


class Interval(NamedTuple):
    """One interval to restart in, in units of sigma / alpha.

    `low`, `high`: the paper's t_min and t_max. `repeats`: its K. `steps`: down from `high` to
    `low`, spaced as `jaxdiff.grids.karras`; None takes the grid's own nodes between the two.
    """

    low: float
    high: float
    repeats: int = 1
    steps: int | None = None


def restart(
    grid: Grid, intervals: Sequence[Interval | Sequence[Any]] = (Interval(0.05, 0.3, 2),),
    s_noise: float = 1.0, base: Callable[[Grid], Tableau] = heun,
) -> Tableau:  # fmt: skip
    """Restart: `base` down the grid and, at an interval's end, up by noise and down again K times.

    In y = x / alpha and rho = sigma / alpha, at the node nearest to `low`

        y <- y + s_noise sqrt(high^2 - rho^2) z,    then `base` from high to rho,

    `repeats` times, and on. Noise contracts the error made so far, and only the short interval is
    solved again. Xu, Deng, Cheng, Tian, Liu & Jaakkola, "Restart Sampling for Improving Generative
    Processes" (2023), algorithm 1, for any process; EDM's Heun in the paper. Evaluations: those of
    `base` on the grid and on every repeated interval. In distribution as accurate as `base`, order
    2 for Heun, where the steps of an interval shrink with the grid's (steps=None); with a fixed
    number of them the error of the interval stays. Ends as those of `base`.

    Arguments:
      intervals: `Interval`s, or sequences of their fields, in any order; they run from noise to
        data. Each starts at the node of sigma / alpha nearest to `low`, as in the official code
        (whose two intervals at one node overwrite each other, here both run), among those after
        the first, below `high` and with sigma > 0; a grid that has no such node runs without it.
        The official `num_steps` counts nodes: it is steps + 1.
      s_noise: factor on the noise, >= 0; with any but 1 the marginals are lost.
      base: a builder, called on each piece of the grid; `functools.partial(...)` gives it options
        (churn among them, whose s_churn is then divided by the steps of the piece).

    Raises ValueError for an interval that is none, a grid from data to noise, or nodes that are not
    known on the host; and where `high` is a level that the process does not have.
    """
    intervals = [_checked(interval) for interval in intervals]
    if isinstance(s_noise, bool) or not isinstance(s_noise, Real) or not 0 <= s_noise < np.inf:
        raise ValueError(f"s_noise must be a finite number and not negative, got {s_noise!r}")
    if grid.backward or grid.xp is not np:
        raise ValueError("restart needs a grid from noise to data with nodes known on the host")
    rho = np.exp(-grid.lam)
    chosen = []
    for interval in intervals:
        able = [i for i in range(1, len(grid)) if 0 < rho[i] < interval.high]
        if able:
            chosen.append((min(able, key=lambda i: abs(rho[i] - interval.low)), interval))
    pieces, done = [], 0
    for place, interval in sorted(chosen, key=lambda pair: pair[0]):
        if place > done:
            pieces.append(base(part(grid, done, place)))
        sub = _revisited(grid, place, interval)
        again = _entered(base(sub), sub, grid.node(place), interval.high, s_noise)
        pieces += [again] * interval.repeats
        done = place
    if done < grid.steps:
        pieces.append(base(part(grid, done, grid.steps)))
    return concatenate(pieces)


def _checked(interval: Any) -> Interval:
    try:
        interval = Interval(*interval)
    except TypeError as error:
        raise ValueError(
            f"an interval is (low, high, repeats, steps), the last two optional; got {interval!r}"
        ) from error
    low, high, repeats, steps = interval
    numbers = all(isinstance(value, Real) for value in (low, high))
    if not numbers or not 0 < low < high < np.inf:
        raise ValueError(f"an interval needs 0 < low < high, got low={low!r}, high={high!r}")
    for name, count in (("repeats", repeats), ("steps", 1 if steps is None else steps)):
        whole = isinstance(count, (int, np.integer)) and not isinstance(count, bool)
        if not whole or count < 1:
            raise ValueError(f"{name} of an interval must be an integer >= 1, got {count!r}")
    return interval


def _revisited(grid: Grid, place: int, interval: Interval) -> Grid:
    """The nodes from the interval's upper end down to node `place`."""
    lam, top = grid.lam, -np.log(interval.high)
    if interval.steps is None:
        inner = lam[:place][lam[:place] > top + 1e-9]
    else:
        ends = np.exp(-np.array([top, lam[place]]) / 7.0)
        inner = -7.0 * np.log(np.linspace(*ends, interval.steps + 1))[1:-1]
    levels = np.array([grid.at(value) for value in (top, *inner)])
    nodes = np.concatenate([levels, [grid.node(place)]]).T
    return dataclasses.replace(
        grid, t=nodes[0], alpha=nodes[1], sigma=nodes[2], ends=(False, False)
    )


def _entered(
    table: Tableau, sub: Grid, level: tuple[Any, Any, Any], high: float, s_noise: float
) -> Tableau:
    """`table`, built on `sub`, from `level` at sub's end: first up to sub's start, by noise."""
    _, alpha, sigma = level
    up = s_noise * sub.alpha[0] * np.sqrt(high**2 - (sigma / alpha) ** 2)
    start, draw = table.start, table.draw
    noise = np.abs(start.S) * up
    if start.C is not None:  # the base's own churn
        noise = np.hypot(noise, start.C)
    elif table.C is not None:  # draw 0 is the start's
        draw = draw + np.int32(1)
    scale = start.S * sub.alpha[0] / alpha
    return dataclasses.replace(table, start=Start(scale, noise, start.d), draw=draw)
