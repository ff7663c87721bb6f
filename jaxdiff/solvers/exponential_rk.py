"""Exponential Runge-Kutta methods in half-log-SNR, as tables of phi functions.

With h = lambda' - lambda, u = x / alpha obeys du / dlambda = -u + x0, and u = x / sigma obeys
du / dlambda = u - eps: a linear part, whose flow is exact, and the network. Stage i stands at
lambda + c_i h; with z = -h for x0 and z = h for eps

    u_i = exp(c_i z) u + h sum_{j < i} a_ij(z) n_j,     u' = exp(z) u + h sum_j b_j(z) n_j,

n = x0 or -eps. Every a_ij and b_j is a combination of phi_k(c z); those of the first stage follow
from sum_j a_ij = c_i phi_1(c_i z), sum_j b_j = phi_1(z): a constant n is integrated exactly.
"""

from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.arrays import is_concrete
from jaxdiff.grids import Grid
from jaxdiff.solvers.clocks import Level, carry, check_choice, weights
from jaxdiff.solvers.phi import phi
from jaxdiff.solvers.tableau import Row, Tableau, Update, assemble, check_ends

# sum of (coefficient, k, c): coefficient phi_k(c z)
Terms = tuple[tuple[Any, int, Any], ...]


class Scheme(NamedTuple):
    """The coefficients that do not follow from the others.

    c: places of stages 2 to s, as fractions of the step.
    a: for stage 3 on, a_i2 to a_i,i-1.
    b: b_2 to b_s.
    """

    c: tuple[Any, ...]
    a: tuple[tuple[Terms, ...], ...]
    b: tuple[Terms, ...]


def two_stages(c2: Any) -> Scheme:
    """Order 2, b_2 = phi_2 / c2 (Hochbruck & Ostermann 2010)."""
    return Scheme((c2,), (), (((1.0 / c2, 2, 1.0),),))


def two_stages_weak(c2: Any) -> Scheme:
    """Order 2, b_2 = phi_1 / (2 c2) (Hochbruck & Ostermann 2010)."""
    return Scheme((c2,), (), (((0.5 / c2, 1, 1.0),),))


def three_stages(c2: Any, c3: Any) -> Scheme:
    """Order 3 (Hochbruck & Ostermann 2005).

    2 (gamma c2 + c3) = 3 (gamma c2^2 + c3^2); with c3 = 2/3 gamma is 0, and b_2 with it. (RES4LYF's
    calculate_gamma has c3^3 for c3^2: of order 2, but for its default c3 = 1.)
    """
    gamma = c3 * (3.0 * c3 - 2.0) / (c2 * (2.0 - 3.0 * c2)) if c3 != 2 / 3 else 0.0
    share = 1.0 / (gamma * c2 + c3)
    a32 = ((gamma * c2, 2, c2), (c3**2 / c2, 2, c3))
    return Scheme((c2, c3), ((a32,),), (((gamma * share, 2, 1.0),), ((share, 2, 1.0),)))


_SIMPSON_MIDDLE, _SIMPSON_END = ((4.0, 2, 1.0), (-8.0, 3, 1.0)), ((-1.0, 2, 1.0), (4.0, 3, 1.0))
_HALF_MIDDLE = ((2.0, 2, 1.0), (-4.0, 3, 1.0))
_A52 = ((0.5, 2, 0.5), (-1.0, 3, 1.0), (0.25, 2, 1.0), (-0.5, 3, 0.5))
_A54 = ((0.25, 2, 0.5), *((-factor, k, c) for factor, k, c in _A52))

