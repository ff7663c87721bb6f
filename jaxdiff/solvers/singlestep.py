"""DPM-Solver and DPM-Solver++ single-step: exponential Runge-Kutta of order 1, 2 and 3."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxdiff.grids import Grid
from jaxdiff.solvers.ancestral import check_noise_options
from jaxdiff.solvers.clocks import check_choice, check_order
from jaxdiff.solvers.exponential_rk import (
    Scheme,
    check_fraction,
    first_order_row,
    from_blocks,
    stage_rows,
    two_stages,
    two_stages_weak,
)
from jaxdiff.solvers.first_order import x0_clock
from jaxdiff.solvers.tableau import Row, Tableau, assemble, check_ends


def singlestep_plan(
    evaluations: int, order: int = 3, lower_order_final: bool | None = None
) -> list[int]:
    """The order of each step, highest first, that spends exactly `evaluations`.

    Steps of `order` while they fit, then one of what is left. Where nothing is left,
    `lower_order_final` has the last step of `order` give way to steps of order 2 and 1 (order 3) or
    1 and 1 (order 2). None does so for order 3 alone: "DPM-Solver-fast" of the authors' code, and
    k-diffusion's dpm_fast; True is diffusers' default. Raises ValueError for fewer evaluations than
    1 or an order above 3.
    """
    check_order(order, 3)
    check_order(evaluations, 10**6, "evaluations")
    lowered = order == 3 if lower_order_final is None else lower_order_final
    whole, rest = divmod(evaluations, order)
    if rest or not lowered or order == 1:
        return [order] * whole + ([rest] if rest else [])
    return [order] * (whole - 1) + ([2, 1] if order == 3 else [1, 1])


def dpm_solver_singlestep(
    grid: Grid, order: int = 2, integrand: str = "eps", solver_type: str = "dpmsolver",
    r1: float | None = None, r2: float | None = None, plan: Sequence[int] | None = None,
    lower_order_final: bool | None = None, stages: str = "at", eta: float = 0.0,
    s_noise: float = 1.0,
) -> Tableau:  # fmt: skip
    """DPM-Solver-1, -2, -3 (integrand "eps") and DPM-Solver++(2S), (3S) (integrand "x0").

    Lu et al., "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around
    10 Steps" (2022), and "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic
    Models" (2022), with the authors' code. A step of order p makes p evaluations, at lambda, lambda
    + r1 h and lambda + r2 h: an exponential Runge-Kutta method (`exponential_rk`'s "ho2_weak" with
    c2 = r1, "ho3" with c2 = 1/3, c3 = 2/3).

    Arguments:
      order: 1 (DDIM), 2 or 3.
      solver_type: how the last evaluations are weighed (m_1, m_2 those of the stages):
        "dpmsolver"  order 2: phi_1 / (2 r1) times m_1 - m_0; order 3: phi_2 / r2 times m_2 - m_0;
        "taylor"     the integral of the polynomial through all evaluations (diffusers' "heun");
        "midpoint"   diffusers' "midpoint": as "dpmsolver", but the third stage of order 3 is
                     reached by its second-order step.
      r1, r2: places of the stages, fractions of the step in lambda: 1/2 for order 2, 1/3 and 2/3
        for order 3. With r2 other than 2/3 third-order steps are of order 2 ("ho3" is of order 3).
      plan: the order of each step, in place of `order`: `singlestep_plan(evaluations)`, on a grid
        of as many steps (stages "at") or of one step an evaluation ("nodes").
      lower_order_final: with stages "at" the orders end ..., 2, 1 (None: they do not), with "nodes"
        as `singlestep_plan` has them. A last step of order 1 limits the order to 2.
      stages: "at": each interval of the grid is a step, the stages lie inside. "nodes": each
        `order` intervals are one step and the nodes between are the stages, wherever they lie
        (diffusers' singlestep scheduler; the authors' time_uniform and time_quadratic grids). Then
        r1 and r2 follow from the grid, which with order 3 must be smooth in lambda to keep it.
      eta: ancestral noise, >= 0, with stages "at": a step goes past its end, to the level of
        `euler_ancestral` with this eta but not below the last one of the grid with sigma > 0, and
        noise brings it back. None in the step that ends there, or at sigma = 0. k-diffusion's
        sample_dpm_fast with n evaluations is plan = singlestep_plan(n) on `grids.half_log_snr` with
        as many steps.
      s_noise: factor on that noise's standard deviation, >= 0; any but 1 leaves the marginals.

    A step to sigma = 0 is of order 1: its stages go, or with "nodes" belong to a step of their own.
    So is the step from alpha = 0, which "x0" supports. Raises ValueError for other options or a
    plan that does not fit the grid.
    """
    check_order(order, 3)
    check_choice("integrand", integrand, ("eps", "x0"))
    check_choice("solver_type", solver_type, ("dpmsolver", "taylor", "midpoint"))
    check_choice("stages", stages, ("at", "nodes"))
    check_noise_options(grid, "dpm_solver_singlestep", eta, s_noise)
    if eta and stages == "nodes":
        raise ValueError(f"stages='nodes' takes eta = 0, got {eta!r}")
    fractions = _fractions(r1, r2, order, plan, stages)
    check_ends(grid, "dpm_solver_singlestep", noise=integrand == "x0", data=True)
    if stages == "at":
        steps = _steps_at(grid, order, plan, lower_order_final)
    else:
        steps = steps_on_nodes(grid, order, plan, lower_order_final)
    # With noise a step ends past its node, on a path that goes down and up again.
    path = _with_downs(grid, eta) if eta else grid
    if eta:
        steps = [(2 * a, 2 * a + 1, k) for a, _, k in steps]
    blocks = {a: [first_order_row(path, a, b, integrand)] for a, b, k in steps if k == 1}
    for k in (2, 3):
        starts, ends = (np.array([s[j] for s in steps if s[2] == k], int) for j in (0, 1))
        if not len(starts):
            continue
        places, c = None, fractions[k]
        lam, h = path.lam[starts], path.lam[ends] - path.lam[starts]
        if stages == "nodes":
            inner = [starts + j for j in range(1, k)]
            places = [tuple(a[i] for a in grid.node(slice(None))) for i in inner]
            c = tuple((grid.lam[i] - lam) / h for i in inner)
        elif eta:
            places = [grid.at(lam + fraction * h) for fraction in c]
        scheme = _scheme(k, solver_type, *c)
        blocks.update(
            zip(starts.tolist(), stage_rows(path, starts, ends, scheme, integrand, places))
        )
    ordered = [blocks[a] for a, _, _ in steps]
    if eta:
        return _with_noise(grid, path, ordered, integrand, s_noise)
    if stages == "at":
        return from_blocks(grid, ordered, integrand)
    # One row an interval: the solution at a stage's node is what the step has there.
    return from_blocks(grid, [[row] for block in ordered for row in block], integrand)


def _with_downs(grid: Grid, eta: float) -> Grid:
    """Node 2 i is the grid's i, 2 i + 1 (at the alpha of i + 1) is where step i's noise begins."""
    xp, last = grid.xp, grid.steps - int(grid.ends[1])
    if eta > 1 and xp is not np:
        raise ValueError(f"eta above 1 needs a grid with nodes known on the host, got eta={eta!r}")
    nodes = []
    for i in range(grid.steps):
        t, alpha, sigma = grid.node(i + 1)
        if i + 1 < last:
            shrink = sigma / alpha * grid.alpha[i] / grid.sigma[i]
            share = xp.maximum(1.0 - eta**2 + (eta * shrink) ** 2, 0.0)
            floor = alpha * grid.sigma[last] / grid.alpha[last]
            sigma = xp.maximum(sigma * xp.sqrt(share), floor)
        nodes += [grid.node(i), (t, alpha, sigma)]
    t, alpha, sigma = (xp.stack(column) for column in zip(*nodes))
    return dataclasses.replace(grid, t=t, alpha=alpha, sigma=sigma)


def _with_noise(
    grid: Grid, path: Grid, blocks: list[list[Row]], integrand: str, s_noise: float
) -> Tableau:
    """The steps of `path`, each with the noise that leads from its end to the grid's node."""
    xp, last, rows, nodes = grid.xp, grid.steps - int(grid.ends[1]), [], [(0, 0)]
    for i, block in enumerate(blocks):
        *inner, row = block
        if i + 1 < last:
            up, down = grid.sigma[i + 1], path.sigma[2 * i + 1]
            noise = s_noise * xp.sqrt((up - down) * (up + down))
            row = row._replace(updates=[row.updates[0]._replace(z=noise)], clock=x0_clock(grid, i))
        rows += [*inner, row]
        nodes.append((len(rows), 0))
    return assemble(rows, integrand, xp, nodes=nodes, brownian="x0")


def _fractions(
    r1: Any, r2: Any, order: int, plan: Any, stages: str
) -> dict[int, tuple[Any, ...]]:
    for name, value in (("r1", r1), ("r2", r2)):
        if value is not None:
            if stages == "nodes":
                raise ValueError(f"stages='nodes' takes {name} from the grid, got {value!r}")
            check_fraction(name, value)
    if plan is None and r2 is not None and order != 3:
        raise ValueError(f"r2 is for order 3, got r2={r2!r} with order {order}")
    r2 = 2 / 3 if r2 is None else r2
    third = 1 / 3 if r1 is None else r1
    if third == r2:
        raise ValueError(f"r1 and r2 must differ, got {r1!r} and {r2!r}")
    return {2: (0.5 if r1 is None else r1,), 3: (third, r2)}


def _scheme(order: int, solver_type: str, r1: Any, r2: Any = None) -> Scheme:
    if order == 2:
        return (two_stages if solver_type == "taylor" else two_stages_weak)(r1)
    if solver_type == "midpoint":
        a32 = ((0.5 * r2**2 / r1, 1, r2),)
    else:
        a32 = ((r2**2 / r1, 2, r2),)
    if solver_type != "taylor":
        return Scheme((r1, r2), ((a32,),), ((), ((1.0 / r2, 2, 1.0),)))
    near, far = 1.0 / (r1 * (r2 - r1)), 1.0 / (r2 * (r2 - r1))
    return Scheme((r1, r2), ((a32,),), (
        ((r2 * near, 2, 1.0), (-2.0 * near, 3, 1.0)),
        ((-r1 * far, 2, 1.0), (2.0 * far, 3, 1.0)),
    ))  # fmt: skip


Step = tuple[int, int, int]  # first node, last node, order


def _steps_at(grid: Grid, order: int, plan: Any, lower_order_final: bool | None) -> list[Step]:
    count = grid.steps
    orders = [min(order, count - i) if lower_order_final else order for i in range(count)]
    if plan is not None:
        orders = _checked(plan)
        if len(orders) != count:
            raise ValueError(f"the plan has {len(orders)} steps, the grid {count}")
    if grid.ends[0]:
        orders[0] = 1
    if grid.ends[1]:
        orders[-1] = 1
    return [(i, i + 1, k) for i, k in enumerate(orders)]


def steps_on_nodes(
    grid: Grid, order: int, plan: Any, lower_order_final: bool | None
) -> list[Step]:
    """Steps of `order` intervals each, the nodes between being their stages."""
    count = grid.steps
    orders = singlestep_plan(count, order, lower_order_final) if plan is None else _checked(plan)
    if sum(orders) != count:
        raise ValueError(f"the plan makes {sum(orders)} evaluations, the grid has {count} steps")
    # An interval of infinite half-log-SNR is a step of its own.
    if grid.ends[1] and orders[-1] > 1:
        orders = [*orders[:-1], orders[-1] - 1, 1]
    if grid.ends[0] and orders[0] > 1:
        orders = [1, orders[0] - 1, *orders[1:]]
    bounds = np.cumsum([0, *orders]).tolist()
    return [(a, b, k) for a, b, k in zip(bounds, bounds[1:], orders)]


def _checked(plan: Sequence[int]) -> list[int]:
    orders = list(plan)
    for k in orders:
        check_order(k, 3, "an order of the plan")
    if not orders:
        raise ValueError("the plan is empty")
    return orders
