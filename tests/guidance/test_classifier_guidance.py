"""Classifier guidance against Bayes' rule on a mixture, exactly, and with a classifier that learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from compilations import counted

import jaxdiff as jd
from jaxdiff import guidance
from jaxdiff.predictions import PREDICTIONS

PROCESS = jd.processes.vp_cosine()
LABELS = np.array([0, 1, 0])  # of the components of oracles.BROAD
X = np.random.default_rng(0).normal(size=(5, 2))
Y = np.array([0, 1, 1, 0, 1])
LEVEL = 0.4, 0.8, 0.6


def mixture(prediction="x0", keep=None):
    o = oracles.BROAD
    keep = np.arange(3) if keep is None else keep
    parts = o.means[keep], o.std[keep], o.weights[keep]
    return jd.gaussian_mixture(*parts, PROCESS, prediction, dtype=jnp.float64)


def guided(prediction="x0", label=Y, scale=1.0, **options):
    net = mixture(prediction)
    return guidance.classifier_guidance(
        net, *guidance.mixture_classifier(net.params, LABELS), label, scale, **options
    )


def test_the_exact_classifier_makes_the_exact_conditional(x64):
    """Scale 1: the denoiser of the label's components alone; 0: the denoiser itself."""
    assert guided().prediction == "x0" and guided("v").prediction == "v" and guided().cost == 1

    @jax.jit
    def every(x):
        pairs = []
        for prediction in PREDICTIONS:
            parts = [mixture(prediction, np.flatnonzero(LABELS == y))(x, *LEVEL) for y in (0, 1)]
            want = jnp.where(Y[:, None] == 0, *parts), mixture(prediction)(x, *LEVEL)
            got = guided(prediction)(x, *LEVEL), guided(prediction, scale=0.0)(x, *LEVEL)
            pairs.append((got, want))
        return pairs

    for got, want in every(X):
        np.testing.assert_allclose(got[0], want[0], rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(got[1], want[1], rtol=1e-12, atol=1e-12)


def test_scale_and_temperature_are_those_of_the_formula(x64):
    """eps - s sigma grad log softmax(logits / T), by finite differences in NumPy."""
    o, (_, alpha, sigma) = oracles.BROAD, LEVEL

    def log_p(x):
        joint = o._parts(x, alpha, sigma)[2]
        logits = np.stack([np.logaddexp(joint[:, 0], joint[:, 2]), joint[:, 1]], 1) / 1.7
        return (logits - np.logaddexp(*logits.T)[:, None])[np.arange(5), Y]

    h = 1e-6
    shift = h * np.eye(2)
    gradient = np.stack([(log_p(X + d) - log_p(X - d)) / (2 * h) for d in shift], 1)
    scale = np.array([2.0, 0.5, -1.0, 3.0, 1.0])
    net = guided("eps", scale=jnp.asarray(scale), temperature=1.7)
    got = jax.jit(lambda x: net(x, *LEVEL))(X)
    want = o.eps(X, alpha, sigma) - scale[:, None] * sigma * gradient
    np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-8)


def test_nothing_guides_from_pure_noise(x64):
    """At alpha = 0 a v network is left alone, instead of 0 / 0."""
    level = 1.0, 0.0, 1.0
    np.testing.assert_array_equal(guided("v")(X, *level), mixture("v")(X, *level))


def test_labels_and_scales_are_data():
    net = jd.gaussian_mixture(oracles.BROAD.means, 0.6 * np.ones(3), np.ones(3), PROCESS)
    fn, params = guidance.mixture_classifier(net.params, LABELS)
    tableau = jd.solvers.ddim(jd.grids.half_log_snr(PROCESS, 4))
    x = jnp.asarray(X, jnp.float32)

    def run(label, scale):
        return jd.sample(guidance.classifier_guidance(net, fn, params, label, scale), tableau, x)

    first = run(0, 1.0)
    with counted() as compiled:
        second = run(1, 2.5)
    assert compiled == [] and float(jnp.abs(first - second).max()) > 0.1
    both = jax.vmap(run)(jnp.array([0, 1]), jnp.array([1.0, 2.5]))
    np.testing.assert_allclose(both, np.stack([first, second]), rtol=1e-4, atol=1e-5)


