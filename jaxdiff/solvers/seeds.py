"""SEEDS: stochastic exponential Runge-Kutta methods."""

from numbers import Real

import numpy as np

from jaxdiff.grids import Grid
from jaxdiff.solvers.clocks import check_choice, check_order
from jaxdiff.solvers.reverse_sde import (
    at_end,
    end_step,
    exact_step,
    linear_part,
    noise_clock,
    noise_levels,
    path_form,
    step_clock,
)
from jaxdiff.solvers.tableau import Row, Tableau, Update, assemble, check_ends


def seeds(
    grid: Grid, stages: int = 1, integrand: str = "x0", tau: float = 1.0,
    middle: float | tuple[float, float] | None = None, weights: str = "phi_1",
) -> Tableau:  # fmt: skip
    """SEEDS-1, -2 and -3: exponential Runge-Kutta methods for the reverse SDE with noise tau.

    Gonzalez et al., "SEEDS: Exponential SDE Solvers for Fast High-Quality Sampling from Diffusion
    Models" (2023). With M(a, b; P) the exact step of `jaxdiff.solvers.reverse_sde` from a to b with
    the prediction replaced by P, D the prediction at the step's start, lambda_j = lambda + r_j h,
    D_j the prediction at stage j,

        SEEDS-1   x' = M(0, 1; D)                              (the first-order SDE-DPM-Solver)
        SEEDS-2   u_1 = M(0, r; D);   x' = M(0, 1; (1 - 1/(2r)) D + D_1 / (2r))    "phi_1"
                                      x' = M(0, 1; the line through D and D_1)     "phi_2"
        SEEDS-3   u_1 = M(0, r_1; D);   u_2 = M(0, r_2; the line through D and D_1);
                  x' = M(0, 1; the line through D and D_2)

    all on one Brownian path: the noise of a stage is carried on to the later stages and the end,
    where that of the rest of the step, drawn independently, adds to it. A stage is one evaluation.
    Of the authors' code one and two stages are the same (its "2a" and "2b"); three ("3a") differ, and
    two with middle other than 1/2, by what docs/references.md says. It ends at the last sigma > 0.

    Arguments:
      stages: 1, 2 or 3.
      integrand: "x0", or "eps" (the paper's noise prediction, alpha > 0 at the noise end).
      tau: noise; 1 is the reverse SDE, 0 the probability flow, whose method is then DPM-Solver's.
        In data prediction tau^2 is ComfyUI's eta.
      middle: r in (0, 1] for two stages (default 1/2), 0 < r_1 < r_2 <= 1 for three (1/3, 2/3).
      weights: "phi_1" or "phi_2", of two stages.

    Steps from alpha = 0 ("x0" only) and to sigma = 0 are of first order with one evaluation. Raises
    ValueError for options other than these.
    """
    check_order(stages, 3, "stages")
    check_choice("integrand", integrand, ("x0", "eps"))
    check_choice("weights", weights, ("phi_1", "phi_2"))
    if callable(tau):
        raise TypeError(f"tau must be a number, got {tau!r}")
    check_ends(grid, "seeds", noise=integrand == "x0", data=True)
    places, xp = _places(stages, middle), grid.xp
    taus = noise_levels(grid, tau)
    form = path_form(integrand, taus)
    rows, nodes = [], [(0, 0)]
    for i, noise_level in enumerate(taus):
        level, end = grid.node(i), grid.node(i + 1)
        if at_end(grid, i):
            carry, found, noise = end_step(grid, i, integrand, noise_level)
            clock = step_clock(grid, i, integrand)
            rows.append(Row(level, [Update([carry], found, noise)], clock))
            nodes.append((len(rows), 0))
            continue
        h = grid.lam[i + 1] - grid.lam[i]
        inner = [grid.at(grid.lam[i] + r * h) if r < 1 else end for r in places]
        stops = [level, *inner, end]
        for j in range(stages):
            here, there = stops[j], stops[j + 1]
            # The linear part and the noise of this piece; what predictions add, from the start.
            carry, noise = linear_part(xp, here, there, integrand, noise_level)
            used = [level] if j == 0 else [here, level]
            if j == 1 and stages == 2 and weights == "phi_1":
                whole = exact_step(xp, level, there, [level], integrand, noise_level).weights[0]
                share = 0.5 / places[0]
                found = [share * whole, (1.0 - share) * whole]
            else:
                found = exact_step(xp, level, there, used, integrand, noise_level).weights
            # Evaluations between the stage before and the start count nothing.
            found = found if j < 2 else [found[0], 0.0, found[1]]
            linear = [carry] if j == 0 else [0.0, carry]
            updates = [Update(linear, found, noise)]
            if j < stages - 1:
                # s_1 is the linear part and the noise alone, for the stages to come.
                updates.append(Update(linear, [], noise))
            clock = noise_clock(xp, integrand, here, there)
            rows.append(Row(here, updates, clock))
        nodes.append((len(rows), 0))
    return assemble(rows, integrand, xp, nodes=nodes, brownian=form)


def _places(stages: int, middle: float | tuple[float, float] | None) -> tuple[float, ...]:
    """The inner stages' places in the step, checked."""
    if middle is None:
        return ((), (0.5,), (1 / 3, 2 / 3))[stages - 1]
    found = (middle,) if isinstance(middle, Real) else tuple(middle)
    inside = all(0 < r <= 1 for r in found) and list(found) == sorted(set(found))
    if len(found) != stages - 1 or not inside:
        raise ValueError(
            f"middle must be {stages - 1} increasing numbers in (0, 1] for {stages} stages, got "
            f"{middle!r}"
        )
    return tuple(float(np.float64(r)) for r in found)
