"""MMPS and TMPD: x_0 given x_t as a Gaussian with the covariance that the network itself says.

With Tweedie's covariance V = (sigma^2 / alpha) J, p(x_0 | x_t) = N(x_0hat, V) and

    p(y | x_t) = N(y; A x_0hat, A V A^T + noise_std^2 I),

exact for Gaussian data of any covariance. MMPS solves with that matrix by products alone, TMPD
replaces it by a diagonal one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.denoisers import Denoiser
from jaxdiff.inverse.measurement import Measurement
from jaxdiff.inverse.tweedie import guide
from jaxdiff.solvers.clocks import check_order

SOLVERS = ("cg", "gmres")


def mmps(
    denoiser: Denoiser, measurement: Measurement, iterations: int = 1, solver: str = "gmres"
) -> Denoiser:
    """x_0 = x_0hat + V A^T (A V A^T + noise_std^2 I)^{-1} (y - A x_0hat), a few iterations of the solve.

    Rozet, Andry, Lanusse & Louppe, "Learning Diffusion Priors from Observations by Expectation
    Maximization" (2024), moment matching posterior sampling. Predicts x0, for any tableau.

    Arguments:
      iterations: of the solver, each a pullback; one to a few are enough in the paper. As many as y has
        entries solve exactly: then it is the full TMPD.
      solver: "gmres" (right also where a network's Jacobian is not symmetric) or "cg", whose every
        iterate is that of a positive definite matrix and which keeps no basis.

    One evaluation and iterations + 1 pullbacks a call. Raises ValueError for another solver or count.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; choose from {list(SOLVERS)}")
    check_order(iterations, None, "iterations")
    solve = _MMPS(int(iterations), solver)
    return guide(denoiser, measurement, solve, (), "mmps")


@dataclasses.dataclass(frozen=True)
class _MMPS:
    iterations: int
    solver: str

    def __call__(self, measurement, strengths, residual, at):
        operator = measurement.operator
        noise = measurement.noise_std.astype(residual.dtype) ** 2

        def spread(v):
            return noise * v + operator(at.covariance(operator.adjoint(v)))

        solve = _conjugate_gradients if self.solver == "cg" else _gmres
        return solve(spread, residual, self.iterations)


# lineax takes a batch for one vector; here every sample has its own inner products.


def _dot(a: Array, b: Array) -> Array:
    return jnp.sum(a * b, tuple(range(1, a.ndim)), keepdims=True)


def _ratio(a: Array, b: Array) -> Array:
    """a / b, and 0 where b is 0: a sample that is solved stays."""
    return jnp.where(b != 0, a / jnp.where(b != 0, b, 1.0), 0.0)


def _conjugate_gradients(
    product: Callable[[Array], Array], b: Float[Array, "batch ..."], iterations: int
) -> Float[Array, "batch ..."]:
    """`iterations` steps of CG from 0, per sample (Hestenes & Stiefel 1952)."""
    x, r, p = jnp.zeros_like(b), b, b
    square = _dot(r, r)
    for _ in range(iterations):
        image = product(p)
        step = _ratio(square, _dot(p, image))
        x, r = x + step * p, r - step * image
        new = _dot(r, r)
        p = r + _ratio(new, square) * p
        square = new
    return x


def _gmres(
    product: Callable[[Array], Array], b: Float[Array, "batch ..."], iterations: int
) -> Float[Array, "batch ..."]:
    """The x of the Krylov space of dimension `iterations` with the least |b - M x|, per sample.

    Saad & Schultz (1986), by Arnoldi's basis: M Q_k = Q_{k+1} H, x = Q_k argmin |(|b|, 0, ...) - H y|.
    """
    length = jnp.sqrt(_dot(b, b))
    basis, columns = [_ratio(b, length)], []
    for _ in range(iterations):
        new = product(basis[-1])
        whole, along = _dot(new, new), [0.0] * len(basis)
        for _again in range(2):  # orthogonal to rounding only the second time (Kahan and Parlett)
            for j, q in enumerate(basis):
                share = _dot(q, new)
                along[j], new = along[j] + share, new - share * q
        square = _dot(new, new)
        # Nothing but rounding left: the space is exhausted.
        square = jnp.where(square > (10 * jnp.finfo(b.dtype).eps) ** 2 * whole, square, 0.0)
        along.append(jnp.sqrt(square))
        columns.append(jnp.stack([a.ravel() for a in along], -1))
        basis.append(_ratio(new, along[-1]))
    H = jnp.stack([jnp.pad(c, ((0, 0), (0, iterations + 1 - c.shape[1]))) for c in columns], -1)
    y = jnp.linalg.pinv(H)[:, :, 0] * length.reshape(-1, 1)
    return sum(y[:, i].reshape(length.shape) * q for i, q in enumerate(basis[:-1]))


def tmpd(denoiser: Denoiser, measurement: Measurement) -> Denoiser:
    """x_0 = x_0hat + V A^T (y - A x_0hat) / (A V A^T 1 + noise_std^2), entry by entry. Predicts x0.

    Boys, Girolami, Pidstrigach, Reich, Mosca & Akyildiz, "Tweedie Moment Projected Diffusions for
    Inverse Problems" (2023), in its form for large problems: the sums of the rows of A V A^T for its
    diagonal, exact where entries of y are independent given x_t. A sum below 0, where they are opposed,
    counts as 0. The full method, which solves, is `mmps` with enough iterations.

    One evaluation and two pullbacks a call. Needs noise_std > 0 where rows may sum to 0.
    """
    return guide(denoiser, measurement, _row_sums, (), "tmpd")


def _row_sums(measurement, strengths, residual, at):
    operator = measurement.operator
    sums = operator(at.covariance(operator.adjoint(jnp.ones_like(residual))))
    spread = jnp.maximum(sums, 0.0) + measurement.noise_std.astype(residual.dtype) ** 2
    return _ratio(residual, spread)