def logits(params, x, levels):
    """Quadratic in x, with weights that depend on the level: what a mixture of two needs."""
    _, alpha, sigma = levels
    level = jnp.broadcast_to(alpha**2, x.shape[:1])[:, None]
    features = jnp.concatenate([x, x**2, x[:, :1] * x[:, 1:]], 1)
    features = jnp.concatenate([features, level * features, level, jnp.ones_like(level)], 1)
    return jnp.tanh(features @ params["in"]) @ params["out"]


def loss(params, x0, label, key):
    pick, when, noise = jax.random.split(key, 3)
    rows = jax.random.randint(pick, (128,), 0, len(x0))
    t = jd.losses.sample_times("uniform", when, 128, PROCESS)
    eps = jax.random.normal(noise, (128, 2))
    each = guidance.noisy_cross_entropy(logits, params, PROCESS, x0[rows], label[rows], t, eps)
    return jnp.mean(each)


def test_a_classifier_of_noisy_data_is_learned():
    """Trained by noisy_cross_entropy it guides 9 samples of 10 to a class that had 45%."""
    o = oracles.Mixture(oracles.BROAD.means * 1.5, np.full(3, 0.3), oracles.BROAD.weights)
    net = jd.gaussian_mixture(o.means, o.std, o.weights, PROCESS)
    exact, exact_params = guidance.mixture_classifier(net.params, LABELS)
    x0, component = net.params.sample(jax.random.key(0), (2000,))
    keys = jax.random.split(jax.random.key(1))
    start = {
        "in": 0.5 * jax.random.normal(keys[0], (12, 32)),
        "out": 0.1 * jax.random.normal(keys[1], (32, 2)),
    }
    args = (x0, jnp.asarray(LABELS)[component])
    found = jd.gradients.optimize(
        loss, start, optax.adam(1e-2), 300, args=args, key=jax.random.key(2)
    )
    x_T = jax.random.normal(jax.random.key(3), (400, 2))
    tableau = jd.solvers.ddim(jd.grids.half_log_snr(PROCESS, 20, t_max=0.99))

    def share(*classifier):
        y = jd.sample(guidance.classifier_guidance(net, *classifier, 1), tableau, x_T)
        nearest = jnp.argmin(jnp.sum((y[:, None] - o.means) ** 2, -1), 1)
        return float(jnp.mean(LABELS[np.asarray(nearest)] == 1))

    plain = jd.sample(net, tableau, x_T)
    nearest = jnp.argmin(jnp.sum((plain[:, None] - o.means) ** 2, -1), 1)
    assert abs(np.mean(LABELS[np.asarray(nearest)] == 1) - 0.45) < 0.08
    right = share(exact, exact_params)
    assert right > 0.98 and share(logits, found.value) > 0.85


def test_bad_input_is_named(x64):
    net = mixture()
    with pytest.raises(TypeError, match="labels must be integers, got dtype float"):
        guided(label=1.0)
    with pytest.raises(ValueError, match="labels must be from 0 to 1, got 2"):
        guided(label=np.array([0, 2]))
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0.0"):
        guided(temperature=0.0)
    with pytest.raises(TypeError, match="classifier_guidance takes a jaxdiff.Denoiser"):
        guidance.classifier_guidance(lambda x, t: x, logits, None, 0)
    with pytest.raises(ValueError, match="a label for each of 3 components"):
        guidance.mixture_classifier(net.params, [0, 2, 0])
    with pytest.raises(ValueError, match="a label for each of 5 samples"):
        guidance.noisy_cross_entropy(logits, None, PROCESS, jnp.asarray(X), 0, 0.5, jnp.asarray(X))
    table = jd.solvers.ddim(jd.grids.uniform(PROCESS, 2, t_max=0.9))
    with pytest.raises(RuntimeError, match="labels must be from 0 to 1"):
        jd.sample(guidance.classifier_guidance(net, logits_of_two, None, 3), table, jnp.asarray(X))
    with pytest.raises(ValueError, match=r"labels must be a number or \[batch\] = \(5,\)"):
        jd.sample(guided(label=np.array([0, 1])), table, jnp.asarray(X))


def logits_of_two(params, x, levels):
    return x
