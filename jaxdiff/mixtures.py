"""The exact denoiser of a Gaussian mixture: an oracle for tests, and a model without training."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from jaxdiff.arrays import to_batch
from jaxdiff.denoisers import Denoiser, level
from jaxdiff.predictions import target


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GaussianMixture:
    """p(x_0) = sum_k w_k N(m_k, V_k): everything about its diffusion in closed form.

    x_t has components N(alpha m_k, alpha^2 V_k + sigma^2 I). V_k = Q_k diag(variances_k) Q_k^T is
    kept in its eigenbasis. Built by `gaussian_mixture`; methods take x [batch, dim], and alpha and
    sigma as scalars or [batch].
    """

    means: Array
    variances: Array
    rotations: Array | None
    log_weights: Array
    process: Any = None

    def at(self, t: ArrayLike) -> tuple[Any, Any]:
        """(alpha, sigma) of the mixture's process at t: `mixture.score(x, *mixture.at(t))`."""
        if self.process is None:
            raise ValueError("this mixture was built without a process: pass alpha and sigma")
        return self.process.alpha(t), self.process.sigma(t)

    def _components(self, x, alpha, sigma):
        """Per component: x - alpha m_k in the eigenbasis, its variances, log w_k N(x; ...)."""
        alpha, sigma = (jnp.asarray(c, x.dtype)[..., None, None] for c in (alpha, sigma))
        delta = x[..., None, :] - alpha * self.means
        if self.rotations is not None:
            delta = jnp.einsum("kij,...ki->...kj", self.rotations, delta)
        variance = alpha**2 * self.variances + sigma**2
        log_density = -0.5 * jnp.sum(delta**2 / variance + jnp.log(2 * jnp.pi * variance), -1)
        return delta, variance, self.log_weights + log_density

    def _back(self, y):
        return y if self.rotations is None else jnp.einsum("kij,...kj->...ki", self.rotations, y)

    def log_density(self, x: Array, alpha: ArrayLike, sigma: ArrayLike) -> Float[Array, " batch"]:
        """log p_t(x) in nats, [batch]; alpha = 1, sigma = 0 is the data density."""
        return jax.nn.logsumexp(self._components(x, alpha, sigma)[2], axis=-1)

    def score(self, x: Array, alpha: ArrayLike, sigma: ArrayLike) -> Array:
        """Gradient of log p_t at x, [batch, dim]."""
        delta, variance, log_joint = self._components(x, alpha, sigma)
        weights = jax.nn.softmax(log_joint, -1)[..., None]
        return -jnp.sum(weights * self._back(delta / variance), -2)

    def responsibilities(self, x: Array, alpha: ArrayLike, sigma: ArrayLike) -> Array:
        """Posterior probability of each component given x_t = x, [batch, components]."""
        return jax.nn.softmax(self._components(x, alpha, sigma)[2], -1)

    def posterior(self, x: Array, alpha: ArrayLike, sigma: ArrayLike) -> tuple[Array, Array]:
        """E[x_0 | x_t = x], [batch, dim], and Cov[x_0 | x_t = x], [batch, dim, dim]."""
        means, local, weights = self._component_posteriors(x, alpha, sigma)
        mean = jnp.sum(weights[..., None] * means, -2)
        centred = means - mean[..., None, :]
        basis = (
            jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), (*local.shape, x.shape[-1]))
            if self.rotations is None
            else jnp.broadcast_to(self.rotations, (*local.shape, x.shape[-1]))
        )
        within = jnp.einsum("...k,...kia,...ka,...kja->...ij", weights, basis, local, basis)
        between = jnp.einsum("...k,...ki,...kj->...ij", weights, centred, centred)
        return mean, within + between

    def _component_posteriors(self, x, alpha, sigma):
        delta, variance, log_joint = self._components(x, alpha, sigma)
        a, s = (jnp.asarray(c, x.dtype)[..., None, None] for c in (alpha, sigma))
        means = self.means + self._back(a * self.variances / variance * delta)
        return means, self.variances * s**2 / variance, jax.nn.softmax(log_joint, -1)

    def denoise(self, x: Array, alpha: ArrayLike, sigma: ArrayLike) -> Array:
        """E[x_0 | x_t = x], [batch, dim]."""
        means, _, weights = self._component_posteriors(x, alpha, sigma)
        return jnp.sum(weights[..., None] * means, -2)

    def expected_noise(self, x: Array, alpha: ArrayLike, sigma: ArrayLike) -> Array:
        """E[eps | x_t = x] = -sigma score, without the cancellation of (x - alpha x0) / sigma."""
        sigma_ = to_batch(jnp.asarray(sigma, x.dtype), x)
        return -sigma_ * self.score(x, alpha, sigma)

    def sample(self, key: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """x_0 [*shape, dim] and the component each came from, [*shape]."""
        key_component, key_noise = jax.random.split(key)
        k = jax.random.categorical(key_component, self.log_weights, shape=shape)
        z = jax.random.normal(key_noise, (*shape, self.means.shape[1]), self.means.dtype)
        z = jnp.sqrt(self.variances[k]) * z
        if self.rotations is not None:
            z = jnp.einsum("...ij,...j->...i", self.rotations[k], z)
        return self.means[k] + z, k


@dataclasses.dataclass(frozen=True)
class _MixtureFn:
    prediction: str

    def __call__(self, mixture, x, levels, cond=None):
        t, alpha, sigma = levels
        if self.prediction == "x0":
            return mixture.denoise(x, alpha, sigma)
        eps = mixture.expected_noise(x, alpha, sigma)
        if self.prediction == "eps":
            return eps
        if self.prediction == "score":
            return mixture.score(x, alpha, sigma)
        # The pair (x0, eps) is known, so no conversion divides by alpha or sigma.
        return target(self.prediction, mixture.denoise(x, alpha, sigma), eps, alpha, sigma)


def gaussian_mixture(
    means: ArrayLike, scales: ArrayLike, weights: ArrayLike, process: Any = None,
    prediction: str = "x0", dtype: Any = None,
) -> Denoiser:  # fmt: skip
    """The exact denoiser of a Gaussian mixture: no training, any dimension, closed form.

    Arguments:
      means: [components, dim].
      scales: standard deviations [components] or [components, dim], or covariances
        [components, dim, dim].
      weights: [components], positive; normalised to sum to 1.
      process: kept for `GaussianMixture.at`; sampling itself gets alpha and sigma with every call.
      prediction: what it predicts, one of `jaxdiff.predictions.PREDICTIONS`.

    Returns a Denoiser whose `params` is the `GaussianMixture`, with its log-density, score,
    posterior moments and samples. Raises ValueError for shapes that do not match, means that are
    not finite, negative scales, weights that are not positive, or covariances that are not
    symmetric positive semi-definite.
    """
    means, scales, weights = (np.asarray(a, np.float64) for a in (means, scales, weights))
    if means.ndim != 2 or not np.all(np.isfinite(means)):
        raise ValueError(f"means must be finite and [components, dim], got {means}")
    count, dim = means.shape
    if weights.shape != (count,) or not np.all(weights > 0):
        raise ValueError(f"weights must be {count} positive numbers, got {weights}")
    rotations = None
    if scales.shape in ((count,), (count, dim)) and not (scales.ndim == 1 and count == 0):
        if not np.all(scales >= 0):
            raise ValueError(f"standard deviations must not be negative, got {scales}")
        variances = np.broadcast_to((scales**2).reshape(count, -1), (count, dim))
    elif scales.shape == (count, dim, dim):
        if not np.allclose(scales, np.swapaxes(scales, 1, 2)):
            raise ValueError("covariances must be symmetric")
        variances, rotations = np.linalg.eigh(scales)
        if np.any(variances < -1e-10 * np.abs(variances).max()):
            raise ValueError("covariances must be positive semi-definite")
        variances = np.maximum(variances, 0.0)
    else:
        raise ValueError(
            f"scales must have shape ({count},), ({count}, {dim}) or ({count}, {dim}, {dim}), got "
            f"{scales.shape}"
        )
    dtype = jnp.result_type(float) if dtype is None else dtype
    as_leaf = lambda a: None if a is None else jnp.asarray(a, dtype)  # noqa: E731
    mixture = GaussianMixture(
        as_leaf(means), as_leaf(variances), as_leaf(rotations),
        as_leaf(np.log(weights / weights.sum())), process,
    )  # fmt: skip
    return Denoiser(_MixtureFn(prediction), prediction, mixture, level)
