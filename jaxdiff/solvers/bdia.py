"""Bi-directional integration approximation: two-step samplers with an exact inverse."""

from typing import Any

import numpy as np
from jaxtyping import ArrayLike

from jaxdiff.arrays import is_concrete, namespace
from jaxdiff.grids import Grid
from jaxdiff.solvers.clocks import Level, check_choice
from jaxdiff.solvers.tableau import Row, Tableau, Update, assemble, check_ends

BASES = ("ddim", "edm", "dpm_solver_pp")


def bdia(grid: Grid, gamma: ArrayLike = 1.0, base: str = "ddim", start: str = "step") -> Tableau:
    """BDIA: the first-order step, corrected by the same step backward to the state before.

    Zhang, Lewis & Kleijn, "Exact Diffusion Inversion via Bi-directional Integration
    Approximation" (2024). With d(z; i -> j) the state at node j by DDIM from z at node i,

        z_{i+1} = gamma (z_{i-1} - d(z_i; i -> i - 1)) + d(z_i; i -> i + 1),

    after a first step of DDIM; node 0 is the noise end. One evaluation a step. gamma = 1 cancels
    the steps' leading errors: order 2; below 1 the order is 1, with the error of DDIM times about
    (1 - gamma) / (1 + gamma). The authors take 0.5 at 10 steps and 1 at 40.

    The step is linear in (z_{i-1}, z_i, evaluation at z_i), so z_{i-1} follows from the pair (z_i,
    z_{i+1}), with 1 / gamma in place of gamma: a grid from data to noise (`grid.reversed()`) means
    that inverse. To go back exactly from a sample, keep the pair and exchange it:

        state = sample(denoiser, bdia(grid, gamma), x_T, save="state")
        pair = state._replace(registers=state.registers[::-1])
        x_T = sample(denoiser, bdia(grid.reversed(), gamma, start="pair"), None, state=pair)

    (with `save="state"` there too, the pair at the noise end, which leads back to the sample). Each
    inverse step divides rounding errors by gamma: 50 steps with gamma = 0.5 multiply them by 1e15,
    so less than 1 is for few steps and float64.

    Arguments:
      gamma: in [0, 1]; 0 is DDIM, which has no inverse.
      base: the state that z is: "ddim", x itself; "edm", x / alpha, in which DDIM is Euler's method
        in sigma / alpha; "dpm_solver_pp", x / sigma, in which it is DPM-Solver++'s first step. They
        differ in the factor with which the correction is carried on. With "edm" and gamma = 1 errors
        alternate in sign and grow as rho falls: on vp_linear it is worse than DDIM at 10 steps.
      start: "step", DDIM's; "pair", from a `State` with (z_1, z_0) in its registers: one row less.

    With "ddim" and "dpm_solver_pp" every end is supported, with "edm" sigma = 0 is; backward, from a
    pair, an end to leave with "ddim" or "edm" is sigma = 0. Raises ValueError for other options.
    """
    check_choice("base", base, BASES)
    check_choice("start", start, ("step", "pair"))
    if is_concrete(gamma):
        if isinstance(gamma, bool) or not isinstance(gamma, ArrayLike) or np.ndim(gamma):
            raise TypeError(f"gamma must be a number, got {gamma!r}")
        if not 0 <= gamma <= 1 or (grid.backward and gamma == 0):
            raise ValueError(f"gamma must be in [0, 1], and not 0 backward, got {gamma!r}")
    pair = start == "pair"
    if pair and grid.steps < 2:
        raise ValueError("start='pair' needs a grid of at least 2 steps, got 1")
    _check_ends(grid, base, pair)
    xp = namespace(grid.t, grid.alpha, grid.sigma, gamma)
    factor = 1.0 / gamma if grid.backward else gamma
    integrand, rows = "eps" if base == "edm" else "x0", []
    for i in range(1 if pair else 0, grid.steps):
        carried, weight = _step(grid, i, i + 1, integrand)
        keep = Update([1.0])
        if i == 0:
            rows.append(Row(grid.node(i), [Update([carried], [weight]), keep]))
            continue
        before, lead = _step(grid, i, i - 1, integrand)
        # z_{i-1} and its estimate, carried to node i + 1 in z's scale
        share = factor * _scale(base, grid.node(i + 1)) / _scale(base, grid.node(i - 1))
        state = Update([carried - share * before, share], [weight - share * lead])
        rows.append(Row(grid.node(i), [state, keep]))
    return assemble(rows, integrand, xp)


def _scale(base: str, level: Level) -> Any:
    _, alpha, sigma = level
    return {"ddim": 1.0, "edm": alpha, "dpm_solver_pp": sigma}[base]


def _step(grid: Grid, i: int, j: int, integrand: str) -> tuple[Any, Any]:
    """(coefficient of x, of the integrand) in DDIM's step from node i to node j.

    At an end the weight's limit; elsewhere the same number written so that nothing cancels.
    """
    (_, a, s), (_, a1, s1) = grid.node(i), grid.node(j)
    noise, data = (grid.steps, 0) if grid.backward else (0, grid.steps)
    if integrand == "x0":
        pure = grid.ends[0] and j == noise
        return s1 / s, -s1 * a / s if pure else -a1 * grid.xp.expm1(grid.lam[i] - grid.lam[j])
    clean = grid.ends[1] and j == data
    return a1 / a, -a1 * s / a if clean else -s1 * grid.xp.expm1(grid.lam[j] - grid.lam[i])


def _check_ends(grid: Grid, base: str, pair: bool) -> None:
    if not grid.backward:
        check_ends(grid, f"bdia over {base}", noise=base != "edm", data=True)
        return
    if grid.ends[0] and base == "edm":
        raise ValueError("bdia over edm cannot run to a noise end with alpha = 0")
    if grid.ends[1] and not (pair and base != "dpm_solver_pp"):
        raise ValueError(
            "bdia runs backward from sigma = 0 only from a pair (start='pair') and with base 'ddim' "
            f"or 'edm', got start={'pair' if pair else 'step'!r}, base={base!r}"
        )
