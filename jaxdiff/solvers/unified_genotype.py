"""The decisions of USF: what a sampler of the unified framework does in each of its steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from numbers import Real
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxdiff.names import unknown
from jaxdiff.solvers.clocks import check_choice, check_order

INTEGRANDS = ("x0", "eps", "flow", "v3")
HIGHEST_ORDER = 4
SCALINGS = ("none", "bh1", "bh2", "grow", "shrink")
FIRST = ("network", "noise", "mean")


@dataclasses.dataclass(frozen=True)
class Expansion:
    """One Taylor expansion: from where, how far, and from which evaluations.

    Ages count evaluations' nodes from the newest, 0; in a corrector 0 is the end of the step.

    Attributes:
      order: terms, 1 to 4 (5 in a corrector): derivatives up to order - 1.
      start: age of the node that is expanded from: 0 in a multistep method, 1 where the second
        stage of a single-step method goes back to the step's start; in a corrector one more.
      points: for each derivative, first to last, the ages of the evaluations that its Taylor
        system takes beside the start's: at least k for the k-th. Fewer than order - 1 is the
        paper's low-order estimation. Empty: the order - 1 newest for every derivative.
      scaling: factor of the first derivative, with H = -h for x0 and h otherwise: "bh1" is
        1 / (2 phi_2(H)) and "bh2" phi_1(H) / (2 phi_2(H)), UniPC's B(H) = H and exp(H) - 1 (the
        latter also DPM-Solver's midpoint); "grow" and "shrink" 1 +- (exp(H) - 1) / 2; a number c
        is 1 + c h.
    """

    order: int = 1
    start: int = 0
    points: tuple[tuple[int, ...], ...] = ()
    scaling: str | float = "none"

    def systems(self) -> tuple[tuple[int, ...], ...]:
        """Points with the default spelled out."""
        if self.points:
            return self.points
        newest = tuple(age for age in range(self.order) if age != self.start)[: self.order - 1]
        return (newest,) * (self.order - 1)


@dataclasses.dataclass(frozen=True)
class Decision:
    """One step: the prediction expanded, the predictor, and the corrector if there is one.

    `reevaluate` evaluates again at the corrected state (the paper's implicit corrector: one
    evaluation more); else the evaluation at the predicted state stays.
    """

    prediction: str = "x0"
    predictor: Expansion = Expansion()
    corrector: Expansion | None = None
    reevaluate: bool = False


@dataclasses.dataclass(frozen=True)
class Genotype:
    """A table of decisions: hashable, one `Decision` a step.

    Attributes:
      decisions: of the steps, from noise to data.
      times: of the nodes between the grid's ends, one less than steps; empty for the grid's own.
      first: where the first evaluation comes from: the "network"; or, at no cost, "noise", eps =
        x_T / sqrt(alpha^2 + sigma^2), or "mean", x0 = the mean of the data.
    """

    decisions: tuple[Decision, ...]
    times: tuple[float, ...] = ()
    first: str = "network"

    @property
    def nfe(self) -> int:
        """Evaluations of the network."""
        again = sum(decision.reevaluate for decision in self.decisions)
        return len(self.decisions) - (self.first != "network") + again


def matching_corrector(predictor: Expansion, scaling: str | float = "none") -> Expansion:
    """UniPC's corrector for a predictor: one term more, the new evaluation in every system."""
    older = tuple(tuple(age + 1 for age in ages) + (0,) for ages in predictor.systems())
    last = older[-1] if older else (0,)
    return Expansion(predictor.order + 1, predictor.start + 1, (*older, last), scaling)


def uniform_schedule(
    steps: int, prediction: str = "x0", order: int = 2, scaling: str | float = "none",
    corrector: bool = False, lower_order_final: bool | None = None, singlestep: bool = False,
) -> Genotype:  # fmt: skip
    """The same decisions in every step, as the methods that the framework contains make them.

    Multistep orders grow 1, 2, ... to `order` and, with `lower_order_final`, fall to 1 again: None
    does so below 15 steps, the authors' code always, which costs the last step's order. Single-step
    orders repeat 1, ..., order, each from the first node of its group. `scaling` is that of
    differences of two evaluations; the `corrector` is `matching_corrector`, none in the last step.
    Raises ValueError for single-step methods with either, and for bad options.
    """
    check_choice("prediction", prediction, INTEGRANDS)
    check_order(order, HIGHEST_ORDER)
    check_order(steps, 10**6, "steps")
    _check_scaling(scaling, "scaling")
    if singlestep and (corrector or lower_order_final is not None):
        raise ValueError(
            "corrector and lower_order_final are of a multistep schedule, got singlestep=True"
        )
    lowered = steps < 15 if lower_order_final is None else lower_order_final
    decisions = []
    for i in range(steps):
        if singlestep:
            terms, start = i % order + 1, i % order
        else:
            terms, start = min(i + 1, order), 0
            terms = min(terms, steps - i) if lowered else terms
        predictor = Expansion(terms, start, (), scaling if terms == 2 else "none")
        fix = None
        if corrector and i < steps - 1:
            fix = matching_corrector(predictor, scaling if terms == 1 else "none")
        decisions.append(Decision(prediction, predictor, fix))
    return check_genotype(Genotype(tuple(decisions)))


