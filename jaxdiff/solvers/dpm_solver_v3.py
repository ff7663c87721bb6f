"""DPM-Solver-v3: a multistep solver in the parameterisation that suits the network.

With the model statistics l, s, b (`jaxdiff.solvers.statistics`), f = (sigma eps - l x) / alpha and
integrals from the step's start lambda_s, the exact solution of the probability flow is

    x_t = (alpha_t / alpha_s) e^{-L_t} x_s - alpha_t e^{-L_t} int e^{L+S} (g + B) dlambda,
    g = e^{-S} f - B,      L = int l,  S = int s,  B = int e^{-S} b,

and g, whose derivative vanishes where f' = s f + b, is replaced by a polynomial in lambda through the
last evaluations. All coefficients have the statistics' shape, that of a sample or one that broadcasts.
"""

import dataclasses
from collections.abc import Sequence
from math import factorial
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.arrays import is_concrete, namespace
from jaxdiff.grids import Grid
from jaxdiff.solvers.clocks import check_choice, check_order
from jaxdiff.solvers.statistics import (
    Integrals,
    ModelStatistics,
    as_statistics,
    check_covers,
    integrals,
    l_at,
)
from jaxdiff.solvers.tableau import Row, Tableau, Update, assemble, check_ends


def dpm_solver_v3(
    grid: Grid, statistics: ModelStatistics | str | Path | Sequence[float] = (1.0, 0.0, 0.0),
    order: int = 3, pseudo: bool = False, corrector: str = "same",
    correct_above: float | None = None, lower_order_final: bool = True, quadrature: str = "gauss",
) -> Tableau:  # fmt: skip
    """DPM-Solver-v3 of order 1, 2 or 3, one evaluation a step.

    Zheng, Lu, Chen & Zhu, "DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical Model
    Statistics" (2023), algorithm 2, and the authors' code, which puts the nodes on the statistics'
    bins; here they stand anywhere within the bins' span. Its time grids are `half_log_snr`,
    `uniform`, `quadratic` and `karras` of `jaxdiff.grids`.

    Arguments:
      statistics: `ModelStatistics` (`jaxdiff.calibration.estimate_statistics`), the path of their
        file, or three numbers (l, s, b), which know nothing of the network: (1, 0, 0), the default and
        the code's `degenerated`, gives the multistep method in the data prediction, (0, -1, 0) that in
        the noise prediction.
      order: evaluations of the predictor: 1 to 3. The authors take 3, and 2 under guidance. It
        grows over the first steps, which leaves an error of order h^2.
      pseudo: take each derivative of g from the fewest evaluations, which is of lower order than the
        polynomial for order 3. The authors do so with 5 steps on CIFAR-10.
      corrector: "none"; "same", each step but the last corrected with as many evaluations as its
        predictor had, the new one included (none after a first-order step); or "pseudo", with one
        more and pseudo derivatives. f is not evaluated again: its value at the predicted state stays.
        The authors use it with few steps.
      correct_above: correct only at nodes with t above this; their `half` is 0.5 where t is in [0, 1].
      lower_order_final: lower the orders to ..., 2, 1 over the last steps.
      quadrature: of the integrals: "gauss", exact for statistics that are linear within a bin, or
        "trapezoid" as in the authors' code, which on 120 bins moves states by 2e-4 to 5e-3.

    A network of any prediction is used. A step to sigma = 0 gives the denoised state; alpha = 0 is
    refused. Raises TypeError or ValueError for other options, and statistics that do not cover the
    grid's finite half-log-SNRs.
    """
    check_order(order, 3)
    check_choice("corrector", corrector, ("none", "same", "pseudo"))
    check_choice("quadrature", quadrature, ("gauss", "trapezoid"))
    check_ends(grid, "dpm_solver_v3", noise=False, data=True)
    if quadrature == "trapezoid" and isinstance(statistics, (tuple, list)):
        raise ValueError("three numbers have no bins for the trapezoid: give ModelStatistics")
    statistics = as_statistics(statistics)
    check_covers(statistics, grid)
    corrects = _corrected_nodes(grid, corrector, correct_above)
    steps, finite = grid.steps, grid.steps - grid.ends[1]
    xp = namespace(grid.alpha, grid.sigma, statistics)
    lam = xp.clip(grid.lam[: finite + 1], statistics.lam[0], statistics.lam[-1])
    parts = [integrals(statistics, lam[i], lam[i + 1], 4, quadrature) for i in range(finite)]
    at_rows = l_at(statistics, lam[:steps])
    orders = [min(i + 1, order) for i in range(steps)]
    if lower_order_final:
        orders = [min(p, steps - i) for i, p in enumerate(orders)]
    rows, shifts, nodes = [], [], [(0, 0)]
    for i in range(steps):
        if i == finite:  # x0 = (1 - l) x / alpha - f
            end = grid.alpha[-1]
            carry, found = end * (1.0 - at_rows[i]) / grid.alpha[i], [-end]
            shift = xp.zeros_like(carry)
        else:
            places = range(i, i - orders[i], -1)
            carry, found, shift = _step(xp, grid, lam, parts, i, places, pseudo)
        used = orders[i - 1] + (corrector == "pseudo") if i in corrects else 0
        if used > 1:
            # The state that the predictor leaves is the corrected one, of the node before it.
            places = [i - 1, i, *range(i - 2, i - used, -1)]
            back, fixes, offset = _step(xp, grid, lam, parts, i - 1, places, corrector == "pseudo")
            kept = Update([0.0, back], fixes)
            first = Update([0.0, carry * back], _sum(found, [carry * fix for fix in fixes]))
            rows.append(Row(grid.node(i), [first, kept]))
            shifts.append([carry * offset + shift, offset])
        else:
            keep = [Update([1.0])] if corrects else []
            rows.append(Row(grid.node(i), [Update([carry], found), *keep]))
            shifts.append([shift, *[xp.zeros_like(shift) for _ in keep]])
        nodes.append((i + 1, 0))
    if corrects:
        nodes[1:-1] = [(i + 1, 1) for i in range(1, steps)]
    tableau = assemble(rows, "eps", xp, nodes=nodes)
    u, w = _integrand(tableau, at_rows)
    d = None
    if not is_concrete(statistics.b) or np.any(np.asarray(statistics.b) != 0):
        d = xp.stack([xp.stack(row) for row in shifts])
    return dataclasses.replace(tableau, u=u, w=w, d=d)


