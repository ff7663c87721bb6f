"""InvDiff: groups that differ the most, a module that makes them alike, and colours without bias."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.metrics import roc_auc_score

import jaxdiff as jd
from jaxdiff import guidance
from jaxdiff.denoisers import level
from jaxdiff.predictions import PREDICTIONS

PROCESS = jd.processes.vp_cosine()
RNG = np.random.default_rng(0)


def test_groups_are_those_of_the_published_loop(x64):
    """Adam on -std(L_g) - 3 min(l w), and the projection, in NumPy with finite differences."""
    losses = RNG.uniform(0.5, 2.0, 6)
    key = jax.random.key(0)

    def objective(w):
        each = losses @ w / w.sum(0)
        return -np.std(each, ddof=1) - 3.0 * np.min(losses[:, None] * w)

    w = np.asarray(jax.random.uniform(key, (6, 3), jnp.float64))
    first, second = np.zeros_like(w), np.zeros_like(w)
    for i in range(1, 9):
        gradient, h = np.zeros_like(w), 1e-6
        for place in np.ndindex(w.shape):
            shift = np.zeros_like(w)
            shift[place] = h
            gradient[place] = (objective(w + shift) - objective(w - shift)) / (2 * h)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        step = first / (1 - 0.9**i) / (np.sqrt(second / (1 - 0.999**i)) + 1e-8)
        w = np.maximum(w - 0.01 * step, 0)
        w /= w.sum(1, keepdims=True)
    got = guidance.infer_groups(losses, 3, key, steps=8)
    np.testing.assert_allclose(got, w, atol=1e-5)


def test_the_loss_is_mean_and_variance_of_the_groups(x64):
    """Of those with weight; published form, by a loop."""
    losses, weights = RNG.uniform(size=5), RNG.dirichlet(np.ones(3), 5)
    weights = np.concatenate([weights, np.zeros((5, 1))], 1)
    each = [np.sum(weights[:, g] * losses) / np.sum(weights[:, g]) for g in range(3)]
    want = np.mean(each) + 2.5 * np.var(each, ddof=1)
    got = guidance.invariant_loss(losses, weights, 2.5)
    np.testing.assert_allclose(got, want, rtol=1e-7)
    alone = guidance.invariant_loss(losses, np.ones((5, 1)), 2.5)
    np.testing.assert_allclose(alone, losses.mean(), rtol=1e-7)


def half(params, x, t):
    return params * x


def test_the_combination_is_that_of_the_noise(x64):
    """(1 - k) eps_0 + k eps_module for modules of any prediction; k = 0 returns the base model."""
    x, level = jnp.asarray(RNG.normal(size=(3, 2))), (0.4, 0.8, 0.6)
    base, k = jd.Denoiser(half, "v", 0.5), jnp.array([0.0, 0.25, 1.0])
    modules = [jd.Denoiser(half, prediction, 0.3) for prediction in PREDICTIONS]

    @jax.jit
    def every(x):
        both = [guidance.with_module(base, module, k) for module in modules]
        return [d.predict("eps", x, *level) for d in (base, *modules, *both)]

    first, *rest = every(x)
    for module, found in zip(rest[:5], rest[5:]):
        want = (1 - k[:, None]) * first + k[:, None] * module
        np.testing.assert_allclose(found, want, rtol=1e-10)
    off = guidance.with_module(base, modules[0], 0.0)
    np.testing.assert_array_equal(off(x, *level), 0.5 * x)
    added = guidance.with_module(base, modules[0], 2.0, form="add")
    assert added.cost == 2
    np.testing.assert_allclose(added(x, *level), 0.5 * x + 2.0 * 0.3 * x, rtol=1e-12)


# --- Hou et al. 2024 on coloured digits -----------------------------------------------------------

CLASSES, EACH, WIDTH = 2, 240, 0.2


def coloured(half):
    """Zeros and ones on two colour planes, 240 each; 95% of the zeros are red, as many ones green.

    Two halves of different digits, each of 80 in three positions: what the model knows, and what its
    losses are measured on (its own images it would know by heart, the rare ones too).
    """
    train = jd.data.digits("all")
    x = np.full((CLASSES * EACH, 8, 8, 2), -1.0, np.float32)
    label = np.repeat(np.arange(CLASSES), EACH)
    rare = np.tile(np.arange(EACH) % 20 == 7, CLASSES)
    colour = np.where(rare, 1 - label, label)
    for c in range(CLASSES):
        digits = train.x[train.label == c][half::2][:80, ..., 0]
        moved = np.concatenate([np.roll(digits, shift, 2) for shift in (-1, 0, 1)])
        for i, digit in zip(np.flatnonzero(label == c), moved):
            x[i, ..., colour[i]] = digit
    return x.reshape(len(x), -1), label, rare


def exact(params, x, levels, cond):
    """x0 of the narrow mixture over images of the class."""
    images, labels = params
    _, alpha, sigma = (jnp.reshape(jnp.broadcast_to(v, x.shape[:1]), (-1, 1)) for v in levels)
    variance = alpha**2 * WIDTH**2 + sigma**2
    logits = (alpha * x @ images.T - alpha**2 * jnp.sum(images**2, -1) / 2) / variance
    logits = jnp.where(cond[:, None] == labels, logits, -jnp.inf)
    mean = jax.nn.softmax(logits) @ images
    return mean + alpha * WIDTH**2 / variance * (x - alpha * mean)


def test_a_colour_bias_goes_without_labels():
    """InvDiff's "works when": of a model whose digits' colours are 95% those of their class, the
    inferred groups find the minority with an AUC of 0.8 or more, the colours of a class come within
    30% to 70%, and the class accuracy falls by less than 3 points; k = 0 is the base. With the error of
    x0 for the loss: that of the noise is of fine levels, where colour is plain.

    The raw losses find the minority too, with an AUC of 0.998 where the groups have 0.985: what the
    groups add is the training. The same with equal weights, whose variance is 0, moves no colours.
    """
    base = jd.Denoiser(exact, "x0", tuple(map(jnp.asarray, coloured(0)[:2])), level)
    x0, label, rare = coloured(1)

    @jax.jit
    def losses(key, t):
        eps = jax.random.normal(key, x0.shape)
        args = jnp.asarray(x0), t, eps, jnp.asarray(label), "x0"
        return jd.losses.score_matching(base, PROCESS, *args)

    times = np.float32(np.arange(40) + 0.5) / 40
    each = np.mean([losses(jax.random.key(i), t) for i, t in enumerate(times)], 0)
    weights = guidance.infer_groups(each, 4, jax.random.key(1))
    # A sample's worst case: the mean loss of the groups it is in.
    worst = np.asarray(weights @ guidance.group_losses(each, weights))
    auc, auc_raw = roc_auc_score(rare, worst), roc_auc_score(rare, np.asarray(each))

    network = jd.models.MLP(width=64, depth=1, num_classes=CLASSES, label_dropout=0.0)
    start = network.init(jax.random.key(2), jnp.zeros((1, 128)), jnp.zeros(1), jnp.zeros(1, int))
    module = jd.models.from_linen(network, start, "x0")
    optimizer = optax.adam(3e-3)
    trained, alike = (
        guidance.train_module(
            base, module, PROCESS, x0, w, jax.random.key(3), optimizer, steps=300,
            batch_size=128, penalty=10.0, k=1.0, form="add", cond=label, weighting="x0",
        ).value
        for w in (weights, jnp.full_like(weights, 0.25))
    )  # fmt: skip
    tableau = jd.solvers.ddim(jd.grids.half_log_snr(PROCESS, 20, t_max=0.99, t_min=0.02))
    asked = np.arange(200) % 2
    x_T = PROCESS.prior(jax.random.key(4), (200, 128))

    def figures(denoiser):
        y = np.clip(jd.sample(denoiser, tableau, x_T, cond=asked), -1, 1).reshape(-1, 8, 8, 2)
        colour = y.sum((1, 2)).argmax(1)
        grey = y.max(-1, keepdims=True)
        accuracy = jd.metrics.conditional_accuracy(jd.metrics.digit_classifier(), grey, asked)
        return [np.mean(colour[asked == c] == c) for c in range(2)], accuracy

    pairs = (trained, 0.0), (trained, 1.0), (alike, 1.0)
    (shares, accuracy), (debiased, accuracy_after), (ungrouped, _) = (
        figures(guidance.with_module(base, one, jnp.float32(k), "add")) for one, k in pairs
    )
    print("AUC", auc, "raw", auc_raw, "accuracy", accuracy, accuracy_after)
    print("shares", shares, debiased, "with equal weights", ungrouped)
    assert auc >= 0.8 and auc_raw >= 0.8
    assert min(shares) >= 0.9 and min(ungrouped) >= 0.9
    assert all(0.3 <= share <= 0.7 for share in debiased) and accuracy_after > accuracy - 0.03


def test_bad_input_is_named():
    base = jd.Denoiser(half, "eps", 0.5)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="groups must be an integer from 2"):
        guidance.infer_groups([1.0, 2.0], 1, key)
    with pytest.raises(ValueError, match="two or more finite numbers of at least 0"):
        guidance.infer_groups([1.0, np.nan], 2, key)
    with pytest.raises(ValueError, match="form must be one of"):
        guidance.with_module(base, base, form="times")
    kept = dataclasses.replace(base, memory=jnp.zeros(()))
    with pytest.raises(ValueError, match="a module without memory"):
        guidance.with_module(base, kept)
    with pytest.raises(ValueError, match=r"weights must be \[4, groups\], got shape \(3, 2\)"):
        guidance.train_module(
            base, base, PROCESS, np.zeros((4, 2)), np.ones((3, 2)), key, optax.adam(1e-3)
        )
