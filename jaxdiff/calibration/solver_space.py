"""The space that S^3 searches: random tables of decisions, their mutations and children."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxdiff.grids import Grid
from jaxdiff.solvers.clocks import check_choice, check_order
from jaxdiff.solvers.unified_genotype import (
    FIRST,
    FIXED_SCHEDULES,
    HIGHEST_ORDER,
    INTEGRANDS,
    SCALINGS,
    Decision,
    Expansion,
    Genotype,
    fixed_schedule,
    matching_corrector,
)

_CLOSEST = 1e-3  # in half-log-SNR, between two nodes


@dataclasses.dataclass(frozen=True)
class SolverSpace:
    """Which decisions may be taken; names are drawn with equal chance.

    Attributes:
      predictions: some of "x0", "eps", "flow", "v3".
      highest_order: of the Taylor expansions, 1 to 4; orders 1 to it are drawn, 2 most often.
      low_order: chance that a first derivative is estimated from fewer evaluations.
      scalings: some of "none", "bh1", "bh2", "grow", "shrink" and "linear", whose number walks.
      corrected, reevaluated: chances that a step is corrected, and that a corrected one is
        evaluated again.
      first: some of "network", "noise", "mean".
      times: whether nodes move.
      rate: chance that a mutation changes any one decision (`first`: half of it).
    """

    predictions: tuple[str, ...] = INTEGRANDS
    highest_order: int = 4
    low_order: float = 0.3
    scalings: tuple[str, ...] = (*SCALINGS, "linear")
    corrected: float = 0.5
    reevaluated: float = 0.0
    first: tuple[str, ...] = FIRST
    times: bool = True
    rate: float = 0.15

    def __post_init__(self):
        for field, accepted in (
            ("predictions", INTEGRANDS), ("scalings", (*SCALINGS, "linear")), ("first", FIRST),
        ):  # fmt: skip
            names = getattr(self, field)
            if not isinstance(names, tuple) or not names:
                raise ValueError(f"{field} must be a tuple of names, got {names!r}")
            for name in names:
                check_choice(field, name, accepted)
        check_order(self.highest_order, HIGHEST_ORDER, "highest_order")
        if not isinstance(self.times, (bool, np.bool_)):
            raise ValueError(f"times must be True or False, got {self.times!r}")
        for field in ("low_order", "corrected", "reevaluated", "rate"):
            if not 0.0 <= getattr(self, field) <= 1.0:
                raise ValueError(f"{field} must lie in [0, 1], got {getattr(self, field)!r}")


class Moves:
    """Draws of genotypes with `nfe` evaluations on a grid's span: `evolve`'s three functions."""

    def __init__(self, space: SolverSpace, grid: Grid, nfe: int):
        self.space, self.grid, self.nfe = space, grid, nfe
        lam = np.asarray(grid.lam)
        finite = lam[np.isfinite(lam)] if np.any(np.isfinite(lam)) else np.zeros(1)
        # Beyond an infinite end's neighbour nodes go this much further, where there are times.
        self.low, self.high = finite[0], finite[-1]
        if grid.ends[0]:
            self.low = max(self.low - 2.0, self.at(grid.process.time(self.low - 2.0)))
        if grid.ends[1]:
            self.high = min(self.high + 2.0, self.at(grid.process.time(self.high + 2.0)))

    def at(self, t: Any) -> np.ndarray:
        """The half-log-SNR of times."""
        process, t = self.grid.process, np.asarray(t)
        return np.log(process.alpha(t)) - np.log(process.sigma(t))

    def newcomer(self, rng: np.random.Generator) -> Genotype:
        """Nodes about those of a random `jaxdiff.grids.logistic`, and every decision drawn."""
        first = self.pick(self.space.first, rng)
        steps = self.nfe + (first != "network")
        decisions = tuple(self.draw(rng) for _ in range(steps))
        if not self.space.times:
            return self.fit(Genotype(decisions, (), first), rng)
        exponent, center = np.exp(rng.uniform(-2.0, 0.0)), np.exp(0.5 * rng.normal())
        lam = self.logistic(steps, exponent, center, rng.normal(size=steps - 1) * 0.2)
        return self.fit(Genotype(decisions, self.times(lam), first), rng)

    def fixed(self, rng: np.random.Generator) -> list[Genotype]:
        """The space's fixed schedules on the grid's nodes and, where nodes move, logistic ones."""
        found = []
        for name, options in FIXED_SCHEDULES.items():
            if options.get("prediction", "x0") not in self.space.predictions:
                continue
            genotype = fixed_schedule(name, self.nfe)
            found.append(self.fit(genotype, rng))
            if self.space.times:
                times = self.times(self.logistic(self.nfe, 0.75, 1.0, 0.0))
                found.append(self.fit(dataclasses.replace(genotype, times=times), rng))
        return list(dict.fromkeys(found))

    def logistic(self, steps: int, exponent: float, center: float, shift: Any) -> np.ndarray:
        """Half-log-SNRs of `jaxdiff.grids.logistic`, moved by `shift` of a step."""
        ends = (exponent * (np.asarray(self.grid.lam)[[0, -1]] + np.log(center))).tolist()
        first, last = (0.5 - 0.5 * np.tanh(0.5 * end) for end in ends)
        share = (np.arange(1, steps) + shift) / steps
        u = np.clip(first + share * (last - first), 1e-9, 1.0 - 1e-9)
        return (np.log1p(-u) - np.log(u)) / exponent - np.log(center)

    def mutate(self, genotype: Genotype, rng: np.random.Generator) -> Genotype:
        """Each decision and node changed with the space's rate; at least one, where it can be."""
        for _ in range(100):
            first = genotype.first
            if rng.uniform() < self.space.rate / 2:
                first = self.pick(self.space.first, rng)
            times = genotype.times
            if self.space.times:
                times = self.times(self.moved(genotype, rng))
            decisions = tuple(self.changed(decision, rng) for decision in genotype.decisions)
            found = self.fit(Genotype(decisions, times, first), rng)
            if found != genotype:
                break
        return found

    def cross(self, one: Genotype, other: Genotype, rng: np.random.Generator) -> Genotype:
        """The nodes of one parent, and each step's decision from either."""
        base, second = (one, other) if rng.uniform() < 0.5 else (other, one)
        if len(base.decisions) != len(second.decisions):
            return self.mutate(base, rng)
        decisions = tuple(
            b if rng.uniform() < 0.5 else a for a, b in zip(base.decisions, second.decisions)
        )
        return self.fit(dataclasses.replace(base, decisions=decisions), rng)

    def pick(self, names: tuple[str, ...], rng: np.random.Generator) -> str:
        return names[rng.integers(len(names))]

    def order(self, rng: np.random.Generator) -> int:
        chances = np.array([0.2, 0.4, 0.3, 0.1])[: self.space.highest_order]
        return int(rng.choice(len(chances), p=chances / chances.sum())) + 1

    def scaling(self, old: Any, rng: np.random.Generator) -> str | float:
        name = self.pick(self.space.scalings, rng)
        if name != "linear":
            return name
        return (0.0 if isinstance(old, str) else old) + 0.1 * float(rng.normal())

    def draw(self, rng: np.random.Generator) -> Decision:
        predictor = self.expansion(self.order(rng), self.scaling("none", rng), rng)
        corrector = None
        if rng.uniform() < self.space.corrected:
            corrector = Expansion(2, 1, (), self.scaling("none", rng))
        again = corrector is not None and rng.uniform() < self.space.reevaluated
        return Decision(self.pick(self.space.predictions, rng), predictor, corrector, bool(again))

    def expansion(self, order: int, scaling: str | float, rng: np.random.Generator) -> Expansion:
        """A multistep one; the first derivative's system sometimes smaller than the others'."""
        whole = tuple(range(1, order))
        if order > 2 and rng.uniform() < self.space.low_order:
            points = (whole[: rng.integers(1, order - 1)], *[whole] * (order - 2))
            return Expansion(order, 0, points, scaling)
        return Expansion(order, 0, (), scaling)

    def changed(self, decision: Decision, rng: np.random.Generator) -> Decision:
        """A decision with each of its parts drawn anew at the space's rate."""
        new = self.draw(rng)
        prediction, order, scaling, corrector = rng.uniform(size=4) < self.space.rate
        if prediction:
            decision = dataclasses.replace(decision, prediction=new.prediction)
        if order:
            kept = dataclasses.replace(new.predictor, scaling=decision.predictor.scaling)
            decision = dataclasses.replace(decision, predictor=kept)
        if scaling:
            value = self.scaling(decision.predictor.scaling, rng)
            kept = dataclasses.replace(decision.predictor, scaling=value)
            decision = dataclasses.replace(decision, predictor=kept)
        if corrector:
            decision = dataclasses.replace(
                decision, corrector=new.corrector, reevaluate=new.reevaluate
            )
        return decision

    def lam(self, genotype: Genotype) -> np.ndarray:
        """The half-log-SNR of the inner nodes; without times the grid's, spread over the steps."""
        if genotype.times:
            return self.at(genotype.times)
        nodes = np.concatenate([[self.low], np.asarray(self.grid.lam)[1:-1], [self.high]])
        place = np.linspace(0.0, self.grid.steps, len(genotype.decisions) + 1)
        return np.interp(place, np.arange(len(nodes)), nodes)[1:-1]

    def moved(self, genotype: Genotype, rng: np.random.Generator) -> np.ndarray:
        lam = self.lam(genotype)
        bounds = np.concatenate([[self.low], lam, [self.high]])
        gap = 0.5 * np.maximum(bounds[2:] - bounds[:-2], _CLOSEST)
        moves = rng.uniform(size=len(lam)) < self.space.rate
        return lam + moves * 0.3 * gap * rng.normal(size=len(lam))

    def times(self, lam: np.ndarray) -> tuple[float, ...]:
        """Times of these half-log-SNRs, sorted, and kept apart and within the span."""
        lam, count = np.sort(lam), len(lam)
        apart = _CLOSEST * (1.0 + np.arange(count))
        lam = np.maximum.accumulate(np.maximum(lam - apart, self.low)) + apart
        lam = np.minimum(lam, self.high - apart[::-1])
        return tuple(float(t) for t in np.asarray(self.grid.process.time(lam)))

    def fit(self, genotype: Genotype, rng: np.random.Generator) -> Genotype:
        """The nearest genotype that is allowed and has the right number of evaluations."""
        decisions, lam = list(genotype.decisions), self.lam(genotype)
        while True:
            again = sum(d.reevaluate and d.corrector is not None for d in decisions[:-1])
            extra = len(decisions) - (genotype.first != "network") + again - self.nfe
            if not extra:
                break
            if extra > 0:
                drop = int(rng.integers(len(decisions) - 1))
                del decisions[drop]
                lam = np.delete(lam, drop)
            else:
                nodes = np.concatenate([[self.low], lam, [self.high]])
                widest = int(np.argmax(np.diff(nodes)))
                lam = np.insert(lam, widest, 0.5 * (nodes[widest] + nodes[widest + 1]))
                # One evaluation more, not two: else odd and even numbers may never meet.
                decisions.insert(widest, dataclasses.replace(self.draw(rng), reevaluate=False))
        last = len(decisions) - 1
        fitted = tuple(self.fitted(d, i, i == last) for i, d in enumerate(decisions))
        times = genotype.times
        if len(decisions) != len(genotype.decisions) or (not times and last + 1 != self.grid.steps):
            times = self.times(lam)
        return Genotype(fitted, times, genotype.first)

    def fitted(self, decision: Decision, i: int, last: bool) -> Decision:
        """What step i can do of a decision: as many evaluations as there are behind it."""
        predictor, prediction = decision.predictor, decision.prediction
        start = min(predictor.start, max(i - self.grid.ends[0], 0))
        order = min(predictor.order, i + 1, self.space.highest_order)
        points = predictor.points
        if start != predictor.start or order != predictor.order:
            ages = [age for age in range(order) if age != start][: order - 1]
            points = tuple(
                tuple(a for a in old if a in ages) or tuple(ages) for old in points[: order - 1]
            )
            points = () if any(len(p) < k for k, p in enumerate(points, 1)) else points
        if self.grid.ends[0] and i == 0 and prediction not in ("x0", "flow"):
            prediction = "x0"
        predictor = Expansion(order, start, points, predictor.scaling if order > 1 else "none")
        corrector = None
        if decision.corrector is not None and not last:
            # Scaled, as in UniPC, where the derivative is a single difference.
            scaling = decision.corrector.scaling if order == 1 else "none"
            corrector = matching_corrector(predictor, scaling)
        again = decision.reevaluate and corrector is not None
        return Decision(prediction, predictor, corrector, again)

    def encode(self, genotype: Genotype) -> np.ndarray:
        """Numbers for the predictor: every step's decisions and node, and the first evaluation."""
        steps = self.nfe + 1
        rows = np.zeros((steps, len(INTEGRANDS) + 2 * len(SCALINGS) + 11))
        nodes = np.concatenate([[self.low], self.lam(genotype), [self.high]])
        offset = steps - len(genotype.decisions)  # the last steps are the same for all
        for i, decision in enumerate(genotype.decisions):
            found, fix = decision.predictor, decision.corrector
            scalings = [found.scaling, "none" if fix is None else fix.scaling]
            smallest = len(found.systems()[0]) if found.order > 1 else 0
            rows[offset + i] = np.concatenate([
                [decision.prediction == name for name in INTEGRANDS],
                [scaling == name for scaling in scalings for name in SCALINGS],
                [0.0 if isinstance(scaling, str) else scaling for scaling in scalings],
                [found.order, found.order > 1, smallest],
                [found.start, fix is not None, decision.reevaluate],
                [nodes[i], nodes[i + 1], nodes[i + 1] - nodes[i]],
            ])  # fmt: skip
        return np.concatenate([rows.ravel(), [genotype.first == name for name in FIRST]])
