"""The diffusion classifier against Bayes' rule, on digits, and on scenes of two digits."""

import conditional
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conditional import conditional_mixture, log_densities
from scipy.optimize import minimize
from trained import digits

import jaxdiff as jd
from jaxdiff import diagnostics
from jaxdiff.denoisers import level

PROCESS = jd.processes.vp_cosine()
CLASSES, EACH, DIM = 4, 3, 8
KEY = jax.random.key(2)


@pytest.fixture(scope="module")
def mixture():
    means = 0.9 * np.random.default_rng(0).normal(size=(CLASSES * EACH, DIM))
    subsets = np.kron(np.eye(CLASSES), np.ones(EACH)).astype(bool)
    return conditional_mixture(means, np.full(len(means), 0.5), subsets)


@pytest.fixture(scope="module")
def examples(mixture):
    return mixture.params[0].sample(jax.random.key(1), (200,))[0]


@pytest.fixture(scope="module")
def exact(mixture, examples):
    """log p(class | x)."""
    log_p = log_densities(mixture, examples)
    return log_p - np.logaddexp.reduce(log_p, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def errors(mixture, examples):
    """{(times, paired): errors}."""
    return {
        (count, paired): np.asarray(diagnostics.class_errors(
            mixture, PROCESS, examples, np.arange(CLASSES),
            diagnostics.even_times(PROCESS, count), KEY, paired=paired,
        ))
        for count, paired in ((16, True), (64, True), (64, False))
    }  # fmt: skip


def agreement(errors, weighting, exact):
    t = diagnostics.even_times(PROCESS, errors.shape[2])
    weights = diagnostics.time_weights(PROCESS, t, weighting)
    found = diagnostics.log_posterior(errors, weights)
    return np.mean(found.argmax(1) == exact.argmax(1)), found


def test_expected_errors_of_a_gaussian_in_closed_form():
    """E = (sigma alpha |x - m| / V)^2 + d (alpha^2 s^2 / V)^2, V = alpha^2 s^2 + sigma^2."""
    means, s = np.array([[0.5, -0.2], [-0.3, 0.8]]), 0.7
    denoiser = conditional_mixture(means, [s, s], np.eye(2, dtype=bool))
    t, x = 0.4, np.array([[0.3, 0.1]], np.float32)
    alpha, sigma = PROCESS.alpha(t), PROCESS.sigma(t)
    found = diagnostics.class_errors(
        denoiser, PROCESS, x, np.arange(2), np.full(4000, t), KEY, batch_size=8000
    )
    total = alpha**2 * s**2 + sigma**2
    away = np.sum((x - means) ** 2, 1)
    want = (sigma * alpha / total) ** 2 * away + 2 * (alpha**2 * s**2 / total) ** 2
    spread = np.std(found[0], 1) / np.sqrt(4000)
    assert np.all(np.abs(np.mean(found[0], 1) - want) < 4 * spread)
    assert np.all(spread < 0.1 * want)


def test_it_is_the_bayes_classifier_of_exact_denoisers(errors, exact):
    """Of 64 shared draws at least 95 percent agree with Bayes; the bound's posterior is Bayes's."""
    assert agreement(errors[64, True], "simple", exact)[0] >= 0.95
    share, found = agreement(errors[64, True], "elbo", exact)
    assert share >= 0.95
    assert np.mean(np.abs(np.exp(found) - np.exp(exact))) < 0.03
    prior = np.log([0.7, 0.1, 0.1, 0.1])
    weights = diagnostics.time_weights(PROCESS, diagnostics.even_times(PROCESS, 64), "elbo")
    tilted = diagnostics.log_posterior(errors[64, True], weights, prior)
    want = exact + prior
    want -= np.logaddexp.reduce(want, axis=1, keepdims=True)
    assert np.mean(np.abs(np.exp(tilted) - np.exp(want))) < 0.03


@pytest.mark.parametrize("weighting", ["simple", "elbo"])
def test_shared_noise_needs_a_quarter_of_the_evaluations(errors, exact, weighting):
    """16 draws that all classes share do as well as 64 of each class's own (to 2 of 100)."""
    shared = agreement(errors[16, True], weighting, exact)[0]
    assert shared >= agreement(errors[64, False], weighting, exact)[0] - 0.02
    assert shared >= 0.9


def test_any_prediction_and_any_batch_size(mixture, examples, errors):
    def v(params, x, levels, cond):
        eps = mixture.fn(params, x, levels, cond)
        return jd.predictions.convert(eps, x, "eps", "v", *levels[1:])

    denoiser = jd.Denoiser(v, "v", mixture.params, level)
    t = diagnostics.even_times(PROCESS, 16)
    keys = jd.sample_keys(KEY, np.arange(200))[37:40]
    found = diagnostics.class_errors(
        denoiser, PROCESS, examples[37:40], np.arange(CLASSES), t, keys, batch_size=20
    )
    np.testing.assert_allclose(found, errors[16, True][37:40], rtol=2e-3, atol=2e-3)


def test_stages_drop_classes_and_count_evaluations(mixture, examples, errors, exact):
    whole = diagnostics.classify(
        mixture, PROCESS, examples, np.arange(CLASSES), KEY, stages=[(16, 1)]
    )
    assert whole.evaluations == 16 * CLASSES
    np.testing.assert_array_equal(whole.index, errors[16, True].sum(2).argmin(1))
    np.testing.assert_allclose(whole.energies, errors[16, True].mean(2), rtol=1e-5)
    # 4 times of 4 classes, 12 more of 2.
    staged = diagnostics.classify(
        mixture, PROCESS, examples, np.arange(CLASSES), KEY, stages=[(4, 2), (16, 1)]
    )
    assert staged.evaluations == 4 * CLASSES + 12 * 2
    first = errors[16, True][:, :, 2::4].sum(2)
    kept = np.argsort(first, axis=1)[:, :2]
    np.testing.assert_array_equal(np.sort(np.argsort(staged.energies, 1)[:, :2]), np.sort(kept))
    assert np.all(np.isinf(staged.energies).sum(1) == CLASSES - 2)
    rest = np.take_along_axis(errors[16, True].sum(2), kept, 1).argmin(1)
    want = np.take_along_axis(kept, rest[:, None], 1)[:, 0]
    np.testing.assert_array_equal(staged.index, want)
    assert np.mean(staged.index == exact.argmax(1)) >= 0.9


def test_the_times_of_stages_nest(mixture, examples, errors):
    """4, 8 and 16 times, evenly spaced each: a stage adds to the one before and to nothing else."""
    found = diagnostics.classify(
        mixture, PROCESS, examples, np.arange(CLASSES), KEY, stages=[(4, 3), (8, 2), (16, 1)]
    )
    assert found.evaluations == 4 * CLASSES + 4 * 3 + 8 * 2
    table, alive = errors[16, True], np.ones((len(examples), CLASSES), bool)
    for places, keep in ((slice(1, None, 4), 3), (slice(1, None, 2), 2)):
        energy = np.where(alive, table[:, :, places].sum(2), np.inf)
        alive = energy <= np.sort(energy, axis=1)[:, keep - 1 : keep]
    np.testing.assert_array_equal(np.isfinite(found.energies), alive)
    np.testing.assert_allclose(found.energies[alive], table.mean(2)[alive], rtol=1e-5)


def test_weights_are_those_of_the_losses():
    t = diagnostics.even_times(PROCESS, 50)
    span = PROCESS.t_max - PROCESS.t_min
    np.testing.assert_allclose(t[[0, -1]], [PROCESS.t_min + span / 100, PROCESS.t_max - span / 100])
    np.testing.assert_allclose(diagnostics.time_weights(PROCESS, t), span / 50)
    # The bound integrates over lambda: its weights sum to the span of lambda.
    many = diagnostics.even_times(PROCESS, 5000)
    lam = PROCESS.half_log_snr(np.array([PROCESS.t_min, PROCESS.t_max]))
    np.testing.assert_allclose(
        diagnostics.time_weights(PROCESS, many, "elbo").sum(), lam[0] - lam[1], rtol=1e-2
    )
    snr = np.exp(2 * PROCESS.half_log_snr(t))
    np.testing.assert_allclose(
        diagnostics.time_weights(PROCESS, t, "min_snr", gamma=2.0),
        np.minimum(snr, 2.0) / snr * span / 50, rtol=1e-5,
    )  # fmt: skip
    np.testing.assert_allclose(
        diagnostics.time_weights(PROCESS, t, lambda lam, rate: 2 * lam), snr * span / 50
    )


def test_fitted_weights_are_the_best_of_a_convex_problem():
    """Against SciPy's bounded quasi-Newton, and the right time found among misleading ones."""
    rng = np.random.default_rng(3)
    index = rng.integers(0, 3, 40)
    errors = rng.normal(size=(40, 3, 6)) + 5.0
    errors[np.arange(40), index, 2] -= 1.5
    errors[np.arange(40), index, 4] += 1.0
    found = diagnostics.fit_weights(errors, index, penalty=0.02)
    centred = errors - errors.mean(1, keepdims=True)
    size = np.sqrt(np.mean(centred**2, axis=(0, 1)))

    def objective(v):
        log_p = diagnostics.log_posterior(errors, v / size)
        penalty = 0.02 * np.sum((v - v.mean()) ** 2)
        return -np.mean(log_p[np.arange(40), index]) + penalty

    best = minimize(objective, np.full(6, 0.2), bounds=[(0, None)] * 6, options={"ftol": 1e-14})
    np.testing.assert_allclose(objective(found * size), best.fun, atol=1e-8)
    np.testing.assert_allclose(found * size, best.x, atol=1e-3)
    assert found.argmax() == 2 and found[4] == 0
    alike = diagnostics.fit_weights(errors, index, penalty=1e4) * size
    np.testing.assert_allclose(alike, alike.mean(), atol=1e-3)


def test_digits():
    """Held-out digits: at least 0.93 right, from 4 shared draws already.

    60 images, for speed: benchmarks/results/diagnostics.json has 100 and up to 32 draws. The defaults
    of benchmarks/diagnostics.py, 300 and 64, are in no committed result.
    """
    held = jd.data.digits("test")
    found = diagnostics.classify(
        digits.denoiser("large"), digits.experiment("large").process, held.x[:60], np.arange(10),
        KEY, stages=[(4, 1)], batch_size=200,
    )  # fmt: skip
    assert found.evaluations == 4 * 10
    assert np.mean(found.index == held.label[:60]) >= 0.93


# --- scenes of two digits: which is on the left, and which has which tint -------------------------

ONE, BLUR = 30, 0.2  # training digits a class, and their standard deviation
OWN, FAINT = 60, 240
CONFUSABLE = np.array([(3, 8), (4, 9), (5, 9), (1, 7), (8, 1), (3, 9), (2, 7), (6, 5)])


def scene_eps(params, x, levels, cond):
    """A scene's halves are independent, given their digits."""
    halves = zip(jnp.split(x, 2, axis=1), (cond[:, 0], cond[:, 1]))
    return jnp.concatenate([conditional.eps(params, half, levels, c) for half, c in halves], 1)


@pytest.fixture(scope="module")
def scenes():
    """The exact denoiser of scenes of training digits, blurred a little; cond is (left, right)."""
    train = jd.data.digits("train")
    means = [train.x[train.label == c][:ONE].reshape(ONE, 64) for c in range(10)]
    subsets = np.kron(np.eye(10), np.ones(ONE)).astype(bool)
    single = conditional_mixture(np.concatenate(means), np.full(10 * ONE, BLUR), subsets)
    return jd.Denoiser(scene_eps, "eps", single.params, level)


def made_of(images, labels, pairs, rng):
    """A scene of images with each pair of labels, [n, 128]."""
    chosen = [[rng.choice(np.flatnonzero(labels == c)) for c in pair] for pair in pairs]
    return images.reshape(-1, 64)[np.array(chosen)].reshape(-1, 128)


def orders(denoiser, x, pairs, rng):
    """Errors of both orders of each scene's digits, in an order of their own, and which is right."""
    index = rng.integers(0, 2, len(x))
    both = np.stack([pairs, pairs[:, ::-1]], 1)
    both = np.where(index[:, None, None] == 1, both[:, ::-1], both)
    t = diagnostics.even_times(PROCESS, 8)
    errors = diagnostics.class_errors(denoiser, PROCESS, x, both, t, KEY, each=True)
    return np.asarray(errors), index


def test_scenes_of_its_own_and_of_others(scenes):
    """The model's own scenes are told apart better than faint ones of held-out digits, where weights
    fitted to 50 scenes gain at least 3 points over equal ones."""
    rng = np.random.default_rng(0)
    pairs = CONFUSABLE[rng.integers(0, len(CONFUSABLE), OWN + FAINT)]
    pairs = np.where(rng.integers(0, 2, len(pairs))[:, None] == 1, pairs[:, ::-1], pairs)
    kept = np.asarray(scenes.params[0].means), np.repeat(np.arange(10), ONE)
    own = made_of(*kept, pairs[:OWN], rng) + BLUR * rng.normal(size=(OWN, 128))
    held = jd.data.digits("test")
    faint = -1 + 0.1 * (made_of(held.x, held.label, pairs[OWN:], rng) + 1)
    x = np.concatenate([own, faint]).astype(np.float32)
    errors, index = orders(scenes, x, pairs, rng)

    def right(rows, weights):
        found = diagnostics.log_posterior(errors[rows], weights).argmax(1)
        return np.mean(found == index[rows])

    few, rest = slice(OWN, OWN + 50), slice(OWN + 50, None)
    in_domain, equal = right(slice(OWN), np.ones(8)), right(rest, np.ones(8))
    fitted = right(rest, diagnostics.fit_weights(errors[few], index[few]))
    assert in_domain >= 0.97
    assert equal <= in_domain - 0.05
    assert fitted >= equal + 0.03


def tinted(images, tint):
    """Two channels of digits [n, 64], the second fainter for tint 0, the first for 1."""
    share = np.array([[1.0, 0.8], [0.8, 1.0]])[tint]
    return ((images[:, None] + 1) * share[:, :, None] - 1).reshape(len(images), 128)


def test_tints_are_bound_to_their_digits():
    """Held-out digits, one of each tint: which has which, the two digits and tints being known."""
    train, test = jd.data.digits("train"), jd.data.digits("test")
    few = 8  # of each class, for speed
    kept = [np.flatnonzero(train.label == c)[:few] for c in range(10)]
    digit = train.x.reshape(-1, 64)[np.concatenate(kept)]
    means = np.concatenate([tinted(digit, np.full(len(digit), k)) for k in (0, 1)])
    subsets = np.kron(np.eye(20), np.ones(few)).astype(bool)  # cond is digit + 10 tint
    single = conditional_mixture(means, np.full(len(means), BLUR), subsets)
    denoiser = jd.Denoiser(scene_eps, "eps", single.params, level)
    rng, n = np.random.default_rng(1), 40
    chosen, tint = rng.integers(0, len(test.x), (2, n)), rng.integers(0, 2, n)
    halves = [tinted(test.x[i].reshape(-1, 64), k) for i, k in zip(chosen, (tint, 1 - tint))]
    x = np.concatenate(halves, 1).astype(np.float32)
    left, right = test.label[chosen]
    both = np.stack([[left + 10 * k, right + 10 * (1 - k)] for k in (0, 1)]).transpose(2, 0, 1)
    t = diagnostics.even_times(PROCESS, 4)
    errors = diagnostics.class_errors(denoiser, PROCESS, x, both, t, KEY, each=True)
    assert np.mean(np.asarray(errors).sum(2).argmin(1) == tint) >= 0.95


@pytest.mark.parametrize(("change", "message"), [
    ({"stages": [(40, 2), (64, 1)]}, "must divide the next"),
    ({"weighting": np.where(np.arange(64) == 3, -1.0, 1.0)}, "not negative"),
    ({"weighting": np.zeros(64)}, "are 0 at all 64 times"),
    ({"x0": np.full((3, DIM), np.nan, np.float32)}, "x0 must be finite"),
    ({"stages": [(4, 2), (4, 1)]}, "stages are pairs"),
    ({"stages": [(4, 5), (8, 1)]}, "stages are pairs"),
    ({"stages": [(4, 2)]}, "stages are pairs"),
    ({"stages": []}, "stages are pairs"),
    ({"weighting": "elb"}, "did you mean elbo"),
    ({"weighting": np.ones(3)}, r"weights must be \[64\]"),
    ({"classes": {"a": np.arange(2), "b": np.arange(3)}}, "one length"),
    ({"each": True}, "classes must have"),
    ({"classes": 10}, "classes must have"),
    ({"batch_size": 0}, "batch_size"),
])  # fmt: skip
def test_bad_input(mixture, examples, change, message):
    call = {"x0": examples, "classes": np.arange(CLASSES), "key": KEY}
    with pytest.raises(ValueError, match=message):
        diagnostics.classify(mixture, PROCESS, **(call | change))


def test_more_bad_input(mixture, examples):
    with pytest.raises(ValueError, match="sigma > 0, not at t = 0"):
        diagnostics.class_errors(mixture, PROCESS, examples, np.arange(4), [0.5, 0.0], KEY)
    with pytest.raises(ValueError, match="no denoiser with memory"):
        remembers = jd.Denoiser(mixture.fn, "eps", mixture.params, level, memory=np.zeros(1))
        diagnostics.class_errors(remembers, PROCESS, examples, np.arange(4), [0.5], KEY)
    with pytest.raises(TypeError, match="expected a process"):
        diagnostics.class_errors(mixture, None, examples, np.arange(4), [0.5], KEY)
    with pytest.raises(ValueError, match="indices must be from 0 to 2"):
        diagnostics.fit_weights(np.ones((2, 3, 4)), np.array([0, 3]))
    with pytest.raises(ValueError, match="penalty"):
        diagnostics.fit_weights(np.ones((2, 3, 4)), np.array([0, 1]), penalty=-1.0)
