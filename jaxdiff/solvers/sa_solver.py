"""SA-Solver: stochastic exponential Adams methods, predictor and corrector."""

from typing import Any

import numpy as np

from jaxdiff.grids import Grid
from jaxdiff.solvers.clocks import Level, by_age, check_choice, check_order, coordinate
from jaxdiff.solvers.reverse_sde import (
    Step,
    TauLaw,
    at_end,
    noise_levels,
    path_form,
    step,
    step_clock,
)
from jaxdiff.solvers.tableau import Row, Tableau, Update, assemble, check_ends

HIGHEST_ORDER = 4


def sa_solver(
    grid: Grid, predictor: int = 3, corrector: int = 4, tau: TauLaw = 1.0,
    window: tuple[float, float] = (0.0, np.inf), integrand: str = "x0", mode: str = "pec",
    variant: str = "exact", lower_order_final: bool = False, correct_last: bool = False,
) -> Tableau:  # fmt: skip
    """SA-Solver: Adams methods for the reverse SDE with noise tau.

    A step of half-log-SNR length h, with k = 1 + tau^2 and tau that of the step's end, is

        x' = (sigma' / sigma) exp(-tau^2 h) x + alpha' k int_0^h exp(-k (h - s)) P(s) ds
             + sigma' sqrt(1 - exp(-2 tau^2 h)) z

    with P the polynomial in lambda through the last `predictor` data predictions, integrated
    exactly; the corrector repeats the step, with the same z, through the last `corrector`
    predictions, that at the step's end included. Xue et al., "SA-Solver: Stochastic Adams Solver
    for Fast Sampling of Diffusion Models" (2023). With tau = 0 it is `exponential_adams` of x0 in
    lambda. Any tau keeps the marginals, so that it may jump between steps.

    For tau > 0, weak order min(2, max(predictor, corrector)) and strong order 1, whatever the
    polynomials' degrees (1/2 where noise begins or ends between nodes: a `window`, a jump of tau,
    or the quiet last step of "few_steps"), on the `jaxdiff.BrownianPath` of the form `integrand`.

    Arguments:
      predictor: evaluations that the predictor uses, 1 to 4 (grown from 1 over the first steps).
      corrector: evaluations that the corrector uses, the new one included, 1 to 4; 0 for none.
      tau: a number, or a function of the level (t, alpha, sigma) at a step's end (the official
        code's default is 1 where 0.2 <= t <= 0.8, else 0).
      window: tau is 0 outside these sigma / alpha of a step's end.
      integrand: "x0"; or "eps", where noise does not damp the state (the authors advise against
        it).
      mode: "pec", one evaluation a step; "pece" evaluates the corrected state too (before a step to
        sigma = 0 only with correct_last).
      variant: "exact"; or "few_steps", the official code's default: the last step has no noise, and
        in x0 polynomials of degree 1 take k h^2 / 2 for their slope's integral.
      lower_order_final: lower the orders to ..., 2, 1 over the last steps (the official code does).
      correct_last: one more evaluation to correct the last state with sigma > 0 too, or, where a
        step to sigma = 0 follows, to take x0 at the corrected state. With `denoise_to_zero` it is
        the official code's more_steps. By default a last state is not corrected.

    Steps from alpha = 0 ("x0" only) and to sigma = 0 are of first order, the latter without noise.
    Raises ValueError for options other than these, or correct_last without a corrector.
    """
    check_order(predictor, HIGHEST_ORDER, "predictor")
    check_order(corrector, HIGHEST_ORDER, "corrector", 0)
    check_choice("integrand", integrand, ("x0", "eps"))
    check_choice("mode", mode, ("pec", "pece"))
    check_choice("variant", variant, ("exact", "few_steps"))
    if correct_last and not corrector:
        raise ValueError("correct_last needs a corrector, got corrector=0")
    check_ends(grid, "sa_solver", noise=integrand == "x0", data=True)
    xp, steps = grid.xp, grid.steps
    taus = noise_levels(grid, tau, window)
    if variant == "few_steps":
        taus[-1] = 0.0
    form = path_form(integrand, taus)

    def move(i: int, places: list[Level], wanted: int, new: bool = False) -> Step:
        """Step i through the newest `wanted` of `places`, the first of them its end where `new`."""
        places = places[:wanted]
        found = step(grid, i, places, integrand, taus[i])
        rescaled = variant == "few_steps" and integrand == "x0" and len(places) == 2
        if not rescaled or at_end(grid, i):
            return found
        newest, older = (coordinate(xp, "lambda", place) for place in places)
        k, h = 1.0 + taus[i] ** 2, grid.lam[i + 1] - grid.lam[i]
        whole, slope = sum(found.weights), grid.alpha[i + 1] * k * h**2 / 2 / (newest - older)
        return found._replace(weights=[slope, whole - slope] if new else [whole + slope, -slope])

    rows, nodes, seen = [], [(0, 0)], []
    for i in range(steps + int(correct_last and not grid.ends[1])):
        level, last = grid.node(i), grid.ends[1] and i == steps - 1
        # The node at alpha = 0 leaves the history, where lambda is infinite.
        seen = [level] if grid.ends[0] and i == 1 else [level, *seen]
        state, solution = Update([1.0]), None
        if corrector and i > 0 and not (grid.ends[0] and i == 1):
            ages, places = _ages(seen)
            count = min(corrector, steps - i + 2) if lower_order_final else corrector
            found = move(i - 1, places, count, new=True).weights
            state = Update([0.0, 1.0], by_age(ages[: len(found)], found))
            if i == steps:
                rows.append(Row(level, [state]))
                break
            again = correct_last if last else mode == "pece"
            if again:
                rows.append(Row(level, [state]))
                state, seen, solution = Update([1.0]), [level, None, *seen[1:]], (len(rows), 0)
        elif i == steps:  # after one step, from alpha = 0, which is of first order
            break
        ages, places = _ages(seen)
        count = min(predictor, steps - i) if lower_order_final else predictor
        carry, found, noise = move(i, places, count)
        # What the corrector of this step shares with its predictor, noise included.
        held = Update([carry * s for s in state.s], [carry * m for m in state.m], noise)
        predicted = held._replace(m=_sum(held.m, by_age(ages[: len(found)], found)))
        clock = step_clock(grid, i, integrand) if form else None
        rows.append(Row(level, [predicted, held, state] if corrector else [predicted], clock))
        if i > 0:
            nodes.append(solution or ((len(rows), 2) if corrector else (i, 0)))
    return assemble(rows, integrand, xp, nodes=[*nodes, (len(rows), 0)], brownian=form)


def _ages(seen: list[Level | None]) -> tuple[list[int], list[Level]]:
    """Ages and levels of the evaluations that polynomials use, newest first."""
    ages = [age for age, place in enumerate(seen) if place is not None]
    return ages, [seen[age] for age in ages]


def _sum(a: list[Any], b: list[Any]) -> list[Any]:
    """Coefficient lists of two lengths, added."""
    if len(a) < len(b):
        a, b = b, a
    return [x + y for x, y in zip(a, [*b, *[0.0] * (len(a) - len(b))])]
