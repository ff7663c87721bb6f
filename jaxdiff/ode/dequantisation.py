"""From densities to probabilities of grey levels: dequantisation and bits per dimension.

Level k of `levels` is a bin of width w in [-1, 1], by its `scaling`:

    "centres"   k -> 2 k / (levels - 1) - 1       w = 2 / (levels - 1); the end levels are -1 and 1
    "edges"     k -> (2 k + 1) / levels - 1       w = 2 / levels; the outermost bins end at -1 and 1

A density p of continuous data gives every image a probability, the integral over its bin, which any
density q(u | k) of the place u in the bin, u in [0, 1)^d, bounds from below (Jensen):

    log P(k) >= E_q[log p(x(k, u)) - log q(u | k)] + d log w,       x(k, u) = x(k) + w (u - 1/2)

Uniform q: Theis, van den Oord & Bethge, "A note on the evaluation of generative models" (2016). A
learned q, variational dequantisation, is tighter: Ho et al., "Flow++" (2019). With several draws of u
the logarithm of the mean weight is tighter still: Burda, Grosse & Salakhutdinov (2016).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from jaxdiff.arrays import as_arrays, is_concrete, namespace
from jaxdiff.noise import normal, per_sample
from jaxdiff.solvers.clocks import check_choice, check_order

SCALINGS = ("centres", "edges")


def bin_width(levels: int, scaling: str = "centres") -> float:
    """w, the width of a level's bin on data in [-1, 1]."""
    check_order(levels, 2**31 - 1, "levels", 2)
    check_choice("scaling", scaling, SCALINGS)
    return 2.0 / (levels - 1 if scaling == "centres" else levels)


def from_levels(x: Int[ArrayLike, "*shape"], levels: int, scaling: str = "centres") -> Any:
    """The centre of each level's bin in [-1, 1]; float64 for NumPy, JAX's default for JAX arrays.

    Raises TypeError unless x is of integers, ValueError for one outside 0 .. levels - 1.
    """
    width = bin_width(levels, scaling)
    _check_levels(x, levels)
    xp = namespace(x)
    offset = 0.0 if scaling == "centres" else 0.5
    return (xp.asarray(x) + offset) * width - 1.0


def to_levels(x: Float[ArrayLike, "*shape"], levels: int, scaling: str = "centres") -> Any:
    """The levels, int32, of data in [-1, 1] that holds nothing but centres of bins.

    The inverse of `from_levels`: `to_levels(digits.x, 17)`. Raises ValueError for a number that is
    farther from a centre than a hundredth of a bin, or outside the levels.
    """
    width = bin_width(levels, scaling)
    xp = namespace(x)
    place = (xp.asarray(x) + 1.0) / width - (0.0 if scaling == "centres" else 0.5)
    k = xp.round(place)
    if is_concrete(place):
        near, far = np.abs(np.asarray(place) - np.asarray(k)).max(initial=0.0), np.asarray(k)
        if near > 0.01 or far.min(initial=0) < 0 or far.max(initial=0) > levels - 1:
            raise ValueError(
                f"x is not {levels} levels at the {scaling!r} scaling of [-1, 1]: it holds numbers "
                f"from {np.min(x):g} to {np.max(x):g}, up to {near:.2g} of a bin beside a level"
            )
    return k.astype(np.int32)


def uniform_dequantisation(
    key: jax.Array, x: Int[ArrayLike, "batch ..."], levels: int, scaling: str = "centres"
) -> Float[Array, "batch ..."]:
    """Continuous data: every level's centre plus w (u - 1/2), u uniform on [0, 1).

    E[log p] + d log w then bounds log P: `bits_per_dim(log_prob, dims, levels)`.

    Arguments:
      key: one key, or one per sample.
      x: integers 0 .. levels - 1, [batch, ...].
    Raises TypeError for data that are not integers (see `to_levels`), ValueError outside the levels.
    """
    x = _as_levels(x, levels)
    return _placed(x, _uniform(key, x), levels, scaling)


