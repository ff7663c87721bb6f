"""Conversions between predictions, against pairs (x_0, eps) that are known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxdiff import predictions
from jaxdiff.predictions import PREDICTIONS, affine, convert

pytestmark = pytest.mark.filterwarnings("error:.*:RuntimeWarning")

PAIRS = list(itertools.product(PREDICTIONS, repeat=2))
every_pair = pytest.mark.parametrize("source, goal", PAIRS)
# Variance preserving, exploding, flow, and neither; both near their ends.
LEVELS = [(0.6, 0.8), (1.0, 40.0), (1.0, 0.01), (0.3, 0.7), (0.9, 0.2), (1e-4, 1.0), (1.0, 1e-4)]


def known(name, x0, eps, alpha, sigma):
    """Each prediction's definition."""
    return {
        "x0": x0,
        "eps": eps,
        "v": alpha * eps - sigma * x0,  # Salimans & Ho 2022, section 4
        "flow": eps - x0,  # d x_t / dt of the straight path
        "score": -eps / (sigma or np.nan),  # gradient of log N(x_t; alpha x_0, sigma^2)
    }[name]


def test_the_names():
    assert PREDICTIONS == ("x0", "eps", "v", "flow", "score")


@every_pair
@pytest.mark.parametrize("alpha, sigma", LEVELS)
def test_every_pair_is_the_known_one(source, goal, alpha, sigma):
    x0, eps = np.random.default_rng(0).normal(size=(2, 4, 3))
    x = alpha * x0 + sigma * eps
    value, expected = (known(name, x0, eps, alpha, sigma) for name in (source, goal))
    u, w = affine(source, goal, alpha, sigma)
    # What rounding does to a conversion: eps times its two terms.
    scale = np.abs(u * value) + np.abs(w * x)
    assert np.all(np.abs(u * value + w * x - expected) <= 1e-14 * scale)
    got = convert(value, x, source, goal, alpha, sigma)
    np.testing.assert_array_equal(got, value if source == goal else u * value + w * x)


@every_pair
def test_affine_keeps_alphas_shape_and_kind(source, goal):
    alpha, sigma = np.array([[0.6, 0.9]]), np.array([[0.8, 0.1]])
    scalars = affine(source, goal, 0.6, 0.8)
    for coefficient, scalar in zip(affine(source, goal, alpha, sigma), scalars):
        assert coefficient.shape == (1, 2) and coefficient.dtype == np.float64
        assert np.shape(scalar) == () and coefficient[0, 0] == scalar
    device = affine(source, goal, jnp.asarray(alpha), jnp.asarray(sigma))
    for got, expected in zip(device, affine(source, goal, alpha, sigma)):
        assert isinstance(got, jax.Array) and got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=1e-6)


numbers = st.floats(-10, 10, allow_subnormal=False)
# lambda from -6 to 6, and a size: any (alpha, sigma) that is not at an end.
half_log_snrs, sizes = st.floats(-6, 6), st.floats(0.1, 10)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    st.sampled_from(PAIRS), arrays(np.float64, (2, 5), elements=numbers), half_log_snrs, sizes
)
def test_there_and_back_is_the_identity(pair, values, lam, size):
    alpha, sigma = size * np.exp(lam) / np.hypot(1, np.exp(lam)), size / np.hypot(1, np.exp(lam))
    value, x = values
    there = convert(value, x, *pair, alpha, sigma)
    back = convert(there, x, *pair[::-1], alpha, sigma)
    (u, w), (u1, w1) = affine(*pair, alpha, sigma), affine(*pair[::-1], alpha, sigma)
    scale = np.abs(u1) * (np.abs(u * value) + np.abs(w * x)) + np.abs(w1 * x)
    assert np.all(np.abs(back - value) <= 1e-14 * (scale + np.abs(value)))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.tuples(*[st.sampled_from(PREDICTIONS)] * 3),
    arrays(np.float64, (2, 5), elements=numbers), st.floats(-3, 3),
)  # fmt: skip
def test_conversions_compose(chain, values, lam):
    """By way of a third prediction, or directly."""
    alpha, sigma = np.exp(lam) / np.hypot(1, np.exp(lam)), 1 / np.hypot(1, np.exp(lam))
    (value, x), (a, b, c) = values, chain
    by_way = convert(convert(value, x, a, b, alpha, sigma), x, b, c, alpha, sigma)
    direct = convert(value, x, a, c, alpha, sigma)
    np.testing.assert_allclose(by_way, direct, rtol=1e-10, atol=1e-9)


