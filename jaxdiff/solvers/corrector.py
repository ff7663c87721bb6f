"""A corrector over any predictor, at no evaluation more."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxdiff.arrays import is_concrete, namespace
from jaxdiff.grids import Grid
from jaxdiff.predictions import PREDICTIONS, affine
from jaxdiff.solvers.clocks import (
    INTEGRANDS,
    VARIABLES,
    Level,
    by_age,
    carry,
    check_choice,
    check_order,
    weights,
)
from jaxdiff.solvers.tableau import Tableau

Rule = Callable[[Level, Level, list[Level], bool], Sequence[Any]]


def corrected(
    tableau: Tableau, grid: Grid, order: int | Sequence[int] = 2, integrand: str = "x0",
    variable: str = "lambda", power: float = 1.0, stages: bool = False,
    ramp: bool = True,
) -> Tableau:  # fmt: skip
    """`tableau` with each step but the last corrected by the evaluation made at its end.

    The state at node i is replaced, before anything else uses it, by

        x_i = (scale_i / scale_{i-1}) x_{i-1} + scale_i int P(z) dclock,

    P through the evaluation at the predicted x_i and those before it, x_{i-1} corrected itself:
    Adams-Moulton, UniPC's corrector (Zhao et al. 2023) for
    a method of any kind. A predictor of order p becomes one of order min(p + 1, order), but with
    `ramp` 3 at most, where the trajectory is not smooth from the start.

    Arguments:
      tableau: a deterministic sampler on `grid` whose integrand is `integrand`, with the solution
        of every node in s_0.
      order: evaluations that P goes through, the new one included (at least 2), as far as there are
        that many; or one number for each step, 0 for a step that is not corrected.
      integrand, variable, power: as in `exponential_adams`.
      stages: whether evaluations between nodes count. Those of a single-step method stand at states
        of low order, which costs its order; a start's few do not.
      ramp: whether the first steps, which have fewer evaluations behind them than `order`, are
        corrected with those; False for a predictor whose order is high from the first step on.

    Nodes where z is infinite are left out, and a step from one is not corrected. Raises ValueError
    for a stochastic tableau, one on another grid, or one of another integrand. Of a traced tableau
    (an argument of jax.jit) grid and integrand are not seen, and only one with a single register
    and one evaluation a step is taken: which rows stand at nodes must be known.
    """
    check_choice("integrand", integrand, INTEGRANDS)
    check_choice("variable", variable, VARIABLES)
    orders = _orders(order, grid.steps)

    def rule(level: Level, end: Level, places: list[Level], pure_noise: bool) -> Sequence[Any]:
        return weights(grid, level, end, places, integrand, variable, power, (pure_noise, False))

    infinite = ("lambda", "rho") if not grid.backward else ()
    return correct(tableau, grid, orders, integrand, rule, variable in infinite, stages, ramp)


def _orders(order: Any, steps: int) -> list[int]:
    orders = [order] * steps if np.ndim(order) == 0 else list(order)
    if len(orders) != steps:
        raise ValueError(f"order must be one number or {steps}, got {len(orders)}")
    for number in orders:
        if number != 0:
            check_order(number, 10**6, "a corrector's order", 2)
    return orders


def correct(
    tableau: Tableau, grid: Grid, orders: Sequence[int], integrand: str, rule: Rule,
    skip_pure_noise: bool, stages: bool = False, ramp: bool = True,
) -> Tableau:  # fmt: skip
    """`corrected` with a step's weights from `rule(level, end, places, whether level has alpha = 0)`.

    Places and weights are newest first. `skip_pure_noise` leaves out the evaluation at a node with
    alpha = 0.
    """
    *rows_at, end_row = _rows_at_nodes(tableau, grid, integrand)
    xp = namespace(tableau, grid.t, grid.alpha, grid.sigma)
    levels = [(tableau.t[r], tableau.alpha[r], tableau.sigma[r]) for r in range(tableau.rows)]
    for i, row in enumerate(rows_at):  # the same, but known where only the tableau is traced
        levels[row] = grid.node(i)
    registers = tableau.registers
    plan: dict[int, tuple[Any, Sequence[Any]]] = {}
    for i in range(1, grid.steps):
        pure_noise = grid.ends[0] and i == 1
        if not orders[i - 1] or (pure_noise and skip_pure_noise):
            continue
        row, first = rows_at[i], 1 if grid.ends[0] and skip_pure_noise else 0
        used = [r for r in range(row, first - 1, -1) if stages or r in rows_at][: orders[i - 1]]
        if not ramp and len(used) < orders[i - 1]:
            continue
        _check_distinct(tableau, used)
        level, end = grid.node(i - 1), grid.node(i)
        found = rule(level, end, [levels[r] for r in used], pure_noise)
        ages = [row - r for r in used]
        plan[row] = carry(xp, integrand, level, end), by_age(ages, found, xp.zeros(()))
    if not plan:
        return tableau
    history = max([tableau.history, *(len(found) for _, found in plan.values())])
    one, none = xp.ones(()), xp.zeros(())

    def grown(values: Any, width: int) -> list[Any]:
        return [*values, *([none] * (width - len(values)))]

    a, b = [], []
    for r in range(tableau.rows):
        own_a = [grown(list(tableau.A[r, j]), registers + 1) for j in range(registers)]
        own_b = [grown(list(tableau.B[r, j, :, 0]), history) for j in range(registers)]
        # What stands for s_0 from here on, in old registers, kept register and integrands.
        if r in plan:
            factor, found = plan[r]
            state, kept = grown([none] * registers + [factor], registers + 1), grown(found, history)
        elif r in rows_at:
            state, kept = grown([one], registers + 1), grown([], history)
        else:  # between two nodes the kept state waits
            a.append([*own_a, [*([none] * registers), one]])
            b.append([*own_b, grown([], history)])
            continue
        for j in range(registers):
            share = own_a[j][0]
            own_a[j] = [x + share * y for x, y in zip([none, *own_a[j][1:]], state)]
            own_b[j] = [x + share * y for x, y in zip(own_b[j], kept)]
        a.append([*own_a, state])
        b.append([*own_b, kept])
    pack = lambda rows: xp.stack([xp.stack([xp.stack(u) for u in row]) for row in rows])  # noqa: E731
    kept_at = [(r + 1, registers) for r in rows_at[1:]]
    nodes = np.array([(rows_at[0], 0), *kept_at, (end_row, 0)], np.int32)
    return dataclasses.replace(
        tableau, A=pack(a), B=pack(b)[..., None], nodes=nodes,
        start=dataclasses.replace(
            tableau.start, S=xp.concatenate([tableau.start.S, tableau.start.S[:1]])
        ),
        registers=registers + 1, history=history,
    )  # fmt: skip


def _check_distinct(tableau: Tableau, rows: Sequence[int]) -> None:
    """Raise ValueError where two evaluations of one polynomial stand at one level."""
    if is_concrete(tableau.alpha, tableau.sigma):
        levels = [(float(tableau.alpha[r]), float(tableau.sigma[r])) for r in rows]
        if len(set(levels)) < len(levels):
            raise ValueError(
                "the tableau evaluates twice at one level, and a polynomial takes one of them: give "
                "stages=False"
            )


def _rows_at_nodes(tableau: Tableau, grid: Grid, integrand: str) -> list[int]:
    """The rows executed at each node: the next one evaluates there. Raises for other tableaux."""
    if tableau.stochastic or tableau.d is not None or tableau.outputs != 1:
        raise ValueError("a corrector takes a deterministic tableau of one output")
    if np.ndim(tableau.A) != 3:
        raise ValueError("a corrector takes a tableau whose coefficients are numbers")
    if is_concrete(tableau.nodes):
        nodes = np.asarray(tableau.nodes)
    elif tableau.registers == 1 and tableau.rows == grid.steps:
        nodes = np.array([(i, 0) for i in range(tableau.nodes.shape[0])])  # no others are possible
    else:
        raise ValueError(
            "a corrector must know which rows stand at the grid's nodes, and of a traced tableau of "
            f"{tableau.registers} registers and {tableau.rows} rows for {grid.steps} steps it does "
            "not: correct it outside of jax.jit, or build it inside from the traced grid"
        )
    if nodes.shape[0] != len(grid) or np.any(nodes[:, 1] != 0):
        raise ValueError(
            f"a corrector takes a tableau with the solution of each of the grid's {len(grid)} nodes "
            f"in s_0, got nodes {nodes.tolist()}"
        )
    rows = nodes[:, 0].tolist()
    if is_concrete(tableau, grid.t, grid.alpha, grid.sigma):
        for i, row in enumerate(rows[:-1]):
            if not np.isclose(tableau.alpha[row] * grid.sigma[i], tableau.sigma[row] * grid.alpha[i]):
                raise ValueError(f"row {row} of the tableau does not evaluate at node {i} of the grid")
        column = PREDICTIONS.index("v")
        u, w = affine("v", integrand, np.asarray(tableau.alpha), np.asarray(tableau.sigma))
        same = np.allclose(tableau.u[:, 0, column], u) and np.allclose(tableau.w[:, 0, column], w)
        if not same:
            raise ValueError(f"the tableau's integrand is not {integrand!r}")
    return rows
