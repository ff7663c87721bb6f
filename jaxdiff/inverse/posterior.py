"""The exact posterior of a Gaussian mixture under a linear measurement: a mixture again."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import ArrayLike, Float

from jaxdiff.denoisers import Denoiser
from jaxdiff.inverse.operators import LinearOperator
from jaxdiff.mixtures import GaussianMixture, gaussian_mixture


@dataclasses.dataclass(frozen=True, eq=False)
class MixturePosterior:
    """p(x_0 | y) = sum_k weights_k N(means_k, covariances_k), in float64 NumPy.

    Attributes:
      means: [components, n]; covariances: [components, n, n]; weights: [components], sum 1.
      log_evidence: log p(y) in nats.
    """

    means: np.ndarray
    covariances: np.ndarray
    weights: np.ndarray
    log_evidence: float

    @property
    def mean(self) -> Float[np.ndarray, " n"]:
        """E[x_0 | y]."""
        return self.weights @ self.means

    @property
    def covariance(self) -> Float[np.ndarray, "n n"]:
        """Cov[x_0 | y]."""
        centred = self.means - self.mean
        within = np.einsum("k,kij->ij", self.weights, self.covariances)
        return within + np.einsum("k,ki,kj->ij", self.weights, centred, centred)

    def sample(self, rng: np.random.Generator, count: int) -> Float[np.ndarray, "count n"]:
        """Exact draws from the posterior."""
        k = rng.choice(len(self.weights), size=count, p=self.weights)
        values, vectors = np.linalg.eigh(self.covariances)
        z = np.sqrt(np.maximum(values, 0.0))[k] * rng.normal(size=(count, self.means.shape[1]))
        return self.means[k] + np.einsum("cij,cj->ci", vectors[k], z)

    def denoiser(self, process: Any = None, prediction: str = "x0") -> Denoiser:
        """The exact denoiser of p(x_0 | y): E[x_0 | x_t, y], which guided samplers approximate."""
        return gaussian_mixture(self.means, self.covariances, self.weights, process, prediction)


def mixture_posterior(
    mixture: GaussianMixture | Denoiser, A: LinearOperator | ArrayLike,
    y: ArrayLike, noise_std: float,
) -> MixturePosterior:  # fmt: skip
    """p(x_0 | y) for a mixture prior and y = A x_0 + noise_std n, in closed form.

    Per component, with S = A V A^T + noise_std^2 I and K = V A^T S^-1:

        m' = m + K (y - A m),   V' = (I - K A) V (I - K A)^T + noise_std^2 K K^T,
        w' proportional to w N(y; A m, S).

    Arguments:
      mixture: a `GaussianMixture`, or the denoiser of one, of dimension n.
      A: an operator (of any shape of n entries), or a matrix [m, n].
      y: one measurement, [*A.measured] or [m].
      noise_std: positive.

    Raises ValueError for shapes that do not match, or noise that is not positive.
    """
    prior = mixture.params if isinstance(mixture, Denoiser) else mixture
    if not isinstance(prior, GaussianMixture):
        raise TypeError(f"expected a GaussianMixture or its denoiser, got {type(prior).__name__}")
    matrix = np.asarray(A.dense() if isinstance(A, LinearOperator) else A, np.float64)
    y = np.asarray(y, np.float64)
    measured = A.measured if isinstance(A, LinearOperator) else matrix.shape[:1]
    means = np.asarray(prior.means, np.float64)
    if matrix.ndim != 2 or matrix.shape[1] != means.shape[1] or y.shape != measured:
        raise ValueError(
            f"the mixture has dimension {means.shape[1]}, A is {matrix.shape} and y is {y.shape}, "
            f"where {measured} is measured"
        )
    if not 0 < noise_std < np.inf:
        raise ValueError(f"noise_std must be positive, got {noise_std!r}")
    y, noise = y.ravel(), float(noise_std) ** 2
    new_means, new_covariances, log_joint = [], [], []
    for mean, covariance, log_weight in zip(means, _covariances(prior), prior.log_weights):
        spread = matrix @ covariance @ matrix.T + noise * np.eye(len(matrix))
        gain = np.linalg.solve(spread, matrix @ covariance).T
        left = np.eye(len(mean)) - gain @ matrix
        innovation = y - matrix @ mean
        new_means.append(mean + gain @ innovation)
        new_covariances.append(left @ covariance @ left.T + noise * gain @ gain.T)
        _, log_determinant = np.linalg.slogdet(2 * np.pi * spread)
        fit = innovation @ np.linalg.solve(spread, innovation)
        log_joint.append(float(log_weight) - 0.5 * (log_determinant + fit))
    evidence = np.logaddexp.reduce(log_joint)
    weights = np.exp(np.asarray(log_joint) - evidence)
    return MixturePosterior(
        np.stack(new_means), np.stack(new_covariances), weights / weights.sum(), float(evidence)
    )


def _covariances(mixture: GaussianMixture) -> np.ndarray:
    variances = np.asarray(mixture.variances, np.float64)
    if mixture.rotations is None:
        return np.stack([np.diag(v) for v in variances])
    vectors = np.asarray(mixture.rotations, np.float64)
    return np.einsum("kij,kj,klj->kil", vectors, variances, vectors)