def variational_dequantisation(
    key: jax.Array, x: Int[ArrayLike, "batch ..."], levels: int, q: Callable,
    scaling: str = "centres",
) -> tuple[Float[Array, "batch ..."], Float[Array, " batch"]]:  # fmt: skip
    """(continuous data, log q): u drawn from q(u | x) instead of uniformly.

    E[log p - log q] + d log w bounds log P: `bits_per_dim(log_prob - log_q, dims, levels)`.

    Arguments:
      q: a function (key, x) -> (u, log_q): u of x's shape in [0, 1], and the log of its density
        there, [batch]; differentiable in its own parameters to be trained by the bound. Such as
        `sigmoid_normal`.
    Others, and errors, as `uniform_dequantisation`; ValueError for results of q of other shapes.
    """
    x = _as_levels(x, levels)
    u, log_q = q(key, x)
    if jnp.shape(u) != x.shape or jnp.shape(log_q) != x.shape[:1]:
        raise ValueError(
            f"q must return u of shape {x.shape} and log_q of shape {x.shape[:1]}, got "
            f"{jnp.shape(u)} and {jnp.shape(log_q)}"
        )
    return _placed(x, u, levels, scaling), log_q


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SigmoidNormal:
    """See `sigmoid_normal`."""

    location: Any
    log_scale: Any

    def __call__(self, key: jax.Array, x: Int[Array, "batch ..."]) -> tuple[Array, Array]:
        location, log_scale = (
            jnp.broadcast_to(a[x] if jnp.ndim(a) else a, x.shape)
            for a in (self.location, self.log_scale)
        )
        z = normal(key, jnp.zeros(x.shape, location.dtype))
        a = location + jnp.exp(log_scale) * z
        log_q = (
            -0.5 * (z**2 + math.log(2.0 * math.pi))
            - log_scale - jax.nn.log_sigmoid(a) - jax.nn.log_sigmoid(-a)
        )  # fmt: skip
        return jax.nn.sigmoid(a), jnp.sum(log_q.reshape(len(x), -1), 1)


def sigmoid_normal(location: ArrayLike = 0.0, log_scale: ArrayLike = 0.5) -> SigmoidNormal:
    """q(u | k): u = sigmoid(a), a ~ N(location_k, exp(log_scale_k)^2), each number by itself.

    A small flow for `variational_dequantisation`, with a location and a scale for each level
    ([levels]) or for all (scalars). A pytree: train it by gradient ascent on the bound.
    """
    location, log_scale = as_arrays((location, log_scale))
    for name, value in (("location", location), ("log_scale", log_scale)):
        if jnp.ndim(value) > 1:
            raise ValueError(f"{name} must be a scalar or [levels], got shape {jnp.shape(value)}")
    return SigmoidNormal(location * 1.0, log_scale * 1.0)


def discrete_log_prob(
    log_density: Callable, key: jax.Array, x: Int[ArrayLike, "batch ..."], levels: int, *,
    q: Callable | None = None, samples: int = 1, scaling: str = "centres",
) -> Float[Array, " batch"]:  # fmt: skip
    """A lower bound on log P(x) in nats, [batch]: log mean_j p(x_j) w^d / q(u_j), over draws j.

    The bound is on its expectation, and rises with `samples` towards log P (exactly: the estimate of
    P is unbiased). For bits: `bits_per_dim(result, dims)`, without levels.

    Arguments:
      log_density: (key, x) -> log p(x) in nats, [batch], of continuous x in [-1, 1]; the key for
        random probes, such as
        `lambda key, x: jd.ode.log_likelihood(denoiser, process, x, trace=..., key=key).log_prob`.
      q: as in `variational_dequantisation`; None is uniform.
      samples: draws for each image, one after the other; importance weighted if there are several.
    """
    check_order(samples, 10**9, "samples")
    x = _as_levels(x, levels)
    keys = per_sample(key, len(x))
    weights = []
    for j in range(samples):
        place, probe = (
            jax.vmap(jax.random.fold_in, (0, None))(keys, 2 * j + part) for part in (0, 1)
        )
        if q is None:
            y, log_q = uniform_dequantisation(place, x, levels, scaling), 0.0
        else:
            y, log_q = variational_dequantisation(place, x, levels, q, scaling)
        weights.append(log_density(probe, y) - log_q)
    mean = jax.nn.logsumexp(jnp.stack(weights), axis=0) - math.log(samples)
    return mean + x[0].size * math.log(bin_width(levels, scaling))


