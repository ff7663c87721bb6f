"""EluCD: a classifier of clean digits guides, through x0^ and without the network's Jacobian."""

import clean_cnn
import exact_digits
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import jaxdiff as jd
from jaxdiff import guidance
from jaxdiff.guidance.off_the_shelf import clean_gradient
from jaxdiff.predictions import PREDICTIONS

PROCESS = jd.processes.vp_cosine()
RNG = np.random.default_rng(0)
W = RNG.normal(size=(2, 3))
Y = np.array([0, 1, 2, 1])


def linear(params, x):
    """Logits of clean points: a linear classifier, whose gradients are known."""
    return x @ params


@jax.custom_jvp
def opaque(x):
    return x


@opaque.defjvp
def _no_derivative(primals, tangents):
    raise AssertionError("the network's Jacobian was asked for")


def network(params, x, levels):
    """The mixture's denoiser behind something that cannot be differentiated."""
    return opaque(params(x, *levels))


def mixture(prediction="x0"):
    o = oracles.BROAD
    net = jd.gaussian_mixture(o.means, o.std, o.weights, PROCESS, prediction, dtype=jnp.float64)
    return jd.Denoiser(network, prediction, net, jd.denoisers.level)


def by_hand(x0, joint, marginal):
    """The gradient of a f_y - log sum exp(b f) of the linear classifier."""
    share = np.exp(marginal * x0 @ W)
    share /= share.sum(1, keepdims=True)
    return joint * W.T[Y] - marginal * share @ W.T


def test_the_score_moves_by_the_gradient_at_x0(x64):
    """Off the shelf, on any prediction, with the network's Jacobian forbidden."""
    x, (t, alpha, sigma) = RNG.normal(size=(4, 2)), (0.4, 0.8, 0.6)

    @jax.jit
    def every(x):
        nets = [mixture(prediction) for prediction in PREDICTIONS]
        args = linear, jnp.asarray(W), Y, 0.7, 1.3, 0.5
        guided = [guidance.off_the_shelf(net, *args) for net in nets]
        assert all(g.prediction == p and g.cost == 1 for g, p in zip(guided, PREDICTIONS))
        x0 = nets[0].predict("x0", x, t, alpha, sigma)
        return x0, [g.predict("eps", x, t, alpha, sigma) for g in guided]

    x0, found = every(x)
    g = by_hand(np.asarray(x0), 1.3, 0.5)
    want = oracles.BROAD.eps(x, alpha, sigma) - 0.7 * sigma * g
    for eps in found:
        np.testing.assert_allclose(eps, want, rtol=1e-9, atol=1e-9)


def test_equal_temperatures_are_log_softmax(x64):
    x0 = jnp.asarray(RNG.normal(size=(4, 2)))
    of = lambda y: jnp.sum(jax.nn.log_softmax(2 * y @ W)[np.arange(4), Y])  # noqa: E731
    got = clean_gradient(linear, jnp.asarray(W), x0, Y, 2.0, 2.0)
    np.testing.assert_allclose(got, jax.grad(of)(x0), rtol=1e-12)
    alone = clean_gradient(linear, jnp.asarray(W), x0, Y, 2.0, 0.0)
    np.testing.assert_allclose(alone, 2 * W.T[Y], rtol=1e-12)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_it_is_the_published_step(x64, variance):
    """EluCD's p_sample in NumPy: mean + (var + gamma max_var sin(pi t / T)) grad, the same noise."""
    grid = jd.grids.uniform(PROCESS, 6, t_max=0.9, t_min=0.05)
    x = start = RNG.normal(size=(4, 2))
    noise, highest = RNG.normal(size=(6, 4, 2)), 0.0
    for i in range(6):
        (t, a, s), (_, a1, s1) = grid.node(i), grid.node(i + 1)
        abar, abar1 = (v**2 / (v**2 + u**2) for v, u in ((a, s), (a1, s1)))
        beta = 1 - abar / abar1
        var = beta if variance == "fixed_large" else beta * (1 - abar1) / (1 - abar)
        x0 = (x - s * oracles.BROAD.eps(x, a, s)) / a
        mean = np.sqrt(abar1) * beta / (1 - abar) * x0
        mean += np.sqrt(1 - beta) * (1 - abar1) / (1 - abar) * x
        highest = max(highest, var)
        add = max(np.sin(t / 1.1 * np.pi) * highest * 0.3, 0.0)
        mean += (var + add) * 2.5 * by_hand(x0, 1.0, 0.5)
        x = mean + np.sqrt(var) * noise[i]
    net = mixture("eps")
    control = guidance.elucd(
        grid, net, linear, jnp.asarray(W), Y, 2.5, gamma=0.3, variance=variance, span=1.1
    )
    tableau = jd.solvers.ddpm(grid, variance)
    got = jd.sample(net, tableau, jnp.asarray(start), noise=jnp.asarray(noise), control=control)
    np.testing.assert_allclose(got, x, rtol=1e-9, atol=1e-9)