# From Hochbruck & Ostermann 2010, and the 'expint' package's tables.
FIXED = {
    "etd3rk": Scheme((0.5, 1.0), ((((2.0, 1, 1.0),),),), (_SIMPSON_MIDDLE, _SIMPSON_END)),
    "etdrk4": Scheme(
        (0.5, 0.5, 1.0),
        ((((0.5, 1, 0.5),),), ((), ((1.0, 1, 0.5),))),
        (_HALF_MIDDLE, _HALF_MIDDLE, _SIMPSON_END),
    ),
    "krogstad": Scheme(
        (0.5, 0.5, 1.0),
        ((((1.0, 2, 0.5),),), ((), ((2.0, 2, 1.0),))),
        (_HALF_MIDDLE, _HALF_MIDDLE, _SIMPSON_END),
    ),
    "strehmel_weiner": Scheme(
        (0.5, 0.5, 1.0),
        ((((0.5, 2, 0.5),),), (((-2.0, 2, 1.0),), ((4.0, 2, 1.0),))),
        ((), _SIMPSON_MIDDLE, _SIMPSON_END),
    ),
    "ho4": Scheme(
        (0.5, 0.5, 1.0, 0.5),
        (
            (((1.0, 2, 0.5),),),
            (((1.0, 2, 1.0),), ((1.0, 2, 1.0),)),
            (_A52, _A52, _A54),
        ),
        ((), (), _SIMPSON_END, _SIMPSON_MIDDLE),
    ),
}
METHODS = ("ho2", "ho2_weak", "ho3", *FIXED)


def exponential_rk(
    grid: Grid, method: str = "krogstad", integrand: str = "x0", c2: float | None = None,
    c3: float | None = None,
) -> Tableau:  # fmt: skip
    """Exponential Runge-Kutta with 2 to 5 stages, as many evaluations a step.

    Hochbruck & Ostermann, "Explicit Exponential Runge-Kutta Methods for Semilinear Parabolic
    Problems" (2005) and "Exponential Integrators" (2010); for diffusion models Zhang, Song & Chen,
    "Improved Order Analysis and Design of Exponential Integrator for Diffusion Models Sampling"
    (2023), who call them RES.

    Arguments:
      method: by stages and order,
        "ho2"              2, 2   b_2 = phi_2 / c2; RES's second-order step at c2 = 1/2, and
                                  DPM-Solver-2's "taylor"
        "ho2_weak"         2, 2   b_2 = phi_1 / (2 c2); DPM-Solver-2
        "ho3"              3, 3   any c2 and c3; DPM-Solver-3 at c2 = 1/3, c3 = 2/3
        "etd3rk"           3, 3   Cox & Matthews (2002)
        "etdrk4"           4, 4   Cox & Matthews (2002)
        "krogstad"         4, 4   Krogstad (2005)
        "strehmel_weiner"  4, 4   Strehmel & Weiner (1992)
        "ho4"              5, 4   Hochbruck & Ostermann (2005), the one that keeps order 4 however
                                  stiff the linear part
      integrand: "x0" or "eps".
      c2: place of the second stage, for "ho2", "ho2_weak" (default 1/2) and "ho3" (default 1/3);
        in (0, 1], and for "ho3" not 2/3.
      c3: place of the third stage, for "ho3" (default 2/3), in (0, 1].

    The step to sigma = 0 is first order, its stages go; so is the step from alpha = 0, which "x0"
    supports. Raises ValueError for other options.
    """
    check_choice("method", method, METHODS)
    check_choice("integrand", integrand, ("x0", "eps"))
    scheme = _scheme(method, c2, c3)
    check_ends(grid, "exponential_rk", noise=integrand == "x0", data=True)
    inner = np.arange(int(grid.ends[0]), grid.steps - int(grid.ends[1]))
    ends = [i for i in range(grid.steps) if i not in inner]
    blocks = {i: [first_order_row(grid, i, i + 1, integrand)] for i in ends}
    blocks.update(zip(inner.tolist(), stage_rows(grid, inner, inner + 1, scheme, integrand)))
    return from_blocks(grid, [blocks[i] for i in range(grid.steps)], integrand)


