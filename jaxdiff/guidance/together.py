"""What the guidance of one network by itself shares: several conditions in one evaluation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from jaxdiff.arrays import as_arrays, is_concrete, to_batch
from jaxdiff.denoisers import Denoiser, check_single
from jaxdiff.mixtures import GaussianMixture

Scale = ArrayLike | Callable[[Any, Any, Any], Any]


def check_conditional(denoiser: Any, what: str) -> None:
    """Raise unless `denoiser` has one prediction and its function takes a condition.

    TypeError for anything but a Denoiser; ValueError for several predictions, for a function, module
    or mixture of (x, t) alone. (Networks of `jaxdiff.models` made without classes are told apart when
    sampling, by their own check.)
    """
    check_single(denoiser, what)
    if not any(_takes_cond(inner) for inner in _innermost(denoiser)):
        raise ValueError(
            f"{what} needs a conditional model: the function of this denoiser takes no cond, so there "
            "is nothing for a scale to amplify"
        )


def _innermost(denoiser: Denoiser) -> list[Denoiser]:
    """Those that a denoiser around others evaluates in the end; itself if it is around none."""
    leaves = jax.tree.leaves(denoiser.params, is_leaf=lambda a: isinstance(a, Denoiser))
    found = [inner for a in leaves if isinstance(a, Denoiser) for inner in _innermost(a)]
    return found or [denoiser]


def _takes_cond(denoiser: Denoiser) -> bool:
    own_mixture = type(denoiser.fn).__module__ == GaussianMixture.__module__
    if own_mixture and isinstance(denoiser.params, GaussianMixture):
        return False
    fn, given = denoiser.fn, 3 + (denoiser.params is not None)
    if hasattr(fn, "module"):
        fn, given = type(fn.module).__call__, 4
    elif hasattr(fn, "graphdef"):
        from flax import nnx  # which the core does without

        fn, given = nnx.merge(fn.graphdef, denoiser.params).__call__, 3
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # built in: nothing is known
        return True
    try:
        signature.bind_partial(*[None] * given)
    except TypeError:
        return False
    return True


def as_scale(scale: Scale, what: str) -> Any:
    """A guidance scale as leaves: a number or [batch], finite, or a function of (t, alpha, sigma)."""
    if callable(scale):
        return as_arrays(scale)
    if is_concrete(scale):
        values = np.asarray(scale)
        if values.ndim > 1 or not np.all(np.isfinite(values)):
            raise ValueError(
                f"{what}: a scale must be a finite number, [batch], or a function of "
                f"(t, alpha, sigma), got {scale!r}"
            )
    return jnp.asarray(scale, jnp.result_type(float))


def check_scale(scale: Any, batch: int, what: str = "a scale") -> None:
    """Raise ValueError unless a scale is one number, one a sample of the batch, or a function."""
    if not callable(scale) and np.shape(scale) not in ((), (batch,)):
        raise ValueError(
            f"{what} must be a number or [batch] = ({batch},), got shape {np.shape(scale)}"
        )


def at_level(scale: Any, levels: tuple[Any, Any, Any]) -> Any:
    """The scale's value at (t, alpha, sigma)."""
    return scale(*levels) if callable(scale) else scale


def need_cond(cond: Any, what: str) -> None:
    """Raise ValueError if there is no condition."""
    if cond is None:
        raise ValueError(f"{what} needs cond=")


def filled(null: Any, cond: Any) -> Any:
    """The condition that means none, in `cond`'s shapes and types."""
    return jax.tree.map(lambda c, n: jnp.broadcast_to(n, c.shape).astype(c.dtype), cond, null)


def together(
    evaluate: Callable, x: Any, levels: tuple[Any, Any, Any], conds: Sequence[Any]
) -> list[Any]:
    """The predictions under each of `conds`, by one evaluation of as many times the batch.

    `evaluate` as in `jaxdiff.denoisers.wrap`; the results are in the state's precision, as guidance
    amplifies their differences.
    """
    count = len(conds)
    many = jax.tree.map(lambda a: jnp.concatenate([a] * count), x)
    levels = [jnp.tile(c, count) if jnp.ndim(c) == 1 else c for c in levels]
    joined = jax.tree.map(lambda *c: jnp.concatenate(c), *conds)
    out = wide(evaluate(many, *levels, joined), many)
    return [jax.tree.map(lambda a, i=i: jnp.split(a, count)[i], out) for i in range(count)]


def wide(out: Any, x: Any) -> Any:
    """The prediction in the state's precision, if that is higher."""
    return jax.tree.map(lambda a, y: a.astype(jnp.promote_types(a.dtype, y.dtype)), out, x)


def extrapolated(start: Any, end: Any, scale: Any) -> Any:
    """start + scale (end - start), scale a number or [batch]."""
    scale = jnp.asarray(scale)

    def leaf(a, b):
        return a + to_batch(scale, a).astype(a.dtype) * (b - a)

    return jax.tree.map(leaf, start, end)


def times(factor: Any, tree: Any) -> Any:
    """factor tree, the factor a number or [batch]."""
    factor = jnp.asarray(factor)
    return jax.tree.map(lambda a: to_batch(factor, a).astype(a.dtype) * a, tree)


def dot(a: Any, b: Any) -> Float[Array, " batch"]:
    """The inner product of each sample, over all leaves."""

    def leaf(u, v):
        return jnp.sum((u * v).reshape(u.shape[0], -1), axis=1)

    return sum(jax.tree.leaves(jax.tree.map(leaf, a, b)))


def keeping(denoiser: Denoiser, memory: Any) -> tuple[Callable, Callable]:
    """(evaluate, kept): an evaluation as `wrap` passes it, and what its memory is by then.

    For guidance with branches, whose memory must not leave them but as a result.
    """
    cell = [memory]

    def evaluate(x, t, alpha, sigma, cond):
        out, cell[0] = denoiser.evaluate(x, t, alpha, sigma, cond, cell[0])
        return out

    return evaluate, lambda: cell[0]
