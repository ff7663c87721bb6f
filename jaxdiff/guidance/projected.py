"""Adaptive projected guidance: large scales without oversaturation."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from jaxdiff.arrays import as_arrays, is_concrete
from jaxdiff.denoisers import Denoiser, check_known, level
from jaxdiff.guidance.together import (
    Scale,
    as_scale,
    at_level,
    check_conditional,
    check_scale,
    dot,
    filled,
    keeping,
    need_cond,
    times,
    together,
)
from jaxdiff.predictions import convert


class Projected(NamedTuple):
    """The memory of `adaptive_projected` with momentum: the network's own, and the running sum."""

    inner: Any
    average: Any


def adaptive_projected(
    denoiser: Denoiser, scale: Scale, null_cond: Any, eta: ArrayLike = 0.0,
    threshold: ArrayLike = np.inf, momentum: ArrayLike = 0.0, like: Any = None,
) -> Denoiser:  # fmt: skip
    """cond + (s - 1) (d_perp + eta d_par), d = cond - uncond: s = 1 is conditional; predicts "x0".

    Sadat, Hilliges & Weber, "Eliminating Oversaturation and Artifacts of High Guidance Scales in
    Diffusion Models" (2024). All are of x_0. The part d_par of d along cond saturates, and eta < 1
    weakens it; before
    that d is d + momentum (the d of the evaluation before, so treated), and is scaled down to the norm
    `threshold`. With eta = 1, no threshold and no momentum it is classifier-free guidance. Products and
    norms are over a whole sample.

    Arguments:
      scale, null_cond: as for `classifier_free`; cost 2.
      eta: in [0, 1].
      threshold: r, positive: 2.5 for EDM2 and 15 for Stable Diffusion XL in the paper; a leaf.
      momentum: negative turns away from the last steps; -0.75 and -0.5 in the paper. It needs a memory
        (`Projected`), so a sampler with one evaluation a step.
      like: x_T, or a `jax.ShapeDtypeStruct` of it, for the momentum.

    Raises ValueError for numbers out of range, or a momentum without `like`; and, when sampling,
    for an eps network on a grid from alpha = 0.
    """
    check_conditional(denoiser, "adaptive projected guidance")
    if is_concrete(eta) and not np.all((np.asarray(eta) >= 0) & (np.asarray(eta) <= 1)):
        raise ValueError(f"eta must be in [0, 1], got {eta!r}")
    if is_concrete(threshold) and not np.all(np.asarray(threshold) > 0):
        raise ValueError(f"threshold must be positive, got {threshold!r}")
    if is_concrete(momentum) and not np.all(np.abs(np.asarray(momentum)) < 1):
        raise ValueError(f"momentum must be in (-1, 1), got {momentum!r}")
    moving = not is_concrete(momentum) or bool(np.any(np.asarray(momentum) != 0))
    if moving and like is None:
        raise ValueError("momentum needs like=x_T: the running sum has the state's shape")
    memory = denoiser.memory
    if moving:
        average = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), as_arrays(like))
        memory = Projected(denoiser.memory, average)
    numbers = tuple(jnp.asarray(v, jnp.result_type(float)) for v in (eta, threshold, momentum))
    null = jax.tree.map(jnp.asarray, null_cond)
    params = (denoiser, (as_scale(scale, "guidance"), null, numbers))
    fn = _Projecting(denoiser.prediction, moving)
    return Denoiser(fn, "x0", params, level, memory, 2 * denoiser.cost)


@dataclasses.dataclass(frozen=True)
class _Projecting:
    prediction: str
    moving: bool

    def __call__(self, params, x, levels, cond=None, memory=None):
        need_cond(cond, "adaptive projected guidance")
        denoiser, (scale, null, (eta, threshold, momentum)) = params
        evaluate, kept = keeping(denoiser, memory.inner if self.moving else memory)
        outs = together(evaluate, x, levels, [cond, filled(null, cond)])
        target, without = (convert(a, x, self.prediction, "x0", *levels[1:]) for a in outs)
        apart = jax.tree.map(jnp.subtract, target, without)
        if self.moving:
            apart = jax.tree.map(jnp.add, apart, times(momentum, memory.average))
        average = apart
        tiny = jnp.finfo(jax.tree.leaves(apart)[0].dtype).tiny
        size = jnp.sqrt(jnp.maximum(dot(apart, apart), tiny))
        apart = times(jnp.minimum(1.0, threshold / size), apart)
        share = dot(apart, target) / jnp.maximum(dot(target, target), tiny)
        along = times(share, target)
        strength = at_level(scale, levels) - 1.0
        # d_perp + eta d_par = d - (1 - eta) d_par
        update = jax.tree.map(jnp.subtract, apart, times(1.0 - eta, along))
        out = jax.tree.map(jnp.add, target, times(strength, update))
        if self.moving:
            return out, Projected(kept(), average)
        return out if denoiser.memory is None else (out, kept())

    def check(self, params, batch, cond, alpha):
        need_cond(cond, "adaptive projected guidance")
        denoiser, (scale, null, _) = params
        check_scale(scale, batch)
        check_known(denoiser.prediction, "x0", alpha, "adaptive projected guidance")
        denoiser.check(batch, cond, alpha)
        denoiser.check(batch, null, alpha)