def _scheme(method: str, c2: Any, c3: Any) -> Scheme:
    for name, value, allowed in (("c2", c2, "ho"), ("c3", c3, "ho3")):
        if value is None:
            continue
        if method in FIXED or not method.startswith(allowed):
            raise ValueError(f"method {method!r} has no {name}, got {name}={value!r}")
        check_fraction(name, value)
    if method in FIXED:
        return FIXED[method]
    if method != "ho3":
        return (two_stages if method == "ho2" else two_stages_weak)(0.5 if c2 is None else c2)
    if c2 == 2 / 3:
        raise ValueError("method 'ho3' takes any c2 but 2/3")
    return three_stages(1 / 3 if c2 is None else c2, 2 / 3 if c3 is None else c3)


def check_fraction(name: str, value: Any) -> None:
    """Raise unless `value` is a number in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value!r}")


def first_order_row(
    grid: Grid, i: int, k: int, integrand: str, level: Level | None = None
) -> Row:
    """The step from node i, or another level, to node k with the evaluation there alone: DDIM."""
    level, end = grid.node(i) if level is None else level, grid.node(k)
    kept = carry(grid.xp, integrand, level, end)
    return Row(level, [Update([kept], weights(grid, level, end, [level], integrand))])


def from_blocks(grid: Grid, blocks: Sequence[list[Row]], integrand: str) -> Tableau:
    """The tableau of steps given as their rows, one step a grid interval."""
    nodes = [(int(n), 0) for n in np.cumsum([0, *(len(block) for block in blocks)])]
    return assemble([row for block in blocks for row in block], integrand, grid.xp, nodes=nodes)


def stage_rows(
    grid: Grid, starts: np.ndarray, ends: np.ndarray, scheme: Scheme, integrand: str,
    places: Sequence[Level] | None = None,
) -> list[list[Row]]:  # fmt: skip
    """The rows of the steps from nodes `starts` to nodes `ends`, one list a step.

    `places` are the levels (t, alpha, sigma; vectors over the steps) of stages 2 to s where these
    are not to be looked up. Coefficients of the scheme may be vectors over the steps too.
    """
    if not len(starts):
        return []
    level, end = (tuple(a[nodes] for a in grid.node(slice(None))) for nodes in (starts, ends))
    lam, h = grid.lam[starts], grid.lam[ends] - grid.lam[starts]
    if places is None:
        places = [
            end if is_concrete(c) and np.all(c == 1.0) else grid.at(lam + c * h) for c in scheme.c
        ]
    z, known = (-h if integrand == "x0" else h), {}

    def value(terms: Terms) -> Any:
        total = 0.0
        for factor, k, c in terms:
            if (k, id(c)) not in known:
                known[k, id(c)] = phi(k, c * z)
            total = total + factor * known[k, id(c)]
        return total

    stages = []  # (place, coefficient of x, weights oldest first), stage 2 to the end
    targets = [*zip(places, scheme.c, ((), *scheme.a)), (end, 1.0, scheme.b)]
    for place, c, columns in targets:
        later = [value(terms) for terms in columns]
        column = [c * value(((1.0, 1, c),)) - sum(later), *later]
        factor = h * (place[1] if integrand == "x0" else -place[2])
        stages.append((carry(grid.xp, integrand, level, place), [factor * a for a in column]))
    return rows_of([level, *places], stages)


def rows_of(
    levels: Sequence[Level], stages: Sequence[tuple[Any, Sequence[Any]]]
) -> list[list[Row]]:
    """The rows of many steps at once, one list a step, from vectors over the steps.

    `levels` are those of stages 1 to s; `stages` those that follow them, 2 to s and the step's end:
    (coefficient of the state the step left from, weights of the evaluations so far, oldest first).
    s_0 goes from stage to stage, s_1 keeps the state that the step left from.
    """
    blocks = []
    for n in range(len(levels[0][0])):
        rows = []
        for j, (level, (kept, column)) in enumerate(zip(levels, stages)):
            found = [w[n] if np.ndim(w) else w for w in reversed(column)]
            state = [kept[n]] if j == 0 else [0.0, kept[n]]
            keep = [] if j == len(levels) - 1 else [Update([1.0] if j == 0 else [0.0, 1.0])]
            rows.append(Row(tuple(a[n] for a in level), [Update(state, found), *keep]))
        blocks.append(rows)
    return blocks
