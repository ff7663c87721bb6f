"""Exponential Adams methods: one evaluation a step, polynomials through the last evaluations."""

import numpy as np

from jaxdiff.arrays import is_concrete
from jaxdiff.grids import Grid
from jaxdiff.solvers.clocks import (
    INTEGRANDS,
    VARIABLES,
    Level,
    by_age,
    carry,
    check_choice,
    check_order,
    half_log_snr_at,
    own_clock,
    scale,
    weights,
)
from jaxdiff.solvers.corrector import corrected
from jaxdiff.solvers.tableau import Row, Tableau, Update, assemble, check_ends

HIGHEST_ORDER = 8


def exponential_adams(
    grid: Grid, order: int = 2, integrand: str = "x0", variable: str = "lambda",
    power: float = 1.0, corrector: int = 0, start: str = "ramp", lower_order_final: bool = False,
    blend: float = 1.0,
) -> Tableau:  # fmt: skip
    """Exponential Adams-Bashforth of any order, and Adams-Moulton as its corrector.

    With the integrand m, its scale and its clock as in `jaxdiff.solvers.clocks`,

        x' = (scale' / scale) x + scale' int P(z) dclock,

    P the polynomial in z = variable^power through the last `order` evaluations, integrated exactly.
    DEIS (eps in t or rho), linear multistep in sigma (eps in rho), DPM-Solver++ (x0 in lambda),
    DPM-Solver in eps, azula's x0, eps and v methods (lambda) are settings of it; the variable matters
    as much as the order (Zhang & Chen, "DEIS", 2023; Lu et al., "DPM-Solver++", 2022). One
    evaluation a step.

    Arguments:
      order: evaluations that the predictor uses, 1 to 8: its order, once the start allows it.
      integrand: "x0", "eps", "flow" or "v".
      variable: the variable z of the polynomial: "lambda", "t", "rho" = sigma / alpha, "kappa" =
        alpha / sigma, "tau" = sigma / (alpha + sigma), "angle" = atan2(sigma, alpha). "t" between
        the nodes of a grid from arrays is interpolated.
      power: raises it to a power, say t^0.5; 1 for "lambda".
      corrector: evaluations that the corrector uses, the new one included; 0 for none, else 2 to 8.
        It corrects each step but the last with the evaluation made at its end, and the next step
        leaves the corrected state: no evaluation more.
      start: "ramp" grows the orders 1, 2, ... over the first steps, which leaves an error of order
        h^2 (h^3 corrected): the order is at most 2 (3 corrected). "singlestep" makes the first
        step with the exponential midpoint method, one evaluation more: at most 3 (4 corrected).
        "runge_kutta" makes the first order - 1 steps with the classical fourth-order method in the
        integrand's own clock, three evaluations more each, uncorrected: at most 5.
      lower_order_final: lower the orders to ..., 2, 1 over the last steps.
      blend: share of the predictor's polynomial of full order, the rest being that of one order
        less, in [0, 1]. Between the two the leading error has the factor 1 - blend and the method
        converges at order - 1; with few steps, where the last difference is mostly noise, it is
        often the better one.

    The settings `flow_pc_2` and `flow_pc_3` interpolate the flow eps - x0 in angle and correct with
    order 4. The flow's scale is alpha + sigma, its integral along a step to pure noise or data is
    finite, and where either dominates it is nearly constant, so that one polynomial serves both ends
    of the trajectory, where x0 and eps each fit one. With few evaluations the blend keeps the
    predictor stable, and the corrector returns the order at no cost.

    The corrected method converges at min(order + 1, corrector), with blend < 1 at min(order,
    corrector), where the start allows it. From alpha = 0 no start keeps an order: stages would stand
    in an infinite step. Steps from alpha = 0 and to sigma = 0 are of first order where z is infinite
    there, and that node is left out of later polynomials; "eps" needs alpha > 0. Raises ValueError
    for options other than these, and for repeated times with "t".
    """
    check_order(order, HIGHEST_ORDER)
    check_choice("integrand", integrand, INTEGRANDS)
    check_choice("variable", variable, VARIABLES)
    check_choice("start", start, ("ramp", "singlestep", "runge_kutta"))
    if corrector:
        check_order(corrector, HIGHEST_ORDER, "corrector", 2)
    if not power > 0 or (variable == "lambda" and power != 1.0):
        raise ValueError(f"power must be positive, and 1 for 'lambda', got {power!r}")
    if not 0.0 <= blend <= 1.0 or (order == 1 and blend != 1.0):
        raise ValueError(f"blend must lie in [0, 1], and be 1 for order 1, got {blend!r}")
    if variable == "t" and is_concrete(grid.t):
        repeated = np.flatnonzero(np.diff(np.asarray(grid.t)[:-1]) == 0)
        if repeated.size:
            raise ValueError(
                f"variable 't' needs times that differ, but nodes {repeated[0]} and {repeated[0] + 1} "
                f"are both at t = {grid.t[repeated[0]]:g}: interpolate in another variable"
            )
    check_ends(grid, "exponential_adams", noise=integrand != "eps", data=True)
    steps = grid.steps

    def limit(i: int, wanted: int) -> int:
        """Evaluations that the step from node i may use."""
        if grid.ends[0] and i == 0 and variable in ("lambda", "rho"):
            return 1
        if grid.ends[1] and i == steps - 1 and variable in ("lambda", "kappa"):
            return 1
        return min(wanted, steps - i) if lower_order_final else wanted

    # Levels of the evaluations so far, newest first; None for a stage that no polynomial uses.
    rows, nodes, seen, started = [], [(0, 0)], [], []
    for i in range(steps):
        level, end = grid.node(i), grid.node(i + 1)
        # The node at alpha = 0 stays in the history only where z is finite there.
        seen = [level] if limit(0, 2) == 1 and i == 1 and grid.ends[0] else [level, *seen]
        seen = seen[: 4 * HIGHEST_ORDER]
        highest = limit(i, order)
        # Stages stand within the step, so not in one of infinite half-log-SNR.
        ends = grid.ends[0] and i == 0, grid.ends[1] and i == steps - 1
        finite = not any(ends)
        known = sum(place is not None for place in seen)
        if start == "singlestep" and highest > 1 and known == 1 and finite:
            middle = grid.at(grid.lam[i] + 0.5 * (grid.lam[i + 1] - grid.lam[i]))
            first = step(grid, level, middle, seen[:1], integrand, variable, power)
            second = step(grid, level, end, [middle], integrand, variable, power)
            rows.append(Row(level, [first, Update([1.0])]))
            rows.append(Row(middle, [Update([0.0, *second.s], second.m)]))
            seen = [middle, *seen]
        elif start == "runge_kutta" and highest > known and finite:
            rows += _classical_step(grid, level, end, integrand)
            seen = [None, None, None, *seen]
            started.append(i)
        else:
            ages = [age for age, place in enumerate(seen) if place is not None][:highest]
            places = [seen[age] for age in ages]
            update = step(grid, level, end, places, integrand, variable, power, ends)
            m = update.m
            if blend != 1.0 and len(places) == order:
                lower = step(grid, level, end, places[:-1], integrand, variable, power, ends).m
                m = [blend * a + (1.0 - blend) * b for a, b in zip(m, [*lower, 0.0])]
            rows.append(Row(level, [Update(update.s, by_age(ages, m))]))
        nodes.append((len(rows), 0))
    predictor = assemble(rows, integrand, grid.xp, nodes=nodes)
    if not corrector:
        return predictor
    # A step's corrector uses one evaluation more than a predictor lowered to the same order.
    orders = [
        0 if i in started else min(corrector, limit(i, corrector) + 1) for i in range(steps)
    ]
    stages = start == "singlestep"
    return corrected(predictor, grid, orders, integrand, variable, power, stages)


