"""Optimal boundary conditions: the search by brute force, and super-resolution of digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import spearmanr

import jaxdiff as jd
from jaxdiff.acceleration import optimal_boundary_condition
from jaxdiff.data import digits

PROCESS = jd.processes.vp_cosine()
TABLEAU = jd.solvers.ddim(jd.grids.half_log_snr(PROCESS, 5))


def shrunk(x):
    """8 x 8 to 4 x 4, means of four."""
    return x.reshape(len(x), 4, 2, 4, 2, 1).mean((2, 4))


def all_levels(t, alpha, sigma):
    return t, alpha, sigma


def super_resolution(params, x, levels, cond):
    """Exact E[x0 | x_t, y] of a mixture around the training digits, given y = shrunk(x0) + tau eps."""
    data, small, width, tau = params
    _, alpha, sigma = levels
    variance = (alpha * width) ** 2 + sigma**2
    flat, low = x.reshape(len(x), -1), cond.reshape(len(x), -1)
    gaps = jnp.sum((flat[:, None] - alpha * data) ** 2, -1) / variance
    gaps = gaps + jnp.sum((low[:, None] - small) ** 2, -1) / tau**2
    mean = jax.nn.softmax(-0.5 * gaps, -1) @ data
    return (mean + alpha * width**2 / variance * (flat - alpha * mean)).reshape(x.shape)


@pytest.fixture(scope="module")
def denoiser():
    data = digits("train").x[::3].astype(np.float32)
    params = (
        jnp.asarray(data.reshape(len(data), -1)), jnp.asarray(shrunk(data).reshape(len(data), -1)),
        jnp.float32(0.3), jnp.float32(0.2),
    )  # fmt: skip
    return jd.Denoiser(super_resolution, "x0", params, all_levels)


def distances(denoiser, candidates, images):
    return optimal_boundary_condition(
        denoiser, TABLEAU, candidates, shrunk(images), images, at_once=4
    )


def test_the_search_is_brute_force(denoiser):
    images = digits("test").x[:3].astype(np.float32)
    candidates = PROCESS.prior(jax.random.key(0), (5, 8, 8, 1))
    found = distances(denoiser, candidates, images)
    expected = np.empty((5, 3))
    for i, x_T in enumerate(candidates):
        for j in range(3):
            image = images[j : j + 1]
            x0 = jd.sample(denoiser, TABLEAU, x_T[None], cond=jnp.asarray(shrunk(image)))
            expected[i, j] = np.mean((np.asarray(x0) - image) ** 2)
    np.testing.assert_allclose(found.distances, expected, rtol=1e-3)
    assert found.index == expected.mean(1).argmin()
    assert np.array_equal(found.x_T, candidates[found.index])


def test_the_chosen_start_is_good_for_images_not_seen(denoiser):
    """Row 81's measures, with its candidates and pairs; 200 held-out images."""
    images = digits("test").x.astype(np.float32)
    candidates = PROCESS.prior(jax.random.key(0), (200, 8, 8, 1))
    found = distances(denoiser, candidates, images[:50])
    others = np.asarray(distances(denoiser, candidates, images[50:250]).distances).mean(1)
    assert np.mean(others > others[found.index]) >= 0.95
    seen = np.asarray(found.distances).mean(1)
    assert spearmanr(seen, others).statistic >= 0.6


def test_bad_arguments(denoiser):
    images = digits("test").x[:2].astype(np.float32)
    small, good = shrunk(images), jnp.zeros((3, 8, 8, 1))
    for match, call in (
        ("of the targets' shape", lambda: optimal_boundary_condition(
            denoiser, TABLEAU, good[:, :4], small, images)),
        ("at_once must be", lambda: optimal_boundary_condition(
            denoiser, TABLEAU, good, small, images, at_once=0)),
        ("deterministic", lambda: optimal_boundary_condition(
            denoiser, jd.solvers.ddpm(jd.grids.half_log_snr(PROCESS, 2)), good, small, images)),
        (r"one number a pair, \[2\], got \(\)", lambda: optimal_boundary_condition(
            denoiser, TABLEAU, good, small, images, mean_of_all)),
        ("no candidate of 3 has a finite", lambda: optimal_boundary_condition(
            denoiser, TABLEAU, good * np.nan, small, images)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            call()


def mean_of_all(x, y):
    return jnp.mean(jnp.square(x - y))


def test_a_candidate_of_no_finite_distance_is_not_chosen(denoiser):
    images = digits("test").x[:2].astype(np.float32)
    candidates = PROCESS.prior(jax.random.key(0), (3, 8, 8, 1)).at[0].set(np.nan)
    found = optimal_boundary_condition(denoiser, TABLEAU, candidates, shrunk(images), images)
    expected = np.mean(found.distances, 1)
    assert np.isnan(expected[0]) and found.index == np.nanargmin(expected)
