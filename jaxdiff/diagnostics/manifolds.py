"""Exact denoisers of data on a manifold of known dimension, to test estimators of it."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import i0e, i1e
from jaxtyping import ArrayLike

from jaxdiff.arrays import is_concrete
from jaxdiff.denoisers import Denoiser, level


def sphere(dimension: int, ambient: int, radius: ArrayLike = 1.0) -> Denoiser:
    """The exact denoiser of the uniform distribution on a circle or a sphere in `ambient` dimensions.

    The data lie in the first n = dimension + 1 coordinates at distance R = `radius` of the origin, the
    other coordinates are 0. x_0 given x_t = x has a von Mises-Fisher law there, so with y the first n
    coordinates of x,

        E[x_0 | x] = R A(k) y / |y|,    k = alpha R |y| / sigma^2,

        A(k) = I_1(k) / I_0(k) for the circle (dimension 1), coth(k) - 1 / k for the sphere (2).

    Predicts x0. x is [batch, ambient], y not 0. Raises ValueError for another dimension, or ambient
    below n, or a radius that is not positive.
    """
    if dimension not in (1, 2):
        raise ValueError(f"dimension must be 1 (circle) or 2 (sphere), got {dimension!r}")
    if ambient < dimension + 1:
        raise ValueError(f"ambient must be at least {dimension + 1}, got {ambient!r}")
    if is_concrete(radius) and not np.all(np.asarray(radius) > 0):
        raise ValueError(f"radius must be positive, got {radius!r}")
    return Denoiser(_Sphere(dimension), "x0", jnp.asarray(radius, jnp.result_type(float)), level)


@dataclasses.dataclass(frozen=True)
class _Sphere:
    dimension: int

    def __call__(self, radius, x, levels, cond=None):
        _, alpha, sigma = levels
        y = x[:, : self.dimension + 1]
        length = jnp.linalg.norm(y, axis=-1)
        mean = radius * _MEAN_LENGTH[self.dimension](alpha * radius * length / sigma**2)
        y = (mean / length)[:, None] * y
        return jnp.pad(y, ((0, 0), (0, x.shape[-1] - y.shape[-1])))


def _circle(k):
    return i1e(k) / i0e(k)


def _two_sphere(k):
    # coth(k) - 1 / k loses its digits for small k, where it is k / 3 - k^3 / 45.
    small = k < 0.1
    safe = jnp.where(small, 1.0, k)
    return jnp.where(small, k / 3.0 - k**3 / 45.0, 1.0 / jnp.tanh(safe) - 1.0 / safe)


_MEAN_LENGTH = {1: _circle, 2: _two_sphere}
