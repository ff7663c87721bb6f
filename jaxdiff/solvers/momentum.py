"""Momentum: Polyak's heavy ball over any sampler, and its generalisation with Adams coefficients.

Wizadwongsa, Chinchuthakun, Khungurn, Raj & Suwajanakorn, "Diffusion Sampling with Momentum for
Mitigating Divergence Artifacts" (2024).
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import ArrayLike

from jaxdiff.arrays import is_concrete, namespace
from jaxdiff.grids import Grid, from_arrays
from jaxdiff.solvers.clocks import carry, check_choice, check_order, weights
from jaxdiff.solvers.dpm_solver import dpm_solver_pp_multistep
from jaxdiff.solvers.pndm import ipndm
from jaxdiff.solvers.tableau import Row, Start, Tableau, Update, assemble, check_ends
from jaxdiff.solvers.unipc import unipc

# GHVB of order r: (p + q beta) / (d beta) for the velocities, newest first.
_GHVB = {
    1: (1, ((0, 1),)),
    2: (2, ((2, 1), (-2, 1))),
    3: (12, ((18, 5), (-24, 8), (6, -1))),
    4: (24, ((46, 9), (-78, 19), (42, -5), (-10, 1))),
    5: (720, ((1650, 251), (-3420, 646), (2880, -264), (-1380, 106), (270, -19))),
}


def ghvb(
    grid: Grid, order: int = 2, beta: ArrayLike = 0.8, coefficients: str = "constant"
) -> Tableau:
    """GHVB: Adams-Bashforth steps over velocities, of order 1 to 5.

    In y = x / alpha, rho = sigma / alpha (dy / drho = eps), with v_0 = eps_0,

        v_n = (1 - beta) v_{n-1} + beta eps_n
        y' = y + (rho' - rho) sum_k c_k(beta) v_{n-k},

    c = (1), ((2 + beta) v_n - (2 - beta) v_{n-1}) / (2 beta), and so on: chosen so that the method
    keeps its order while beta < 1 widens the region of stability. beta = 1 is Adams-Bashforth
    (PLMS, `ipndm`). The authors write `order` and beta as one number: their 1.8 is order=2,
    beta=0.8. One evaluation a step; sigma = 0 at the end is supported, alpha = 0 is not.

    Arguments:
      order: 1 (heavy ball itself) to 5. The coefficients are fewer over the first steps, and those
        of uniform steps in rho: on other grids the order is at most 2.
      beta: in (0, 1].
      coefficients: "constant", the paper's; "variable" finds c for the steps as they are, exact for
        polynomials of degree order - 1 in rho: order 3 and more on any grid, but for what the first
        steps leave (h^2, small from pure noise, where eps hardly changes).
    """
    check_order(order, len(_GHVB))
    check_choice("coefficients", coefficients, ("constant", "variable"))
    _check_beta(beta)
    check_ends(grid, "ghvb", noise=False, data=True)
    rows, shares = [], []
    for i in range(grid.steps):
        level, end = grid.node(i), grid.node(i + 1)
        whole = weights(grid, level, end, [level], "eps")[0]
        # v_i as weights of eps_0, ..., eps_i
        if coefficients == "variable":
            before = [(1.0 - beta) * w for w in shares[-1]] if i else []
            shares.append([*before, beta if i else 1.0])
        used = min(order, i + 1)
        if coefficients == "constant":
            divisor, terms = _GHVB[used]
            c = [(p + q * beta) / (divisor * beta) for p, q in terms]
        else:
            c = _variable(grid, i, shares[-used:][::-1])
        old, new = (0.0, 1.0) if i == 0 else (1.0 - beta, beta)
        # Registers 1, 2, ... hold v_{n-1}, v_{n-2}, ...
        velocities = [whole * (c[0] * old + (c[1] if used > 1 else 0.0))]
        velocities += [whole * value for value in c[2:]]
        state = Update([carry(grid.xp, "eps", level, end), *velocities], [whole * c[0] * new])
        kept = [Update([0.0] * k + [1.0]) for k in range(1, order - 1)]
        rows.append(Row(level, [state, Update([0.0, old], [new]), *kept]))
    return assemble(rows, "eps", namespace(grid.t, grid.alpha, grid.sigma, beta))


def _variable(grid: Grid, i: int, shares: list[list[Any]]) -> Any:
    """c with  sum_k c_k v_{i-k} = the mean over step i,  for polynomials of degree len(shares) - 1.

    `shares[k]` are the weights of eps_0, eps_1, ... in v_{i-k}.
    """
    xp, count = grid.xp, len(shares)
    rho = grid.sigma / grid.alpha
    place = (rho[: i + 1] - rho[i]) / (rho[i + 1] - rho[i])
    padded = xp.stack([xp.asarray([*s, *[0.0] * (i + 1 - len(s))]) for s in shares])
    powers = xp.stack([place**j for j in range(count)], -1)
    means = 1.0 / (1.0 + np.arange(count))
    return list(xp.linalg.solve((padded @ powers).T, means[:, None])[:, 0])


def heavy_ball(
    tableau: Tableau, beta: ArrayLike = 0.8, skip_first_order: bool = False,
    variant: str = "polyak", pattern: Tableau | None = None,
) -> Tableau:  # fmt: skip
    """`tableau` with heavy-ball momentum on the increment of every step.

    Where the step to a grid node is  x' = a x + w g,  g the mean of the integrand that the sampler
    takes (its weights of the evaluations divided by their sum w), the result is

        v = (1 - beta) v + beta g,    x' = a x + w v,    v_0 = g_0:

    the paper's HB over PLMS and DPM-Solver++. It widens the region of stability and costs order: 1,
    for v lags behind. No evaluation more; one register more, for v. Single-step methods keep their
    inner stages. A corrected step has the momentum and the prediction from its end leaves from
    there, without momentum of its own (so it is in the authors' UniPC too, whose predictor's
    velocity is overwritten; their corrector's is measured in units of x0 / sigma).

    Arguments:
      tableau: a sampler with one output whose steps each carry one register to the next node.
      beta: in (0, 1]; 1 changes nothing.
      skip_first_order: leave steps that use one evaluation alone, as the authors' DPM-Solver++(2M)
        does in its first step and, if that is first order, its last.
      variant: "polyak", as above; or "nesterov", x' = a x + w ((1 - beta) v + beta g), the authors'
        PLMS with Nesterov's momentum.
      pattern: for a traced tableau, one with known coefficients by the same builder and options:
        where the two are zero must agree.

    Raises ValueError for a tableau that is stacked or has steps of another kind (`bdia`, and F-PNDM,
    which keeps predictions in registers).
    """
    _check_beta(beta)
    check_choice("variant", variant, ("polyak", "nesterov"))
    pattern = tableau if pattern is None else pattern
    if not isinstance(tableau, Tableau) or np.ndim(tableau.active) != 1:
        raise ValueError("heavy_ball takes one tableau, not stacked")
    if tableau.outputs != 1 or np.ndim(tableau.A) != 3 or np.ndim(tableau.start.S) != 1:
        raise ValueError("heavy_ball takes a tableau with one output and a number a coefficient")
    if not is_concrete(pattern.A, pattern.B):
        raise ValueError("heavy_ball needs a pattern for a tableau with traced coefficients")
    xp, last = namespace(tableau, beta), tableau.registers
    a = list(xp.pad(tableau.A, ((0, 0), (0, 1), (0, 1))))
    b = list(xp.pad(tableau.B, ((0, 0), (0, 1), (0, 0), (0, 0))))
    unit = np.eye(last + 1)
    steps, moving = _steps(pattern), False
    for r in range(tableau.rows):
        register, origin, others = steps.get(r, (None, None, ()))
        if register is None or (skip_first_order and np.count_nonzero(pattern.B[r, register]) < 2):
            a[r] = a[r] + np.outer(unit[last], unit[last])
            continue
        increment = b[r][register]
        whole = increment.sum()
        old, new = (1.0 - beta, beta) if moving else (0.0, 1.0)
        # The step's mean: so much of v as it was, so much of g.
        lag, now = old, new
        if variant == "nesterov" and moving:
            lag, now = (1.0 - beta) * old, (1.0 - beta) * new + beta
        moving = True
        # What momentum adds to the state at the node, also where the next prediction starts there.
        moved = unit[register] * 1.0
        for i in others:
            moved = moved + unit[i] * (a[r][i, origin] / a[r][register, origin])
        column = moved * (whole * lag) + unit[last] * old
        a[r] = a[r] + xp.tensordot(column, unit[last], axes=0)
        column = moved * (whole * (now - 1.0)) + unit[last] * new
        b[r] = b[r] + xp.tensordot(column, increment / whole, axes=0)

    def grow(x: Any, axis: int, value: float = 0.0) -> Any:
        if x is None:
            return None
        return xp.pad(x, [(0, int(i == axis)) for i in range(np.ndim(x))], constant_values=value)

    start = tableau.start
    return dataclasses.replace(
        tableau, A=xp.stack(a), B=xp.stack(b), C=grow(tableau.C, 1), d=grow(tableau.d, 1),
        start=Start(grow(start.S, 0, 1.0), grow(start.C, 0), grow(start.d, 0)), registers=last + 1,
    )  # fmt: skip


def _steps(tableau: Tableau) -> dict[int, tuple[int, int | None, list[int]]]:
    """{row that ends a step: (register of the new state, register carried, others that follow it)}.

    Others follow in a corrected step: its row makes the next prediction as well.
    """
    a, b = np.asarray(tableau.A), np.asarray(tableau.B)
    steps: dict[int, tuple[int, int | None, list[int]]] = {}
    for row, register in np.asarray(tableau.nodes).tolist():
        r = row - 1
        # A node may be kept by a copy that was made later.
        while r >= 0 and not b[r, register].any() and np.flatnonzero(a[r, register]).size == 1:
            r, register = r - 1, int(np.flatnonzero(a[r, register])[0])
        if r < 0 or r in steps:
            continue
        carried = np.flatnonzero(a[r, register]).tolist()
        if len(carried) > 1 or not b[r, register].any():
            raise ValueError(
                f"heavy_ball needs steps that carry one state, but row {r} carries registers {carried}"
            )
        origin = carried[0] if carried else None
        follows = register > 0 and origin is not None and a[r, 0, origin] != 0
        steps[r] = (register, origin, [0] if follows else [])
    return steps


_BASES = {"ipndm": ipndm, "dpm_solver_pp": dpm_solver_pp_multistep, "unipc": unipc}


def heavy_ball_multistep(
    grid: Grid, base: str = "ipndm", order: int = 2, beta: ArrayLike = 0.8,
    skip_first_order: bool = False, variant: str = "polyak",
) -> Tableau:  # fmt: skip
    """`heavy_ball` over "ipndm" (PLMS), "dpm_solver_pp" (multistep) or "unipc" of that order.

    Raises as both do.
    """
    check_choice("base", base, tuple(_BASES))
    build = _BASES[base]
    # What is zero depends on the number of steps and the grid's ends alone.
    sigma = np.linspace(0.9, 0.1, len(grid))
    sigma[[0, -1]] = [1.0 if grid.ends[0] else 0.95, 0.0 if grid.ends[1] else 0.05]
    pattern = build(from_arrays(sigma, 1.0 - sigma, sigma), order=order)
    return heavy_ball(build(grid, order=order), beta, skip_first_order, variant, pattern)


def _check_beta(beta: Any) -> None:
    if is_concrete(beta):
        if isinstance(beta, bool) or not isinstance(beta, ArrayLike) or np.ndim(beta):
            raise TypeError(f"beta must be a number, got {beta!r}")
        if not 0 < beta <= 1:
            raise ValueError(f"beta must be in (0, 1], got {beta!r}")
