"""Classifier-free guidance."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike

from jaxdiff.arrays import to_batch
from jaxdiff.denoisers import Denoiser, check_single, wrap


def classifier_free(denoiser: Denoiser, scale: ArrayLike, null_cond: Any) -> Denoiser:
    """uncond + s (cond - uncond): s = 1 is conditional, s = 0 unconditional.

    Ho & Salimans, "Classifier-Free Diffusion Guidance" (2022), whose w is s - 1. Both halves run in
    one evaluation of twice the batch (cost 2). It is linear, so it commutes with the conversion
    between predictions.

    Arguments:
      scale: s, a scalar or [batch]; a leaf, so that a new scale compiles nothing and vmaps.
      null_cond: the condition that means none, with `cond`'s structure, each leaf broadcast against
        its own (for the models of `jaxdiff.models`: num_classes).

    Raises ValueError when sampling without `cond`, or for a denoiser of several predictions.
    """
    check_single(denoiser, "guidance")
    strengths = (jnp.asarray(scale, jnp.result_type(float)), jax.tree.map(jnp.asarray, null_cond))
    return wrap(_Guided(), denoiser, strengths, denoiser.prediction, cost=2 * denoiser.cost)


@dataclasses.dataclass(frozen=True)
class _Guided:
    def check(self, check, strengths, cond):
        if cond is None:
            raise ValueError("classifier-free guidance needs cond=")
        check(cond)
        check(strengths[1])

    def __call__(self, evaluate, strengths, x, levels, cond):
        if cond is None:
            raise ValueError("classifier-free guidance needs cond=")
        scale, null = strengths
        both = jax.tree.map(lambda a: jnp.concatenate([a, a]), x)
        t, alpha, sigma = (jnp.tile(c, 2) if jnp.ndim(c) == 1 else c for c in levels)
        null = jax.tree.map(lambda c, n: jnp.broadcast_to(n, c.shape).astype(c.dtype), cond, null)
        conds = jax.tree.map(lambda c, n: jnp.concatenate([c, n]), cond, null)
        out = evaluate(both, t, alpha, sigma, conds)

        def mix(a, y):
            # The difference is amplified: in the state's precision, not the network's.
            with_cond, without = jnp.split(a.astype(jnp.promote_types(a.dtype, y.dtype)), 2)
            s = to_batch(scale, without).astype(without.dtype)
            return without + s * (with_cond - without)

        return jax.tree.map(mix, out, x)
