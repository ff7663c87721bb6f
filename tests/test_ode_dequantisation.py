"""Levels, dequantisation and bits a dimension, against probabilities from distribution functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import logsumexp
from scipy.stats import norm

import jaxdiff as jd
from jaxdiff import ode

MEANS, STD, WEIGHTS = np.array([-0.5, 0.6]), np.array([0.12, 0.3]), np.array([0.4, 0.6])


def log_density(x):
    """log p of a mixture in one dimension, x [...]."""
    parts = norm.logpdf(np.asarray(x, float)[..., None], MEANS, STD) + np.log(WEIGHTS)
    return logsumexp(parts, axis=-1)


def traced_log_density(_, x):
    parts = jax.scipy.stats.norm.logpdf(x, MEANS, STD) + np.log(WEIGHTS)
    return jax.nn.logsumexp(parts, axis=-1)


def truth(k, levels, scaling):
    """log of the integral of p over the bin."""
    centre, half = ode.from_levels(k, levels, scaling), 0.5 * ode.bin_width(levels, scaling)
    mass = [
        WEIGHTS @ (norm.cdf(c + half, MEANS, STD) - norm.cdf(c - half, MEANS, STD)) for c in centre
    ]
    return np.log(mass)


def expected_bound(k, levels, scaling):
    """The uniform bound, by quadrature."""
    width = ode.bin_width(levels, scaling)
    centre = ode.from_levels(k, levels, scaling)
    inside = [
        quad(log_density, c - width / 2, c + width / 2, epsabs=1e-12)[0] / width for c in centre
    ]
    return np.array(inside) + np.log(width)


# --- levels ---------------------------------------------------------------------------------------


def test_levels_of_both_scalings():
    np.testing.assert_allclose(ode.from_levels(np.arange(5), 5), [-1, -0.5, 0, 0.5, 1])
    np.testing.assert_allclose(
        ode.from_levels(np.arange(4), 4, "edges"), [-0.75, -0.25, 0.25, 0.75]
    )
    for scaling in ("centres", "edges"):
        for kind in (np.asarray, jnp.asarray):
            k = kind(np.arange(256).reshape(2, 128))
            np.testing.assert_array_equal(
                ode.to_levels(ode.from_levels(k, 256, scaling), 256, scaling), k
            )
    digits = jd.data.digits("test")
    k = ode.to_levels(digits.x, 17)
    assert (k.min(), k.max()) == (0, 16)
    np.testing.assert_allclose(ode.from_levels(k, 17), digits.x)


def test_uniform_dequantisation_fills_the_bins(x64):
    k = np.tile(np.arange(4), (2000, 1))
    for scaling, low, high in (("edges", -1, 1), ("centres", -4 / 3, 4 / 3)):
        x = np.asarray(ode.uniform_dequantisation(jax.random.key(0), k, 4, scaling))
        u = (x - low) / (high - low)
        np.testing.assert_array_equal(np.floor(u * 4), k)
        # Levels are equally likely here, so x is uniform over the whole.
        assert np.abs(np.histogram(u, 20, (0, 1))[0] / u.size - 0.05).max() < 0.01
    keys = jd.sample_keys(jax.random.key(0), np.arange(2000))
    np.testing.assert_array_equal(ode.uniform_dequantisation(keys, k, 4), x)


def test_bits_of_a_uniform_density():
    """-log2(levels) is lost by nothing but the scaling: 8 bits for noise of 256 levels."""
    dims = 12
    for scaling in ("centres", "edges"):
        length = 256 * ode.bin_width(256, scaling)
        np.testing.assert_allclose(
            ode.bits_per_dim(-dims * np.log(length), dims, 256, scaling), 8.0, rtol=1e-12
        )
    # score_sde's constant for data in [-1, 1]: 7 bits on top of the density's.
    np.testing.assert_allclose(ode.bits_per_dim(0.0, 3, 256, "edges"), 7.0, rtol=1e-12)
    np.testing.assert_allclose(ode.bits_per_dim(np.log(0.25), 2), 1.0, rtol=1e-12)


# --- bounds ---------------------------------------------------------------------------------------


def test_the_uniform_bound_is_below_the_truth_and_tightens(x64):
    gaps, count = [], 60_000
    for levels in (9, 17, 33):
        k = np.arange(levels)
        exact, bound = (f(k, levels, "edges") for f in (truth, expected_bound))
        x = np.arange(count) % levels  # one shape, one program
        found = np.asarray(
            ode.discrete_log_prob(
                traced_log_density, jax.random.key(1), x[:, None], levels, scaling="edges"
            )
        )
        mean, square = (np.bincount(x, a) / np.bincount(x) for a in (found, found**2))
        error = np.sqrt((square - mean**2) / np.bincount(x))
        assert np.all(np.abs(mean - bound) < 4 * error + 1e-6)
        assert np.all(bound < exact)
        gaps.append(np.exp(exact) @ (exact - bound))
    # Bins of half the width: a quarter of the gap.
    assert 0.2 < gaps[1] / gaps[0] < 0.32 and 0.2 < gaps[2] / gaps[1] < 0.32


def test_several_draws_estimate_the_probability_itself(x64):
    levels, copies = 9, 8000
    k = np.repeat(np.arange(levels)[:, None], copies, 0)
    found = ode.discrete_log_prob(
        traced_log_density, jax.random.key(2), k, levels, scaling="edges", samples=4
    )
    found = np.asarray(found).reshape(levels, -1)
    exact, bound = (f(np.arange(levels), levels, "edges") for f in (truth, expected_bound))
    share = np.exp(found - exact[:, None])
    assert np.all(np.abs(share.mean(1) - 1) < 4 * share.std(1) / np.sqrt(copies) + 1e-9)
    # The gap of one draw shrinks to about a quarter.
    assert np.all(exact - found.mean(1) < 0.45 * (exact - bound))


def test_a_trained_q_is_tighter_than_a_uniform_one(x64):
    levels = 5
    k = np.arange(levels)
    exact, uniform = (f(k, levels, "centres") for f in (truth, expected_bound))
    copies = np.repeat(k[:, None], 64, 0)

    def bound(q, key, x):
        return ode.discrete_log_prob(traced_log_density, key, x, levels, q=q)

    @jax.jit
    def ascend(q, key):
        slope = jax.grad(lambda q: jnp.sum(bound(q, key, copies)))(q)
        return jax.tree.map(lambda a, g: a + 0.3 / 64 * g, q, slope)

    q = ode.sigmoid_normal(np.zeros(levels), np.full(levels, 0.5))
    for key in jax.random.split(jax.random.key(3), 100):
        q = ascend(q, key)
    found = np.asarray(bound(q, jax.random.key(4), np.repeat(k[:, None], 4000, 0))).reshape(
        levels, -1
    )
    error = found.std(1) / np.sqrt(4000)
    assert np.all(found.mean(1) < exact + 3.5 * error)
    gap, gap_uniform = (np.exp(exact) @ (exact - b) for b in (found.mean(1), uniform))
    assert gap < 0.25 * gap_uniform and gap_uniform > 0.1


def test_sigmoid_normal_is_a_density(x64):
    """Its log-density integrates to 1: the mean of 1 / q over its own draws is the cube's volume."""
    q = ode.sigmoid_normal(np.array([-0.3, 0.4]), np.array([0.3, 0.6]))
    u, log_q = jax.jit(q)(jax.random.key(5), jnp.tile(jnp.arange(2), (40000, 1)))
    weight = np.exp(-np.asarray(log_q))
    assert abs(weight.mean() - 1) < 4 * weight.std() / np.sqrt(len(weight))
    assert np.all((u > 0) & (u < 1))
    # The median of each number is the sigmoid of its location.
    np.testing.assert_allclose(np.median(u, 0), 1 / (1 + np.exp([0.3, -0.4])), atol=0.01)


