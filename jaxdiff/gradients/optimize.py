"""Optimising what a sample depends on: its noise, its condition, or the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxdiff.arrays import as_arrays


class Optimized(NamedTuple):
    """What `optimize` returns: the last value, and the loss before every update."""

    value: Any
    losses: Float[Array, " steps"]


def optimize(
    loss: Callable, value: Any, optimizer: optax.GradientTransformation, steps: int, *,
    args: tuple = (), key: jax.Array | None = None, project: Callable | None = None,
) -> Optimized:  # fmt: skip
    """Minimise a loss of samples by gradients through the sampler.

        g_i = grad loss(value_i, *args),   value_{i+1} = project(value_i + update(g_i))

    The sampler is inside `loss`, with whichever adjoint it was given, so one function serves the three
    uses of Pan et al., "AdjointDPM" (2024), by what is called `value`:

        x_T       noise with which a sample meets a differentiable target; `project` keeps it near the
                  start, as their attack does: lambda x: projection_linf_ball(x - x_T, 0.1) + x_T
        cond      the embedding that explains given samples (inversion)
        params    parameters, or the whole `Denoiser`, tuned to a differentiable metric; pass `key`
                  and draw new noise every step

    Arguments:
      loss: `loss(value, *args)`, or `loss(value, *args, key)` with a key: a scalar. A module-level
        function given everything else in `args` compiles once; what a closure holds is part of the
        program.
      value: pytree; its floating-point leaves are optimised, all others stay.
      optimizer: from optax. An optax optimizer made anew is a new program.
      steps: number of updates, at least 1.
      args: passed to `loss`.
      key: if given, step i calls with `jax.random.fold_in(key, i)`.
      project: applied to the value after every update (`optax.projections`).

    Raises, before tracing, TypeError for an optimizer that is not optax's, ValueError for steps below
    1 or a value without floating-point leaves; and, on the first trace, ValueError for a loss that is
    not a scalar.
    """
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(f"optimizer must be an optax.GradientTransformation, got {optimizer!r}")
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}")
    value, args = as_arrays(value), as_arrays(args)
    if not any(eqx.is_inexact_array(leaf) for leaf in jax.tree.leaves(value)):
        raise ValueError("the value to optimise has no floating-point leaf")
    return _optimize(loss, value, optimizer, int(steps), args, key, project)


@eqx.filter_jit
def _optimize(loss, value, optimizer, steps, args, key, project):
    varied, fixed = eqx.partition(value, eqx.is_inexact_array)

    def at(varied, i):
        keys = () if key is None else (jax.random.fold_in(key, i),)
        out = loss(eqx.combine(varied, fixed), *args, *keys)
        if jnp.shape(out) != ():
            raise ValueError(f"the loss must be a scalar, got shape {jnp.shape(out)}")
        return out

    def step(carry, i):
        varied, state = carry
        now, gradient = jax.value_and_grad(at)(varied, i)
        updates, state = optimizer.update(gradient, state, varied)
        varied = optax.apply_updates(varied, updates)
        if project is not None:
            moved = project(eqx.combine(varied, fixed))
            varied = eqx.filter(moved, eqx.is_inexact_array)
        return (varied, state), now

    carry = varied, optimizer.init(varied)
    (varied, _), losses = jax.lax.scan(step, carry, jnp.arange(steps))
    return Optimized(eqx.combine(varied, fixed), losses)
