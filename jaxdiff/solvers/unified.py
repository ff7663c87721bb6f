"""USF: one exponential-integral step whose every decision is free, and tables of decisions."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import ArrayLike

from jaxdiff.arrays import is_concrete, namespace
from jaxdiff.grids import Grid
from jaxdiff.grids.grid import make
from jaxdiff.solvers.clocks import check_choice
from jaxdiff.solvers.statistics import as_statistics, check_covers
from jaxdiff.solvers.tableau import Row, Start, Tableau, Update, assemble, check_ends
from jaxdiff.solvers.unified_genotype import Genotype, check_genotype, fixed_schedule
from jaxdiff.solvers.unified_step import Linear, Point, Stepper


def unified(
    grid: Grid, genotype: Genotype | str = "unipc_2", statistics: Any = (0.5, -0.5, 0.0),
    mean: ArrayLike = 0.0, quadrature: str = "gauss",
) -> Tableau:  # fmt: skip
    """The sampler that a table of decisions describes.

    Liu, Ning, Yang & Wang, "A Unified Sampling Framework for Solver Searching of Diffusion
    Probabilistic Models" (2024), and the authors' code. From the state at a node s to a later one,
    h = lambda_t - lambda_s, with a prediction m and its derivatives in lambda,

        x_t = carry x_s + sum_{k < order} mu_k m^(k)(s),

        m       carry                        mu_k
        x0      sigma_t / sigma_s            alpha_t h^(k+1) phi_{k+1}(-h)
        eps     alpha_t / alpha_s            -sigma_t h^(k+1) phi_{k+1}(h)
        flow    scale_t / scale_s            scale_t int (lambda - lambda_s)^k / k! dtau
        v3      (alpha_t / alpha_s) e^(-L)   -alpha_t e^(-L) int e^(L+S) (lambda - lambda_s)^k / k!

    The authors' three are x0, eps and v3, the prediction g of `dpm_solver_v3`, whose default
    statistics here mix noise and data evenly and know nothing of the network; flow = eps - x0, with
    scale and tau as in `jaxdiff.solvers.clocks`, is not theirs. Derivatives solve the Taylor system
    of the evaluations that the decision names, and the first is scaled; a corrector makes the step
    again with the evaluation at its end. `jaxdiff.calibration.search_solver` searches genotypes.

    Arguments:
      grid: the nodes; or, where the genotype has times of its own, their ends and their process.
      genotype: a `Genotype`; or the name of a `fixed_schedule`, for every step of the grid.
      statistics, quadrature: of "v3", as in `dpm_solver_v3`.
      mean: of the data, for a first evaluation that is not made: a number, or an array that
        broadcasts against a sample.

    The table writes every state as a combination of x_T and all x0 predicted so far, which lets
    predictions mix: all genotypes of one number of evaluations, one `statistics` and one `mean`
    stack to one shape, and a run keeps as many integrands as it makes evaluations, so make few. A
    step to sigma = 0 is of first order, from the newest evaluation. So is a step from alpha = 0, in
    x0 or flow ("eps" and "v3" are refused), and nothing else expands from that node or looks at it.
    Raises ValueError or TypeError for what is not a genotype, or does not fit the grid.
    """
    if isinstance(genotype, str):
        genotype = fixed_schedule(genotype, grid.steps)
    check_genotype(genotype)
    check_choice("quadrature", quadrature, ("gauss", "trapezoid"))
    if quadrature == "trapezoid" and isinstance(statistics, (tuple, list)):
        raise ValueError("three numbers have no bins for the trapezoid: give ModelStatistics")
    check_ends(grid, "unified", noise=True, data=True)
    grid = _own_grid(grid, genotype)
    first = genotype.decisions[0].prediction
    if grid.ends[0] and first not in ("x0", "flow"):
        raise ValueError(f"a step from alpha = 0 needs the prediction x0 or flow, got {first!r}")
    statistics = as_statistics(statistics)
    if any(decision.prediction == "v3" for decision in genotype.decisions):
        check_covers(statistics, grid)
    if is_concrete(mean) and not np.all(np.isfinite(np.asarray(mean))):
        raise ValueError(f"mean must be finite, got {mean!r}")
    xp = namespace(grid.t, grid.alpha, grid.sigma, statistics, mean)
    stepper = Stepper(xp, grid, statistics, quadrature)
    return _Builder(stepper, genotype, xp.asarray(mean) * 1.0).build()


def _own_grid(grid: Grid, genotype: Genotype) -> Grid:
    """The grid, or one with the genotype's times between its ends."""
    steps = len(genotype.decisions)
    if not genotype.times:
        if grid.steps != steps:
            raise ValueError(
                f"the genotype has {steps} decisions and no times, but the grid {grid.steps} steps"
            )
        return grid
    if grid.process is None:
        raise ValueError("a genotype with times needs a grid from a process, not from arrays")
    t = np.array(genotype.times, float)
    if is_concrete(grid.t):
        ends = float(grid.t[0]), float(grid.t[-1])
        if not np.all((min(ends) < t) & (t < max(ends))):
            raise ValueError(f"times must lie within the grid's {ends}, got {genotype.times}")
    xp = grid.xp
    inner = t, grid.process.alpha(t), grid.process.sigma(t)
    nodes = (
        xp.concatenate([end[:1], xp.asarray(middle), end[-1:]])
        for end, middle in zip((grid.t, grid.alpha, grid.sigma), inner)
    )
    return make(*nodes, grid.process, grid.ends, grid.backward)


