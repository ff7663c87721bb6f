"""Forward processes: how data becomes noise.

Every process is the Gaussian perturbation

    x_t = alpha(t) x_0 + sigma(t) eps,      eps ~ N(0, I),      t from t_min (data) to t_max (noise)

described by its half-log-SNR  lambda(t) = log(alpha(t) / sigma(t)), strictly decreasing in t. It is
the marginal of the linear SDE  dx = f(t) x dt + g(t) dW  with

    f = d log(alpha) / dt,       g^2 = d sigma^2 / dt - 2 f sigma^2 = -2 sigma^2 d lambda / dt

(Kingma et al., "Variational Diffusion Models", 2021, appendix; Song et al., "Score-Based Generative
Modeling through SDEs", 2021). Functions take NumPy or JAX arrays of any shape and keep the kind:
float64 on the host, whatever JAX uses on a device. Parameters are pytree leaves; the span
[t_min, t_max] is static.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from jaxdiff.arrays import namespace, to_batch
from jaxdiff.noise import normal


def static(default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field that is part of the tree's structure."""
    return dataclasses.field(default=default, metadata={"static": True})


def register(cls: type) -> type:
    """Make `cls` a frozen keyword dataclass and a pytree.

    Not by `jax.tree_util.register_dataclass`: there the tree structures of two classes with the
    same fields compare equal (jaxlib 0.10), and a program compiled for one would run for the other.
    """
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    fields = dataclasses.fields(cls)
    data = [field.name for field in fields if not field.metadata.get("static")]
    meta = [field.name for field in fields if field.metadata.get("static")]

    def flatten_with_keys(process):
        leaves = [(jax.tree_util.GetAttrKey(name), getattr(process, name)) for name in data]
        return leaves, tuple(getattr(process, name) for name in meta)

    def unflatten(values, leaves):
        return cls(**dict(zip(data, leaves)), **dict(zip(meta, values)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten)
    return cls


def floating(value: ArrayLike, process: Any = None) -> tuple[Any, Any]:
    """(array namespace, `value` as a floating-point array of it: float64 on the host)."""
    xp = namespace(value, process)
    return xp, np.asarray(value, np.float64) if xp is np else jnp.asarray(value) * 1.0


def softplus(xp: Any, x: ArrayLike) -> Any:
    """log(1 + exp(x)) in the namespace `xp`."""
    return xp.logaddexp(xp.zeros_like(x), x)


class Process:
    """A forward process. Subclasses give `alpha`, `sigma`, `half_log_snr`, `time` and `rates`."""

    t_min: float
    t_max: float
    # Where the limits lie, if the span may reach them: alpha = 0 (pure noise), sigma = 0 (data).
    noise_time: float | None = None
    data_time: float | None = None

    def alpha(self, t: ArrayLike) -> Any:
        """alpha(t), the factor of the data."""
        raise TypeError(f"{type(self).__name__} does not define alpha")

    def sigma(self, t: ArrayLike) -> Any:
        """sigma(t), the standard deviation of the noise."""
        raise TypeError(f"{type(self).__name__} does not define sigma")

    def half_log_snr(self, t: ArrayLike) -> Any:
        """lambda(t) = log(alpha(t) / sigma(t)); -inf where alpha = 0, +inf where sigma = 0."""
        raise TypeError(f"{type(self).__name__} does not define half_log_snr")

    def time(self, half_log_snr: ArrayLike) -> Any:
        """The t at which lambda(t) equals `half_log_snr`: the exact inverse."""
        raise TypeError(f"{type(self).__name__} does not define time")

    def rates(self, t: ArrayLike) -> tuple[Any, Any]:
        """(f, g^2) of the forward SDE dx = f x dt + g dW at t."""
        raise TypeError(f"{type(self).__name__} does not define rates")

    @property
    def prior_std(self) -> Any:
        """Standard deviation of the state at t_max with data of unit variance.

        sqrt(alpha^2 + sigma^2): 1 where variance is preserved. `VE` and `EDM` neglect the data, as
        their papers do: sigma(t_max). A span that stops short of noise (alpha(t_max) not near 0)
        starts from x_T = alpha x_0 + sigma eps, which this normal matches in its variance only.
        """
        alpha, sigma = self.alpha(self.t_max), self.sigma(self.t_max)
        return namespace(alpha, sigma).sqrt(alpha**2 + sigma**2)

    def drift(self, x: Any, t: ArrayLike) -> Any:
        """f(t) x, the drift of the forward SDE. `t` is a scalar or `[batch]`."""
        return to_batch(self.rates(t)[0], x) * x

    def diffusion(self, t: ArrayLike) -> Any:
        """g(t), the diffusion coefficient of the forward SDE."""
        xp = namespace(t, self)
        return xp.sqrt(self.rates(t)[1])

    def perturb(self, x0: Any, eps: Any, t: ArrayLike) -> Any:
        """x_t = alpha(t) x_0 + sigma(t) eps, for pytrees of arrays; `t` a scalar or `[batch]`."""
        alpha, sigma = self.alpha(t), self.sigma(t)
        return jax.tree.map(lambda x, e: to_batch(alpha, x) * x + to_batch(sigma, x) * e, x0, eps)

    def prior(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        """Draw x_T ~ N(0, prior_std^2 I), `shape` = [batch, ...].

        `key` is one key, or one per sample (see `jaxdiff.sample_keys`): then sample i depends on
        its own key alone, whatever the batch it is drawn in. Raises ValueError for a shape without
        a batch axis, or another number of keys.
        """
        if not len(shape):
            raise ValueError(f"shape must be [batch, ...], got {shape!r}")
        noise = normal(key, jax.ShapeDtypeStruct(shape, dtype))
        return jnp.asarray(self.prior_std, dtype) * noise


class VariancePreserving(Process):
    """alpha^2 + sigma^2 = 1. Subclasses give lambda(t), its inverse and d log(alpha) / dt."""

    @property
    def prior_std(self):
        return 1.0

    def log_alpha_rate(self, t: ArrayLike) -> Any:
        """f = d log(alpha) / dt; g^2 is then -2 f."""
        raise TypeError(f"{type(self).__name__} does not define log_alpha_rate")

    def alpha(self, t):
        xp = namespace(t, self)
        return xp.exp(-0.5 * softplus(xp, -2.0 * self.half_log_snr(t)))

    def sigma(self, t):
        xp = namespace(t, self)
        return xp.exp(-0.5 * softplus(xp, 2.0 * self.half_log_snr(t)))

    def rates(self, t):
        f = self.log_alpha_rate(t)
        return f, -2.0 * f


def half_log_snr_of_log_alpha(xp: Any, log_alpha: Any) -> Any:
    """lambda of a variance-preserving process: log alpha - log(1 - alpha^2) / 2."""
    with np.errstate(divide="ignore"):
        return log_alpha - 0.5 * xp.log(-xp.expm1(2.0 * log_alpha))


def check_span(t_min: float, t_max: float, low: float, high: float) -> None:
    """Raise ValueError unless low <= t_min < t_max <= high."""
    if not low <= t_min < t_max <= high:
        raise ValueError(
            f"need {low:g} <= t_min < t_max <= {high:g}, got t_min={t_min!r}, t_max={t_max!r}"
        )


def check_positive(**values: ArrayLike) -> None:
    """Raise ValueError, with its name, for a value that is not positive; traced ones pass."""
    for name, value in values.items():
        if not isinstance(value, jax.Array) and not np.all(np.asarray(value) > 0):
            raise ValueError(f"{name} must be positive, got {value!r}")
