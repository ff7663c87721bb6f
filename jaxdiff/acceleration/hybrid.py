"""Diversity distillation: the base model makes the first steps, its distilled few-step model the rest.

Gandikota & Bau, "Distilling Diversity and Control in Diffusion Models" (2025): a distilled model
settles what an image shows in its first step, and settles it much the same for every seed. The base
model's first steps keep the variety, and the distilled model's others are as few as ever. The code is
rohitgandikota/distillation. (What the paper calls DT-visualisation, the x0 that a model predicts at
each step, is `jaxdiff.sample(..., save="x0")`.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxdiff.arrays import is_concrete
from jaxdiff.grids import Grid
from jaxdiff.grids.grid import make
from jaxdiff.solvers.combine import concatenate
from jaxdiff.solvers.first_order import ddim
from jaxdiff.solvers.tableau import Tableau

MATCHES = ("nearest", "exact")


class Hybrid(NamedTuple):
    """A sampler in two parts, for `stitch([base, distilled], switch)`.

    `tableau`: both parts in turn; `switch`: the time from which on the base model is evaluated, between
    its last and the distilled model's first (infinite if there is but one part); `base_steps`: of the
    base grid.
    """

    tableau: Tableau
    switch: float
    base_steps: int


def hybrid(
    base_grid: Grid, distilled_grid: Grid, start: int = 1, match: str = "nearest",
    base: Callable[[Grid], Tableau] = ddim, distilled: Callable[[Grid], Tableau] = ddim,
) -> Hybrid:  # fmt: skip
    """The base grid down to the time at which the distilled model's step `start` begins, then that one.

        both = hybrid(grids.uniform(process, 20), grids.uniform(process, 4))
        x0 = sample(stitch([base_model, distilled_model], both.switch), both.tableau, x_T)

    Guidance for the base alone, as the paper has it, is `stitch([classifier_free(model, s, null),
    distilled_model], ...)`.

    Arguments:
      base_grid, distilled_grid: of the same process, usually many steps and 4. From the same noise
        level; both models see the same scale of x.
      start: the first of the distilled model's steps that it does itself: 1, the paper's, leaves it
        all but its first. That is enough where this step settles what a sample will be, as in the
        paper's models; where it ends in so much noise that the next one still does, nothing is won,
        and 2 may be (`save="x0"` shows whether the distilled model's x0 from there on vary as the
        base's do). 0 is the distilled sampler, the grid's number of steps the base sampler.
      match: "nearest", as in the code: the base stops at its node nearest in t to the distilled grid's
        node `start`, and the distilled model goes on from the level it is told there, which is not
        quite the state's. "exact": the base's last node is moved to that node.
      base, distilled: builders of the two parts.

    Raises ValueError for a start that the grid has not, another `match`, grids that are traced or run
    to noise, and grids of two processes.
    """
    if match not in MATCHES:
        raise ValueError(f"match must be one of {MATCHES}, got {match!r}")
    for name, grid in (("base_grid", base_grid), ("distilled_grid", distilled_grid)):
        if grid.backward or not is_concrete(grid.t):
            raise ValueError(f"{name} must run from noise to data, with known nodes")
    if not 0 <= start <= distilled_grid.steps:
        raise ValueError(f"start must be from 0 to {distilled_grid.steps}, got {start}")
    _check_one_process(base_grid, distilled_grid, distilled_grid.t[start])
    stop = int(np.argmin(np.abs(base_grid.t - distilled_grid.t[start])))
    if start == 0:
        return Hybrid(distilled(distilled_grid), np.inf, 0)
    if start == distilled_grid.steps:
        return Hybrid(base(base_grid), -np.inf, base_grid.steps)
    if stop == 0:
        raise ValueError(
            f"the base grid has no node nearer to the distilled one's {distilled_grid.t[start]:.6g} "
            "than its first: give it more steps"
        )
    node = distilled_grid.node(start)
    end = node if match == "exact" else base_grid.node(stop)
    first = [np.append(a[:stop], b) for a, b in zip(base_grid.node(slice(None)), end)]
    rest = make(*distilled_grid.node(slice(start, None)), distilled_grid.process)
    parts = base(make(*first, base_grid.process)), distilled(rest)
    lowest, highest = float(np.min(parts[0].t)), float(np.max(parts[1].t))
    if not lowest > highest:
        raise ValueError(
            f"the base sampler evaluates down to t = {lowest:.6g} and the distilled one from "
            f"{highest:.6g} on, which no switch in t separates: use a base of one evaluation a step"
        )
    return Hybrid(concatenate(parts), 0.5 * (lowest + highest), stop)


def _check_one_process(base_grid: Grid, distilled_grid: Grid, t: float) -> None:
    """alpha and sigma at t, where both grids know their process."""
    processes = base_grid.process, distilled_grid.process
    if any(p is None for p in processes) or not is_concrete(processes):
        return
    one, other = (np.array([p.alpha(t), p.sigma(t)], np.float64) for p in processes)
    if not np.allclose(one, other, rtol=1e-4, atol=1e-6):
        raise ValueError(
            f"the grids are of two processes: at t = {t:.6g} (alpha, sigma) = ({one[0]:.6g}, "
            f"{one[1]:.6g}) of the base, ({other[0]:.6g}, {other[1]:.6g}) of the distilled"
        )
