"""Geometric augmentation of images with its labels: the pipeline of "EDM"."""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

# The low-pass filter of the symlet with six vanishing moments (Daubechies, "Ten lectures on
# wavelets", 1992, table 8.3): orthonormal to its own even shifts, so up and down again is exact.
_SYM6 = np.array([
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
])  # fmt: skip
_MARGIN = len(_SYM6) // 4  # pixels around the image that the filter on the way down reaches

# What is drawn, and how many labels it has.
_LABELS = {
    "x_flip": 1, "y_flip": 1, "translate_int": 2, "scale": 1, "rotate": 2, "anisotropy": 2,
    "translate": 2,
}  # fmt: skip
_GEOMETRIC = ("scale", "rotate", "anisotropy", "translate")


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random flips, scaling, rotation, stretching and translation, and labels that tell of them.

        images, labels = Augmentation(probability=0.12)(keys, images)

    Each transformation is applied to an image with probability min(1, its multiplier times
    `probability`), independently; else its labels are 0. The labels [batch, label_dim] are an input
    of the network in training (`cond["augment"]`), and absent when it is sampled, so deformed
    images do not leak into the samples. With w standard normal and u uniform, in the order of
    application, and with their labels:

        x_flip         left and right are exchanged with probability 1/2           1 if they are
        y_flip         top and bottom are                                          1 if they are
        translate_int  whole pixels, at most translate_int_max of the size,        the shift, relative
                       the image continued by reflection                           to the largest (2)
        scale          by 2^(scale_std w)                                          w
        rotate         by u rotate_max, u in (-pi, pi)                             cos - 1, sin
        anisotropy     by 2^(anisotropy_std w) along one direction and its         w cos r, w sin r
                       inverse across; the direction r is that of the
                       columns, or with probability anisotropy_rotate
                       uniform in (-pi, pi)
        translate      by translate_std w of the size, in each direction           w (2)

    The last four are one affine map about the centre, done without aliasing: the image, continued
    by reflection, is doubled in size with the sym6 wavelet filter, sampled bilinearly, and halved
    with the same filter. Without any of the four an image stays as it is. The defaults
    are EDM's for CIFAR-10 with `probability` 0.12 (0.15 for faces): every image is flipped with
    probability 1/2, no shifts by whole pixels, 9 labels. Karras et al., "Elucidating the Design
    Space of Diffusion-Based Generative Models" (2022), appendix F.2; Karras et al., "Training
    Generative Adversarial Networks with Limited Data" (2020).

    Pure JAX, for use inside a compiled step: an image is decided by its key alone, wherever it is
    computed, and the input pipeline's processors do none of it. Raises ValueError for a probability
    outside [0, 1], and for negative numbers.
    """

    probability: float = 0.0
    x_flip: float = 1e8
    y_flip: float = 1.0
    translate_int: float = 0.0
    scale: float = 1.0
    rotate: float = 1.0
    anisotropy: float = 1.0
    translate: float = 1.0
    translate_int_max: float = 0.125
    scale_std: float = 0.2
    rotate_max: float = 1.0
    anisotropy_std: float = 0.2
    anisotropy_rotate: float = 0.5
    translate_std: float = 0.125

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            most = 1.0 if field.name in ("probability", "anisotropy_rotate") else math.inf
            if not 0 <= value <= most:
                accepted = "in [0, 1]" if most == 1.0 else "at least 0"
                raise ValueError(f"{field.name} must be {accepted}, got {value!r}")

    @property
    def label_dim(self) -> int:
        """Labels of an image; 0 if nothing is ever applied."""
        return sum(_LABELS[name] for name in self._used)

    @property
    def _used(self) -> tuple[str, ...]:
        return tuple(n for n in _LABELS if getattr(self, n) > 0 and self.probability > 0)

    def __call__(
        self, keys: Key[Array, " batch"], images: Float[Array, "batch height width channels"]
    ) -> tuple[Float[Array, "batch height width channels"], Float[Array, "batch label_dim"]]:
        """(augmented images, labels); image i is decided by keys[i]. ValueError for other shapes.
        """
        if images.ndim != 4 or min(images.shape[1:3]) < 2:
            raise ValueError(
                "augmentation needs images [batch, height, width, channels] of at least 2 x 2 "
                f"pixels, got shape {images.shape}"
            )
        return self.apply(self.draw(keys), images)

    def draw(self, keys: Key[Array, " batch"]) -> dict[str, Array]:
        """The random numbers of each image, 0 where a transformation is not applied.

        "x_flip" and "y_flip" 0 or 1; "translate_int" [batch, 2] in (-1, 1), of the largest shift;
        "scale" w; "rotate" the angle; "anisotropy" [batch, 2], w and r; "translate" [batch, 2], w.
        """

        def value(name, key):
            if name in ("x_flip", "y_flip"):
                return jax.random.bernoulli(key).astype(jnp.float32)
            if name == "translate_int":
                return jax.random.uniform(key, (2,), minval=-1.0)
            if name == "scale":
                return jax.random.normal(key)
            if name == "rotate":
                return jax.random.uniform(key, minval=-np.pi, maxval=np.pi) * self.rotate_max
            if name == "translate":
                return jax.random.normal(key, (2,))
            key, angle_key, turned_key = jax.random.split(key, 3)
            angle = jax.random.uniform(angle_key, minval=-np.pi, maxval=np.pi)
            turned = jax.random.bernoulli(turned_key, self.anisotropy_rotate)
            return jnp.stack([jax.random.normal(key), jnp.where(turned, angle, 0.0)])

        def one(key):
            drawn = {}
            for i, name in enumerate(_LABELS):  # the number of each does not depend on the others
                if name in self._used:
                    value_key, applied_key = jax.random.split(jax.random.fold_in(key, i))
                    rate = getattr(self, name) * self.probability
                    applied = jax.random.uniform(applied_key) < rate
                    drawn[name] = jnp.where(applied, value(name, value_key), 0.0)
            return drawn

        return jax.vmap(one)(keys)

    def apply(
        self, drawn: Mapping[str, Array], images: Float[Array, "batch height width channels"]
    ) -> tuple[Float[Array, "batch height width channels"], Float[Array, "batch label_dim"]]:
        """(transformed images, labels) for the numbers that `draw` returns."""
        labels = []
        for name, axis in (("x_flip", 2), ("y_flip", 1)):
            if name in drawn:
                flipped = drawn[name][:, None, None, None] > 0
                images = jnp.where(flipped, jnp.flip(images, axis), images)
                labels.append(drawn[name][:, None])
        if "translate_int" in drawn:
            images, shifts = self._shifted(images, drawn["translate_int"])
            labels.append(shifts)
        if "scale" in drawn:
            labels.append(drawn["scale"][:, None])
        if "rotate" in drawn:
            angle = drawn["rotate"]
            labels.append(jnp.stack([jnp.cos(angle) - 1.0, jnp.sin(angle)], 1))
        if "anisotropy" in drawn:
            w, angle = drawn["anisotropy"].T
            labels.append(jnp.stack([w * jnp.cos(angle), w * jnp.sin(angle)], 1))
        if "translate" in drawn:
            labels.append(drawn["translate"])
        used = [drawn[name] for name in _GEOMETRIC if name in drawn]
        if used:
            matrix = self._affine(drawn, *images.shape[1:3])
            moved = jax.vmap(_warped)(images, matrix)
            still = ~jnp.any(jnp.concatenate([a.reshape(len(a), -1) for a in used], 1) != 0, 1)
            images = jnp.where(still[:, None, None, None], images, moved)
        return images, jnp.concatenate(labels, 1) if labels else jnp.zeros((len(images), 0))

    def _shifted(self, images, fraction):
        """Images moved right and up by whole pixels, and the shifts as labels."""
        sizes = np.array(images.shape[2:0:-1])  # width, height
        largest = jnp.asarray(sizes * self.translate_int_max, fraction.dtype)
        shift = jnp.round(fraction * largest)

        def source(size, shift):
            period = 2 * (size - 1)
            return size - 1 - jnp.abs(size - 1 - (jnp.arange(size) - shift) % period)

        def move(image, shift):
            columns = source(image.shape[1], shift[0])
            return image[source(image.shape[0], -shift[1])][:, columns]

        return jax.vmap(move)(images, shift.astype(jnp.int32)), shift / largest

    def _affine(self, drawn, height, width):
        """The map from the result's pixels to the image's, about the centre, [batch, 3, 3]."""
        count = len(next(iter(drawn.values())))
        found = jnp.broadcast_to(jnp.eye(3), (count, 3, 3))

        def then(matrix):
            nonlocal found
            found = jnp.matmul(found, matrix, precision="highest")

        if "scale" in drawn:
            inverse = jnp.exp2(-self.scale_std * drawn["scale"])
            then(_diagonal(inverse, inverse))
        if "rotate" in drawn:
            then(_rotation(drawn["rotate"]))
        if "anisotropy" in drawn:
            w, angle = drawn["anisotropy"].T
            stretch = jnp.exp2(self.anisotropy_std * w)
            then(_rotation(-angle))
            then(_diagonal(1.0 / stretch, stretch))
            then(_rotation(angle))
        if "translate" in drawn:
            size = self.translate_std * np.array([width, height], np.float32)
            shift = jnp.broadcast_to(jnp.eye(3), (count, 3, 3))
            then(shift.at[:, :2, 2].set(-drawn["translate"] * size))
        return found


def _diagonal(x: Array, y: Array) -> Float[Array, "batch 3 3"]:
    return jax.vmap(jnp.diag)(jnp.stack([x, y, jnp.ones_like(x)], 1))


def _rotation(angle: Array) -> Float[Array, "batch 3 3"]:
    cos, sin, zero = jnp.cos(angle), jnp.sin(angle), jnp.zeros_like(angle)
    rows = [cos, -sin, zero], [sin, cos, zero], [zero, zero, zero + 1.0]
    return jnp.moveaxis(jnp.stack([jnp.stack(row) for row in rows]), -1, 0)


def _warped(image: Float[Array, "h w c"], matrix: Float[Array, "3 3"]) -> Float[Array, "h w c"]:
    """The image whose pixel p is the image at `matrix` p, coordinates (x, y) from the centre."""
    height, width, _ = image.shape
    sizes = [2 * (size + 2 * _MARGIN) for size in (height, width)]
    # Doubling moves the samples half a pixel of the doubled image; the halving moves them back.
    half = jnp.array([0.5, 0.5])
    y, x = (jnp.arange(size) + 0.5 - size / 2 for size in sizes)
    at = jnp.stack(jnp.broadcast_arrays(x[None, :], y[:, None])) + half[:, None, None]
    linear = jnp.einsum("ij,jhw->ihw", matrix[:2, :2], at, precision="highest")
    source = linear + (2.0 * matrix[:2, 2] - half)[:, None, None]
    up = [_doubling(size) for size in (height, width)]
    large = jnp.einsum("ah,bw,hwc->cab", *up, image, precision="highest")
    rows, columns = (source[i] + len(m) / 2 - 0.5 for i, m in ((1, up[0]), (0, up[1])))
    sample = functools.partial(jax.scipy.ndimage.map_coordinates, order=1, mode="constant")
    turned = jax.vmap(lambda channel: sample(channel, [rows, columns]))(large)
    down = [_halving(size) for size in (height, width)]
    found = jnp.einsum("ha,wb,cab->hwc", *down, turned, precision="highest")
    return found.astype(image.dtype)


@functools.cache
def _doubling(size: int) -> Float[np.ndarray, "rows size"]:
    """The linear map from `size` pixels to their reflections on both sides, twice as fine."""
    wide = np.pad(np.eye(size), ((size - 1, size - 1), (0, 0)), mode="reflect")
    fine = np.zeros((2 * len(wide) - 1, size))
    fine[::2] = wide
    return _filtered(fine, _SYM6[::-1], len(_SYM6) // 2)


@functools.cache
def _halving(size: int) -> Float[np.ndarray, "size columns"]:
    """The linear map back from the fine pixels of an image with its margin."""
    fine = _filtered(np.eye(2 * (size + 2 * _MARGIN)), _SYM6, len(_SYM6) // 2 - 1)
    return fine[::2][_MARGIN:-_MARGIN]


def _filtered(columns: np.ndarray, taps: np.ndarray, edge: int) -> Float[np.ndarray, "rows size"]:
    padded = np.pad(columns, ((edge, edge), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, len(taps), axis=0)
    return (windows @ taps).astype(np.float32)
