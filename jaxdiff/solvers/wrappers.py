"""Tableau -> Tableau: what the data's mean and spread tell without the network, and a last x0 step."""

import dataclasses
from typing import Any

import lineax as lx
import numpy as np
from jaxtyping import ArrayLike

from jaxdiff.arrays import is_concrete, namespace
from jaxdiff.grids import Grid, from_arrays
from jaxdiff.predictions import PREDICTIONS
from jaxdiff.solvers.combine import concatenate
from jaxdiff.solvers.first_order import ddim
from jaxdiff.solvers.tableau import Start, Tableau

_X0 = PREDICTIONS.index("x0")


def analytic_first_step(
    tableau: Tableau, mean: ArrayLike = 0.0, std: ArrayLike = 1.0
) -> Tableau:
    """`tableau` with its first evaluation replaced by what data N(mean, std^2) would give.

    There x0 = mean + alpha std^2 / (alpha^2 std^2 + sigma^2) (x - alpha mean), which is linear in
    x_T, so that the first step costs nothing: near pure noise any denoiser is close to it.
    Dockhorn, Vahdat & Kreis, "GENIE" (2022), whose code takes eps = x_T where alpha^2 + sigma^2 = 1;
    diff-sampler's eps = x / sqrt(1 + sigma^2), with alpha = 1, is the same step. Both are eps = x /
    sqrt(alpha^2 + sigma^2), here std^2 = sigma / (sigma + sqrt(alpha^2 + sigma^2)), about 1/2; data
    N(0, 1) have sigma times as much noise. One evaluation less.

    Arguments:
      tableau: any sampler of two evaluations or more whose start is a number a register.
      mean: of the data: a number, or an array that broadcasts against one sample.
      std: standard deviation of the data's components, a positive number.

    Raises ValueError for other tableaux. The result has no Brownian clock.
    """
    _check_start(tableau, "analytic_first_step", any_number=True)
    if tableau.rows < 2:
        raise ValueError("analytic_first_step needs a tableau of at least 2 evaluations, got 1")
    if np.ndim(std) or (is_concrete(std) and not 0 < float(std) < np.inf):
        raise ValueError(f"std must be one positive number, got {std!r}")
    xp = namespace(tableau, mean, std)
    alpha, sigma = tableau.alpha[0], tableau.sigma[0]
    gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
    # m_p = slope_p S_0 x_T + shift_p, for the first row's integrands.
    u, w = tableau.u[0, :, _X0], tableau.w[0, :, _X0]
    slope = (u * gain + w) * tableau.start.S[0]
    mean = xp.asarray(mean) * 1.0
    shift = xp.tensordot(u * (1.0 - gain * alpha), mean, axes=0)
    shifted = not is_concrete(mean) or bool(np.any(np.asarray(mean) != 0))
    registers, rows = tableau.registers, tableau.rows - 1

    first = tableau.A[0] @ tableau.start.S + tableau.B[0, :, 0] @ slope
    start_c = None
    if tableau.C is not None and not (is_concrete(tableau.C) and np.all(tableau.C[0] == 0)):
        start_c = xp.append(tableau.C[0], 0.0)
    # One more register keeps x_T, for the rows that use the first integrand.
    a = _grow(xp, tableau.A[1:])
    b = xp.concatenate([tableau.B[1:], xp.zeros((rows, 1, *tableau.B.shape[2:]))], 1)
    a_new, b_new = [], []
    for r in range(rows):
        age = r + 1  # of the first integrand, seen from this row
        used = b[r, :, age] if age < tableau.history else xp.zeros_like(b[r, :, 0])
        keep = np.zeros(registers + 1)
        keep[registers] = 1.0
        kept = a[r] + xp.tensordot(used @ slope, keep, axes=0)
        a_new.append(kept + xp.tensordot(keep, keep, axes=0))
        mask = (np.arange(tableau.history) != age)[None, :, None]
        b_new.append(b[r] * mask)
    d, start_d = tableau.d, None
    if shifted or d is not None:
        d = xp.zeros((tableau.rows, registers)) if d is None else d
        trailing = (1,) * mean.ndim
        d = d.reshape(d.shape + trailing) if d.ndim == 2 else d
        moved = [
            xp.tensordot(tableau.B[r, :, r], shift, axes=1) if r < tableau.history
            else xp.zeros((registers, *mean.shape))
            for r in range(tableau.rows)
        ]  # fmt: skip
        d = d + xp.stack(moved)
        d = xp.concatenate([d, xp.zeros((tableau.rows, 1, *d.shape[2:]))], 1)
        d, start_d = d[1:], d[0]
    old, xn = tableau.nodes, namespace(tableau.nodes)
    start = np.array([0, registers], np.int32)
    nodes = xn.where(old[:, :1] == 0, start, xn.maximum(old - np.array([1, 0], np.int32), 0))
    return dataclasses.replace(
        tableau, A=xp.stack(a_new), B=xp.stack(b_new),
        C=None if tableau.C is None else xp.pad(tableau.C[1:], ((0, 0), (0, 1))), d=d,
        **{f: getattr(tableau, f)[1:] for f in ("u", "w", "t", "alpha", "sigma", "active", "draw")},
        clock=None, brownian=None, nodes=nodes, registers=registers + 1,
        start=Start(xp.append(first, tableau.start.S[0]), start_c, start_d),
    )  # fmt: skip


