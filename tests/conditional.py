"""Exact conditional denoisers: a mixture whose components a condition selects."""

import dataclasses

import jax.numpy as jnp
import numpy as np

import jaxdiff as jd
from jaxdiff.denoisers import level


def eps(params, x, levels, cond):
    mixture, table = params
    _, alpha, sigma = levels
    chosen = dataclasses.replace(mixture, log_weights=table[cond])
    return chosen.expected_noise(x, alpha, sigma)


def conditional_mixture(means, scales, subsets):
    """Denoiser of a mixture of equal components; cond [n] picks rows of `subsets`.

    subsets: [conditions, components], booleans: which components a condition leaves.
    """
    mixture = jd.gaussian_mixture(means, scales, np.ones(len(means))).params
    share = np.asarray(subsets, float)
    with np.errstate(divide="ignore"):
        table = np.log(share / share.sum(1, keepdims=True))
    dtype = mixture.means.dtype
    return jd.Denoiser(eps, "eps", (mixture, jnp.asarray(table, dtype)), level)


def log_densities(denoiser, x):
    """log p(x | condition) of every condition, [n, conditions]."""
    mixture, table = denoiser.params
    one = jnp.ones(len(x), x.dtype)
    columns = [
        dataclasses.replace(mixture, log_weights=row).log_density(x, one, 0.0 * one)
        for row in table
    ]
    return np.stack([np.asarray(c, np.float64) for c in columns], 1)
