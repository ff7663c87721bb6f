"""Transport distances against SciPy, assignment, closed forms and a Sinkhorn loop in NumPy."""

import sys

import jax
import numpy as np
import pytest
import scipy.stats
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.special import logsumexp

from jaxdiff import metrics
from jaxdiff.metrics import transport

_KEY = jax.random.key(0)


@pytest.mark.parametrize("sizes", [(30, 30), (30, 47), (5, 40), (1, 8)])
def test_one_dimension_is_scipys_wasserstein_distance(sizes):
    rng = np.random.default_rng(sizes)
    a, b = rng.standard_normal(sizes[0]), rng.uniform(-1, 3, sizes[1])
    got = metrics.sliced_wasserstein(a, b, _KEY, num_projections=3, p=1.0)
    np.testing.assert_allclose(got, scipy.stats.wasserstein_distance(a, b), rtol=1e-12)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
def test_different_counts_are_copies(p):
    # 4 points three times each and 6 points twice each: the same distributions, 12 points both.
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal(4), rng.standard_normal(6)
    gaps = np.sort(np.tile(a, 3)) - np.sort(np.tile(b, 2))
    want = np.mean(np.abs(gaps) ** p) ** (1 / p)
    got = metrics.sliced_wasserstein(a, b, _KEY, num_projections=2, p=p)
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("block", [1, 2**21])
def test_every_direction_against_scipy(monkeypatch, block):
    monkeypatch.setattr(transport, "_BLOCK", block)
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((20, 5)), rng.standard_normal((33, 5)) + 1
    directions = np.asarray(jax.random.normal(_KEY, (7, 5)), np.float64)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    want = np.mean([scipy.stats.wasserstein_distance(a @ d, b @ d) for d in directions])
    got = metrics.sliced_wasserstein(a, b, _KEY, num_projections=7, p=1.0)
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("dim", [2, 10])
def test_a_shift_in_every_direction(dim):
    # A copy shifted by v is theta . v away; E (theta . v)^2 = |v|^2 / d, and its fourth power has
    # mean 3 |v|^4 / (d (d + 2)).
    rng = np.random.default_rng(dim)
    a, shift, count = rng.standard_normal((8, dim)), rng.standard_normal(dim), 5_000
    got = metrics.sliced_wasserstein(a, a + shift, _KEY, count) ** 2
    norm = shift @ shift
    error = norm * np.sqrt((3 / (dim * (dim + 2)) - 1 / dim**2) / count)
    assert abs(got - norm / dim) < 4 * error


def _entropic_cost(a, b, epsilon):
    """min over plans of <P, C> + epsilon KL(P | uniform x uniform): the dual's value."""
    cost = cdist(a, b, "sqeuclidean")
    g, change = np.zeros(len(b)), 1.0
    while change > 1e-12:
        f = -epsilon * logsumexp((g - cost) / epsilon - np.log(len(b)), axis=1)
        before, g = g, -epsilon * logsumexp((f[:, None] - cost) / epsilon - np.log(len(a)), axis=0)
        change = np.abs(g - before).max()
    return f.mean() + g.mean()


_TIGHT = {"threshold": 1e-6, "max_iterations": 100_000}


@pytest.fixture(scope="module")
def clouds():
    rng = np.random.default_rng(2)
    return rng.standard_normal((6, 2)), rng.standard_normal((6, 2)) + np.array([1.0, 0.5])


def test_sinkhorn_against_a_loop(clouds):
    a, b = clouds
    b = b[:4]
    want = _entropic_cost(a, b, 0.5) - (_entropic_cost(a, a, 0.5) + _entropic_cost(b, b, 0.5)) / 2
    got = metrics.sinkhorn_divergence(a, b, epsilon=0.5, **_TIGHT)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_small_epsilon_is_the_assignment(clouds):
    cost = cdist(*clouds, "sqeuclidean")
    want = cost[linear_sum_assignment(cost)].mean()
    got = metrics.sinkhorn_divergence(*clouds, epsilon=1e-3, threshold=1e-4, max_iterations=20_000)
    np.testing.assert_allclose(got, want, rtol=1e-3)


def test_large_epsilon_is_the_distance_of_the_means(clouds):
    a, b = clouds
    gap = a.mean(axis=0) - b.mean(axis=0)
    got = metrics.sinkhorn_divergence(a, b, epsilon=1e5, **_TIGHT)
    np.testing.assert_allclose(got, gap @ gap, rtol=1e-3)


def test_a_shift_costs_its_square_at_any_epsilon(clouds):
    # The cross term of |x - y - v|^2 is fixed by the marginals, so the plan does not change.
    a, shift = clouds[0], np.array([1.0, 2.0])
    for epsilon in (1.0, 3.0):
        got = metrics.sinkhorn_divergence(a, a + shift, epsilon, **_TIGHT)
        np.testing.assert_allclose(got, 5.0, rtol=1e-6)
    images = a.reshape(6, 1, 2, 1)
    assert abs(metrics.sinkhorn_divergence(images, images, epsilon=3.0, **_TIGHT)) < 1e-9


def test_without_ott_the_extra_is_named(monkeypatch, clouds):
    monkeypatch.setitem(sys.modules, "ott.tools.sinkhorn_divergence", None)
    with pytest.raises(ImportError, match=r"needs ott-jax: pip install 'jaxdiff\[ot\]'"):
        metrics.sinkhorn_divergence(*clouds)


def test_no_convergence_is_an_error(clouds):
    with pytest.raises(ValueError, match="max_iterations 10 at epsilon 0.001, threshold 1e-06"):
        metrics.sinkhorn_divergence(*clouds, epsilon=1e-3, threshold=1e-6, max_iterations=10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: metrics.sliced_wasserstein(a, a, _KEY, 0), "num_projections .* got 0"),
        (lambda a: metrics.sliced_wasserstein(a, a, _KEY, p=0.5), "p must be .* got 0.5"),
        (lambda a: metrics.sliced_wasserstein(a, a[:, :1], _KEY), r"\(6, 2\) and \(6, 1\)"),
        (lambda a: metrics.sliced_wasserstein(a * np.nan, a, _KEY), "6 of 6 points"),
        (lambda a: metrics.sinkhorn_divergence(a, a, epsilon=0.0), "epsilon .* got 0.0"),
        (lambda a: metrics.sinkhorn_divergence(a, a, threshold=0.0), "threshold .* got 0.0"),
        (lambda a: metrics.sinkhorn_divergence(a, a, max_iterations=0), "max_iterations .* got 0"),
        (lambda a: metrics.sinkhorn_divergence(a * np.inf, a), "6 of 6 points"),
    ],
)
def test_bad_input_is_named(clouds, call, message):
    with pytest.raises(ValueError, match=message):
        call(clouds[0])
