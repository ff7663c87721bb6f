"""How often a diffrax solver evaluates its vector field."""

from __future__ import annotations

from typing import Any, NamedTuple

import diffrax
import jax.numpy as jnp


def evaluations(solver: diffrax.AbstractSolver, steps: Any, state: Any) -> Any:
    """Evaluations made in `steps` attempted steps, or None if diffrax does not tell.

    `state` is the final state of a `Counted` controller; any other had no rejections and no jumps.
    """
    cost = _cost(solver)
    if cost is None:
        return None
    first_stages = state.first_stages if isinstance(state, CountedState) else 1
    return cost[0] * steps + cost[1] * first_stages


def _cost(solver: Any) -> tuple[int, int] | None:
    """Evaluations of an attempted step, and those on top where no earlier stage can be reused."""
    if isinstance(solver, diffrax.AbstractImplicitSolver):
        return None
    if type(solver) is diffrax.HalfSolver:
        inner = _cost(solver.solver)
        return None if inner is None else (3 * inner[0], 2 * inner[1])
    if type(solver) in (diffrax.Euler, diffrax.LeapfrogMidpoint):
        return 1, 0
    if isinstance(solver, diffrax.AbstractERK):
        # "First same as last": the last stage of an accepted step is the first of the next one.
        reused = int(solver.tableau.fsal)
        return solver.tableau.num_stages - reused, reused
    return None


class CountedState(NamedTuple):
    """`fresh`: the next attempt has no stage to reuse; `first_stages`: attempts that had none."""

    inner: Any
    fresh: Any
    first_stages: Any


class Counted(diffrax.AbstractAdaptiveStepSizeController):
    """The controller itself; its state also counts the attempts that reuse no stage.

    Those are the attempts up to the first accepted step, and up to the first after each jump.
    """

    controller: diffrax.AbstractAdaptiveStepSizeController

    rtol = property(lambda self: self.controller.rtol)
    atol = property(lambda self: self.controller.atol)
    norm = property(lambda self: self.controller.norm)

    def wrap(self, direction):
        return Counted(self.controller.wrap(direction))

    def init(self, *args):
        end, inner = self.controller.init(*args)
        return end, CountedState(inner, jnp.asarray(True), jnp.asarray(0))

    def adapt_step_size(self, t0, t1, y0, y1_candidate, args, y_error, error_order, state):
        keep, start, end, jump, inner, result = self.controller.adapt_step_size(
            t0, t1, y0, y1_candidate, args, y_error, error_order, state.inner
        )
        fresh = jnp.where(keep, jump, state.fresh)
        state = CountedState(inner, fresh, state.first_stages + state.fresh)
        return keep, start, end, jump, state, result
