"""MMD and energy distance against double loops, SciPy and closed forms."""

import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from scipy.spatial.distance import cdist, pdist

from jaxdiff import metrics
from jaxdiff.metrics import kernels


def _double_loop(a, b, kernel, unbiased):
    def mean(x, y, skip):
        values = [
            kernel(p, q) for i, p in enumerate(x) for j, q in enumerate(y) if not (skip and i == j)
        ]
        return sum(values) / len(values)

    return mean(a, a, unbiased) + mean(b, b, unbiased) - 2 * mean(a, b, False)


_KERNELS = {
    "rbf": (metrics.rbf(0.7), lambda p, q: np.exp(-np.sum((p - q) ** 2) / (2 * 0.7**2))),
    "kid": (metrics.polynomial(), lambda p, q: (np.dot(p, q) / 3 + 1) ** 3),
    "quadratic": (metrics.polynomial(2, 0.5, 0.1), lambda p, q: (0.5 * np.dot(p, q) + 0.1) ** 2),
}


@pytest.mark.parametrize("name", _KERNELS)
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("block", [1, 40, 2**21])
def test_double_loop(monkeypatch, name, unbiased, block):
    monkeypatch.setattr(kernels, "_BLOCK", block)  # one row at a time, three, all
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((11, 3)), rng.standard_normal((13, 3)) + 0.5
    kernel, scalar = _KERNELS[name]
    want = _double_loop(a, b, scalar, unbiased)
    np.testing.assert_allclose(metrics.mmd(a, b, kernel, unbiased), want, rtol=1e-11)


def test_gaussians_closed_form():
    # E k of N(0, s^2 I) and N(mu, r^2 I): (h^2 / v)^(d/2) exp(-|mu|^2 / 2v), v = h^2 + s^2 + r^2.
    dim, n, m, h, s, r, mu = 2, 60, 90, 0.8, 1.0, 1.3, np.array([0.6, -0.3])

    def expected_kernel(spread, gap):
        v = h**2 + spread
        return (h**2 / v) ** (dim / 2) * np.exp(-np.sum(gap**2) / (2 * v))

    within_a, within_b = expected_kernel(2 * s**2, 0 * mu), expected_kernel(2 * r**2, 0 * mu)
    exact = within_a + within_b - 2 * expected_kernel(s**2 + r**2, mu)
    bias = (1 - within_a) / n + (1 - within_b) / m  # pairs of a point with itself
    rng = np.random.default_rng(0)
    draws = [
        (s * rng.standard_normal((n, dim)), r * rng.standard_normal((m, dim)) + mu)
        for _ in range(400)
    ]
    for unbiased, want in ((True, exact), (False, exact + bias)):
        values = [metrics.mmd(a, b, metrics.rbf(h), unbiased) for a, b in draws]
        error = np.std(values) / np.sqrt(len(values))
        assert error < 0.1 * bias  # so that the two could not be mistaken for one another
        assert abs(np.mean(values) - want) < 4 * error


def test_default_bandwidth_is_the_median_distance():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((20, 2, 2)), rng.standard_normal((31, 2, 2))
    pooled = np.concatenate([a, b]).reshape(51, 4)
    median = np.median(pdist(pooled))
    np.testing.assert_allclose(metrics.median_bandwidth(a, b), median, rtol=1e-12)
    want = metrics.mmd(a, b, metrics.rbf(median))
    np.testing.assert_allclose(metrics.mmd(a, b), want, rtol=1e-9)
    some = pooled[[0, 17, 33, 50]]  # four points, evenly spaced
    np.testing.assert_allclose(
        metrics.median_bandwidth(a, b, 4), np.median(pdist(some)), rtol=1e-12
    )


def test_far_from_the_origin_distances_stay_accurate():
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((30, 4)), rng.standard_normal((40, 4)) + 0.5
    for distance in (lambda x, y: metrics.mmd(x, y, metrics.rbf(1.0)), metrics.energy_distance):
        np.testing.assert_allclose(distance(a + 1e5, b + 1e5), distance(a, b), rtol=1e-8)


def test_energy_distance_in_one_dimension_is_scipys():
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal(40), rng.uniform(-1, 3, 70)
    want = scipy.stats.energy_distance(a, b)
    np.testing.assert_allclose(metrics.energy_distance(a, b), want, rtol=1e-10)


def test_energy_distance_of_vectors():
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((25, 6)), rng.standard_normal((35, 6)) * 2
    want = np.sqrt(2 * cdist(a, b).mean() - cdist(a, a).mean() - cdist(b, b).mean())
    np.testing.assert_allclose(metrics.energy_distance(a, b), want, rtol=1e-9)
    assert metrics.energy_distance(a, a) == 0


def test_images_and_bfloat16_are_points_too():
    rng = np.random.default_rng(5)
    a = jnp.asarray(rng.standard_normal((9, 4, 4, 1)), jnp.bfloat16)
    b = rng.standard_normal((7, 4, 4, 1)).astype(np.float32)
    flat = np.asarray(a, np.float64).reshape(9, 16), np.float64(b).reshape(7, 16)
    assert metrics.energy_distance(a, b) == metrics.energy_distance(*flat)


def test_pairs_are_never_held_at_once(monkeypatch):
    monkeypatch.setattr(kernels, "_BLOCK", 2**14)
    rng = np.random.default_rng(6)
    a, b = rng.standard_normal((1000, 2)), rng.standard_normal((1000, 2))
    tracemalloc.start()
    try:
        metrics.mmd(a, b, metrics.rbf(1.0))
        metrics.energy_distance(a, b)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1e6  # the pairs alone would be 8e6 bytes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.rbf(0.0), "bandwidth must be positive and finite, got 0.0"),
        (lambda: metrics.rbf(float("nan")), "got nan"),
        (lambda: metrics.polynomial(degree=0), "degree must be at least 1, got 0"),
        (lambda: metrics.mmd(np.zeros((1, 2)), np.zeros((3, 2))), "at least 2 points .* 1 and 3"),
        (lambda: metrics.mmd(np.zeros((3, 2)), np.zeros((3, 2))), "bandwidth .* got 0.0"),
        (lambda: metrics.mmd(np.zeros((3, 2)), np.zeros((3, 1))), r"\(3, 2\) and \(3, 1\)"),
        (lambda: metrics.energy_distance([0.0, np.nan], [1.0]), "1 of 2 points .* number 1"),
        (lambda: metrics.energy_distance(1.0, 2.0), r"at least one value, got \(\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
