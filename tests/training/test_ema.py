import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy.integrate import quad

from jaxdiff.training import ema


def profile(gamma, last):
    """The density of the paper's equation, as it is written there."""
    return lambda t: (gamma + 1) * t**gamma / last ** (gamma + 1) if t <= last else 0.0


def weights(sigma_rel, last):
    """What each of `last` steps weighs, by quadrature."""
    density = profile(ema.exponent(sigma_rel), last)
    return np.array([quad(density, i - 1, i)[0] for i in range(1, last + 1)])


@pytest.mark.parametrize("gamma", [0.0, 0.5, 6.94, 40.0])
def test_a_length_is_the_standard_deviation_of_its_profile(gamma):
    density = profile(gamma, 1.0)
    mean = quad(lambda t: t * density(t), 0, 1)[0]
    variance = quad(lambda t: (t - mean) ** 2 * density(t), 0, 1)[0]
    np.testing.assert_allclose(ema.relative_std(gamma), variance**0.5, rtol=1e-10)


def test_the_exponent_is_the_root_to_rounding():
    lengths = np.geomspace(1e-3, ema.LONGEST, 40)
    found = [float(ema.relative_std(ema.exponent(s))) for s in lengths]
    np.testing.assert_allclose(found, lengths, rtol=1e-14)
    # The paper's two, and the plain mean.
    np.testing.assert_allclose([ema.exponent(0.05), ema.exponent(0.10)], [16.97, 6.94], atol=5e-3)
    assert ema.exponent(ema.LONGEST) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.3, float("nan")])
def test_a_length_that_no_profile_has_is_named(sigma_rel):
    with pytest.raises(ValueError, match=f"0.288675.*got {sigma_rel}"):
        ema.exponent(sigma_rel)


def test_the_recurrence_weighs_each_step_by_its_integral_of_the_profile():
    lengths, last = (0.05, 0.1, 0.25), 40
    path = np.random.default_rng(0).standard_normal((last, 3)).astype(np.float32)

    @jax.jit
    def run(path):
        def body(tracks, item):
            step, params = item
            return ema.update(tracks, params, step, lengths), None

        first = ema.start(path[0] + 7.0, lengths)
        return jax.lax.scan(body, first, (jnp.arange(1, last + 1), path))[0]

    for track, length in zip(run(path), lengths, strict=True):
        expected = weights(length, last)
        assert expected.sum() == pytest.approx(1.0, abs=1e-9)
        np.testing.assert_allclose(track, expected @ path, rtol=1e-5, atol=1e-6)


def test_a_late_step_is_not_lost_in_float32():
    (found,) = ema.update((jnp.zeros(()),), jnp.ones(()), 1_000_000, (0.05,))
    expected = 1.0 - np.longdouble(1 - np.longdouble(1e-6)) ** (ema.exponent(0.05) + 1)
    np.testing.assert_allclose(found, float(expected), rtol=1e-6)  # 1.8e-5: 1 - float32 is 3% off


def test_inner_products_are_the_integrals():
    for (a, gamma_a), (b, gamma_b) in [
        ((1.0, 3.0), (1.0, 5.0)), ((0.3, 6.9), (1.0, 17.0)), ((2.0, 0.0), (0.7, 2.5)),
    ]:  # fmt: skip
        p, q = profile(gamma_a, a), profile(gamma_b, b)
        expected = quad(lambda t, p=p, q=q: p(t) * q(t), 0, min(a, b))[0]
        np.testing.assert_allclose(ema.inner_product(a, gamma_a, b, gamma_b), expected, rtol=1e-8)


def stored(every, last, lengths=(0.05, 0.1)):
    pairs = [(step, length) for step in range(every, last + 1, every) for length in lengths]
    return [step for step, _ in pairs], [length for _, length in pairs]