def _classical_step(grid: Grid, level: Level, end: Level, integrand: str) -> list[Row]:
    """Four rows: the classical Runge-Kutta method for dy / dclock = g m, from `level` to `end`."""
    xp = grid.xp
    (clock, start), (_, stop) = own_clock(xp, integrand, level), own_clock(xp, integrand, end)
    h, middle = stop - start, grid.at(half_log_snr_at(xp, clock, 0.5 * (start + stop)))
    g = [1.0 if integrand != "v" else 1.0 / scale(xp, "v", at) for at in (level, middle, end)]
    size = [scale(xp, integrand, at) for at in (level, middle, end)]
    half, whole = size[1] / size[0], size[2] / size[0]
    keep = Update([0.0, 1.0])
    return [
        Row(level, [Update([half], [0.5 * h * size[1] * g[0]]), Update([1.0])]),
        Row(middle, [Update([0.0, half], [0.5 * h * size[1] * g[1]]), keep]),
        Row(middle, [Update([0.0, whole], [h * size[2] * g[1]]), keep]),
        Row(end, [Update(
            [0.0, whole],
            [h * size[2] / 6 * part for part in (g[2], 2 * g[1], 2 * g[1], g[0])],
        )]),
    ]  # fmt: skip


def step(
    grid: Grid, level: Level, end: Level, places: list[Level], integrand: str, variable: str,
    power: float = 1.0, ends: tuple[bool, bool] | None = None,
) -> Update:  # fmt: skip
    """The update from `level` to `end` with the evaluations at `places`, newest first."""
    found = weights(grid, level, end, places, integrand, variable, power, ends)
    return Update([carry(grid.xp, integrand, level, end)], found)


def deis(
    grid: Grid, order: int = 3, variable: str = "t", start: str = "ramp",
    lower_order_final: bool = False,
) -> Tableau:  # fmt: skip
    """DEIS: exponential Adams-Bashforth in eps with polynomials in t (tAB) or rho (rhoAB).

    Zhang & Chen, "Fast Sampling of Diffusion Models with Exponential Integrator" (2023), whose
    tAB-r and rhoAB-r have order r + 1: order 1 is DDIM. The paper recommends `grids.quadratic`.
    diffusers' DEIS interpolates in "lambda". Options as in `exponential_adams`.
    """
    return exponential_adams(
        grid, order, "eps", variable, start=start, lower_order_final=lower_order_final
    )


def lms(grid: Grid, order: int = 4) -> Tableau:
    """Linear multistep in sigma: Adams-Bashforth for dy / drho = eps on any nodes.

    k-diffusion's LMS sampler, for every process; the same map as rhoAB-DEIS of that order. As in
    `exponential_adams` with integrand "eps" and variable "rho".
    """
    return exponential_adams(grid, order, "eps", "rho")

