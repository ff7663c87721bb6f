"""Denoising errors of one example under several conditions, with the noise they share."""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from jaxdiff.arrays import as_arrays, structure_hash, to_batch
from jaxdiff.denoisers import Denoiser, check_single
from jaxdiff.noise import per_sample
from jaxdiff.predictions import convert
from jaxdiff.processes import Process


class Draws(NamedTuple):
    """At which levels an example is noised, each with a draw of noise of its own.

    t, alpha, sigma: [draws]; number: the draw's number, which with the example's key decides the
    noise, so that numbers that occur twice share it; sign: 1, or -1 for the noise reversed.
    """

    t: Float[ArrayLike, " draws"]
    alpha: Float[ArrayLike, " draws"]
    sigma: Float[ArrayLike, " draws"]
    number: Int[ArrayLike, " draws"]
    sign: Float[ArrayLike, " draws"]


def draws_at(process: Process, t: ArrayLike, number: Any = None, sign: Any = None) -> Draws:
    """`Draws` at times t [draws] of a process, by default numbered in turn; ValueError at an end."""
    if not isinstance(process, Process):
        raise TypeError(f"expected a process of jaxdiff.processes, got {type(process).__name__}")
    t = np.asarray(t, np.float64)
    if t.ndim != 1 or not len(t):
        raise ValueError(f"t must be [times], at least one, got shape {t.shape}")
    alpha, sigma = (np.asarray(f(t), np.float64) for f in (process.alpha, process.sigma))
    bad = ~(np.isfinite(t) & (alpha > 0) & (sigma > 0))
    if np.any(bad):
        raise ValueError(
            f"the noise's error is defined where alpha > 0 and sigma > 0, not at t = {t[bad][0]}: "
            f"keep t within [{process.t_min:g}, {process.t_max:g}]"
        )
    number = np.arange(len(t)) if number is None else np.asarray(number)
    sign = np.ones(len(t)) if sign is None else np.asarray(sign, np.float64)
    return Draws(t, alpha, sigma, number, sign)


def noise_errors(
    denoiser: Denoiser, x0: Array, conds: Any, draws: Draws, key: Array, *, paired: bool = True,
    by_element: bool = False, orthogonal: bool = False, batch_size: int = 1024,
) -> Float[Array, "batch conds draws ..."]:  # fmt: skip
    """|eps_j - eps_hat(alpha_j x0 + sigma_j eps_j, t_j, cond)|^2 of every example, condition, draw.

    Arguments:
      x0: [batch, ...].
      conds: the conditions, leaves [batch, conds, ...].
      key: one key, or one per example; eps_j is a function of the example's key and of the number
        of the draw.
      paired: whether all conditions of an example see one eps_j; if not, each its own.
      by_element: whether to keep the squares of the elements, [batch, conds, draws, ...].
      orthogonal: |eps_hat(cond) - eps_hat(last cond)|^2 instead.
      batch_size: inputs that the network sees at once, about: rounded to whole sets of conditions.

    Raises TypeError or ValueError for a denoiser of several predictions or with memory, and for x0
    that is not a floating-point array [batch, ...].
    """
    check_evaluated(denoiser)
    x0, conds = jnp.asarray(x0), as_arrays(conds)
    if x0.ndim < 1 or not jnp.issubdtype(x0.dtype, jnp.floating):
        raise ValueError(f"x0 must be floating point [batch, ...], got {x0.dtype} {x0.shape}")
    count = jax.tree.leaves(conds)[0].shape[1]
    for leaf in jax.tree.leaves(conds):
        if leaf.shape[:2] != (len(x0), count):
            raise ValueError(
                f"conditions must be [{len(x0)}, {count}, ...], got shape {leaf.shape}"
            )
    batch_size = operator.index(batch_size)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    groups = len(x0) * len(draws.t)
    rows = min(max(1, batch_size // count), groups)
    denoiser = as_arrays(denoiser)
    every = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), conds)
    denoiser.check(len(x0) * count, every, draws.alpha)
    found = _errors(
        denoiser, x0, conds, Draws(*(np.asarray(a) for a in draws)), per_sample(key, len(x0)),
        rows, paired, by_element, orthogonal, structure_hash(denoiser, conds),
    )  # fmt: skip
    return jnp.moveaxis(found, 1, 2)


def check_evaluated(denoiser: Any, what: str = "a diagnostic") -> None:
    """Raise for what is not a denoiser of one prediction, without memory."""
    check_single(denoiser, what)
    if denoiser.memory is not None:
        raise ValueError(f"{what} evaluates unrelated inputs: it takes no denoiser with memory")


@functools.partial(
    jax.jit, static_argnames=("rows", "paired", "by_element", "orthogonal", "structure")
)
def _errors(denoiser, x0, conds, draws, keys, rows, paired, by_element, orthogonal, structure):
    batch, shape = len(x0), x0.shape[1:]
    count = jax.tree.leaves(conds)[0].shape[1]
    levels = [jnp.asarray(a, x0.dtype) for a in (draws.t, draws.alpha, draws.sigma)]
    total = len(draws.t)

    def one_noise(key, number, sign):
        number = number if paired else number * count + jnp.arange(count)
        numbers = jnp.broadcast_to(number, (count,))
        drawn = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(key, k), shape, x0.dtype))
        return jnp.asarray(sign, x0.dtype) * drawn(numbers)

    def block(index):
        i, j = index // total, index % total
        eps = jax.vmap(one_noise)(keys[i], draws.number[j], draws.sign[j])  # [rows, conds, ...]
        t, alpha, sigma = (jnp.repeat(a[j], count) for a in levels)
        eps = eps.reshape(-1, *shape)
        x = to_batch(alpha, eps) * jnp.repeat(x0[i], count, axis=0) + to_batch(sigma, eps) * eps
        cond = jax.tree.map(lambda a: a[i].reshape(-1, *a.shape[2:]), conds)
        out = convert(
            denoiser(x, t, alpha, sigma, cond), x, denoiser.prediction, "eps", alpha, sigma
        )
        out, eps = (a.reshape(-1, count, *shape) for a in (out, eps))
        squares = (out - (out[:, -1:] if orthogonal else eps)) ** 2
        return squares if by_element else jnp.sum(squares, axis=tuple(range(2, squares.ndim)))

    blocks = -(-batch * total // rows)
    index = jnp.minimum(jnp.arange(blocks * rows), batch * total - 1).reshape(blocks, rows)
    found = jax.lax.map(block, index)
    found = found.reshape(-1, *found.shape[2:])[: batch * total]
    return found.reshape(batch, total, *found.shape[1:])
