"""Exponential Adams methods: one evaluation a step, polynomials through the last evaluations."""

from jaxdiff.grids import Grid
from jaxdiff.solvers.clocks import (
    INTEGRANDS,
    VARIABLES,
    Level,
    carry,
    check_choice,
    check_order,
    weights,
)
from jaxdiff.solvers.corrector import corrected
from jaxdiff.solvers.tableau import Row, Tableau, Update, assemble, check_ends

HIGHEST_ORDER = 8


def exponential_adams(
    grid: Grid, order: int = 2, integrand: str = "x0", variable: str = "lambda",
    power: float = 1.0, corrector: int = 0, start: str = "ramp", lower_order_final: bool = False,
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
      lower_order_final: lower the orders to ..., 2, 1 over the last steps.

    The corrected method converges at min(order + 1, corrector), where the start allows it. Steps
    from alpha = 0 and to sigma = 0 are of first order where z is infinite there, and that node is
    left out of later polynomials; "eps" needs alpha > 0. Raises ValueError for options other than
    these.
    """
    check_order(order, HIGHEST_ORDER)
    check_choice("integrand", integrand, INTEGRANDS)
    check_choice("variable", variable, VARIABLES)
    check_choice("start", start, ("ramp", "singlestep"))
    if corrector:
        check_order(corrector, HIGHEST_ORDER, "corrector", 2)
    if not power > 0 or (variable == "lambda" and power != 1.0):
        raise ValueError(f"power must be positive, and 1 for 'lambda', got {power!r}")
    check_ends(grid, "exponential_adams", noise=integrand != "eps", data=True)
    steps = grid.steps

    def limit(i: int, wanted: int) -> int:
        """Evaluations that the step from node i may use."""
        if grid.ends[0] and i == 0 and variable in ("lambda", "rho"):
            return 1
        if grid.ends[1] and i == steps - 1 and variable in ("lambda", "kappa"):
            return 1
        return min(wanted, steps - i) if lower_order_final else wanted

    rows, nodes, seen = [], [(0, 0)], []
    for i in range(steps):
        level, end = grid.node(i), grid.node(i + 1)
        # The node at alpha = 0 stays in the history only where z is finite there.
        seen = [level] if limit(0, 2) == 1 and i == 1 and grid.ends[0] else [level, *seen]
        highest = limit(i, order)
        if start == "singlestep" and highest > 1 and len(seen) == 1 and not (grid.ends[0] and i == 0):
            middle = grid.at(grid.lam[i] + 0.5 * (grid.lam[i + 1] - grid.lam[i]))
            first = step(grid, level, middle, seen, integrand, variable, power)
            second = step(grid, level, end, [middle], integrand, variable, power)
            rows.append(Row(level, [first, Update([1.0])]))
            rows.append(Row(middle, [Update([0.0, *second.s], second.m)]))
            seen = [middle, level]
        else:
            rows.append(Row(level, [step(grid, level, end, seen[:highest], integrand, variable, power)]))
        nodes.append((len(rows), 0))
    predictor = assemble(rows, integrand, grid.xp, nodes=nodes)
    if not corrector:
        return predictor
    # A step's corrector uses one evaluation more than a predictor lowered to the same order.
    orders = [min(corrector, limit(i, corrector) + 1) for i in range(steps)]
    return corrected(predictor, grid, orders, integrand, variable, power)


def step(
    grid: Grid, level: Level, end: Level, places: list[Level], integrand: str, variable: str,
    power: float = 1.0,
) -> Update:  # fmt: skip
    """The update from `level` to `end` with the evaluations at `places`, newest first."""
    found = weights(grid, level, end, places, integrand, variable, power)
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

