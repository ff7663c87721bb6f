"""Averages of the weights: the classical one with its warm-ups, and EDM2's power-function averages,
from which an average of any other length can be made after training.

Karras et al., "Analyzing and improving the training dynamics of diffusion models" (2023), section 3
and appendix C. The profile of length sigma_rel at step T weighs the parameters of time t by

    p(t) = (gamma + 1) t^gamma / T^(gamma + 1),    0 <= t <= T,

whose standard deviation is sigma_rel T. The recurrence of `update` weighs the parameters after step
i by exactly the integral of p from i - 1 to i. Time is counted in steps; with one batch size that
is the same as counting examples.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

WARMUPS = ("count", "half_life", "none")
LONGEST = 12**-0.5


def check(settings: Any) -> None:
    """Raise ValueError unless the averages of a train section fit together."""
    if settings.ema_warmup not in WARMUPS:
        raise ValueError(
            f"config.train.ema_warmup must be one of {list(WARMUPS)}, got {settings.ema_warmup!r}"
        )
    if len(set(settings.ema_lengths)) < len(settings.ema_lengths):
        raise ValueError(f"config.train.ema_lengths has one twice: {settings.ema_lengths}")
    if settings.ema_snapshots_every and not settings.ema_lengths:
        raise ValueError("config.train.ema_snapshots_every needs config.train.ema_lengths")


def decay(step: ArrayLike, limit: float, warmup: str = "count", ratio: float = 0.05) -> Array:
    """The d of ema <- d ema + (1 - d) params, after `step` steps (0 for the first).

        "count"      min(limit, (1 + step) / (10 + step))
        "half_life"  min(limit, 2^(-1 / (ratio step))): a half-life of at most `ratio` of the
                     training so far (Karras et al., EDM, 2022; their ema_rampup_ratio, 0.05)
        "none"       limit
    """
    step = jnp.asarray(step)
    if warmup == "count":
        return jnp.minimum(limit, (1.0 + step) / (10.0 + step))
    if warmup == "half_life":
        return jnp.minimum(limit, jnp.exp2(-1.0 / (ratio * step)))
    return jnp.full_like(step, limit, dtype=jnp.float32)


def relative_std(gamma: ArrayLike) -> Float[np.ndarray, "..."]:
    """sigma_rel = sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3))), for gamma > -1."""
    gamma = np.asarray(gamma, np.float64)
    return np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def exponent(sigma_rel: float) -> float:
    """The gamma >= 0 of a length: the largest root of (g + 2)^2 (g + 3) = (g + 1) / sigma_rel^2.

    Raises ValueError unless 0 < sigma_rel <= 1 / sqrt(12), the length of the plain mean.
    """
    check_length("sigma_rel", sigma_rel)
    t = float(sigma_rel) ** -2
    root = np.roots([1.0, 7.0, 16.0 - t, 12.0 - t]).real.max()
    slope = 3 * root**2 + 14 * root + 16 - t
    root -= (((root + 7) * root + 16 - t) * root + 12 - t) / slope  # the roots' last digits
    return max(float(root), 0.0)


def check_length(where: str, sigma_rel: float) -> None:
    """Raise ValueError unless 0 < sigma_rel <= 1 / sqrt(12)."""
    if not 0 < sigma_rel <= LONGEST:
        raise ValueError(
            f"{where} must be above 0 and at most 1 / sqrt(12) = {LONGEST:.6f}, the length of the "
            f"plain mean, got {sigma_rel!r}"
        )


def start(params: Any, lengths: Sequence[float]) -> tuple[Any, ...]:
    """The averages before the first step: one tree for each length, of which nothing will stay."""
    return tuple(jax.tree.map(jnp.zeros_like, params) for _ in lengths)


def update(
    tracks: tuple[Any, ...], params: Any, step: ArrayLike, lengths: Sequence[float]
) -> tuple[Any, ...]:
    """The averages after step number `step` (from 1), which made `params`.

    With beta = (1 - 1 / step)^(gamma + 1): average <- average + (1 - beta) (params - average).
    """
    step = jnp.asarray(step, jnp.float32)
    found = []
    for track, length in zip(tracks, lengths, strict=True):
        # 1 - beta itself: float32 would lose it in beta. The first step's is 1.
        new = -jnp.expm1((exponent(length) + 1.0) * jnp.log1p(-1.0 / step))
        found.append(jax.tree.map(lambda a, p, w=new: a + (w * (p - a)).astype(a.dtype), track, params))
    return tuple(found)


class Fit(NamedTuple):
    """How a profile is made of others.

    Attributes:
      coefficients: [profiles], of sum 1.
      error: what remains, |sum_i c_i p_i - p| / |p| in the mean square over time; 0 is exact.
    """

    coefficients: Float[np.ndarray, " profiles"]
    error: float


def fit(
    steps: Sequence[int], lengths: Sequence[float], step: int, sigma_rel: float
) -> Fit:
    """The combination of stored profiles (steps[i], lengths[i]) nearest to (step, sigma_rel).

    Least squares over time, from the inner products of the profiles in closed form, then scaled to
    the sum 1 (appendix C.3, algorithm 3). Raises ValueError for no profiles, steps below 1, or
    lengths that are none.
    """
    if not len(steps) or len(steps) != len(lengths):
        raise ValueError(f"need as many steps as lengths, got {len(steps)} and {len(lengths)}")
    if min(*steps, step) < 1:
        raise ValueError(f"steps must be at least 1, got {[*steps, step]}")
    times = np.asarray(steps, np.float64)
    gammas = np.array([exponent(length) for length in lengths])
    gamma = exponent(sigma_rel)
    # Profiles of norm 1: raw ones of early and late steps differ by orders of magnitude.
    norms = np.sqrt(inner_product(times, gammas, times, gammas))
    norm = float(np.sqrt(inner_product(step, gamma, step, gamma)))
    gram = inner_product(times[:, None], gammas[:, None], times, gammas) / np.outer(norms, norms)
    target = inner_product(times, gammas, step, gamma) / (norms * norm)
    found = np.linalg.lstsq(gram, target, rcond=1e-15 * len(times))[0]
    coefficients = found / norms * norm
    coefficients /= coefficients.sum()
    scaled = coefficients * norms / norm
    square = scaled @ gram @ scaled - 2 * scaled @ target + 1.0
    return Fit(coefficients, float(np.sqrt(max(square, 0.0))))


def inner_product(
    step_a: ArrayLike, gamma_a: ArrayLike, step_b: ArrayLike, gamma_b: ArrayLike
) -> Float[np.ndarray, "..."]:
    """Integral over t of p_a(t) p_b(t), the profiles of exponents gamma_a, gamma_b at these steps.

    With the earlier step s, the later one T, and the later one's exponent g:

        (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1)  (s / T)^g / T
    """
    step_a, step_b, gamma_a, gamma_b = (
        np.asarray(v, np.float64) for v in (step_a, step_b, gamma_a, gamma_b)
    )
    early, late = np.minimum(step_a, step_b), np.maximum(step_a, step_b)
    power = (early / late) ** np.where(step_a < step_b, gamma_b, gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * power / late


def combine(coefficients: Sequence[float], trees: Iterable[Any]) -> Any:
    """sum_i coefficients[i] trees[i], one tree in memory at a time besides the sum."""
    total = None
    for coefficient, tree in zip(coefficients, trees, strict=True):
        if total is None:
            total = jax.tree.map(jnp.zeros_like, tree)
        total = _add(total, np.float32(coefficient), tree)
    return total


@jax.jit
def _add(total, coefficient, tree):
    return jax.tree.map(lambda a, b: a + (coefficient * b).astype(a.dtype), total, tree)