def _corrected_nodes(grid: Grid, corrector: str, above: float | None) -> set[int]:
    """The inner nodes whose state is corrected."""
    if corrector == "none":
        if above is not None:
            raise ValueError(f"correct_above needs a corrector, got {above!r} with 'none'")
        return set()
    if above is None:
        return set(range(1, grid.steps))
    if not is_concrete(grid.t, above):
        raise ValueError("correct_above takes known times: leave it None for a traced grid")
    return {i for i in range(1, grid.steps) if grid.t[i] > above}


def _step(
    xp: Any, grid: Grid, lam: Any, parts: Sequence[Integrals], i: int, places: Sequence[int],
    pseudo: bool,
) -> tuple[Any, list[Any], Any]:  # fmt: skip
    """x_{i+1} = carry x_i + sum_k weight_k f_k + shift: (carry, weights by age, shift).

    `places` are the nodes of the evaluations, i first; ages count from the newest of them.
    """
    part, alpha, end = parts[i], grid.alpha[i], grid.alpha[i + 1]
    outer = end * xp.exp(-part.L)
    derivatives = _derivatives(xp, [lam[j] - lam[i] for j in places], pseudo)
    newest = max(places)
    weights = [xp.zeros(())] * (newest - min(places) + 1)
    shift = part.C
    for column, j in enumerate(places):
        share = sum(e * row[column] for e, row in zip(part.E[1:], derivatives))
        share = share + part.E[0] if j == i else share
        growth, offset = _relative(xp, parts, i, j)
        weights[newest - j] = -outer * share * xp.exp(-growth)
        shift = shift - share * offset
    return outer / alpha, weights, -outer * shift


def _relative(xp: Any, parts: Sequence[Integrals], i: int, j: int) -> tuple[Any, Any]:
    """S and B at node j when they start at node i; j is i + 1 or before it."""
    if j > i:
        return parts[i].S, parts[i].B
    growth = offset = xp.zeros_like(parts[i].S)
    for part in reversed(parts[j:i]):
        growth = growth - part.S
        offset = offset - xp.exp(-growth) * part.B
    return growth, offset


def _derivatives(xp: Any, offsets: Sequence[Any], pseudo: bool) -> list[list[Any]]:
    """g^(1) ... g^(n) at offset 0 as weights of the values at the n + 1 offsets, the first being 0.

    Those of the polynomial through all of them; or, `pseudo`, k! times the k-th divided difference of
    the first k + 1.
    """
    n = len(offsets) - 1
    if pseudo:
        rows = []
        for k in range(1, n + 1):
            row = [0.0] * (n + 1)
            for j in range(k + 1):
                product = 1.0
                for m in range(k + 1):
                    product = product if m == j else product * (offsets[j] - offsets[m])
                row[j] = factorial(k) / product
            rows.append(row)
        return rows
    if n == 0:
        return []
    matrix = xp.stack([xp.stack([offset**k for k in range(1, n + 1)]) for offset in offsets[1:]])
    inverse = xp.linalg.inv(matrix)
    return [
        [-factorial(k) * xp.sum(row), *(factorial(k) * value for value in row)]
        for k, row in enumerate(inverse, 1)
    ]


def _sum(a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
    """Two lists of weights by age, added."""
    short, long = sorted((list(a), list(b)), key=len)
    return [x + y for x, y in zip(short, long)] + long[len(short) :]


def _integrand(tableau: Tableau, at_rows: Any) -> tuple[Any, Any]:
    """(u, w) with f = u output + w x for each prediction, from those for eps; l at the rows."""
    tail = (1,) * (np.ndim(at_rows) - 1)
    rho = (tableau.sigma / tableau.alpha)[:, None, None]
    pull = at_rows / tableau.alpha.reshape((-1, *tail))
    w = (rho * tableau.w).reshape((*tableau.w.shape, *tail)) - pull[:, None, None]
    return rho * tableau.u, w
