"""Operators on images [height, width, ...]: downsampling, blur, projections."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from jaxdiff.inverse.operators import LinearOperator, as_leaf, as_shape
from jaxdiff.inverse.spectra import Hartley, Kronecker, Spectrum, static, svd

# --- downsampling ---------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Separable(LinearOperator):
    """y = R x C^T per channel, R [h', h], C [w', w]; the decompositions of both are kept."""

    matrices: tuple[Array, Array]
    left_vectors: tuple[Array, Array]
    values: tuple[Array, Array]
    right_vectors: tuple[Array, Array]
    shape: tuple[int, ...] = static()

    @property
    def measured(self) -> tuple[int, ...]:
        return (*(a.shape[0] for a in self.matrices), *self.shape[2:])

    def _apply(self, x):
        rows, columns = (a.astype(x.dtype) for a in self.matrices)
        return jnp.einsum("ih,jw,bhw...->bij...", rows, columns, x)

    def _closed_form(self):
        rows, columns = self.values
        channels = math.prod(self.shape[2:])
        values = jnp.repeat(jnp.outer(rows, columns).ravel(), channels)
        measured = self.measured
        return Spectrum(
            values,
            Kronecker(*self.right_vectors, self.shape, measured[:2]),
            Kronecker(*self.left_vectors, measured, measured[:2]),
        )


def _separable(matrices, shape) -> Separable:
    dtype = jnp.result_type(float)
    cast = lambda arrays: tuple(jnp.asarray(a, dtype) for a in arrays)  # noqa: E731
    left, values, right = zip(*(svd(a) for a in matrices))
    return Separable(cast(matrices), cast(left), cast(values), cast(v.T for v in right), shape)


def _reduced(shape: Any, factor: Any) -> tuple[int, ...]:
    shape = as_shape(shape, least=2)
    whole = isinstance(factor, (int, np.integer)) and not isinstance(factor, bool)
    if not whole or factor < 1 or any(n % factor for n in shape[:2]):
        raise ValueError(f"factor must be an integer that divides {shape[:2]}, got {factor!r}")
    return shape


def box_down(shape: Any, factor: int) -> Separable:
    """Means over blocks of factor x factor pixels; shape [h, w] or [h, w, channels].

    Raises ValueError for a factor that does not divide height and width.
    """
    shape = _reduced(shape, factor)
    matrices = (np.kron(np.eye(n // factor), np.full((1, factor), 1 / factor)) for n in shape[:2])
    return _separable(tuple(matrices), shape)


def bicubic_down(shape: Any, factor: int) -> Separable:
    """Bicubic downsampling with anti-aliasing: Keys' kernel (a = -1/2) stretched by `factor`.

    MATLAB's imresize in the interior; at a border the weights inside the image are normalised, as by
    `jax.image.resize(..., "cubic")`, which this is. Raises ValueError as `box_down`.
    """
    shape = _reduced(shape, factor)
    return _separable(tuple(_bicubic(n, factor) for n in shape[:2]), shape)


def _bicubic(n: int, factor: int) -> np.ndarray:
    """[n / factor, n]: output i is centred on (i + 1/2) factor - 1/2. Keys (1981)."""
    centres = (np.arange(n // factor) + 0.5) * factor - 0.5
    d = np.abs(centres[:, None] - np.arange(n)) / factor
    near = (1.5 * d - 2.5) * d**2 + 1.0
    far = ((-0.5 * d + 2.5) * d - 4.0) * d + 2.0
    weights = np.where(d <= 1, near, np.where(d < 2, far, 0.0))
    return weights / weights.sum(1, keepdims=True)


# --- blur -----------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CircularBlur(LinearOperator):
    """Convolution over images that wrap around."""

    kernel: Array
    shape: tuple[int, ...] = static()

    @property
    def measured(self) -> tuple[int, ...]:
        return self.shape

    def _transfer(self):
        """The kernel's Fourier transform, its centre at pixel (0, 0)."""
        size = self.kernel.shape
        place = [(0, n - k) for n, k in zip(self.shape, size)]
        centred = jnp.roll(jnp.pad(self.kernel, place), [-(k // 2) for k in size], (0, 1))
        return jnp.fft.fftn(centred)

    def _filter(self, x, transfer):
        transfer = transfer.reshape(*transfer.shape, *(1,) * (len(self.shape) - 2))
        return jnp.fft.ifftn(transfer * jnp.fft.fftn(x, axes=(1, 2)), axes=(1, 2)).real.astype(x.dtype)

    def _apply(self, x):
        return self._filter(x, self._transfer())

    def _adjoint(self, y):
        return self._filter(y, jnp.conj(self._transfer()))

    def _closed_form(self):
        transfer = self._transfer()
        gain, channels = jnp.abs(transfer), math.prod(self.shape[2:])
        # Where nothing passes the phase is rounding, and not odd in frequency.
        passes = gain > 10 * jnp.finfo(gain.dtype).eps * jnp.max(gain)
        angle = jnp.where(passes, jnp.angle(transfer), 0.0)
        values = jnp.repeat(gain.ravel(), channels)
        return Spectrum(values, Hartley(None, self.shape), Hartley(angle, self.shape))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PaddedBlur(LinearOperator):
    """Convolution of the image extended by a mode of `jnp.pad`, linear in the image."""

    kernel: Array
    shape: tuple[int, ...] = static()
    mode: str = static()

    @property
    def measured(self) -> tuple[int, ...]:
        return self.shape

    def _apply(self, x):
        h, w = self.kernel.shape
        margins = [(h - 1 - h // 2, h // 2), (w - 1 - w // 2, w // 2)]
        wide = jnp.pad(x, [(0, 0), *margins, *[(0, 0)] * (x.ndim - 3)], mode=self.mode)
        circular = CircularBlur(self.kernel.astype(x.dtype), wide.shape[1:])._apply(wide)
        (top, _), (left, _) = margins
        return circular[:, top : top + x.shape[1], left : left + x.shape[2]]


MODES = ("wrap", "reflect", "symmetric", "edge", "constant")


def blur(shape: Any, kernel: Float[ArrayLike, "a b"], mode: str = "wrap") -> LinearOperator:
    """y = kernel * x: y[i] = sum_j kernel[j] x[i + c - j], c = size // 2, per channel.

    Arguments:
      shape: [h, w] or [h, w, channels].
      kernel: [a, b], no larger than the image; see `gaussian_kernel`, `motion_kernel`.
      mode: what lies beyond the border, as in `jnp.pad`: "wrap" (circular, with a closed-form
        spectrum), "reflect" (DPS's Gaussian blur), "symmetric", "edge" or "constant" (zeros).
    """
    shape = as_shape(shape, least=2)
    if np.ndim(kernel) != 2 or any(k > n for k, n in zip(np.shape(kernel), shape)):
        raise ValueError(
            f"the kernel must be a matrix no larger than {shape[:2]}, got shape {np.shape(kernel)}"
        )
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; choose from {list(MODES)}")
    kernel = as_leaf(kernel, "kernel")
    return CircularBlur(kernel, shape) if mode == "wrap" else PaddedBlur(kernel, shape, mode)


def gaussian_kernel(size: int, std: float) -> np.ndarray:
    """exp(-r^2 / (2 std^2)) on size x size pixels, sum 1; std in pixels. `size` must be odd."""
    _check_kernel(size, std=std)
    line = np.exp(-0.5 * ((np.arange(size) - size // 2) / std) ** 2)
    return np.outer(line, line) / line.sum() ** 2


def motion_kernel(size: int, length: float, angle: float = 0.0) -> np.ndarray:
    """A straight motion of `length` pixels at `angle` radians from the horizontal, sum 1.

    Points along the line are spread over the pixels around them bilinearly. `size` must be odd and
    hold the line.
    """
    _check_kernel(size, length=length)
    along = np.linspace(-0.5, 0.5, 16 * size) * length
    ends = size // 2 + np.stack([-along * np.sin(angle), along * np.cos(angle)])
    if ends.min() < 0 or ends.max() > size - 1:
        raise ValueError(f"a line of length {length} at {angle} does not fit {size} pixels")
    kernel = np.zeros((size, size))
    low = np.minimum(np.floor(ends).astype(int), size - 2)
    part = ends - low
    for i in (0, 1):
        for j in (0, 1):
            share = (part[0] if i else 1 - part[0]) * (part[1] if j else 1 - part[1])
            np.add.at(kernel, (low[0] + i, low[1] + j), share)
    return kernel / kernel.sum()


def _check_kernel(size: Any, **lengths: float) -> None:
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 3 or not size % 2:
        raise ValueError(f"a kernel's size must be an odd integer of at least 3, got {size!r}")
    for name, value in lengths.items():
        if not 0 < value < np.inf:
            raise ValueError(f"{name} must be positive, got {value!r}")


# --- projections ----------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Radon(LinearOperator):
    """Parallel-beam projections; see `radon`."""

    angles: Array
    detectors: int = static()
    shape: tuple[int, ...] = static()

    @property
    def measured(self) -> tuple[int, ...]:
        return (self.angles.shape[0], self.detectors, *self.shape[2:])

    def _apply(self, x):
        h, w = self.shape[:2]
        across = jnp.arange(self.detectors) - (self.detectors - 1) / 2
        along = across[:, None]
        images = jnp.moveaxis(x.reshape(x.shape[0], h, w, -1), 3, 1).reshape(-1, h, w)

        def project(angle):
            cos, sin = jnp.cos(angle), jnp.sin(angle)
            row = (h - 1) / 2 - across * sin - along * cos
            column = (w - 1) / 2 + across * cos - along * sin
            at = [row.astype(x.dtype), column.astype(x.dtype)]
            sampled = jax.vmap(lambda a: jax.scipy.ndimage.map_coordinates(a, at, order=1))(images)
            return jnp.sum(sampled, 1)  # along the ray

        found = jax.lax.map(project, self.angles.astype(x.dtype))
        found = found.reshape(len(self.angles), x.shape[0], -1, self.detectors)
        return jnp.moveaxis(found, (1, 0, 3, 2), (0, 1, 2, 3)).reshape(x.shape[0], *self.measured)


def radon(shape: Any, angles: Float[ArrayLike, " views"], detectors: int | None = None) -> Radon:
    """Line integrals of an image at `angles` (radians): y[view, s], a parallel-beam scan (CT).

    A ray of view a meets the points s (cos a, sin a) + u (-sin a, cos a) from the image's centre, x to
    the right and y up; the image is interpolated bilinearly, zero outside, and summed at unit steps of
    u in pixels. `detectors` rays, one pixel apart and centred; by default enough to see all of the
    image. Measures [views, detectors, ...].
    """
    shape = as_shape(shape, least=2)
    if np.ndim(angles) != 1 or not np.size(angles):
        raise ValueError(f"angles must be a vector of at least one, got shape {np.shape(angles)}")
    least = math.ceil(math.hypot(*shape[:2]))
    (detectors,) = as_shape(least if detectors is None else detectors)
    return Radon(as_leaf(angles, "angles"), detectors, shape)
