"""Guidance scales that depend on the noise level.

Where guidance takes a `scale`, it takes a function of (t, alpha, sigma) too; these are such functions,
and pytrees: their numbers are leaves, so other numbers compile nothing. With u from 0 at noise to 1 at
data they are

    linear         start + (end - start) u
    cosine         start + (end - start) (1 - cos(pi u)) / 2
    power_cosine   start + (end - start) (1 - cos(pi u^p)) / 2
    power          start + (end - start) u^p
    beta           scale u^(a - 1) (1 - u)^(b - 1) / B(a, b)

Wang, Dufour, Andreou, Cani, Abrevaya, Picard & Kalogeiton, "Analysis of Classifier-Free Guidance Weight
Schedulers" (2024), find that rising ones do best; their linear and cosine ones of weight w are from 0
to 2 w, and their clamped ones have `at_least`. The power-cosine one is of Gao, Zhou, Cheng & Yan,
"Masked Diffusion Transformer" (2023); the beta density, mean `scale` over u, of Malarz et al.,
"Classifier-Free Guidance with Adaptive Scaling" (2025).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import betaln
from jaxtyping import Array, ArrayLike

from jaxdiff.arrays import as_arrays, is_concrete

CLOCKS = ("t", "half_log_snr")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """A guidance scale, `schedule(t, alpha, sigma)`; see this module.

    Attributes:
      rule: (u, *numbers) -> the scale.
      numbers: of the rule.
      over: the clock's values where u is 0 (noise) and 1 (data); beyond them u stays.
      at_least: the scale is never less.
      clock: "t", or "half_log_snr", log(alpha / sigma).
    """

    rule: Callable = dataclasses.field(metadata={"static": True})
    numbers: tuple[Any, ...]
    over: tuple[Any, Any]
    at_least: Any
    clock: str = dataclasses.field(metadata={"static": True})

    def __call__(self, t: ArrayLike, alpha: ArrayLike, sigma: ArrayLike) -> Array:
        """The scale at a level; scalars or [batch]."""
        now = jnp.asarray(t) if self.clock == "t" else jnp.log(alpha) - jnp.log(sigma)
        noise, data = self.over
        u = jnp.clip((now - noise) / (data - noise), 0.0, 1.0)
        return jnp.maximum(self.rule(u, *self.numbers), self.at_least)


def linear(
    start: ArrayLike, end: ArrayLike, over: tuple[ArrayLike, ArrayLike] | None = None,
    at_least: ArrayLike = -np.inf, clock: str = "t",
) -> Schedule:  # fmt: skip
    """start + (end - start) u: from `start` at noise to `end` at data.

    Arguments:
      over: (noise, data), the clock's values between which it changes: falling in t, rising in
        half_log_snr. By default time from 1 to 0; half_log_snr has no default. For the whole of a
        process: (process.t_max, process.t_min).
      at_least: a floor.
      clock: "t", or "half_log_snr".

    Raises ValueError for numbers that are not finite, for ends that are missing, infinite, equal or in
    the other order, or another clock.
    """
    return _schedule(_between, (start, end), over, at_least, clock)


def cosine(
    start: ArrayLike, end: ArrayLike, over: tuple[ArrayLike, ArrayLike] | None = None,
    at_least: ArrayLike = -np.inf, clock: str = "t",
) -> Schedule:  # fmt: skip
    """start + (end - start) (1 - cos(pi u)) / 2; arguments as for `linear`."""
    return power_cosine(start, end, 1.0, over, at_least, clock)


def power_cosine(
    start: ArrayLike, end: ArrayLike, exponent: ArrayLike = 4.0,
    over: tuple[ArrayLike, ArrayLike] | None = None, at_least: ArrayLike = -np.inf, clock: str = "t",
) -> Schedule:  # fmt: skip
    """start + (end - start) (1 - cos(pi u^p)) / 2, p = `exponent` > 0; the rest as for `linear`."""
    _check_positive(exponent=exponent)
    return _schedule(_power_cosine, (start, end, exponent), over, at_least, clock)


def power(
    start: ArrayLike, end: ArrayLike, exponent: ArrayLike = 2.0,
    over: tuple[ArrayLike, ArrayLike] | None = None, at_least: ArrayLike = -np.inf, clock: str = "t",
) -> Schedule:  # fmt: skip
    """start + (end - start) u^p, p = `exponent` > 0; the rest as for `linear`."""
    _check_positive(exponent=exponent)
    return _schedule(_power, (start, end, exponent), over, at_least, clock)


def beta(
    scale: ArrayLike, a: ArrayLike = 2.0, b: ArrayLike = 2.0,
    over: tuple[ArrayLike, ArrayLike] | None = None, at_least: ArrayLike = -np.inf, clock: str = "t",
) -> Schedule:  # fmt: skip
    """scale u^(a - 1) (1 - u)^(b - 1) / B(a, b), a and b at least 1; the rest as for `linear`."""
    if is_concrete(a, b) and not (np.all(np.asarray(a) >= 1) and np.all(np.asarray(b) >= 1)):
        raise ValueError(
            f"a and b must be at least 1, or the scale is infinite, got {a!r} and {b!r}"
        )
    return _schedule(_beta, (scale, a, b), over, at_least, clock)


def _schedule(rule, numbers, over, at_least, clock) -> Schedule:
    if clock not in CLOCKS:
        raise ValueError(f"clock must be one of {CLOCKS}, got {clock!r}")
    if is_concrete(numbers) and not all(np.all(np.isfinite(n)) for n in numbers):
        raise ValueError(f"the numbers of a schedule must be finite, got {numbers}")
    if over is None and clock != "t":
        raise ValueError("clock='half_log_snr' needs over=(noise, data), two half-log-SNRs")
    noise, data = (1.0, 0.0) if over is None else over
    if is_concrete(noise, data):
        if not (np.all(np.isfinite(noise)) and np.all(np.isfinite(data))):
            raise ValueError(f"over must be two finite values (noise, data), got {over!r}")
        falling = np.asarray(noise) - np.asarray(data)
        if not np.all(falling > 0 if clock == "t" else falling < 0):
            order = "falls" if clock == "t" else "rises"
            raise ValueError(
                f"over must be (noise, data), and from noise to data {clock} {order}; got {over!r}"
            )
    return Schedule(rule, *as_arrays((numbers, (noise, data), at_least)), clock)


def _check_positive(**values: ArrayLike) -> None:
    for name, value in values.items():
        if is_concrete(value) and not np.all(np.asarray(value) > 0):
            raise ValueError(f"{name} must be positive, got {value!r}")


def _between(u, start, end):
    return start + (end - start) * u


def _power(u, start, end, exponent):
    return _between(u**exponent, start, end)


def _power_cosine(u, start, end, exponent):
    return _between(0.5 * (1.0 - jnp.cos(jnp.pi * u**exponent)), start, end)


def _beta(u, scale, a, b):
    return scale * u ** (a - 1.0) * (1.0 - u) ** (b - 1.0) * jnp.exp(-betaln(a, b))
