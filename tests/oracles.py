"""Independent truth in float64 NumPy and SciPy: a mixture whose flow is known, fitted orders,
and a term of DDPM's variational bound."""

import dataclasses

import numpy as np
from scipy.integrate import solve_ivp
from scipy.special import logsumexp, ndtr, softmax


@dataclasses.dataclass(frozen=True)
class Mixture:
    """sum_k weights_k N(means_k, std_k^2 I), means [components, dim], std [components]."""

    means: np.ndarray
    std: np.ndarray
    weights: np.ndarray

    def _parts(self, x, alpha, sigma):
        variance = alpha**2 * self.std**2 + sigma**2
        delta = x[:, None, :] - alpha * self.means
        log_joint = (
            np.log(self.weights)
            - 0.5 * np.sum(delta**2, -1) / variance
            - 0.5 * self.means.shape[1] * np.log(2 * np.pi * variance)
        )
        return variance, delta, log_joint

    def log_density(self, x, alpha, sigma):
        return logsumexp(self._parts(x, alpha, sigma)[2], axis=1)

    def score(self, x, alpha, sigma):
        variance, delta, log_joint = self._parts(x, alpha, sigma)
        share = softmax(log_joint, axis=1)
        return -np.sum((share / variance)[..., None] * delta, axis=1)

    def eps(self, x, alpha, sigma):
        return -sigma * self.score(x, alpha, sigma)

    def sample(self, rng, count, alpha=1.0, sigma=0.0):
        k = rng.choice(len(self.weights), size=count, p=self.weights)
        z, eps = rng.normal(size=(2, count, self.means.shape[1]))
        return alpha * (self.means[k] + self.std[k, None] * z) + sigma * eps

    def moments(self, alpha=1.0, sigma=0.0):
        mean = self.weights @ self.means
        centred = self.means - mean
        within = np.sum(self.weights * self.std**2) * np.eye(self.means.shape[1])
        cov = within + np.einsum("k,ki,kj->ij", self.weights, centred, centred)
        return alpha * mean, alpha**2 * cov + sigma**2 * np.eye(len(mean))

    def flow(self, x, start, end):
        """The probability flow from (alpha, sigma) = `start` to `end`: DOP853 on dy/drho = eps."""
        rhos = [sigma / alpha for alpha, sigma in (start, end)]

        def field(log_rho, y):
            rho = np.exp(log_rho)
            return (rho * self.eps(y.reshape(x.shape), 1.0, rho)).ravel()

        solution = solve_ivp(
            field, np.log(rhos), (x / start[0]).ravel(), method="DOP853", rtol=1e-13, atol=1e-14
        )
        assert solution.success
        return end[0] * solution.y[:, -1].reshape(x.shape)


# Broad components, so that no sample sits on the border of two basins.
BROAD = Mixture(
    np.array([[1.0, 0.2], [-0.9, 0.6], [0.1, -1.1]]), np.array([0.6] * 3), np.array([0.3, 0.45, 0.25])
)

WIDE = Mixture(
    np.random.default_rng(7).normal(size=(3, 16)), np.array([0.6] * 3), np.array([0.3, 0.45, 0.25])
)


def median_error(x, exact):
    """Median over samples of the Euclidean error."""
    return float(np.median(np.linalg.norm(np.asarray(x, np.float64) - exact, axis=-1)))


def fitted_order(steps, errors, floor=1e-11):
    """Slope of -log(error) against log(steps), where errors stand above rounding."""
    steps, errors = np.asarray(steps, float), np.asarray(errors, float)
    keep = errors > floor
    if keep.sum() < 2:
        raise AssertionError(f"fewer than two errors above {floor}: {errors}")
    return -np.polyfit(np.log(steps[keep]), np.log(errors[keep]), 1)[0]


def bound_by_the_book(betas, t, x0, x, eps_hat, v):
    """A step's term of Nichol & Dhariwal's bound in bits a dimension, in the discrete model's terms."""
    bar = np.cumprod(1.0 - betas)
    before = np.append(1.0, bar[:-1])
    posterior = betas * (1.0 - before) / (1.0 - bar)
    clipped = np.append(posterior[1], posterior[1:])
    x0_hat = (x - np.sqrt(1.0 - bar[t]) * eps_hat) / np.sqrt(bar[t])
    variance = betas[t] ** ((1 + v) / 2) * clipped[t] ** ((1 - v) / 2)

    def mean(start):
        first = np.sqrt(before[t]) * betas[t] * start
        return (first + np.sqrt(1.0 - betas[t]) * (1.0 - before[t]) * x) / (1.0 - bar[t])

    if t:
        gap = (mean(x0) - mean(x0_hat)) ** 2
        nats = 0.5 * (np.log(variance / posterior[t]) + (posterior[t] + gap) / variance - 1.0)
    else:
        ends = np.where(x0 > 0.999, np.inf, x0 + 1 / 255), np.where(x0 < -0.999, -np.inf, x0 - 1 / 255)
        high, low = (ndtr((end - mean(x0_hat)) / np.sqrt(variance)) for end in ends)
        nats = -np.log(np.maximum(high - low, 1e-12))
    return nats.mean() / np.log(2.0)
