"""One step of USF, with states as combinations of x_T and the x0 that the evaluations gave."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from math import factorial
from typing import Any, NamedTuple

from jaxdiff.grids import Grid
from jaxdiff.solvers.clocks import Level, carry, weights
from jaxdiff.solvers.phi import phis
from jaxdiff.solvers.statistics import ModelStatistics, integrals, l_at
from jaxdiff.solvers.unified_genotype import HIGHEST_ORDER, Expansion


@dataclasses.dataclass(frozen=True)
class Linear:
    """vector . (x_T, x0 of the evaluations) + shift; vector [evaluations + 1, ...]."""

    vector: Any
    shift: Any
    __array_ufunc__ = None  # an array times this is __rmul__, not an array of these

    def __add__(self, other: Linear) -> Linear:
        return Linear(self.vector + other.vector, self.shift + other.shift)

    def __rmul__(self, factor: Any) -> Linear:
        return Linear(factor * self.vector, factor * self.shift)


class Point(NamedTuple):
    """A node: its number, the state that was evaluated there, what x0 was, and its solution."""

    node: int
    state: Linear
    x0: Linear
    x: Linear


class Exact(NamedTuple):
    """The exact step without a prediction: factor of x, of each derivative, and a constant."""

    carry: Any
    moments: Sequence[Any]
    shift: Any


class Stepper:
    """Steps between the nodes of a grid."""

    def __init__(self, xp: Any, grid: Grid, statistics: ModelStatistics, quadrature: str):
        self.xp, self.grid, self.statistics = xp, grid, statistics
        self.quadrature = quadrature
        self.lam = grid.lam
        bins = statistics.lam
        self.inside = xp.clip(self.lam, bins[0], bins[-1])  # rounding may leave them by little

    def __call__(
        self, prediction: str, expansion: Expansion, points: Sequence[Point], target: int
    ) -> Linear | None:
        """The state at node `target`, from the nodes so far, newest first.

        None where it would expand from a node at alpha = 0, but for the first step's predictor.
        """
        grid, start = self.grid, points[expansion.start]
        ends = self.infinite(start), grid.ends[1] and target == grid.steps
        if ends[0] and expansion.start != 0:
            return None
        if any(ends):
            return self.first_order(prediction, points[0], target, ends)
        systems = [
            tuple(age for age in ages if not self.infinite(points[age]))
            for ages in expansion.systems()
        ]
        short = [k for k, ages in enumerate(systems, 1) if len(ages) < k]
        systems = systems[: short[0] - 1] if short else systems
        exact = self.exact(prediction, start.node, target, len(systems) + 1)
        h = self.lam[target] - self.lam[start.node]
        at = self.value(prediction, start, start.node)
        x = exact.carry * start.x + exact.moments[0] * at
        x = dataclasses.replace(x, shift=x.shift + exact.shift)
        for k, ages in enumerate(systems, 1):
            offsets = [self.lam[points[age].node] - self.lam[start.node] for age in ages]
            factor = exact.moments[k]
            if k == 1:
                factor = factor * self.scale(expansion.scaling, prediction, h)
            for age, weight in zip(ages, self.derivative(offsets, k, h)):
                value = self.value(prediction, points[age], start.node)
                x = x + (factor * weight) * (value + (-1.0) * at)
        return x

    def first_order(
        self, prediction: str, point: Point, target: int, ends: tuple[bool, bool]
    ) -> Linear:
        """The step from alpha = 0 or to sigma = 0, with the newest evaluation alone."""
        level, end = self.grid.node(point.node), self.grid.node(target)
        value = self.value(prediction, point, point.node)
        if prediction == "v3":  # x0 = (1 - l) x / alpha - f, with the solution's x
            return (end[1] * self.unexplained(point)) * point.x + (-end[1]) * value
        whole = weights(self.grid, level, end, [level], prediction, ends=ends)[0]
        return carry(self.xp, prediction, level, end) * point.x + whole * value

    def unexplained(self, point: Point) -> Any:
        """(1 - l) / alpha at a node."""
        place = self.inside[point.node][None]
        mixed = l_at(self.statistics, place)[0]
        return (1.0 - mixed) / self.grid.alpha[point.node]

    def infinite(self, point: Point) -> bool:
        """Whether the node has alpha = 0."""
        return self.grid.ends[0] and point.node == 0

    def value(self, prediction: str, point: Point, start: int) -> Linear:
        """The prediction at a node, for a step that is expanded from node `start`."""
        _, alpha, sigma = self.grid.node(point.node)
        if prediction == "x0":
            return point.x0
        if prediction in ("eps", "flow"):
            share = -alpha / sigma - (prediction == "flow")
            return (1.0 / sigma) * point.state + share * point.x0
        f = self.unexplained(point) * point.state + (-1.0) * point.x0
        if point.node == start:
            return f
        ends = self.inside[start], self.inside[point.node]
        part = integrals(self.statistics, *ends, 0, self.quadrature)
        g = self.xp.exp(-part.S) * f
        return dataclasses.replace(g, shift=g.shift - part.B)

    def exact(self, prediction: str, start: int, target: int, terms: int) -> Exact:
        """carry and mu_k of `unified`, for k < terms."""
        xp, level, end = self.xp, self.grid.node(start), self.grid.node(target)
        h = self.lam[target] - self.lam[start]
        if prediction == "v3":
            ends = self.inside[start], self.inside[target]
            part = integrals(self.statistics, *ends, terms, self.quadrature)
            outer = end[1] * xp.exp(-part.L)
            return Exact(outer / level[1], [-outer * e for e in part.E], -outer * part.C)
        kept = carry(xp, prediction, level, end)
        if prediction == "flow":
            # The moments follow from weights that are exact for polynomials of this degree.
            steps = [h * share / HIGHEST_ORDER for share in range(HIGHEST_ORDER + 1)]
            places = [self.place(self.lam[start] + step) for step in steps]
            found = weights(self.grid, level, end, places, "flow")
            moments = [
                sum(w * step**k for w, step in zip(found, steps)) / factorial(k)
                for k in range(terms)
            ]
            return Exact(kept, moments, 0.0)
        sign, factor = (-1.0, end[1]) if prediction == "x0" else (1.0, -end[2])
        found = phis(terms, sign * h)
        return Exact(kept, [factor * h ** (k + 1) * p for k, p in enumerate(found)], 0.0)

    def place(self, lam: Any) -> Level:
        """Any level of this half-log-SNR."""
        sigma = 1.0 / self.xp.sqrt(1.0 + self.xp.exp(2.0 * lam))
        return None, self.xp.exp(lam) * sigma, sigma

    def scale(self, scaling: str | float, prediction: str, h: Any) -> Any:
        """The factor of the first derivative."""
        signed = -h if prediction == "x0" else h
        if scaling in ("bh1", "bh2"):
            first, second = phis(2, signed)
            return (0.5 if scaling == "bh1" else 0.5 * first) / second
        if scaling in ("grow", "shrink"):
            half = 0.5 * self.xp.expm1(signed)
            return 1.0 + half if scaling == "grow" else 1.0 - half
        return 1.0 if scaling == "none" else 1.0 + scaling * h

    def derivative(self, offsets: Sequence[Any], k: int, h: Any) -> list[Any]:
        """Weights of the differences m_p - m_s for the k-th derivative: the Taylor system solved.

        m_p - m_s = sum_{j = 1 .. len} offset_p^j / j! m^(j).
        """
        xp, count = self.xp, len(offsets)
        if count == 1:
            return [1.0 / offsets[0]]
        ratios = [offset / h for offset in offsets]
        system = xp.stack([xp.stack([r**j for r in ratios]) for j in range(1, count + 1)])
        target = xp.asarray([[1.0 if j == k else 0.0] for j in range(1, count + 1)])
        found = xp.linalg.solve(system, target)[:, 0]
        return [factorial(k) / h**k * weight for weight in found]