def test_the_flow_s_likelihood_gives_the_probability_of_a_level(x64):
    """Everything together: E p(x(k, u)) w is P(k), by a distribution function."""
    process = jd.processes.edm(0.001, 20.0)
    denoiser = jd.gaussian_mixture(MEANS[:, None], STD, WEIGHTS, prediction="x0")
    end = (1.0, 20.0)

    def density(key, x):
        return ode.log_likelihood(
            denoiser, process, x, trace=ode.hutchinson(1), key=key,
            prior=lambda x_T: denoiser.params.log_density(x_T, *end),
        ).log_prob  # fmt: skip

    k = np.repeat(np.arange(5)[:, None], 400, 0)
    share = np.exp(np.asarray(ode.discrete_log_prob(density, jax.random.key(6), k, 5)))
    share = share.reshape(5, -1)
    error = share.std(1) / 20
    assert np.all(np.abs(share.mean(1) - np.exp(truth(np.arange(5), 5, "centres"))) < 4 * error)


# --- the decoder ----------------------------------------------------------------------------------


def test_discretised_normal_is_scipy_s_also_in_the_tails(x64):
    levels, mean, std = 17, 0.3, 0.05
    k = np.arange(levels)
    decode = jax.jit(lambda mean: ode.discretised_normal(k[:, None], mean, std, levels))
    found = decode(jnp.full((levels, 1), mean))
    centre, half = ode.from_levels(k, levels), 1 / 16
    low, high = np.where(k == 0, -np.inf, centre - half), np.where(k == 16, np.inf, centre + half)
    side = np.where(centre > mean, -1, 1)  # log cdf keeps its digits below the mean
    a, b = (norm.logcdf(side * (edge - mean) / std) for edge in (low, high))
    exact = np.maximum(a, b) + np.log1p(-np.exp(-np.abs(a - b)))
    np.testing.assert_allclose(found, exact, rtol=1e-9)
    assert found.min() < -200  # beyond the published code's floor
    assert logsumexp(found) == pytest.approx(0, abs=1e-12)