def bits_per_dim(
    log_prob: ArrayLike, dims: int, levels: int | None = None, scaling: str = "centres"
) -> Any:
    """Bits a dimension of a log-density, or of a log-probability, in nats.

        -(log_prob / dims + log w) / log 2          with the width w of a level's bin

    Arguments:
      log_prob: with `levels`: of continuous data that were scaled to [-1, 1] with this `scaling`
        (less log q where the dequantisation is variational). Without: of the levels themselves, from
        `discrete_log_prob` or a bound with a decoder of levels, and w = 1.
      dims: numbers in one sample, 8 * 8 for an image of 8 x 8 x 1.
    """
    check_order(dims, 2**31 - 1, "dims")
    width = 1.0 if levels is None else bin_width(levels, scaling)
    return -(log_prob / dims + math.log(width)) / math.log(2.0)


def discretised_normal(
    x: Int[ArrayLike, "batch ..."], mean: Float[Array, "batch ..."], std: ArrayLike, levels: int,
    scaling: str = "centres",
) -> Float[Array, " batch"]:  # fmt: skip
    """log P(x) in nats, [batch], of independent N(mean, std^2) numbers rounded to the levels.

        P(k) = Phi((x_k + w/2 - mean) / std) - Phi((x_k - w/2 - mean) / std)

    with all that lies beyond in the outermost bins: the decoder of Ho et al., "Denoising Diffusion
    Probabilistic Models" (2020), equation 13, without its code's floor of 1e-12. `mean` is in the
    units of `from_levels`, `std` broadcasts against it.
    """
    x = _as_levels(x, levels)
    half = 0.5 * bin_width(levels, scaling)
    gap = from_levels(x, levels, scaling).astype(mean.dtype) - mean
    # Finite stand-ins for infinity: their gradients are 0, not NaN.
    low = jnp.where(x == 0, -1e6, (gap - half) / std)
    high = jnp.where(x == levels - 1, 1e6, (gap + half) / std)
    # In the tail below zero, where log Phi keeps its digits.
    flip = gap > 0
    low, high = jnp.where(flip, -high, low), jnp.where(flip, -low, high)
    above, below = jax.scipy.special.log_ndtr(high), jax.scipy.special.log_ndtr(low)
    log_p = above + jnp.log(-jnp.expm1(below - above))
    return jnp.sum(log_p.reshape(len(x), -1), 1)


def _as_levels(x: Any, levels: int) -> Array:
    _check_levels(x, levels)
    x = jnp.asarray(x)
    if not x.ndim:
        raise ValueError("the levels must be an array [batch, ...], got a scalar")
    return x.astype(jnp.int32)


def _check_levels(x: Any, levels: int) -> None:
    check_order(levels, 2**31 - 1, "levels", 2)
    dtype = x.dtype if hasattr(x, "dtype") else np.result_type(x)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(
            f"expected integer levels 0 .. {levels - 1}, got {dtype}: jaxdiff.ode.to_levels converts "
            "data in [-1, 1]"
        )
    if is_concrete(x) and np.size(x):
        least, most = int(np.min(x)), int(np.max(x))
        if least < 0 or most > levels - 1:
            raise ValueError(f"levels must lie in 0 .. {levels - 1}, got {least} to {most}")


def _placed(x, u, levels, scaling):
    width = bin_width(levels, scaling)
    return from_levels(x, levels, scaling).astype(u.dtype) + width * (u - 0.5)


def _uniform(key, x):
    draw = lambda k: jax.random.uniform(k, x.shape[1:])  # noqa: E731
    return jax.vmap(draw)(per_sample(key, len(x)))
