"""Adaptive Guidance: the unconditional half of a sampler's evaluations, while it matters.

Castillo, Kohler, Perez, Perez, Pumarola, Ghanem, Arbelaez & Thabet, "Adaptive Guidance: Training-free
Acceleration of Conditional Diffusion Models" (2023). Along a path the conditional and the unconditional
noise align; from the evaluation after the one whose

    gamma = cos(eps_cond, eps_uncond)

rises to a threshold, the conditional network runs alone. Rises from below it, in an evaluation before:
where all is noise both predict it, and gamma is near 1 (exactly 1 at alpha = 0 if the network predicts
v, x0 or flow) before the condition has said anything.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from jaxdiff.arrays import is_concrete, to_batch
from jaxdiff.denoisers import Denoiser, level
from jaxdiff.guidance.together import (
    Scale,
    as_scale,
    at_level,
    check_conditional,
    check_scale,
    dot,
    extrapolated,
    filled,
    keeping,
    need_cond,
    together,
    wide,
)
from jaxdiff.predictions import convert


class Adaptive(NamedTuple):
    """The memory of `adaptive_guidance`; `sample(..., save="state").memory` is the last.

    `inner`: the network's own; `calls` so far; `evaluations` of the network by them, 2 or 1 each (times
    its cost); `below`: whether gamma has been below the threshold; `crossed`: whether it has risen to it
    since, and guidance ended; `guided`: calls in which it had not; of all or of each sample.
    """

    inner: Any
    calls: Int[Array, ""]
    evaluations: Int[Array, ""]
    below: Bool[Array, "*batch"]
    crossed: Bool[Array, "*batch"]
    guided: Int[Array, "*batch"]


def adaptive_guidance(
    denoiser: Denoiser, scale: Scale, null_cond: Any, threshold: ArrayLike = 0.991,
    calls: ArrayLike | None = None, batch: int | None = None,
) -> Denoiser:  # fmt: skip
    """uncond + s (cond - uncond) until gamma rises to a threshold, then cond alone.

    See this module. Sample with save="state" to read how many evaluations there were:

        state = jd.sample(guided, tableau, x_T, cond=labels, save="state")
        state.registers[0], state.memory.evaluations

    The unconditional half is not evaluated once all samples have crossed (`lax.cond`; under `vmap` it
    is, and `evaluations` counts what would be needed).

    Arguments:
      scale, null_cond: as for `classifier_free`.
      threshold: of gamma, in [-1, 1]; the paper's is 0.991. One that gamma is never below keeps
        guidance to the end; look at gamma by `record_guidance`.
      calls: None, or a number: as many calls guide whatever gamma, and after them gamma need not have
        been below the threshold. 0 is the rule as published, for networks whose gamma only rises.
      batch: number of samples, for a flag each: one that has crossed goes on under cond alone while
        others are guided. None for one flag, which the smallest gamma of a batch sets.

    Its `cost` is 2, before it crosses. Raises ValueError for a threshold outside [-1, 1], a negative
    number of calls, a batch that is not a number of at least 1 or, when sampling, not that of the state.
    """
    check_conditional(denoiser, "adaptive guidance")
    if is_concrete(threshold) and not np.all(np.abs(np.asarray(threshold)) <= 1):
        raise ValueError(f"threshold is of a cosine, in [-1, 1], got {threshold!r}")
    if calls is not None and is_concrete(calls) and not np.all(np.asarray(calls) >= 0):
        raise ValueError(f"calls must be at least 0, got {calls!r}")
    if batch is not None and (isinstance(batch, bool) or int(batch) != batch or batch < 1):
        raise ValueError(f"batch must be a number of samples, or None, got {batch!r}")
    shape = () if batch is None else (int(batch),)
    zero = jnp.zeros((), jnp.int32)
    off = jnp.zeros(shape, bool)
    memory = Adaptive(denoiser.memory, zero, zero, off, off, jnp.zeros(shape, jnp.int32))
    null = jax.tree.map(jnp.asarray, null_cond)
    first = None if calls is None else jnp.asarray(calls, jnp.int32)
    guard = jnp.asarray(threshold, jnp.result_type(float)), first
    params = (denoiser, (as_scale(scale, "guidance"), null, guard))
    fn = _Adaptive(denoiser.prediction, batch)
    return Denoiser(fn, denoiser.prediction, params, level, memory, 2 * denoiser.cost)


@dataclasses.dataclass(frozen=True)
class _Adaptive:
    prediction: str
    batch: int | None

    def __call__(self, params, x, levels, cond=None, memory=None):
        need_cond(cond, "adaptive guidance")
        denoiser, (scale, null, (threshold, calls)) = params
        crossed = memory.crossed

        def both(inner):
            evaluate, kept = keeping(denoiser, inner)
            target, without = together(evaluate, x, levels, [cond, filled(null, cond)])
            strength = jnp.where(crossed, 1.0, at_level(scale, levels))
            guided = extrapolated(without, target, strength)
            if self.batch is not None:  # exactly cond, not what rounds to it
                exact = lambda a, b: jnp.where(to_batch(crossed, a), a, b)  # noqa: E731
                guided = jax.tree.map(exact, target, guided)
            pair = [convert(a, x, self.prediction, "eps", *levels[1:]) for a in (target, without)]
            return guided, cosine(*pair), kept()

        def alone(inner):
            evaluate, kept = keeping(denoiser, inner)
            out = wide(evaluate(x, *levels, cond), x)
            leaf = jax.tree.leaves(out)[0]
            return out, jnp.ones(leaf.shape[0], leaf.dtype), kept()

        done = jnp.all(crossed)
        out, gamma, inner = jax.lax.cond(done, alone, both, memory.inner)
        if self.batch is None:
            gamma = jnp.min(gamma)
        below = memory.below | (gamma < threshold)
        reached = (gamma >= threshold) & (below if calls is None else memory.calls >= calls)
        ran = jnp.where(done, 1, 2) * denoiser.cost
        return out, Adaptive(
            inner, memory.calls + 1, memory.evaluations + ran.astype(jnp.int32), below,
            crossed | reached, memory.guided + jnp.where(crossed, 0, 1).astype(jnp.int32),
        )  # fmt: skip

    def check(self, params, batch, cond, alpha):
        need_cond(cond, "adaptive guidance")
        if self.batch not in (None, batch):
            raise ValueError(f"adaptive guidance was made for a batch of {self.batch}, got {batch}")
        denoiser, (scale, null, _) = params
        check_scale(scale, batch)
        denoiser.check(batch, cond, alpha)
        denoiser.check(batch, null, alpha)


def cosine(a: Any, b: Any) -> Float[Array, " batch"]:
    """The cosine of each sample's angle between two states."""
    return dot(a, b) / jnp.sqrt(dot(a, a) * dot(b, b))
