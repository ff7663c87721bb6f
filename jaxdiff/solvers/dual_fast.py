"""DualFast: noise predictions extrapolated away from an earlier, noisier one."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import ArrayLike

from jaxdiff.arrays import is_concrete, namespace
from jaxdiff.grids import Grid
from jaxdiff.predictions import PREDICTIONS, affine
from jaxdiff.solvers.clocks import check_choice
from jaxdiff.solvers.dpm_solver import dpm_solver_multistep, dpm_solver_pp_multistep
from jaxdiff.solvers.tableau import Start, Tableau

_EPS = PREDICTIONS.index("eps")


def dual_fast(
    tableau: Tableau, c: ArrayLike = 0.25, tau: str = "previous", schedule: str = "constant"
) -> Tableau:
    """`tableau` with eps replaced, in the first-order term of every update, by

        eps_new = (1 + c) eps(x_t, t) - c eps(x_tau, tau),    tau earlier, at more noise.

    Yu, Luo, Wang & Zhao, "DualFast: Dual-Speedup Framework for Fast Sampling of Diffusion Models"
    (2025), over DDIM, DPM-Solver and DPM-Solver++: a network errs less at more noise, so that the
    earlier prediction tells which way the later one is wrong. No evaluation more. Which tau the paper
    takes and how its c grows as the noise falls could not be checked, so both are options.

    An update's first-order term is its carried state and w m, w the sum of its weights of the
    evaluations; for another integrand m than eps, x is held and m moves as eps does (x0 by -sigma /
    alpha times as much). The first row has no earlier prediction and stays as it is.

    Part of the effect is that of a higher order: over DDIM with tau="previous" c = 1/2 is
    Adams-Bashforth of order 2 on nodes uniform in sigma / alpha. Over a method of order 2 or more the
    order becomes 1. With tau="first" the difference does not shrink with the step, so that the limit
    of many steps is wrong by an amount that c decides: let c fall as 1 / steps there.

    Arguments:
      tableau: a sampler with one output whose evaluations enter s_0 alone, from noise to data.
      c: strength, a number, or one for each row; 0 changes nothing.
      tau: "previous", the evaluation before; or "first", the one at the noise end.
      schedule: "constant"; or "linear", c times the row's number over the last one's.

    Raises ValueError for a tableau that is stacked or of another kind, or for other options.
    """
    check_choice("tau", tau, ("previous", "first"))
    check_choice("schedule", schedule, ("constant", "linear"))
    if not isinstance(tableau, Tableau) or np.ndim(tableau.active) != 1:
        raise ValueError("dual_fast takes one tableau, not stacked")
    if tableau.outputs != 1 or np.ndim(tableau.A) != 3 or np.ndim(tableau.start.S) != 1:
        raise ValueError("dual_fast takes a tableau with one output and a number a coefficient")
    if is_concrete(tableau.B) and np.any(np.asarray(tableau.B)[:, 1:] != 0):
        raise ValueError("dual_fast takes a tableau whose evaluations enter register 0 alone")
    rows = tableau.rows
    if np.shape(c) not in ((), (rows,)):
        raise ValueError(f"c must be a number or one for each of {rows} rows, got {np.shape(c)}")
    xp = namespace(tableau, c)
    strength = xp.broadcast_to(xp.asarray(c) * 1.0, (rows,))
    if schedule == "linear":
        strength = strength * np.linspace(0.0, 1.0, rows)
    # In units of eps: nothing in the first row, where eps may say nothing of m (alpha = 0).
    moved = tableau.B[1:, 0, :, 0].sum(-1) * tableau.u[1:, 0, _EPS]
    shift = xp.concatenate([xp.zeros(1), strength[1:] * moved])

    first = tau == "first"
    kept, history = int(first), max(tableau.history, 1 if first else 2)
    a = xp.pad(tableau.A, ((0, 0), (0, kept), (0, kept)))
    b = xp.pad(tableau.B, ((0, 0), (0, kept), (0, history - tableau.history), (0, 1)))
    b = b + _outer(xp, shift, b.shape[1:], (0, 0, 1))
    if first:
        last, onward = tableau.registers, np.arange(rows) > 0
        a = a - _outer(xp, shift, a.shape[1:], (0, last))
        a = a + _outer(xp, 1.0 * onward, a.shape[1:], (last, last))
        b = b + _outer(xp, 1.0 * ~onward, b.shape[1:], (last, 0, 1))
    else:
        b = b - _outer(xp, shift, b.shape[1:], (0, 1, 1))
    conversions = [affine(name, "eps", tableau.alpha, tableau.sigma) for name in PREDICTIONS]
    u, w = (
        xp.concatenate([old, xp.stack([pair[k] for pair in conversions], -1)[:, None]], 1)
        for k, old in enumerate((tableau.u, tableau.w))
    )

    def grow(x: Any, axis: int, value: float = 0.0) -> Any:
        if x is None:
            return None
        return xp.pad(
            x, [(0, kept * (i == axis)) for i in range(np.ndim(x))], constant_values=value
        )

    start = tableau.start
    return dataclasses.replace(
        tableau, A=a, B=b, C=grow(tableau.C, 1), d=grow(tableau.d, 1), u=u, w=w,
        start=Start(grow(start.S, 0, 1.0), grow(start.C, 0), grow(start.d, 0)),
        registers=tableau.registers + kept, history=history, outputs=2,
        blind=(*tableau.blind, ()),
    )  # fmt: skip


def _outer(xp: Any, values: Any, shape: tuple[int, ...], index: tuple[int, ...]) -> Any:
    """[rows, *shape]: `values` at `index`, zero elsewhere."""
    one = np.zeros(shape)
    one[index] = 1.0
    return xp.tensordot(values, one, axes=0)


_BASES = {"dpm_solver": dpm_solver_multistep, "dpm_solver_pp": dpm_solver_pp_multistep}


def dual_fast_multistep(
    grid: Grid, base: str = "dpm_solver_pp", order: int = 1, c: ArrayLike = 0.25,
    tau: str = "previous", schedule: str = "constant",
) -> Tableau:  # fmt: skip
    """`dual_fast` over "dpm_solver" or "dpm_solver_pp" (multistep) of order 1, which is DDIM, 2 or 3.

    Raises as both do.
    """
    check_choice("base", base, tuple(_BASES))
    return dual_fast(_BASES[base](grid, order=order), c, tau, schedule)