def test_softplus_is_a_smooth_relu():
    """Within log 2 / beta of it, exactly there at 0, and its slope at 0 is 1/2."""
    x = np.linspace(-3, 3, 101).astype(np.float32)
    gap = guidance.Softplus(5.0)(x) - np.maximum(x, 0)
    assert gap.max() == pytest.approx(np.log(2) / 5, rel=1e-5) and gap.min() >= 0
    assert float(jax.grad(guidance.Softplus(5.0))(0.0)) == pytest.approx(0.5)


# --- Ma et al. 2024 on digits ---------------------------------------------------------------------

SMOOTH = clean_cnn.Apply(clean_cnn.CNN(activation=guidance.Softplus(5.0)))


def on_noisy(params, x, levels):
    return SMOOTH(params, x)


def test_a_clean_classifier_guides_digits():
    """EluCD's "works when" (Ma et al. 2024): 100 steps, class accuracy at least 0.9, and closer to the
    data than the same classifier applied to x_t, at any of its scales. The distance is the MMD of pairs
    (image, label), and that of the images alone is beside it: of an exact network they are right at
    scale 0, whatever the labels, and every guidance moves them away.

    With the published b = 1/2 that takes scale 1/2 and no sine: accuracy 0.91, pairs -0.0035, images
    -0.0005. At scale 1 with the sine, the defaults, it has accuracy 1 and loses: +0.029 and +0.036.
    Plain log-softmax, b = 1, at those: 1, -0.006 and -0.003. On x_t the scales 1, 5 and 10 have
    accuracies 0.51, 0.63 and 0.71, pairs +0.001, -0.001 and -0.002, images -0.004, -0.003 and +0.001;
    20 to 80 are no better.
    """
    train, weights = jd.data.digits("train"), clean_cnn.variables()
    images, of_images = train.x[:200], train.label[:200]
    net = exact_digits.denoiser(images, of_images)
    tableau = jd.solvers.ddpm(grid := jd.grids.uniform(PROCESS, 100))
    label = np.arange(80) % 10
    x_T = PROCESS.prior(jax.random.key(0), (80, 8, 8, 1))

    def mmd(x, label, weight):
        x, data = (np.asarray(a).reshape(len(a), -1) for a in (x, images))
        hot, of_data = (weight * np.eye(10)[a] for a in (label, of_images))
        both = np.concatenate([x, hot], 1), np.concatenate([data, of_data], 1)
        return jd.metrics.mmd(*both, jd.metrics.rbf(3.0))

    def figures(denoiser, control=None):
        y = jd.sample(denoiser, tableau, x_T, key=jax.random.key(1), control=control)
        y = np.clip(y, -1, 1)
        accuracy = jd.metrics.conditional_accuracy(jd.metrics.digit_classifier(), y, label)
        return np.array([accuracy, mmd(y, label, 4), mmd(y, label, 0)])

    def elucd(scale, marginal, gamma):
        options = (np.float32(v) for v in (scale, 1.0, marginal, gamma))
        return figures(net, guidance.elucd(grid, net, SMOOTH, weights, label, *options))

    def on_x_t(scale):
        return figures(
            guidance.classifier_guidance(net, on_noisy, weights, label, np.float32(scale))
        )

    half, default, plain = elucd(0.5, 0.5, 0.0), elucd(1.0, 0.5, 0.3), elucd(1.0, 1.0, 0.3)
    direct = np.array([on_x_t(scale) for scale in (1.0, 5.0, 10.0)])
    print("b = 1/2", half, "default", default, "b = 1", plain, "on x_t", direct)
    highest, nearest = direct[:, 0].max(), direct[:, 1].min()
    for accuracy, pairs, of_image in (half, plain):
        assert accuracy >= 0.9 and accuracy >= highest + 0.15
        assert pairs < nearest and of_image < direct[np.argmax(direct[:, 0]), 2]
    assert default[0] >= 0.9 and default[1] > nearest


