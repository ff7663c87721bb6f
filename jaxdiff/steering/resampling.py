"""Resampling: which particles go on, in proportion to their weights.

Many prompts each with k particles run in one batch of groups x k samples, group after group; weights
are compared and particles exchanged inside a group only. Weights are kept as logarithms.

Every scheme draws k ancestors with E[number of copies of i] = k w_i, w the normalised weights:

    multinomial    k independent draws
    stratified     one draw in each of the k equal pieces of [0, 1], through the inverse distribution
    systematic     the same with one uniform number for all the pieces: copies are floor or ceil of k w_i
    residual       floor(k w_i) copies, the rest multinomial in what is left

Douc, Cappe & Moulines, "Comparison of Resampling Schemes for Particle Filtering" (2005): the last three
have at most the first one's variance. Kong, Liu & Wong, "Sequential Imputations and Bayesian Missing
Data Problems" (1994), for the effective sample size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from jaxdiff.arrays import is_concrete
from jaxdiff.noise import is_key_batch, sample_keys
from jaxdiff.solvers.clocks import check_choice, check_order

SCHEMES = ("multinomial", "stratified", "systematic", "residual")


def effective_sample_size(log_weights: Float[ArrayLike, "... k"]) -> Float[Array, ...]:
    """(sum w)^2 / sum w^2 over the last axis: from 1 (one particle counts) to k (all alike)."""
    log_weights = jnp.asarray(log_weights)
    total = jax.nn.logsumexp(log_weights, -1)
    return jnp.exp(2.0 * total - jax.nn.logsumexp(2.0 * log_weights, -1))


def ancestors(
    key: Array, log_weights: Float[ArrayLike, " k"], scheme: str = "systematic"
) -> Int[Array, " k"]:
    """The indices of the k particles that go on, of k weighted ones; see this module.

    Arguments:
      log_weights: any constant may be added; -inf for a particle that must not go on.
      scheme: one of `SCHEMES`.

    Raises ValueError for an unknown scheme, no particles, or weights that are NaN, infinite, or all
    zero; where those are traced, an error at run time.
    """
    check_choice("scheme", scheme, SCHEMES)
    if np.ndim(log_weights) != 1 or not np.shape(log_weights)[0]:
        raise ValueError(f"log_weights must be [k] with k >= 1, got shape {np.shape(log_weights)}")
    return _drawn(key, checked(log_weights), scheme)


def _drawn(key: Array, log_weights: Float[Array, " k"], scheme: str) -> Int[Array, " k"]:
    k = log_weights.shape[0]
    weights = jax.nn.softmax(log_weights)
    if scheme == "multinomial":
        return inverse(weights, jax.random.uniform(key, (k,), weights.dtype))
    if scheme == "residual":
        copies = jnp.floor(k * weights)
        # Rounding must not take a copy from a weight that is a multiple of 1 / k.
        copies = jnp.where(k * weights - copies > 1 - 1e-5, copies + 1, copies)
        left = jnp.maximum(k * weights - copies, 0.0)
        sure = jnp.repeat(jnp.arange(k), copies.astype(jnp.int32), total_repeat_length=k)
        rest = inverse(left, jax.random.uniform(key, (k,), weights.dtype))
        return jnp.where(jnp.arange(k) < jnp.sum(copies), sure, rest)
    u = jax.random.uniform(key, (k if scheme == "stratified" else 1,), weights.dtype)
    return inverse(weights, (jnp.arange(k) + u) / k)


def inverse(weights: Float[Array, " k"], places: Float[Array, " n"]) -> Int[Array, " n"]:
    """The first index whose cumulative weight is above each place in [0, 1], of the whole."""
    cumulative = jnp.cumsum(weights)
    # A place that rounds up to the end belongs to the last index with a weight.
    last = jnp.searchsorted(cumulative, cumulative[-1], side="left")
    found = jnp.searchsorted(cumulative, places * cumulative[-1], side="right")
    return jnp.minimum(found, last)


def checked(log_weights: ArrayLike) -> Array:
    """The weights, if there is one to choose in each row; ValueError, or at run time an error."""
    log_weights = jnp.asarray(log_weights)
    text = "degenerate weights: log-weights must be < inf, not NaN, and some > -inf in each group"
    bad = jnp.any(jnp.isnan(log_weights) | (log_weights == jnp.inf)) | jnp.any(
        jnp.all(log_weights == -jnp.inf, axis=-1)
    )
    if is_concrete(bad):
        if bool(bad):
            raise ValueError(f"{text}; got {log_weights}")
        return log_weights
    return eqx.error_if(log_weights, bad, text)


@dataclasses.dataclass(frozen=True)
class Resampler:
    """What is resampled when, inside groups of `particles`.

    Attributes:
      particles: k, that divides the batch; None for all of it.
      scheme: one of `SCHEMES`.
      threshold: resample a group whose effective sample size is below threshold k; 1 or more: always;
        0: never.
    """

    particles: int | None = None
    scheme: str = "systematic"
    threshold: float = 0.5

    def __post_init__(self):
        if self.particles is not None:
            check_order(self.particles, 10**9, "particles")
        check_choice("scheme", self.scheme, SCHEMES)
        if isinstance(self.threshold, bool) or not 0 <= self.threshold < np.inf:
            raise ValueError(f"threshold must be a finite number >= 0, got {self.threshold!r}")

    def grouped(self, values: Float[Array, " batch"]) -> Float[Array, "groups k"]:
        """[batch] as [groups, k]; ValueError if k does not divide the batch."""
        batch = values.shape[0]
        k = batch if self.particles is None else self.particles
        if not batch or batch % k:
            raise ValueError(f"groups of {k} particles need a batch that is a multiple, got {batch}")
        return values.reshape(-1, k)

    def __call__(
        self, key: Array, log_weights: Float[Array, " batch"], allowed: Any = True,
        always: bool = False,
    ) -> tuple[Int[Array, " batch"], Bool[Array, " groups"]]:  # fmt: skip
        """(index of each sample's ancestor in the batch, whether its group was resampled).

        `key`: one, or one a sample, of which a group's first is taken. `allowed`: a boolean, may it be
        done at all. `always`: whatever the effective sample size.
        """
        grouped = checked(self.grouped(log_weights))
        groups, k = grouped.shape
        keys = self.keys(key, groups, k)
        if always or self.threshold >= 1:
            chosen = jnp.broadcast_to(jnp.asarray(allowed), (groups,))
        else:
            chosen = (effective_sample_size(grouped) < self.threshold * k) & allowed
        own = jnp.broadcast_to(jnp.arange(k), grouped.shape)

        def draw():
            drawn = jax.vmap(lambda key, w: _drawn(key, w, self.scheme))(keys, grouped)
            return jnp.where(chosen[:, None], drawn, own)

        index = jax.lax.cond(jnp.any(chosen), draw, lambda: own)
        return (index + k * jnp.arange(groups)[:, None]).reshape(-1), chosen

    @staticmethod
    def keys(key: Array, groups: int, k: int) -> Array:
        """One key a group: of one key, or of one a sample. ValueError for None."""
        if key is None:
            raise ValueError("resampling draws random numbers: pass key= to sample")
        return key[::k] if is_key_batch(key) else sample_keys(key, np.arange(groups))


def per_sample_of(groups: Any, batch: int) -> Any:
    """[groups] as [batch], each group's value for each of its particles."""
    return jnp.repeat(groups, batch // groups.shape[0])
