"""Singular value decompositions of operators, with bases that are transforms where they can be.

A = U diag(s) V^T. U and V are orthogonal and complete; an operator's may be an identity, a real
Fourier transform or a Kronecker product, so that nothing of size n x n is ever formed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def static(default: Any = dataclasses.MISSING) -> Any:
    """A field that is part of the tree's structure."""
    return dataclasses.field(default=default, metadata={"static": True})


class Basis:
    """An orthonormal basis of arrays of one shape: `coordinates` is Q^T x, `back` is Q c."""

    shape: tuple[int, ...]

    def coordinates(self, x: Float[Array, "batch ..."]) -> Float[Array, "batch size"]:
        """Q^T x, [batch, size] of x [batch, *shape]."""
        raise TypeError(f"{type(self).__name__} does not define coordinates")

    def back(self, c: Float[Array, "batch size"]) -> Float[Array, "batch ..."]:
        """Q c, [batch, *shape] of c [batch, size]: the inverse of `coordinates`."""
        raise TypeError(f"{type(self).__name__} does not define back")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Standard(Basis):
    """The identity: coordinates are the entries."""

    shape: tuple[int, ...] = static()

    def coordinates(self, x):
        return x.reshape(x.shape[0], -1)

    def back(self, c):
        return c.reshape(c.shape[0], *self.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Columns(Basis):
    """The columns of an orthogonal matrix [size, size]."""

    matrix: Array
    shape: tuple[int, ...] = static()

    def coordinates(self, x):
        return x.reshape(x.shape[0], -1) @ self.matrix.astype(x.dtype)

    def back(self, c):
        return (c @ self.matrix.T.astype(c.dtype)).reshape(c.shape[0], *self.shape)


def spatial(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes, of an array [batch, *shape], that images lie in: the first two, or the only one."""
    return tuple(range(1, 1 + min(2, len(shape))))


def hartley(x: Float[Array, "batch ..."], axes: tuple[int, ...]) -> Float[Array, "batch ..."]:
    """Re F x - Im F x for the unitary Fourier transform F: real, orthogonal and its own inverse.

    H(k) and H(-k) together are Re F(k) and Im F(k), turned by 45 degrees and scaled by sqrt(2).
    """
    f = jnp.fft.fftn(x, axes=axes, norm="ortho")
    return (f.real - f.imag).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Hartley(Basis):
    """The real Fourier basis over the spatial axes: coordinates are Re F x - Im F x.

    With `angle` (of the spatial axes' shape, odd in k) the basis vectors are those of Hartley with
    the phase exp(i angle) put on each frequency: the left singular vectors of a circular blur.
    """

    angle: Array | None
    shape: tuple[int, ...] = static()

    def _turn(self, x, sign):
        if self.angle is None:
            return x
        axes = spatial(self.shape)
        extra = (1,) * (len(self.shape) - len(axes))
        phase = jnp.exp(1j * sign * self.angle).reshape(*self.angle.shape, *extra)
        turned = jnp.fft.ifftn(phase * jnp.fft.fftn(x, axes=axes), axes=axes)
        return turned.real.astype(x.dtype)

    def coordinates(self, x):
        return hartley(self._turn(x, -1.0), spatial(self.shape)).reshape(x.shape[0], -1)

    def back(self, c):
        x = hartley(c.reshape(c.shape[0], *self.shape), spatial(self.shape))
        return self._turn(x, 1.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Kronecker(Basis):
    """Products of the columns of `rows` [h, h] and `columns` [w, w], over images [h, w, ...].

    Coordinates come with those of the first `first` = (h', w') columns of both in front.
    """

    rows: Array
    columns: Array
    shape: tuple[int, ...] = static()
    first: tuple[int, int] = static()

    def _order(self):
        h, w = self.shape[:2]
        front = np.zeros((h, w, *self.shape[2:]), bool)
        front[: self.first[0], : self.first[1]] = True
        return np.argsort(~front.ravel(), kind="stable")

    def coordinates(self, x):
        rows, columns = self.rows.astype(x.dtype), self.columns.astype(x.dtype)
        c = jnp.einsum("hi,wj,bhw...->bij...", rows, columns, x)
        return c.reshape(x.shape[0], -1)[:, self._order()]

    def back(self, c):
        rows, columns = self.rows.astype(c.dtype), self.columns.astype(c.dtype)
        c = c[:, np.argsort(self._order())].reshape(c.shape[0], *self.shape)
        return jnp.einsum("hi,wj,bij...->bhw...", rows, columns, c)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
    """A = U diag(values) V^T, U [m, m] and V [n, n] orthogonal, as functions.

    `values` [r], r = min(m, n), are at least 0 and in no order; value i belongs to coordinate i of
    both sides, and coordinates from r on are not seen (right) or not reached (left).
    """

    values: Float[Array, " r"]
    right_basis: Basis
    left_basis: Basis

    def right(self, x: Float[Array, "batch ..."]) -> Float[Array, "batch n"]:
        """V^T x."""
        return self.right_basis.coordinates(x)

    def right_back(self, c: Float[Array, "batch n"]) -> Float[Array, "batch ..."]:
        """V c, [batch, *shape]."""
        return self.right_basis.back(c)

    def left(self, y: Float[Array, "batch ..."]) -> Float[Array, "batch m"]:
        """U^T y."""
        return self.left_basis.coordinates(y)

    def left_back(self, c: Float[Array, "batch m"]) -> Float[Array, "batch ..."]:
        """U c, [batch, *measured]."""
        return self.left_basis.back(c)

    def padded(self, size: int) -> Float[Array, " size"]:
        """The values, and zeros up to `size`."""
        return jnp.pad(self.values, (0, size - self.values.shape[0]))


LARGEST = 4096


def dense_spectrum(
    dense: Callable[[], Float[Array, "m n"]], shape: tuple[int, ...], measured: tuple[int, ...]
) -> Spectrum:
    """The decomposition of the matrix that `dense` makes; on the host in float64 unless it is traced.

    Raises ValueError, before it is made, for more than 4096 rows or columns.
    """
    if max(size(shape), size(measured)) > LARGEST:
        raise ValueError(
            f"an operator of {size(measured)} x {size(shape)} without a closed-form spectrum is "
            f"too large for a dense one (at most {LARGEST} a side): use solve, which iterates"
        )
    matrix = dense()
    u, s, vt = svd(matrix)
    cast = lambda a: jnp.asarray(a, matrix.dtype)  # noqa: E731
    return Spectrum(cast(s), Columns(cast(vt.T), shape), Columns(cast(u), measured))


def svd(matrix: Any) -> tuple[Any, Any, Any]:
    """(U [m, m], s, V^T [n, n]), in float64 NumPy where the values are known."""
    if isinstance(matrix, jax.core.Tracer):
        return jnp.linalg.svd(matrix, full_matrices=True)
    return np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=True)


def reached(values: Float[Array, " r"], dtype: Any) -> Any:
    """Where singular values are not 0: above 100 eps of the largest, of their dtype or the coarser
    `dtype` that they are used in.

    Bases are orthogonal transforms or decompositions in float64, so rounding does not grow with size.
    """
    eps = max(float(jnp.finfo(d).eps) for d in (values.dtype, dtype))
    return values > 100 * eps * jnp.max(values)


def size(shape: tuple[int, ...]) -> int:
    """Number of entries."""
    return math.prod(shape)
