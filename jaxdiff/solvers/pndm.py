"""Pseudo-numerical methods: DDIM's step with a combination of noise predictions in place of one.

DDIM's transfer map, for every process,

    phi(x, e; t -> s) = (alpha_s / alpha_t) x + alpha_s (rho_s - rho_t) e,   rho = sigma / alpha,

is the exact step of dy / drho = eps, y = x / alpha, for constant e. A linear multistep or
Runge-Kutta method decides the e.
"""

from typing import Any

import numpy as np

from jaxdiff.grids import Grid
from jaxdiff.solvers.clocks import Level, carry, check_choice, check_order, weights
from jaxdiff.solvers.tableau import Row, Tableau, Update, assemble, check_ends

ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
    5: (1901 / 720, -2774 / 720, 2616 / 720, -1274 / 720, 251 / 720),
}


def pndm(
    grid: Grid, order: int = 4, start: str = "runge_kutta", coefficients: str = "constant",
    stages: str = "rho",
) -> Tableau:  # fmt: skip
    """PNDM: phi with Adams-Bashforth's combination of the last noise predictions.

    Liu, Ren, Lin & Zhao, "Pseudo Numerical Methods for Diffusion Models on Manifolds" (2022),
    formulas 9, 12 and 13: e = (55 e_0 - 59 e_1 + 37 e_2 - 9 e_3) / 24, newest first. The defaults are
    F-PNDM; `order=2, start="heun"` is S-PNDM; `start="heun"` is PLMS as latent diffusion and Stable
    Diffusion sample (diffusers' `skip_prk_steps`: the second call repeats the first step's end, and
    the third evaluates there again). One evaluation a step, and those of the start.

    With constant coefficients the order is 2 whatever `order` says, for they integrate polynomials
    only on nodes uniform in rho. With variable ones the default start keeps order 4.

    Arguments:
      order: predictions combined, 1 to 5 (4 for "published" coefficients); fewer in the first steps
        where there are none yet.
      start: "runge_kutta" makes the first order - 1 steps with Runge-Kutta 4 in phi (9 evaluations
        more for order 4); "heun" the first with the mean of the predictions at both ends (1 more);
        "euler" with phi itself. A step to sigma = 0 needs none of these.
      coefficients: "constant"; "variable" integrates the polynomial in rho through the last
        predictions exactly, for the nodes as they are; "published" is diff-sampler's formula for
        that (`ipndm_v`), with a misplaced bracket in the third-order term, and in the fourth-order
        one a wrong sign and a wrong ratio: on uniform nodes it is (57, -65, 43, -11) / 24.
      stages: where Runge-Kutta's midpoints lie: "rho", halfway in that; or "nodes": the grid's
        nodes 1, 3 and 5 are the midpoints of the first three steps (the paper's are halfway in t),
        the other nodes their ends.

    Raises ValueError for other options, or a grid with alpha = 0.
    """
    check_choice("start", start, ("runge_kutta", "heun", "euler"))
    check_choice("coefficients", coefficients, ("constant", "variable", "published"))
    check_order(order, 4 if coefficients == "published" else 5)
    check_choice("stages", stages, ("rho", "nodes"))
    check_ends(grid, "pndm", noise=False, data=True)
    staged = {"runge_kutta": order - 1, "heun": 1 if order > 1 else 0, "euler": 0}[start]
    plan = _plan(grid, staged if start == "runge_kutta" else 0, stages)
    # The history reaches over Heun's inner stage; Runge-Kutta's start keeps what it needs itself.
    history = order + (staged if start == "heun" else 0)
    rows, nodes, past = [], [(0, 0)], []
    for j, (a, middle, b) in enumerate(plan):
        level, end = grid.node(a), grid.node(b)
        to_zero = grid.ends[1] and b == grid.steps
        past = [(len(rows), level), *past][:order]
        if j < staged and not to_zero and start == "runge_kutta":
            rows += _runge_kutta(grid, level, middle, end, j, order)
        elif j < staged and not to_zero:
            rows += _heun(grid, level, end)
        else:
            places = [place for _, place in past]
            found = _weights(grid, level, end, places, coefficients)
            lags = [len(rows) - row for row, _ in past]
            s, m = [carry(grid.xp, "eps", level, end)] + [0.0] * order, [0.0] * history
            for weight, lag, (row, _) in zip(found, lags, past):
                if lag < history:
                    m[lag] = weight
                else:
                    # Runge-Kutta step k began in row 4 k and keeps that prediction.
                    s[2 + row // 4] = weight
            kept = staged if start == "runge_kutta" and len(rows) < 4 * staged + order else 0
            rows.append(Row(level, [Update(s if kept else s[:1], m), *_keep(kept)]))
        nodes.append((len(rows), 0))
    return assemble(rows, "eps", grid.xp, nodes=nodes)


def ipndm(grid: Grid, order: int = 4, coefficients: str = "constant") -> Tableau:
    """iPNDM: PNDM without its Runge-Kutta start, the order growing 1, 2, ... over the first steps.

    Zhang & Chen, "Fast Sampling of Diffusion Models with Exponential Integrator" (2023), and their
    code: `pndm` with start="euler". One evaluation a step; order 2 from order=2 on, for the first
    step leaves an error of order h^2. `coefficients` as in `pndm` ("variable" is the linear
    multistep method in rho, `lms`). From alpha = 0 diffusers' iPNDM takes x0 = 0 in the first step;
    here that start is refused.
    """
    return pndm(grid, order, "euler", coefficients)


def _plan(grid: Grid, staged: int, stages: str) -> list[tuple[int, Level | None, int]]:
    """Steps as (first node, midpoint or None, last node)."""
    plan, a = [], 0
    while a < grid.steps:
        middle, b = None, a + 1
        inside = len(plan) < staged
        if inside and stages == "nodes" and a + 2 <= grid.steps:
            middle, b = grid.node(a + 1), a + 2
        elif inside and stages == "nodes":
            raise ValueError(f"stages='nodes' needs 2 nodes for each of {staged} steps first")
        elif inside and not (grid.ends[1] and b == grid.steps):
            # -log of the mean of rho and rho'
            middle = grid.at(np.log(2.0) - grid.xp.logaddexp(-grid.lam[a], -grid.lam[a + 1]))
        plan.append((a, middle, b))
        a = b
    return plan


def _transfer(grid: Grid, level: Level, end: Level) -> tuple[Any, Any]:
    """(coefficient of x, of e) in phi."""
    return carry(grid.xp, "eps", level, end), weights(grid, level, end, [level], "eps")[0]


def _weights(
    grid: Grid, level: Level, end: Level, places: list[Level], coefficients: str
) -> list[Any]:
    if coefficients == "variable":
        return weights(grid, level, end, places, "eps", "rho")
    whole = _transfer(grid, level, end)[1]
    if coefficients == "published" and len(places) > 1:
        rho = [sigma / alpha for _, alpha, sigma in (end, *places)]
        return [whole * c for c in _diff_sampler([a - b for a, b in zip(rho, rho[1:])])]
    return [whole * c for c in ADAMS_BASHFORTH[len(places)]]


def _diff_sampler(h: list[Any]) -> list[Any]:
    """diff-sampler's coefficients for steps h, newest first."""
    near = h[0] / h[1]
    out = [1.0 + near / 2, -near / 2]
    if len(h) > 2:
        second = (1 - h[0] ** 2 / (3 * h[1] * (h[1] + h[2]))) / 2
        ratio = h[1] / h[2]
        out = [out[0] + second, out[1] - (1 + ratio) * second, ratio * second]
    if len(h) > 3:
        two, three = h[0] + h[1], h[0] + h[1] + h[2]
        third = (1 - h[0] / (3 * two)) / 2 + (1 - h[0] / (2 * two)) * h[0] / (6 * three)
        third = third * h[0] * two * three / (h[1] * (h[1] + h[2]) * (h[1] + h[2] + h[3]))
        far = h[1] * (h[1] + h[2]) / (h[2] * (h[2] + h[3]))
        out = [
            out[0] + third, out[1] - (1 + ratio + far) * third,
            out[2] + (ratio + far * (1 + h[2] / h[3])) * third, -third * far * ratio,
        ]  # fmt: skip
    return out


def _keep(count: int, new: int | None = None) -> list[Update]:
    """Registers 1 (unused here) to 1 + count: each kept, but `new`, which takes the newest."""
    if not count:
        return []
    held = [Update([0.0] * (2 + k) + [1.0]) for k in range(count)]
    if new is not None:
        held[new] = Update([], [1.0])
    return [Update(), *held]


def _runge_kutta(
    grid: Grid, level: Level, middle: Level, end: Level, j: int, order: int
) -> list[Row]:
    """Four rows: x in register 1, the first prediction of step j in register 2 + j."""
    (c_half, w_half), (c, w) = _transfer(grid, level, middle), _transfer(grid, level, end)
    _, *first = _keep(order - 1, j)
    _, *held = _keep(order - 1)
    x = Update([0.0, 1.0])
    return [
        Row(level, [Update([c_half], [w_half]), Update([1.0]), *first]),
        Row(middle, [Update([0.0, c_half], [w_half]), x, *held]),
        Row(middle, [Update([0.0, c], [w]), x, *held]),
        Row(end, [Update([0.0, c], [w / 6, w / 3, w / 3, w / 6]), Update(), *held]),
    ]


def _heun(grid: Grid, level: Level, end: Level) -> list[Row]:
    c, w = _transfer(grid, level, end)
    return [
        Row(level, [Update([c], [w]), Update([1.0])]),
        Row(end, [Update([0.0, c], [w / 2, w / 2])]),
    ]
