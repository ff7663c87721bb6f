"""DPM-Solver and DPM-Solver++ multistep: exponential Adams-Bashforth in half-log-SNR.

The exact solution of the probability flow from node i to i + 1, h = lambda' - lambda, is

    x' = (sigma' / sigma) x + alpha' int_0^h exp(-(h - s)) x0(lambda + s) ds
       = (alpha' / alpha) x - sigma' int_0^h exp(h - s) eps(lambda + s) ds

and x0 or eps is replaced by the polynomial through the last evaluations.
"""

from typing import Any

from jaxdiff.grids import Grid
from jaxdiff.solvers.clocks import Level, carry, check_choice, check_order, weights
from jaxdiff.solvers.phi import interpolation_weights, phi
from jaxdiff.solvers.tableau import Row, Tableau, Update, assemble, check_ends


def dpm_solver_pp_multistep(
    grid: Grid, order: int = 2, solver_type: str = "midpoint", variant: str = "corrected",
    lower_order_final: bool | None = None, euler_at_final: bool = False, start: str = "ramp",
) -> Tableau:  # fmt: skip
    """DPM-Solver++ multistep of order 1, 2 or 3: "DPM++ 1M", "2M", "3M".

    Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models"
    (2022), algorithm 2. One evaluation a step.

    Arguments:
      order: 1 (DDIM), 2 or 3.
      solver_type: the second-order step: "midpoint", the paper's, which weighs the difference of the
        last two evaluations by h phi_1(-h) / 2; or "heun", the exact integral's h phi_2(-h).
      variant: of the third-order step. "corrected" integrates the quadratic through the last three
        evaluations exactly. "published" is the formula of the authors' code (and of diffusers and
        k-diffusion after it), whose second-difference term lacks a factor 2: it converges at order 2.
      lower_order_final: lower the order to 2 and 1 over the last steps, for stability with few steps;
        None does so below 15 steps, as the authors' code does. A step to sigma = 0 is always of order 1.
      euler_at_final: first order in the last step.
      start: "ramp" grows the order 1, 2, 3 over the first steps: its first step leaves an error of
        order h^2, so the order is at most 2. "singlestep" makes the first step with
        DPM-Solver++(2S) at the midpoint in lambda (one evaluation more), which keeps order 3.

    Every grid end is supported; from alpha = 0 the first step is first order and that node is left
    out of later interpolation.
    """
    return _multistep(
        grid, order, solver_type, variant, lower_order_final, euler_at_final, start, "x0"
    )


def dpm_solver_multistep(
    grid: Grid, order: int = 2, solver_type: str = "midpoint", variant: str = "corrected",
    lower_order_final: bool | None = None, euler_at_final: bool = False, start: str = "ramp",
) -> Tableau:  # fmt: skip
    """DPM-Solver multistep of order 1, 2 or 3: the same in the noise prediction.

    Lu et al., "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around
    10 Steps" (2022), and the authors' code, where `solver_type` "midpoint" is called dpmsolver and
    "heun" taylor. Arguments as in `dpm_solver_pp_multistep`; a grid from alpha = 0 is refused. With
    guidance the data prediction is the stabler of the two.
    """
    return _multistep(
        grid, order, solver_type, variant, lower_order_final, euler_at_final, start, "eps"
    )


def _multistep(
    grid: Grid, order: int, solver_type: str, variant: str, lower_order_final: bool | None,
    euler_at_final: bool, start: str, integrand: str,
) -> Tableau:  # fmt: skip
    check_order(order, 3)
    check_choice("solver_type", solver_type, ("midpoint", "heun"))
    check_choice("variant", variant, ("corrected", "published"))
    check_choice("start", start, ("ramp", "singlestep"))
    name = "dpm_solver_pp_multistep" if integrand == "x0" else "dpm_solver_multistep"
    check_ends(grid, name, noise=integrand == "x0", data=True)
    steps, lam = grid.steps, grid.lam
    lowered = steps < 15 if lower_order_final is None else lower_order_final
    rows, nodes, seen = [], [(0, 0)], []
    for i in range(steps):
        infinite = (grid.ends[0] and i == 0) or (grid.ends[1] and i == steps - 1)
        limit = 1 if infinite or (euler_at_final and i == steps - 1) else order
        if lowered:
            limit = min(limit, steps - i)
        seen = [] if grid.ends[0] and i <= 1 else seen
        seen = [lam[i], *seen][:3]
        if start == "singlestep" and limit > 1 and len(seen) == 1:
            middle = grid.at(lam[i] + 0.5 * (lam[i + 1] - lam[i]))
            rows += _second_order_singlestep(grid, i, middle, integrand)
            seen = [lam[i] + 0.5 * (lam[i + 1] - lam[i]), *seen]
        else:
            used = seen[: min(limit, len(seen))]
            rows.append(Row(grid.node(i), [_step(grid, i, used, solver_type, variant, integrand)]))
        nodes.append((len(rows), 0))
    return assemble(rows, integrand, grid.xp, nodes=nodes)


def _step(
    grid: Grid, i: int, used: list[Any], solver_type: str, variant: str, integrand: str
) -> Update:
    """The step from node i with evaluations at half-log-SNRs `used`, newest (node i's) first."""
    level, end = grid.node(i), grid.node(i + 1)
    kept = carry(grid.xp, integrand, level, end)
    if len(used) == 1:
        return Update([kept], weights(grid, level, end, [level], integrand))
    h = grid.lam[i + 1] - grid.lam[i]
    sign, factor = (-1.0, end[1]) if integrand == "x0" else (1.0, -end[2])
    if len(used) == 2 and solver_type == "midpoint":
        r = (used[0] - used[1]) / h
        whole = h * phi(1, sign * h)
        found = [whole * (1 + 0.5 / r), -whole * 0.5 / r]
    elif len(used) == 3 and variant == "published":
        found = _published_third_order(h, used, sign)
    else:
        found = list(interpolation_weights([lam - used[0] for lam in used], h, sign))
    return Update([kept], [factor * weight for weight in found])


def differences(h: Any, used: list[Any]) -> tuple[list[Any], list[Any]]:
    """First and second differences in units of h, as coefficients of (m_0, m_1, m_2).

    `used` are the half-log-SNRs of the three evaluations, newest first.
    """
    r0, r1 = (used[0] - used[1]) / h, (used[1] - used[2]) / h
    near, far = (1 / r0, -1 / r0, 0.0), (0.0, 1 / r1, -1 / r1)
    second = [(a - b) / (r0 + r1) for a, b in zip(near, far)]
    return [a + r0 * c for a, c in zip(near, second)], second


def _published_third_order(h: Any, used: list[Any], sign: float) -> list[Any]:
    first, second = differences(h, used)
    value = (1.0, 0.0, 0.0)
    return [
        h * (phi(1, sign * h) * v + phi(2, sign * h) * f + phi(3, sign * h) * c)
        for v, f, c in zip(value, first, second)
    ]


def _second_order_singlestep(grid: Grid, i: int, middle: Level, integrand: str) -> list[Row]:
    """DPM-Solver++(2S) with r = 1/2: two rows, the first to the midpoint in half-log-SNR."""
    level, end, xp = grid.node(i), grid.node(i + 1), grid.xp
    to_middle = Update(
        [carry(xp, integrand, level, middle)], weights(grid, level, middle, [level], integrand)
    )
    to_end = Update(
        [0.0, carry(xp, integrand, level, end)], weights(grid, level, end, [middle], integrand)
    )
    return [Row(level, [to_middle, Update([1.0])]), Row(middle, [to_end])]