def test_discretised_normal_has_gradients_at_the_end_levels():
    @jax.jit
    def loss(mean):
        return jnp.sum(ode.discretised_normal(np.array([[0], [255]]), mean, 0.01, 256))

    slope = jax.grad(loss)(jnp.zeros((2, 1)))
    assert slope[0, 0] < -1000 and slope[1, 0] > 1000


# --- errors ---------------------------------------------------------------------------------------

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: ode.uniform_dequantisation(KEY, np.zeros((2, 3)), 256),
            TypeError,
            "integer levels 0 .. 255, got float64: jaxdiff.ode.to_levels",
        ),
        (
            lambda: ode.uniform_dequantisation(KEY, np.array([[0, 256]]), 256),
            ValueError,
            "0 .. 255, got 0 to 256",
        ),
        (
            lambda: ode.variational_dequantisation(
                KEY, np.array([[0, -1]]), 256, ode.sigmoid_normal()
            ),
            ValueError,
            "got -1 to 0",
        ),
        (
            lambda: ode.variational_dequantisation(
                KEY, np.array([[0, 1]]), 4, lambda key, x: (jnp.zeros((1, 1)), jnp.zeros(1))
            ),
            ValueError,
            r"u of shape \(1, 2\) and log_q of shape \(1,\), got \(1, 1\)",
        ),
        (lambda: ode.to_levels(np.array([0.3]), 5), ValueError, "not 5 levels"),
        (lambda: ode.to_levels(np.array([1.5]), 5), ValueError, "not 5 levels.*1.5"),
        (lambda: ode.bits_per_dim(0.0, 3, 1), ValueError, "levels must be an integer from 2"),
        (lambda: ode.bin_width(256, "center"), ValueError, "scaling must be one of"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
