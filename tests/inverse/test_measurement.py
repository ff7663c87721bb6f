"""Measurements, and the exact posterior of a mixture against a numerical one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

import jaxdiff as jd
from jaxdiff import inverse

MASKED = inverse.inpainting(np.array([1, 0, 1]))


def test_the_posterior_of_a_mixture_is_bayes_rule(x64):
    """Prior times likelihood on a grid of the plane: density, mean, covariance, evidence."""
    rng = np.random.default_rng(0)
    means, factors = rng.normal(size=(3, 2)), rng.normal(size=(3, 2, 2))
    covariances = 0.1 * np.eye(2) + 0.3 * factors @ np.swapaxes(factors, 1, 2)
    weights, A, y, std = np.array([0.2, 0.5, 0.3]), np.array([[1.0, -0.6]]), np.array([0.4]), 0.5
    prior = jd.gaussian_mixture(means, covariances, weights)
    posterior = inverse.mixture_posterior(prior, A, y, std)
    line = np.linspace(-8, 8, 801)
    points = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
    density = sum(
        w * multivariate_normal(m, c).pdf(points) for w, m, c in zip(weights, means, covariances)
    )
    joint = density * multivariate_normal(y, std**2).pdf(points @ A.T) * (line[1] - line[0]) ** 2
    np.testing.assert_allclose(np.log(joint.sum()), posterior.log_evidence, atol=1e-6)
    share = joint / joint.sum()
    mean = share @ points
    np.testing.assert_allclose(posterior.mean, mean, atol=1e-6)
    want = np.einsum("p,pi,pj->ij", share, points - mean, points - mean)
    np.testing.assert_allclose(posterior.covariance, want, atol=1e-6)
    drawn = posterior.sample(np.random.default_rng(1), 40_000)
    np.testing.assert_allclose(drawn.mean(0), mean, atol=0.02)
    np.testing.assert_allclose(np.cov(drawn.T), want, atol=0.02)
    # Its denoiser is that of p(x_0 | y): E[x_0 | x_t, y] by the grid too.
    alpha, sigma, x = 0.8, 0.6, np.array([[0.3, -0.7]])
    weighed = share * np.exp(-0.5 * np.sum((x - alpha * points) ** 2, -1) / sigma**2)
    want = weighed @ points / weighed.sum()
    got = posterior.denoiser()(jnp.asarray(x), 0.5, alpha, sigma)[0]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_measurements_of_any_operator_are_those_of_its_matrix():
    rng = np.random.default_rng(0)
    prior = jd.gaussian_mixture(rng.normal(size=(2, 8)), np.ones(2), np.ones(2))
    operator = inverse.box_down((4, 2), 2)
    y = rng.normal(size=operator.measured)
    one = inverse.mixture_posterior(prior, operator, y, 0.3)
    other = inverse.mixture_posterior(prior, np.asarray(operator.dense()), y.ravel(), 0.3)
    np.testing.assert_allclose(one.mean, other.mean, rtol=1e-6)


def test_measuring_adds_noise_where_something_is_measured():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4000, 3)))
    got = inverse.measure(MASKED, x, 0.5, jax.random.key(0))
    noise = np.asarray(got.y - MASKED(x))
    assert np.all(noise[:, 1] == 0)
    np.testing.assert_allclose(noise[:, [0, 2]].std(0), 0.5, rtol=0.05)
    np.testing.assert_array_equal(inverse.measure(MASKED, x, 0.0).y, MASKED(x))
    np.testing.assert_allclose(got.residual(x), noise, atol=1e-6)


def test_noise_stays_off_what_is_not_reached():
    """Behind a mask, without a closed form; and on the range of a matrix that has not full rank."""
    mask = np.random.default_rng(0).random((6, 6)) < 0.5
    behind = inverse.inpainting(mask) @ inverse.blur((6, 6), np.full((3, 3), 1 / 9), "reflect")
    y = inverse.measure(behind, jnp.zeros((50, 6, 6)), 1.0, jax.random.key(0)).y
    np.testing.assert_array_equal(y[:, ~mask], 0)
    np.testing.assert_allclose(y[:, mask].std(), 1.0, rtol=0.1)
    line = np.array([1.0, 2.0, 3.0])
    low = inverse.matrix(np.outer(line, [1.0, -1.0, 0.5]))
    y = inverse.measure(low, jnp.zeros((50, 3)), 1.0, jax.random.key(0)).y
    along = y @ line / np.linalg.norm(line)
    np.testing.assert_allclose(y, along[:, None] * line / np.linalg.norm(line), atol=1e-5)
    np.testing.assert_allclose(along.std(), 1.0, rtol=0.3)


def test_one_measurement_serves_a_batch_and_rows_of_y_serve_their_own():
    x, y = jnp.ones((2, 3)), jnp.asarray([[2.0, 0.0, 3.0], [4.0, 0.0, 5.0]])
    np.testing.assert_array_equal(inverse.Measurement(MASKED, y, 0).residual(x)[1], [3, 0, 4])
    one = inverse.Measurement(MASKED, y[0], 0)
    np.testing.assert_array_equal(one.residual(x), [[1, 0, 2]] * 2)
    moved = jax.vmap(lambda m: m.residual(x))(jax.tree.map(lambda a: jnp.stack([a, 2 * a]), one))
    np.testing.assert_array_equal(moved[1], [[4 - 2, 0, 6 - 2]] * 2)  # 2 y, and a mask of 2
    with pytest.raises(ValueError, match="2 measurements for 3"):
        inverse.Measurement(MASKED, y, 0).residual(jnp.ones((3, 3)))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: inverse.Measurement(MASKED, np.ones(4), 0.1), ValueError, r"\(4,\)"),
        (lambda: inverse.Measurement(MASKED, np.ones((2, 4)), 0.1), ValueError, r"\(2, 4\)"),
        (lambda: inverse.Measurement(MASKED, np.ones(3), -0.1), ValueError, "negative"),
        (lambda: inverse.Measurement(MASKED, np.ones(3), np.ones(3)), ValueError, "scalar"),
        (lambda: inverse.Measurement(MASKED, np.full(3, np.nan), 0.1), ValueError, "finite"),
        (lambda: inverse.Measurement(np.eye(3), np.ones(3), 0.1), TypeError, "ndarray"),
        (lambda: inverse.measure(MASKED, np.ones((1, 3)), 0.1), ValueError, "key"),
        (lambda: posterior(np.eye(3), np.ones(3), 0.1), ValueError, r"\(3, 3\)"),
        (lambda: posterior(np.eye(2), np.ones(3), 0.1), ValueError, r"\(3,\)"),
        (lambda: posterior(np.eye(2), np.ones(2), 0.0), ValueError, "positive"),
        (lambda: inverse.mixture_posterior("p", np.eye(2), np.ones(2), 1), TypeError, "str"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


def posterior(A, y, std):
    prior = jd.gaussian_mixture(np.zeros((1, 2)), np.ones(1), np.ones(1))
    return inverse.mixture_posterior(prior, A, y, std)
