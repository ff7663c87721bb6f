"""Linear operators: what a measurement does to data.

y = A x + noise. An operator is a frozen pytree (its arrays are leaves, so that a new mask or kernel of
the same shape compiles nothing) with

    op(x)             A x,                        [batch, *op.shape] -> [batch, *op.measured]
    op.adjoint(y)     A^T y, back again
    op.pinv(y)        A^+ y, the least-norm least-squares solution
    op.solve(y, c)    (A A^T + c I)^{-1} y
    op.spectrum()     A = U diag(s) V^T: see `jaxdiff.inverse.Spectrum`

Masks, Fourier masks, circular blur, downsampling and matrices have all of it in closed form; others
solve by conjugate gradients (lineax), and decompose their matrix if it is small. `@` composes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from jaxdiff.arrays import is_concrete
from jaxdiff.inverse.spectra import (
    Basis,
    Columns,
    Hartley,
    Spectrum,
    Standard,
    dense_spectrum,
    reached,
    size,
    spatial,
    static,
)


class LinearOperator:
    """Base: subclasses give `shape`, `measured` and `_apply`, linear; the rest has defaults."""

    shape: tuple[int, ...]
    measured: tuple[int, ...]

    def _apply(self, x: Array) -> Array:
        raise TypeError(f"{type(self).__name__} does not define _apply")

    def _adjoint(self, y: Array) -> Array:
        like = jax.ShapeDtypeStruct((y.shape[0], *self.shape), y.dtype)
        return jax.linear_transpose(self._apply, like)(y)[0]

    def _closed_form(self) -> Spectrum | None:
        return None

    def _left(self) -> tuple[Any, Basis] | None:
        """(s padded to m, U) where U needs no iteration; None: `solve` and `pinv` iterate."""
        spectrum = self._closed_form()
        if spectrum is None:
            return None
        return spectrum.padded(size(self.measured)), spectrum.left_basis

    def __call__(self, x: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        """A x. Raises ValueError for another shape than [batch, *shape]."""
        _check(x, self.shape, "takes")
        return self._apply(x)

    def adjoint(self, y: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        """A^T y. Raises ValueError for another shape than [batch, *measured]."""
        _check(y, self.measured, "measures")
        return self._adjoint(y)

    def __matmul__(self, other: LinearOperator) -> LinearOperator:
        return compose(self, other)

    def dense(self, dtype: Any = None) -> Float[Array, "m n"]:
        """The matrix on flattened arrays, [size(measured), size(shape)]."""
        n = size(self.shape)
        columns = self._apply(jnp.eye(n, dtype=dtype).reshape(n, *self.shape))
        return columns.reshape(n, -1).T

    def spectrum(self) -> Spectrum:
        """A = U diag(s) V^T, in closed form or of the dense matrix (at most 4096 a side).

        Take it once, outside a sampler's loop: a dense one is computed at every call.
        """
        found = self._closed_form()
        return dense_spectrum(self.dense, self.shape, self.measured) if found is None else found

    def solve(
        self, y: Float[Array, "batch ..."], ridge: ArrayLike, rtol: float = 1e-5
    ) -> Float[Array, "batch ..."]:
        """(A A^T + ridge I)^{-1} y; ridge a scalar or [batch], may be traced.

        At ridge = 0 directions that A does not reach give 0 in closed form (the pseudo-inverse), and
        do not converge by iteration. Iterations end at residuals below rtol (root mean square of y),
        and raise at run time where they do not get there.
        """
        _check(y, self.measured, "measures")
        if is_concrete(ridge) and not np.all(np.asarray(ridge) >= 0):
            raise ValueError(f"ridge must not be negative, got {ridge!r}")
        ridge = jnp.asarray(ridge, y.dtype)
        left = self._left()
        if left is None:
            return _by_conjugate_gradients(self, y, ridge, rtol)
        values, basis = left
        values = jnp.where(reached(values, y.dtype), values, 0.0).astype(y.dtype)
        square = values**2 + (ridge[:, None] if ridge.ndim else ridge)
        safe = jnp.where(square > 0, square, 1.0)
        return basis.back(jnp.where(square > 0, basis.coordinates(y) / safe, 0.0))

    def pinv(self, y: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        """A^+ y: the solution of least |A x - y| that has the least norm.

        Singular values up to 100 eps times the largest count as 0; without a closed form LSMR (Fong &
        Saunders 2011) iterates.
        """
        _check(y, self.measured, "measures")
        left = self._left()
        if left is None:
            return _by_lsmr(self, y)
        values, basis = left
        seen = reached(values, y.dtype)
        inverse = jnp.where(seen, 1.0 / jnp.where(seen, values, 1.0).astype(y.dtype) ** 2, 0.0)
        return self._adjoint(basis.back(inverse * basis.coordinates(y)))


def _check(a: Any, shape: tuple[int, ...], verb: str) -> None:
    if jnp.ndim(a) == 0 or tuple(jnp.shape(a)[1:]) != shape:
        want = ", ".join(map(str, shape))
        raise ValueError(f"the operator {verb} arrays [batch, {want}], got shape {jnp.shape(a)}")


def _by_conjugate_gradients(op, y, ridge, rtol):
    def one(y, ridge):
        # lineax compares entry by entry: on a common scale the tolerance is relative to the whole.
        scale = jnp.sqrt(jnp.mean(y**2))
        unit = y / jnp.where(scale > 0, scale, 1.0)

        def normal(v):
            return op._apply(op._adjoint(v[None]))[0] + ridge * v

        matrix = lx.FunctionLinearOperator(
            normal, jax.ShapeDtypeStruct(y.shape, y.dtype), lx.positive_semidefinite_tag
        )
        return scale * lx.linear_solve(matrix, unit, lx.CG(rtol=rtol, atol=rtol)).value

    return jax.vmap(one, (0, 0 if ridge.ndim else None))(y, ridge)


def _by_lsmr(op, y):
    eps = float(jnp.finfo(y.dtype).eps)

    def one(y):
        matrix = lx.FunctionLinearOperator(
            lambda v: op._apply(v[None])[0], jax.ShapeDtypeStruct(op.shape, y.dtype)
        )
        return lx.linear_solve(matrix, y, lx.LSMR(rtol=10 * eps, atol=10 * eps)).value

    return jax.vmap(one)(y)


def check_operator(operator: Any, what: str) -> None:
    """Raise TypeError unless `operator` is a LinearOperator."""
    if not isinstance(operator, LinearOperator):
        raise TypeError(
            f"{what} takes an operator of jaxdiff.inverse, got {type(operator).__name__}"
        )


def as_shape(shape: Any, least: int = 1) -> tuple[int, ...]:
    """`shape` as a tuple of positive integers, at least `least` of them; ValueError otherwise."""
    found = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    whole = all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) for n in found)
    if not whole or len(found) < least or any(n < 1 for n in found):
        raise ValueError(f"need a shape of at least {least} positive sizes, got {shape!r}")
    return tuple(map(int, found))


def as_leaf(values: Any, what: str) -> Array:
    """`values` in the default float type; ValueError unless finite where the host can see them."""
    if is_concrete(values) and not np.all(np.isfinite(np.asarray(values, np.float64))):
        raise ValueError(f"{what} must be finite, got {values!r}")
    return jnp.asarray(values, jnp.result_type(float))


# --- masks ----------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Masked(LinearOperator):
    """y = mask * Q^T x for an orthonormal basis Q: `inpainting` and `fourier`."""

    mask: Array
    basis: Basis
    shape: tuple[int, ...] = static()

    @property
    def measured(self) -> tuple[int, ...]:
        return self.shape

    def _apply(self, x):
        c = self.basis.coordinates(x).reshape(x.shape)
        return self.mask.astype(x.dtype) * c

    def _adjoint(self, y):
        return self.basis.back((self.mask.astype(y.dtype) * y).reshape(y.shape[0], -1))

    def _closed_form(self):
        return Spectrum(self.mask.ravel(), self.basis, Standard(self.shape))


def _as_mask(mask: ArrayLike, shape: Any) -> tuple[Array, tuple[int, ...]]:
    shape = np.shape(mask) if shape is None else as_shape(shape)
    if is_concrete(mask) and not np.all(np.isin(np.asarray(mask), (0, 1))):
        raise ValueError(f"a mask is 0 or 1 (1: measured), got values {np.unique(mask)}")
    tail = shape[len(shape) - np.ndim(mask) :]
    if not shape or np.ndim(mask) > len(shape) or any(
        k not in (1, n) for k, n in zip(np.shape(mask), tail)
    ):  # fmt: skip
        raise ValueError(f"a mask of shape {np.shape(mask)} does not fit data of shape {shape}")
    return jnp.broadcast_to(jnp.asarray(mask, jnp.result_type(float)), shape), shape


def inpainting(mask: ArrayLike, shape: Any = None) -> Masked:
    """y = mask * x: entries where mask is 1 are measured, the others are 0 in y.

    `mask` is of the data's shape, or broadcasts to `shape`; it may be traced, and vmapped. Raises
    ValueError for values other than 0 and 1, or a mask that does not fit.
    """
    mask, shape = _as_mask(mask, shape)
    return Masked(mask, Standard(shape), shape)


def fourier(mask: ArrayLike, shape: Any = None) -> Masked:
    """Some frequencies of a real image (MRI): y = mask * (Re F x - Im F x), F unitary.

    F runs over the first two axes of `shape` (the only one of vectors), frequencies in FFT order. The
    measurement is real and as white as the noise: H = Re F - Im F is orthogonal, and H(k), H(-k) are
    Re F(k) and Im F(k) turned by 45 degrees. A real image's F(-k) is the conjugate of F(k), so a mask
    that has k gets -k too. To simulate from complex k-space data f, y = mask * (f.real - f.imag).
    """
    mask, shape = _as_mask(mask, shape)
    axes = tuple(a - 1 for a in spatial(shape))
    mirrored = jnp.roll(jnp.flip(mask, axes), (1,) * len(axes), axes)
    return Masked(jnp.maximum(mask, mirrored), Hartley(None, shape), shape)


# --- matrices -------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Matrix(LinearOperator):
    """y = matrix @ x on flattened arrays; U and s, padded to m, are kept for the solves."""

    matrix: Array
    left_vectors: Array
    values: Array
    shape: tuple[int, ...] = static()

    @property
    def measured(self) -> tuple[int, ...]:
        return (self.matrix.shape[0],)

    def _apply(self, x):
        return x.reshape(x.shape[0], -1) @ self.matrix.T.astype(x.dtype)

    def _adjoint(self, y):
        return (y @ self.matrix.astype(y.dtype)).reshape(y.shape[0], *self.shape)

    def _left(self):
        return self.values, Columns(self.left_vectors, self.measured)


def matrix(A: Float[ArrayLike, "m n"], shape: Any = None) -> Matrix:
    """y = A x for x of `shape`, flattened; by default [batch, n]. `measured` is (m,).

    Its decomposition is made here, on the host in float64 unless A is traced. Raises ValueError for
    A of another shape than [m, size(shape)], or not finite.
    """
    if np.ndim(A) != 2 or 0 in np.shape(A):
        raise ValueError(f"A must be a matrix [m, n], got shape {np.shape(A)}")
    m, n = np.shape(A)
    shape = (n,) if shape is None else as_shape(shape)
    if size(shape) != n:
        raise ValueError(f"A has {n} columns, data of shape {shape} has {size(shape)} entries")
    leaf = as_leaf(A, "A")
    xp, A = (np, np.asarray(A, np.float64)) if is_concrete(A) else (jnp, leaf)
    # Square up to m columns: then U comes complete and V, maybe much larger, thin.
    padded = xp.pad(A, ((0, 0), (0, max(m - n, 0))))
    u, s, _ = xp.linalg.svd(padded, full_matrices=False)
    return Matrix(leaf, jnp.asarray(u, leaf.dtype), jnp.asarray(s, leaf.dtype), shape)


# --- composition ----------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Composed(LinearOperator):
    """outer(inner(x))."""

    outer: LinearOperator
    inner: LinearOperator

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def measured(self) -> tuple[int, ...]:
        return self.outer.measured

    def _apply(self, x):
        return self.outer._apply(self.inner._apply(x))

    def _adjoint(self, y):
        return self.inner._adjoint(self.outer._adjoint(y))


def compose(outer: LinearOperator, inner: LinearOperator) -> Composed:
    """outer(inner(x)), also written `outer @ inner`. Raises ValueError if the shapes do not meet."""
    for operator in (outer, inner):
        check_operator(operator, "compose")
    if outer.shape != inner.measured:
        raise ValueError(
            f"the outer operator takes {outer.shape}, the inner one measures {inner.measured}"
        )
    return Composed(outer, inner)