# --- calibration ----------------------------------------------------------------------------------


def test_the_calibration_error_is_the_sum_over_bins():
    """A loop over bins; by hand, two samples of confidence 0.8, one wrong: |1/2 - 0.8| = 0.3."""
    assert guidance.expected_calibration_error(
        [[0.8, 0.2], [0.8, 0.2]], np.array([0, 1])
    ) == pytest.approx(0.3)
    p = RNG.dirichlet(np.ones(4), 200)
    label = RNG.integers(0, 4, 200)
    want = 0.0
    for b in range(10):
        inside = (p.max(1) > b / 10) & (p.max(1) <= (b + 1) / 10)
        if inside.any():
            right = np.mean(p.argmax(1)[inside] == label[inside])
            want += inside.mean() * abs(right - p.max(1)[inside].mean())
    assert guidance.expected_calibration_error(p, label, 10) == pytest.approx(want)


def test_calibration_tells_a_sharpened_classifier():
    """The exact posterior of a mixture's labels is calibrated at every time, one thrice as sure not."""
    o = oracles.Mixture(oracles.BROAD.means, np.full(3, 0.9), oracles.BROAD.weights)
    net = jd.gaussian_mixture(o.means, o.std, o.weights, PROCESS)
    x0, label = net.params.sample(jax.random.key(0), (2000,))
    args = (jnp.asarray(x0), np.asarray(label), [0.01, 0.5], jax.random.key(1))
    fair, sharp = (
        guidance.calibration(net, PROCESS, responsible, (net.params, times), *args)
        for times in (1.0, 3.0)
    )
    assert fair.shape == (2,) and fair[0] < 0.04 and np.all(sharp > fair + 0.05)


def responsible(params, x0):
    mixture, times = params
    return times * jnp.log(mixture.responsibilities(x0, 1.0, 0.0))


def test_bad_input_is_named():
    net = jd.Denoiser(lambda x, t: x, "x0")
    grid = jd.grids.uniform(PROCESS, 3)
    for wrong, text in (
        (dict(label=-1), "labels must be from 0, got -1"),
        (dict(label=0, joint=0.0), "joint must be positive and finite, got 0.0"),
        (dict(label=0, marginal=-0.5), "marginal must be finite and at least 0, got -0.5"),
    ):
        with pytest.raises(ValueError, match=text):
            guidance.off_the_shelf(net, linear, W, **wrong)
    with pytest.raises(ValueError, match="gamma must be finite and at least 0, got -1"):
        guidance.elucd(grid, net, linear, W, 0, gamma=-1)
    with pytest.raises(ValueError, match="variance must be one of"):
        guidance.elucd(grid, net, linear, W, 0, variance="learned")
    with pytest.raises(ValueError, match="from noise to data"):
        guidance.elucd(grid.reversed(), net, linear, W, 0)
    with pytest.raises(ValueError, match="beta must be positive"):
        guidance.Softplus(0.0)
    with pytest.raises(ValueError, match="rows must be probabilities"):
        guidance.expected_calibration_error([[0.9, 0.9]], [0])
    with pytest.raises(ValueError, match="n labels, got shapes"):
        guidance.expected_calibration_error([[0.5, 0.5]], [0, 1])
    with pytest.raises(ValueError, match="at least one, got shape"):
        guidance.calibration(net, PROCESS, linear, W, np.zeros((1, 2)), [0], [], None)