_MIDPOINT = {"order": 2, "scaling": "bh2"}
FIXED_SCHEDULES: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "ddim": {"order": 1},
    "dpm_solver_pp_2m": _MIDPOINT,
    "dpm_solver_pp_3m": {"order": 3, "scaling": "bh2"},
    "dpm_solver_pp_2s": {**_MIDPOINT, "singlestep": True},
    "dpm_solver_2m": {**_MIDPOINT, "prediction": "eps"},
    "dpm_solver_3m": {"order": 3, "scaling": "bh2", "prediction": "eps"},
    "dpm_solver_2s": {**_MIDPOINT, "singlestep": True, "prediction": "eps"},
    "unipc_2": {**_MIDPOINT, "corrector": True},
    "unipc_2_bh1": {"order": 2, "scaling": "bh1", "corrector": True},
    "unipc_3": {"order": 3, "scaling": "bh2", "corrector": True},
    "unipc_2_eps": {**_MIDPOINT, "corrector": True, "prediction": "eps"},
    "unipc_3_eps": {"order": 3, "scaling": "bh2", "corrector": True, "prediction": "eps"},
    "flow_pc_2": {"order": 2, "corrector": True, "prediction": "flow"},
    "mixed_pc_2": {"order": 2, "corrector": True, "prediction": "v3"},
})  # fmt: skip


def fixed_schedule(name: str, steps: int) -> Genotype:
    """The named setting of `uniform_schedule`, one of `FIXED_SCHEDULES`."""
    if name not in FIXED_SCHEDULES:
        raise ValueError(unknown("schedule", name, FIXED_SCHEDULES))
    return uniform_schedule(steps, **FIXED_SCHEDULES[name])


def check_genotype(genotype: Any) -> Genotype:
    """The genotype; raises TypeError or ValueError, naming the step, where it is not one."""
    if not isinstance(genotype, Genotype):
        raise TypeError(f"genotype must be a Genotype or a name, got {type(genotype).__name__}")
    decisions, times = genotype.decisions, genotype.times
    good = isinstance(decisions, tuple) and all(isinstance(d, Decision) for d in decisions)
    if not good or not decisions:
        raise TypeError(f"decisions must be a tuple of one Decision or more, got {decisions!r}")
    check_choice("first", genotype.first, FIRST)
    if genotype.nfe < 1:
        raise ValueError(f"one step with first={genotype.first!r} makes no evaluation")
    if not isinstance(times, tuple) or not all(_is_number(t) for t in times):
        raise ValueError(f"times must be a tuple of numbers, got {times!r}")
    if times and len(times) != len(decisions) - 1:
        raise ValueError(
            f"times must be a tuple of no or {len(decisions) - 1} numbers, got {times!r}"
        )
    if any(not a > b for a, b in zip(times, times[1:])):
        raise ValueError(f"times must decrease, got {times}")
    for i, decision in enumerate(decisions):
        check_choice(f"prediction of step {i}", decision.prediction, INTEGRANDS)
        _check_expansion(decision.predictor, f"predictor of step {i}", i, 0)
        if decision.corrector is not None:
            if i == len(decisions) - 1:
                raise ValueError("the last step has no evaluation at its end to correct it")
            _check_expansion(decision.corrector, f"corrector of step {i}", i + 1, 1)
        elif decision.reevaluate:
            raise ValueError(f"step {i} has no corrector to evaluate again after")
    return genotype


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_scaling(scaling: Any, name: str) -> None:
    number = _is_number(scaling)
    if number and not np.isfinite(scaling):
        raise ValueError(f"{name} must be finite, got {scaling!r}")
    if not number:
        check_choice(f"{name} (or a number)", scaling, SCALINGS)


def _check_expansion(found: Any, name: str, oldest: int, least: int) -> None:
    """`oldest`: the highest age that exists; `least`: the lowest that may be expanded from."""
    if not isinstance(found, Expansion):
        raise TypeError(f"the {name} must be an Expansion, got {found!r}")
    # A corrector for the highest order has one term more.
    check_order(found.order, HIGHEST_ORDER + least, f"order of the {name}")
    check_order(found.start, oldest, f"start of the {name}", least)
    _check_scaling(found.scaling, f"scaling of the {name}")
    points = found.points
    plain = isinstance(points, tuple) and all(isinstance(ages, tuple) for ages in points)
    if not plain or len(points) not in (0, found.order - 1):
        raise ValueError(
            f"points of the {name} must be a tuple of no or {found.order - 1} tuples of ages, got "
            f"{points!r}"
        )
    for k, ages in enumerate(found.systems(), 1):
        known = all(isinstance(age, int) and 0 <= age <= oldest for age in ages)
        if not known or len({found.start, *ages}) < len(ages) + 1 or len(ages) < k:
            raise ValueError(
                f"derivative {k} of the {name} takes at least {k} different ages from 0 to "
                f"{oldest}, not its start {found.start}, got {ages}"
            )