def test_the_fit_is_the_least_squares_over_a_fine_grid_of_time():
    steps, lengths = stored(64, 256)
    t = (np.arange(40_000) + 0.5) / 40_000 * 256

    def sampled(step, length):
        gamma = ema.exponent(length)
        return np.where(t <= step, (gamma + 1) * (t / step) ** gamma / step, 0.0)

    basis = np.stack([sampled(*pair) for pair in zip(steps, lengths, strict=True)], axis=1)
    target = sampled(256, 0.15)
    expected = np.linalg.lstsq(basis, target, rcond=None)[0]
    found = ema.fit(steps, lengths, 256, 0.15)
    np.testing.assert_allclose(found.coefficients, expected / expected.sum(), atol=2e-3)
    miss = np.linalg.norm(basis @ found.coefficients - target) / np.linalg.norm(target)
    np.testing.assert_allclose(found.error, miss, rtol=1e-2)


def test_a_stored_profile_is_itself():
    steps, lengths = stored(64, 512)
    for i in (0, 5, 15):
        found = ema.fit(steps, lengths, steps[i], lengths[i])
        np.testing.assert_allclose(found.coefficients, np.eye(len(steps))[i], atol=1e-6)
        assert found.error < 1e-6


@pytest.mark.parametrize(("sigma_rel", "at"), [(0.03, 512), (0.08, 512), (0.2, 512), (0.08, 256)])
def test_any_profile_comes_out_better_with_more_snapshots(sigma_rel, at):
    """Averages of a random walk of 512 steps, against the weighted mean of all its points."""
    last = 512
    path = np.cumsum(np.random.default_rng(1).standard_normal((last, 64)), axis=0) / last**0.5

    def average(step, length):
        gamma = ema.exponent(length)
        edges = (np.arange(step + 1) / step) ** (gamma + 1)
        return np.diff(edges) @ path[:step]

    expected = average(at, sigma_rel)
    errors, bounds = [], []
    for every in (128, 64, 32, 16):
        steps, lengths = stored(every, last)
        found = ema.fit(steps, lengths, at, sigma_rel)
        parts = np.stack([average(*pair) for pair in zip(steps, lengths, strict=True)])
        errors.append(np.abs(found.coefficients @ parts - expected).max())
        bounds.append(found.error)
    assert bounds == sorted(bounds, reverse=True) and bounds[-1] < 0.2 * bounds[0]
    assert errors[-1] < 0.2 * errors[0]


def test_trees_are_combined_leaf_by_leaf():
    trees = [{"a": jnp.full((2,), float(i)), "b": jnp.float32(10 * i)} for i in (1, 2, 3)]
    found = ema.combine([2.0, -1.5, 0.5], iter(trees))
    np.testing.assert_allclose(found["a"], [0.5, 0.5])
    np.testing.assert_allclose(found["b"], 5.0)


def test_warmups_of_the_classical_average():
    steps = np.array([0, 1, 10, 1000, 10_000])
    found = ema.decay(steps, 0.999)
    np.testing.assert_allclose(found, np.minimum(0.999, (1 + steps) / (10 + steps)), rtol=1e-6)
    # EDM's words: the half-life in images, at most the fraction of the images seen.
    batch, half_life = 512, 512 * np.log(0.5) / np.log(0.999)
    beta = [0.5 ** (batch / max(min(half_life, n * batch * 0.05), 1e-8)) for n in steps.tolist()]
    np.testing.assert_allclose(ema.decay(steps, 0.999, "half_life", 0.05), beta, rtol=1e-6)
    np.testing.assert_allclose(ema.decay(steps, 0.999, "none"), 0.999, rtol=1e-7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ema_warmup": "fast"}, "ema_warmup must be one of .*'half_life'.*'fast'"),
        ({"ema_lengths": (0.1, 0.1)}, "twice"),
        ({"ema_snapshots_every": 5}, "needs config.train.ema_lengths"),
    ],
)
def test_settings_that_do_not_fit_are_named(change, words):
    settings = {"ema_warmup": "count", "ema_lengths": (), "ema_snapshots_every": 0}
    with pytest.raises(ValueError, match=words):
        ema.check(ConfigDict(settings | change))


def test_a_fit_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="as many steps as lengths"):
        ema.fit([], [], 5, 0.1)
    with pytest.raises(ValueError, match="at least 1"):
        ema.fit([0], [0.1], 5, 0.1)