@every_pair
def test_levels_may_belong_to_samples(source, goal):
    """[batch]-shaped alpha and sigma, on a pytree with leaves of different rank."""
    rng = np.random.default_rng(1)
    alpha, sigma = np.array([0.6, 0.9, 0.2]), np.array([0.8, 0.1, 0.7])
    x0 = {"image": rng.normal(size=(3, 4, 4, 2)), "vector": rng.normal(size=(3, 5))}
    eps = {"image": rng.normal(size=(3, 4, 4, 2)), "vector": rng.normal(size=(3, 5))}

    def each(name):
        return {
            k: np.stack([known(name, x0[k][i], eps[k][i], alpha[i], sigma[i]) for i in range(3)])
            for k in x0
        }

    x = {k: np.stack([alpha[i] * x0[k][i] + sigma[i] * eps[k][i] for i in range(3)]) for k in x0}
    got = convert(each(source), x, source, goal, alpha, sigma)
    assert set(got) == {"image", "vector"}
    for leaf, expected in each(goal).items():
        np.testing.assert_allclose(got[leaf], expected, rtol=1e-12, atol=1e-12)
    made = predictions.target(goal, x0, eps, alpha, sigma)
    for leaf, expected in each(goal).items():
        np.testing.assert_allclose(made[leaf], expected, rtol=1e-14)


def test_ends_are_finite_where_the_source_says_enough():
    """At alpha = 0 eps tells nothing of x_0, at sigma = 0 x_0 tells nothing of eps."""
    x0, eps = np.array([0.7, -0.3]), np.array([1.1, 0.4])
    for alpha, sigma, silent, lost in (
        (0.0, 1.0, {"eps", "score"}, {"x0", "v", "flow"}),
        (1.0, 0.0, {"x0"}, {"eps", "v", "flow", "score"}),
    ):
        x = alpha * x0 + sigma * eps
        for source, goal in PAIRS:
            u, w = affine(source, goal, alpha, sigma)
            finite = np.isfinite(u) and np.isfinite(w)
            if source == goal:
                assert (u, w) == (1.0, 0.0)
            elif source in silent and goal in lost:
                assert not finite, (source, goal)
            elif goal == "score" and sigma == 0:
                assert not finite  # a finite eps is an infinite score
            else:
                assert finite, (source, goal)
                if source != "score" or sigma > 0:
                    value = known(source, x0, eps, alpha, sigma)
                    expected = known(goal, x0, eps, alpha, sigma)
                    np.testing.assert_allclose(u * value + w * x, expected, rtol=1e-15)
    # At sigma = 0 a finite score leaves x_0 = x / alpha and no eps (Tweedie's formula).
    assert affine("score", "x0", 0.5, 0.0) == (0.0, 2.0)
    assert affine("score", "eps", 0.5, 0.0) == (0.0, 0.0)


def test_score_to_x0_is_tweedies_formula():
    """E[x_0 | x] = (x + sigma^2 score) / alpha; for N(m, s^2) data the score is known."""
    alpha, sigma, mean, std = 0.4, 0.7, 1.5, 0.3
    x = np.linspace(-3, 3, 7)
    variance = alpha**2 * std**2 + sigma**2
    score = -(x - alpha * mean) / variance
    posterior = mean + alpha * std**2 / variance * (x - alpha * mean)
    got = convert(score, x, "score", "x0", alpha, sigma)
    np.testing.assert_allclose(got, posterior, rtol=1e-14)


def test_float32_states_stay_float32():
    """Coefficients are cast to the state: float64 levels of the host do not widen it."""
    x = jnp.ones((2, 3), jnp.float32)
    for source, goal in PAIRS:
        out = convert(x, x, source, goal, np.float64(0.6), np.float64(0.8))
        assert out.dtype == jnp.float32
    levels = np.array([0.6, 0.1]), np.array([0.8, 1.0])
    assert convert(x.astype(jnp.bfloat16), x, "eps", "x0", *levels).dtype == jnp.float32


def test_gradients_pass_through_the_levels(x64):
    """d/d sigma of x_0 = (x - sigma eps) / alpha."""
    x, eps = jnp.asarray([[0.3], [0.5]]), jnp.asarray([[1.0], [2.0]])

    def total(sigma):
        return convert(eps, x, "eps", "x0", jnp.asarray([0.5, 0.25]), sigma).sum()

    np.testing.assert_allclose(jax.grad(total)(jnp.asarray([0.1, 0.2])), [-2.0, -8.0], rtol=1e-15)


@pytest.mark.parametrize(
    "call",
    [
        lambda: affine("epsilon", "x0", 0.6, 0.8),
        lambda: affine("x0", "epsilon", 0.6, 0.8),
        lambda: convert(np.ones(2), np.ones(2), "epsilon", "epsilon", 0.6, 0.8),
        lambda: convert(np.ones(2), np.ones(2), "x0", "epsilon", 0.6, 0.8),
        lambda: predictions.target("epsilon", np.ones(2), np.ones(2), 0.6, 0.8),
        lambda: predictions.check_prediction("epsilon"),
    ],
)
def test_an_unknown_name_is_an_error(call):
    with pytest.raises(ValueError, match="unknown prediction 'epsilon'; choose from .*'score'"):
        call()