class _Builder:
    """The states of a genotype's sampler, one after the other, and the rows that make them."""

    def __init__(self, advance: Stepper, genotype: Genotype, mean: Any):
        self.xp, self.grid, self.advance = advance.xp, advance.grid, advance
        self.genotype, self.mean, statistics = genotype, mean, advance.statistics
        self.tail = np.shape(statistics.l)[1:]
        self.shifted = not is_concrete(mean, statistics.b) or any(
            np.any(np.asarray(a) != 0) for a in (mean, statistics.b)
        )

    def unit(self, index: int) -> Linear:
        """x_T (0), or the x0 that evaluation `index` - 1 gives."""
        vector = np.zeros((self.genotype.nfe + 1, *self.tail))
        vector[index] = 1.0
        return Linear(self.xp.asarray(vector), self.xp.zeros(()))

    def assumed(self) -> Linear:
        """x0 of the first evaluation that is not made."""
        if self.genotype.first == "mean":
            return Linear(0.0 * self.unit(0).vector, self.mean)
        _, alpha, sigma = self.grid.node(0)
        size = self.xp.hypot(alpha, sigma)  # (1 - sigma / size) / alpha, also at alpha = 0
        return (alpha / (size * (size + sigma))) * self.unit(0)

    def build(self) -> Tableau:
        genotype = self.genotype
        x = self.unit(0)
        points: list[Point] = []  # of the nodes so far, newest first
        stops: list[tuple[int, Linear, Linear]] = []  # node, state evaluated, solution there
        nodes, start = [(0, 1)], None
        for i, decision in enumerate(genotype.decisions):
            if i == 0 and genotype.first != "network":
                points = [Point(0, x, self.assumed(), x)]
            else:
                points.insert(0, Point(i, x, self.unit(len(stops) + 1), x))
                before = genotype.decisions[i - 1]
                if i and before.corrector is not None:
                    x = self.advance(before.prediction, before.corrector, points, i) or x
                    points[0] = points[0]._replace(x=x)
                stops.append((i, points[0].state, x))
                if i:
                    nodes.append((len(stops), 2))
                if i and before.reevaluate:
                    points[0] = Point(i, x, self.unit(len(stops) + 1), x)
                    stops.append((i, x, x))
            ahead = self.advance(decision.prediction, decision.predictor, points, i + 1)
            if ahead is None:
                raise ValueError(f"step {i} expands from the first node, where alpha = 0")
            x = ahead
            if not stops:
                start = x
        nodes.append((len(stops), 0))
        return self.table(stops, x, nodes, start)

    def table(
        self, stops: list[tuple[int, Linear, Linear]], last: Linear, nodes: list[tuple[int, int]],
        start: Linear | None,
    ) -> Tableau:  # fmt: skip
        """Three registers: the state to evaluate, x_T, and the solution at the newest node."""
        xp, rows, weights, shifts = self.xp, [], [], []
        blank = xp.zeros((len(stops), *self.tail))
        following = [state for _, state, _ in stops[1:]] + [last]
        for r, ((node, _, here), ahead) in enumerate(zip(stops, following)):
            updates = [Update([0.0, x.vector[0]]) for x in (ahead, here)]
            rows.append(Row(self.grid.node(node), [updates[0], Update([0.0, 1.0]), updates[1]]))
            first, third = (  # newest first
                xp.concatenate([x.vector[r + 1 : 0 : -1], blank[r + 1 :]]) for x in (ahead, here)
            )
            weights.append(xp.stack([first, blank, third]))
            shifts.append([ahead.shift, 0.0 * here.shift, here.shift])
        entry = None if start is None else Update([start.vector[0]])
        tableau = assemble(rows, "x0", xp, nodes=nodes, start=entry)
        weights = xp.stack(weights)[:, :, :, None]
        tableau = dataclasses.replace(tableau, B=weights, history=len(stops))
        if not self.shifted:
            return tableau
        shape = np.broadcast_shapes(*(np.shape(s) for row in shifts for s in row))
        wide = [[xp.broadcast_to(s, shape) for s in row] for row in shifts]
        begin = tableau.start
        if start is not None:
            first = xp.broadcast_to(start.shift, shape)
            begin = Start(begin.S, None, xp.stack([first, 0.0 * first, 0.0 * first]))
        stacked = xp.stack([xp.stack(row) for row in wide])
        return dataclasses.replace(tableau, d=stacked, start=begin)
