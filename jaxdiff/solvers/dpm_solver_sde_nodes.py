"""SDE-DPM-Solver++ single-step on the grid's own nodes, as diffusers has it."""

from typing import Any

from jaxdiff.grids import Grid
from jaxdiff.solvers.ancestral import check_noise_options
from jaxdiff.solvers.clocks import check_choice, check_order
from jaxdiff.solvers.dpm_solver import differences
from jaxdiff.solvers.dpm_solver_sde import SOLVER_TYPES
from jaxdiff.solvers.phi import phis
from jaxdiff.solvers.reverse_sde import step, step_clock
from jaxdiff.solvers.singlestep import steps_on_nodes
from jaxdiff.solvers.tableau import Row, Tableau, Update, assemble, check_ends


def dpm_solver_pp_sde_singlestep(
    grid: Grid, order: int = 3, eta: float = 1.0, s_noise: float = 1.0,
    solver_type: str = "heun", variant: str = "corrected",
    lower_order_final: bool | None = None,
) -> Tableau:  # fmt: skip
    """SDE-DPM-Solver++ of order 1, 2 or 3 whose stages are grid nodes.

    Each `order` intervals are one step, from node a; row j of it goes from a to node a + j + 1 with
    the evaluations m_0 (at a) to m_j: with h = lambda_{a+j+1} - lambda_a, H = (1 + eta) h, D and D_2
    their first and second divided differences at a in units of h (as far as there are any),

        x' = (sigma' / sigma_a) exp(-eta h) x_a + alpha' H (phi_1(-H) m_0 + phi_2(-H) D
             + 2 phi_3(-H) D_2) + noise of variance sigma'^2 (1 - exp(-2 eta h))

    the first form of `jaxdiff.solvers.dpm_solver_sde`. One evaluation an interval, weak order
    min(order, 2), every grid end; a step to sigma = 0 or from alpha = 0 is first order. eta = 0 is
    `dpm_solver_singlestep(grid, order, "x0", "taylor", stages="nodes")`. The idea is that of
    diffusers' DPMSolverSinglestepScheduler with sde-dpmsolver++, which no paper derives.

    Arguments:
      order: 1, 2 or 3.
      eta, s_noise: as in `dpm_solver_pp_sde_multistep`.
      solver_type: "heun" as above. "midpoint": phi_1 / 2 in place of phi_2 in second-order rows, and
        third-order ones without D_2, with D through m_0 and m_2 alone.
      variant: "corrected": the noises of one step's rows are sums of increments of one path.
        "diffusers": they are independent (weak order 1), and in third-order rows with "heun" the 1 of
        2 phi_3(-H) H = 1 - 2 phi_2(-H) has the wrong sign: the samples' variance does not tend to
        the data's. No clock.
      lower_order_final: see `singlestep_plan`.
    """
    name = "dpm_solver_pp_sde_singlestep"
    check_order(order, 3)
    check_choice("solver_type", solver_type, SOLVER_TYPES)
    check_choice("variant", variant, ("corrected", "diffusers"))
    check_noise_options(grid, name, eta, s_noise)
    check_ends(grid, name, noise=True, data=True)
    xp, lam = grid.xp, grid.lam
    rows = []
    for a, _, count in steps_on_nodes(grid, order, None, lower_order_final):
        for j in range(count):
            end = a + j + 1
            _, alpha1, sigma1 = grid.node(end)
            if count == 1:
                carry, weights, noise = step(grid, a, [grid.node(a)], "x0", eta**0.5)
                noise = None if noise is None else s_noise * noise
                rows.append(Row(grid.node(a), [Update([carry], weights, noise)],
                                step_clock(grid, a, "x0")))  # fmt: skip
                continue
            h = lam[end] - lam[a]
            carry = sigma1 / grid.sigma[a] * xp.exp(-eta * h)
            places = [lam[a + i] for i in range(j + 1)]
            weights = _weights((1.0 + eta) * h, h, places, solver_type, variant)
            weights = [alpha1 * w for w in reversed(weights)]
            # Registers: the state, the step's start, and the noise so far over sigma exp(-eta lambda).
            old = [0.0, carry, sigma1 * xp.exp(-eta * h)] if j else [carry]
            if not eta:
                rows.append(Row(grid.node(a + j), [Update(old[:2], weights), _keep(j)]))
                continue
            independent = variant == "diffusers"
            begin = lam[a] if independent else lam[end - 1]
            size = s_noise * xp.sqrt(-xp.expm1(-2.0 * eta * (lam[end] - begin)))
            if independent:
                old[2:] = [0.0] * len(old[2:])
            path = Update([0.0, 0.0, 1.0 if j else 0.0], (), size * xp.exp(eta * h))
            update = Update(old, weights, sigma1 * size)
            clock = step_clock(grid, end - 1, "x0")
            rows.append(Row(grid.node(a + j), [update, _keep(j), path], clock))
    return assemble(
        rows, "x0", xp, brownian="x0" if eta and variant == "corrected" else None
    )  # fmt: skip


def _keep(j: int) -> Update:
    """The register that holds the step's start."""
    return Update([0.0, 1.0] if j else [1.0])


def _weights(H: Any, h: Any, places: list[Any], solver_type: str, variant: str) -> list[Any]:
    """Of the evaluations at half-log-SNRs `places`, the step's start first."""
    phi_1, phi_2, phi_3 = phis(3, -H)
    if len(places) == 1:
        return [H * phi_1]
    r = (places[-1] - places[0]) / h
    if len(places) == 2 or solver_type == "midpoint":
        slope = 0.5 * phi_1 if len(places) == 2 and solver_type == "midpoint" else phi_2
        return [H * (phi_1 - slope / r), *[0.0] * (len(places) - 2), H * slope / r]
    first, second = differences(h, places)
    curve = 2.0 * H * phi_3 - (2.0 if variant == "diffusers" else 0.0)
    values = (1.0, 0.0, 0.0)
    return [
        H * (phi_1 * v + phi_2 * f) + curve * c for v, f, c in zip(values, first, second)
    ]  # fmt: skip
