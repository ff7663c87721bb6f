"""The Frechet distance against closed forms and SciPy's matrix square root."""

import numpy as np
import pytest
import scipy.linalg

from jaxdiff import metrics


def _covariance(rng, dim, rank=None):
    factor = rng.standard_normal((dim, rank or dim))
    return factor @ factor.T


@pytest.mark.parametrize("dim", [1, 5, 64])
def test_commuting_gaussians(dim):
    # Shared axes: the distance is a sum over them of (difference of standard deviations)^2.
    rng = np.random.default_rng(dim)
    axes = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    std_a, std_b = rng.uniform(0, 3, (2, dim))
    mean_a, mean_b = rng.standard_normal((2, dim))
    got = metrics.frechet_from_moments(
        mean_a, (axes * std_a**2) @ axes.T, mean_b, (axes * std_b**2) @ axes.T
    )
    want = np.sum((mean_a - mean_b) ** 2) + np.sum((std_a - std_b) ** 2)
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_two_by_two_closed_form():
    # Of a 2 x 2 matrix with positive eigenvalues, tr M^(1/2) = sqrt(tr M + 2 sqrt(det M)).
    rng = np.random.default_rng(0)
    a, b = _covariance(rng, 2), _covariance(rng, 2)
    product = a @ b
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    got = metrics.frechet_from_moments(np.array([1.0, 2.0]), a, np.array([0.0, 4.0]), b)
    np.testing.assert_allclose(got, 1 + 4 + np.trace(a) + np.trace(b) - 2 * root, rtol=1e-12)


@pytest.mark.parametrize("dim", [3, 64])
def test_against_scipy_sqrtm(dim):
    rng = np.random.default_rng(dim)
    a, b = _covariance(rng, dim), _covariance(rng, dim)
    mean = rng.standard_normal(dim)
    root = scipy.linalg.sqrtm(a @ b).real
    want = mean @ mean + np.trace(a + b - 2 * root)
    got = metrics.frechet_from_moments(mean, a, np.zeros(dim), b)
    np.testing.assert_allclose(got, want, rtol=1e-9)


def test_singular_covariances():
    # S_a = u u', S_b = v v': tr((S_a S_b)^(1/2)) = |u . v|, also where u and v are far in scale.
    rng = np.random.default_rng(1)
    u, v = rng.standard_normal(40), 1e-3 * rng.standard_normal(40)
    zero = np.zeros(40)
    got = metrics.frechet_from_moments(zero, np.outer(u, u), zero, np.outer(v, v))
    np.testing.assert_allclose(got, u @ u + v @ v - 2 * abs(u @ v), rtol=1e-7)
    assert metrics.frechet_from_moments(zero, np.zeros((40, 40)), zero, np.zeros((40, 40))) == 0


def test_features_give_their_unbiased_moments():
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal(30), 2 * rng.standard_normal(50) + 1
    want = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    np.testing.assert_allclose(metrics.frechet_distance(a[:, None], b[:, None]), want, rtol=1e-12)


def test_fewer_features_than_dimensions():
    # A shifted copy has the same (singular) covariance: only the shift is left.
    features = np.random.default_rng(3).standard_normal((20, 64)).astype(np.float32)
    shift = np.linspace(-1, 1, 64)
    assert metrics.frechet_distance(features, features) < 1e-6
    got = metrics.frechet_distance(features, np.float64(features) + shift)
    np.testing.assert_allclose(got, shift @ shift, rtol=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), "at least 2 rows, got 1 and 5"),
        (np.zeros((5, 3)), np.zeros((5, 4)), r"one shape, got \(5, 3\) and \(5, 4\)"),
        (np.zeros((0, 3)), np.zeros((5, 3)), r"at least one value, got \(0, 3\)"),
        (np.diag([1, np.nan, 1]), np.zeros((5, 3)), "first sample .*1 of 3 .*number 1"),
        (np.zeros((5, 3)), np.full((5, 3), np.inf), "second sample .*5 of 5 .*number 0"),
    ],
)
def test_bad_features_are_named(a, b, message):
    with pytest.raises(ValueError, match=message):
        metrics.frechet_distance(a, b)


def test_features_must_be_real_numbers():
    with pytest.raises(TypeError, match="first sample must hold real numbers, got dtype complex"):
        metrics.frechet_distance(np.zeros((2, 2), complex), np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("mean", "covariance", "message"),
    [
        ([0, 0, 0], np.eye(2), r"means must have one shape"),
        ([0, 0], np.eye(3), r"second covariance must be \[2, 2\] like its mean, got \[3, 3\]"),
        ([0, 0], [[1, 2], [0, 1]], "must be symmetric, it is off its transpose by 2"),
        ([0, 0], [[1, 0], [0, -0.5]], "no eigenvalue below 0, it has -0.5"),
        ([0, 0], [[1, np.nan], [0, 1]], "second covariance must be finite"),
        ([0, np.nan], np.eye(2), "second mean must be finite"),
    ],
)
def test_bad_moments_are_named(mean, covariance, message):
    with pytest.raises(ValueError, match=message):
        metrics.frechet_from_moments([0, 0], np.eye(2), mean, covariance)