def teleport(
    tableau: Tableau, alpha: ArrayLike, sigma: ArrayLike, mean: ArrayLike, cov: ArrayLike
) -> Tableau:
    """`tableau` entered by the exact solution for data N(mean, cov): the first part costs nothing.

    The probability flow from x at (alpha, sigma) to the tableau's first level (alpha', sigma') is

        x' = alpha' mean + Q diag(psi) Q^T (x - alpha mean),
        psi_k = sqrt((sigma'^2 + l_k alpha'^2) / (sigma^2 + l_k alpha^2)),   cov = Q diag(l) Q^T.

    Wang & Vastola, "Diffusion Models Generate Images Like Painters: an Analytical Theory of
    Outline First, Details Later" (2023): most of a trajectory's first part is that of the
    Gaussian with the data's mean and covariance.

    Arguments:
      tableau: a sampler on the rest of the grid, of which `sample` then takes x_T at (alpha, sigma).
      mean: of the data, with the shape of a sample.
      cov: its covariance, [d, d] for samples of d numbers.

    Raises ValueError for shapes that do not fit, a matrix that is no covariance, or a tableau with a
    start of its own.
    """
    _check_start(tableau, "teleport", any_number=False)
    mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
    if cov.shape != (mean.size, mean.size):
        raise ValueError(f"cov must have shape {(mean.size,) * 2} for this mean, got {cov.shape}")
    scales, axes = np.linalg.eigh(cov)
    if not np.allclose(cov, cov.T) or scales[0] < -1e-8 * max(scales[-1], 1e-300):
        raise ValueError("cov must be symmetric and have no negative eigenvalue")
    scales = np.maximum(scales, 0.0)
    a1, s1 = tableau.alpha[0], tableau.sigma[0]
    if is_concrete(alpha, sigma, a1, s1) and not (alpha >= 0 < sigma and alpha * s1 < a1 * sigma):
        raise ValueError(
            f"need alpha >= 0 and sigma > 0 at more noise than the tableau's first level ({a1:g}, "
            f"{s1:g}), got ({alpha:g}, {sigma:g})"
        )
    xp = namespace(tableau, alpha, sigma)
    psi = xp.sqrt((s1**2 + scales * a1**2) / (sigma**2 + scales * alpha**2))
    matrix = (axes * psi) @ axes.T
    offset = (a1 * mean.ravel() - matrix @ (alpha * mean.ravel())).reshape(mean.shape)
    return dataclasses.replace(
        tableau,
        start=Start(lx.MatrixLinearOperator(matrix), None,
                    xp.stack([offset] * tableau.registers)),
    )  # fmt: skip


def denoise_to_zero(tableau: Tableau, grid: Grid) -> Tableau:
    """`tableau` on `grid`, and a last step to sigma = 0: the result is x0 at the last node.

    One evaluation more. The same as `grid` with a node at sigma = 0 for methods whose step there is
    of first order. Raises ValueError where the grid ends at sigma = 0 already, or is seen not to be
    the tableau's: its last evaluation must lie in the grid's last step.
    """
    if grid.ends[1] or grid.backward:
        raise ValueError("denoise_to_zero takes a grid from noise to data that ends at sigma > 0")
    xp = grid.xp
    t, alpha, sigma = grid.node(grid.steps)
    last = from_arrays(
        xp.stack([t, t]), xp.stack([alpha, xp.ones_like(alpha)]),
        xp.stack([sigma, xp.zeros_like(sigma)]), ends=(False, True),
    )  # fmt: skip
    joined = concatenate([tableau, ddim(last)])
    _check_last_step(tableau, grid)
    return joined


def _check_last_step(tableau: Tableau, grid: Grid) -> None:
    """Raise ValueError unless the tableau's cleanest evaluation is in the grid's last step."""
    if not is_concrete(tableau.alpha, tableau.sigma, grid.alpha, grid.sigma):
        return
    with np.errstate(divide="ignore"):
        found = float(np.min(np.asarray(tableau.sigma) / np.asarray(tableau.alpha)))
        first, last = np.asarray(grid.sigma)[-2:] / np.asarray(grid.alpha)[-2:]
    # Churn evaluates above the node, by sqrt(2) at most. Tables may be in float32.
    highest = first * (np.sqrt(2.0) if tableau.stochastic else 1.0)
    if not last * (1 - 1e-5) <= found <= highest * (1 + 1e-5):
        raise ValueError(
            f"the tableau was built on another grid: its last evaluation is at sigma / alpha = "
            f"{found:.6g}, this grid's last step goes from {first:.6g} to {last:.6g}"
        )


def _check_start(tableau: Any, name: str, any_number: bool) -> None:
    if not isinstance(tableau, Tableau) or np.ndim(tableau.active) != 1:
        raise ValueError(f"{name} takes one tableau, not stacked")
    start = tableau.start
    number = not isinstance(start.S, lx.AbstractLinearOperator) and np.ndim(start.S) == 1
    trivial = number and is_concrete(start.S) and np.all(np.asarray(start.S) == 1)
    plain = number if any_number else trivial
    if not plain or start.C is not None or start.d is not None or np.ndim(tableau.A) != 3:
        raise ValueError(f"{name} takes a tableau whose start is plain: no noise, shift or operator")


def _grow(xp: Any, a: Any) -> Any:
    """Coefficients [rows, R, R] with one more register, of which nothing is made yet."""
    return xp.pad(a, ((0, 0), (0, 1), (0, 1)))
