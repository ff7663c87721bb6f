"""A mixture, a measurement of it, and what guided denoisers are by dense algebra, in float64."""

import jax.numpy as jnp
import numpy as np

import jaxdiff as jd
from jaxdiff import inverse

RNG = np.random.default_rng(0)
DIM, SEEN, STD = 5, 3, 0.3
MEANS, SPREADS = RNG.normal(size=(3, DIM)), RNG.normal(size=(3, DIM, DIM))
COVARIANCES = 0.05 * np.eye(DIM) + 0.1 * SPREADS @ np.swapaxes(SPREADS, 1, 2)
WEIGHTS = np.array([0.3, 0.45, 0.25])
A = RNG.normal(size=(SEEN, DIM)) / np.sqrt(DIM)
Y = RNG.normal(size=SEEN)
X = RNG.normal(size=(4, DIM))
LEVEL = 0.4, 0.8, 0.6


def prior(prediction="x0"):
    return jd.gaussian_mixture(MEANS, COVARIANCES, WEIGHTS, prediction=prediction)


def measurement(noise_std=STD):
    return inverse.Measurement(inverse.matrix(A), Y, noise_std)


def moments():
    """E[x_0 | x_t = X] and Cov[x_0 | x_t = X], from the mixture's own formulas."""
    mean, covariance = prior().params.posterior(jnp.asarray(X), *LEVEL[1:])
    return np.asarray(mean), np.asarray(covariance)
