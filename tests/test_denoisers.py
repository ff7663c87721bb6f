"""Denoisers: how the network is called, thresholding against NumPy, preconditioning by algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize_scalar

import jaxdiff as jd
from jaxdiff.denoisers import level, wrap

RNG = np.random.default_rng(0)


# --- how fn is called -----------------------------------------------------------------------------


def returns_arguments(*args, **kwargs):
    return args, kwargs


def call(denoiser, *rest):
    return denoiser("x", "t", "alpha", "sigma", *rest)


def test_fn_gets_params_and_cond_only_if_there_are_any():
    fn = returns_arguments
    assert call(jd.Denoiser(fn)) == (("x", "t"), {})
    assert call(jd.Denoiser(fn), "cond") == (("x", "t", "cond"), {})
    assert call(jd.Denoiser(fn, params="params")) == (("params", "x", "t"), {})
    assert call(jd.Denoiser(fn, params="params"), "cond") == (("params", "x", "t", "cond"), {})
    assert call(jd.Denoiser(fn, params=0), 0) == ((0, "x", "t", 0), {})  # false, but given
    assert call(jd.Denoiser(fn, time=level)) == (("x", ("t", "alpha", "sigma")), {})
    to_sigma = jd.Denoiser(fn, time=lambda t, alpha, sigma: sigma)
    assert call(to_sigma) == (("x", "sigma"), {})


def counts(params, x, t, cond=None, *, memory):
    return params * x, memory + 1


def test_memory_goes_in_and_out():
    denoiser = jd.Denoiser(counts, "x0", params=3.0, memory=jnp.asarray(5))
    out, memory = denoiser.evaluate(2.0, 0.1, 0.6, 0.8, None, jnp.asarray(7))
    assert (out, memory) == (6.0, 8)
    assert denoiser(2.0, 0.1, 0.6, 0.8) == 6.0  # a plain call starts from the initial memory
    for wrapped in (jd.clip_x0(denoiser), jd.dynamic_threshold(denoiser)):
        out, memory = wrapped.evaluate(jnp.full((2, 1), 0.2), 0.1, 0.6, 0.8, None, wrapped.memory)
        np.testing.assert_allclose(out, 0.6, rtol=1e-6)
        assert memory == 6


def test_predict_converts():
    x, eps = RNG.normal(size=(2, 3, 4))
    denoiser = jd.Denoiser(lambda x, t: eps, "eps")
    np.testing.assert_array_equal(denoiser.predict("eps", x, None, 0.6, 0.8), eps)
    np.testing.assert_allclose(
        denoiser.predict("x0", x, None, 0.6, 0.8), (x - 0.8 * eps) / 0.6, rtol=1e-12
    )
    both = jd.Denoiser(lambda x, t: (x / 2, eps), ("x0", "eps"))
    assert both.predictions == ("x0", "eps")
    np.testing.assert_allclose(
        both.predict("eps", x, None, 0.6, 0.8), (x - 0.6 * x / 2) / 0.8, rtol=1e-12
    )


def test_a_denoiser_is_a_pytree_of_params_and_memory():
    denoiser = jd.Denoiser(counts, "v", params={"a": 1.0}, memory=2, cost=3)
    assert jax.tree.leaves(denoiser) == [1.0, 2]
    doubled = jax.tree.map(lambda a: 2 * a, denoiser)
    assert (doubled.params, doubled.memory, doubled.fn, doubled.prediction, doubled.cost) == (
        {"a": 2.0}, 4, counts, "v", 3,
    )  # fmt: skip


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: jd.Denoiser("net"), TypeError, "fn must be callable, got 'net'"),
        (lambda: jd.Denoiser(abs, "noise"), ValueError, "unknown prediction 'noise'; choose from"),
        (lambda: jd.Denoiser(abs, ("x0", "noise")), ValueError, "unknown prediction 'noise'"),
        (lambda: jd.Denoiser(abs, ["x0"]), ValueError, "a name or a tuple, got .'x0'."),
        (lambda: jd.Denoiser(abs, ()), ValueError, "a name or a tuple, got .."),
        (lambda: jd.Denoiser(abs, None), ValueError, "a name or a tuple, got None"),
        (lambda: jd.clip_x0(abs), TypeError, "thresholding takes a jaxdiff.Denoiser, got builtin"),
        (lambda: jd.clip_x0(jd.Denoiser(abs), 1.0, -1.0), ValueError, "low < high, got 1.0 and -1"),
        (lambda: jd.clip_x0(jd.Denoiser(abs), [-1, 1], [1, 1]), ValueError, "low < high"),
        (lambda: jd.clip_x0(jd.Denoiser(abs, ("x0", "eps"))), ValueError, "takes one prediction"),
        (lambda: jd.dynamic_threshold(jd.Denoiser(abs), 99.5), ValueError, "0, 1., got 99.5"),
        (lambda: jd.dynamic_threshold(jd.Denoiser(abs), 0.0), ValueError, "got 0.0"),
        (lambda: jd.dynamic_threshold(jd.Denoiser(abs), max_value=0.5), ValueError, "got 0.5"),
        (lambda: jd.precondition(abs, sigma_data=0.0), ValueError, "positive, got 0.0"),
        (lambda: jd.precondition(abs, sigma_data=np.nan), ValueError, "positive, got nan"),
    ],
)
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --- thresholding ---------------------------------------------------------------------------------

ALPHA, SIGMA = np.array([0.6, 0.9, 0.3]), np.array([0.8, 0.1, 0.7])
X0, EPS = RNG.normal(size=(2, 3, 5, 4)) * np.array([0.2, 1.0, 3.0])[:, None, None]
X = ALPHA[:, None, None] * X0 + SIGMA[:, None, None] * EPS


# A network of each kind that knows (X0, EPS).
NETWORKS = {
    "x0": jd.Denoiser(lambda x, t: jnp.asarray(X0), "x0"),
    "eps": jd.Denoiser(lambda x, t: jnp.asarray(EPS), "eps"),
    "flow": jd.Denoiser(lambda x, t: jnp.asarray(EPS - X0), "flow"),
}


def threshold(wrapped):
    return wrapped(jnp.asarray(X), None, jnp.asarray(ALPHA), jnp.asarray(SIGMA))


@pytest.mark.parametrize("kind", NETWORKS)
def test_clipping_is_numpys(x64, kind):
    got = threshold(jd.clip_x0(NETWORKS[kind], -0.5, 0.7))
    np.testing.assert_allclose(got, np.clip(X0, -0.5, 0.7), rtol=1e-12, atol=1e-13)
    assert jd.clip_x0(NETWORKS[kind]).prediction == "x0"
    channels = np.array([-1.0, -0.5, -2.0, -0.1]), np.array([1.0, 0.5, 0.2, 0.1])
    got = threshold(jd.clip_x0(NETWORKS[kind], *channels))
    np.testing.assert_allclose(got, np.clip(X0, *channels), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("max_value", [None, 1.0, 1.5])
@pytest.mark.parametrize("quantile", [0.995, 0.7, 1.0])
def test_dynamic_thresholding_is_numpys(x64, kind, max_value, quantile):
    """Saharia et al. 2022: a quantile of |x_0| a sample, at least 1, then clip and divide."""
    expected = []
    for sample in X0:
        s = max(np.quantile(np.abs(sample), quantile), 1.0)
        s = s if max_value is None else min(s, max_value)
        expected.append(np.clip(sample, -s, s) / s)
    got = threshold(jd.dynamic_threshold(NETWORKS[kind], quantile, max_value))
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-13)
    assert np.abs(got).max() <= 1.0
    # The quietest sample is below 1 everywhere: it passes unchanged.
    np.testing.assert_allclose(got[0], X0[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("rule", [jd.clip_x0, jd.dynamic_threshold])
def test_the_unclipped_noise_can_be_kept(x64, kind, rule):
    wrapped = rule(NETWORKS[kind], keep_eps=True)
    assert wrapped.prediction == ("x0", "eps")
    x0, eps = threshold(wrapped)
    np.testing.assert_allclose(eps, EPS, rtol=1e-11, atol=1e-12)
    np.testing.assert_array_equal(x0, threshold(rule(NETWORKS[kind])))


def test_thresholds_are_leaves_and_trees_are_thresholded_leaf_by_leaf(x64):
    x = {"a": jnp.asarray(X), "b": 10 * jnp.asarray(X[:, 0])}
    denoiser = jd.Denoiser(lambda x, t: x, "x0")
    got = jd.dynamic_threshold(denoiser, 0.9)(x, None, 0.6, 0.8)
    for name, leaf in x.items():
        alone = jd.dynamic_threshold(denoiser, 0.9)(leaf, None, 0.6, 0.8)
        np.testing.assert_array_equal(got[name], alone)
    highs = jnp.asarray([0.1, 0.5])
    runs = jax.vmap(lambda high: jd.clip_x0(denoiser, -1.0, high)(x["a"], None, 0.6, 0.8))(highs)
    np.testing.assert_array_equal(runs, np.stack([np.clip(X, -1, 0.1), np.clip(X, -1, 0.5)]))


def doubled(evaluate, strengths, x, levels, cond):
    return strengths * evaluate(x, *levels, cond)


def test_wrap_passes_everything_on():
    inner = jd.Denoiser(lambda p, x, t, cond: p * x + t + cond, "v", params=2.0, cost=3)
    outer = wrap(doubled, inner, 10.0, "v")
    assert outer.cost == 3 and wrap(doubled, inner, 10.0, "v", cost=6).cost == 6
    assert outer(1.0, 0.5, 0.6, 0.8, 100.0) == 10.0 * (2.0 + 0.5 + 100.0)
    assert jax.tree.leaves(outer) == [2.0, 10.0]


# --- preconditioning ------------------------------------------------------------------------------


def coefficients(alpha, sigma, sigma_data):
    """(c_skip, c_out, c_in, c_noise), read off from what the denoiser does to x = 1."""
    seen = []

    def network(value):
        def fn(x, t):
            seen.append((float(x[0, 0]), float(t)))
            return jnp.full_like(x, value)

        return fn

    one = jnp.ones((1, 1))
    skip, both = (
        float(jd.precondition(network(v), sigma_data)(one, None, alpha, sigma)[0, 0])
        for v in (0.0, 1.0)
    )
    return skip, both - skip, *seen[0]


@pytest.mark.parametrize("sigma", [0.002, 0.5, 7.0, 80.0])
def test_preconditioning_at_alpha_one_is_edms(x64, sigma):
    """Karras et al. 2022, table 1, last column."""
    data = 0.5
    expected = (
        data**2 / (sigma**2 + data**2),
        sigma * data / np.sqrt(sigma**2 + data**2),
        1 / np.sqrt(sigma**2 + data**2),
        np.log(sigma) / 4,
    )
    np.testing.assert_allclose(coefficients(1.0, sigma, data), expected, rtol=1e-9)


@pytest.mark.parametrize("alpha, sigma", [(0.6, 0.8), (0.99, 0.1), (0.05, 1.0), (0.3, 0.7)])
@pytest.mark.parametrize("data", [0.5, 1.3])
def test_preconditioning_follows_from_its_three_conditions(x64, alpha, sigma, data):
    """EDM's appendix B.6 for x = alpha x_0 + sigma eps with Var[x_0] = data^2."""
    skip, out, c_in, noise = coefficients(alpha, sigma, data)
    # The network's input has unit variance.
    np.testing.assert_allclose(c_in**2 * (alpha**2 * data**2 + sigma**2), 1.0, rtol=1e-12)
    # Its target (x_0 - c_skip x) / c_out = ((1 - c_skip alpha) x_0 - c_skip sigma eps) / c_out too.
    effective = (1 - skip * alpha) ** 2 * data**2 + skip**2 * sigma**2
    np.testing.assert_allclose(effective / out**2, 1.0, rtol=1e-9)
    # c_skip makes c_out, the amplification of the network's errors, as small as it can be.
    least = minimize_scalar(lambda c: (1 - c * alpha) ** 2 * data**2 + c**2 * sigma**2, tol=1e-14)
    np.testing.assert_allclose(skip, least.x, rtol=1e-6)
    np.testing.assert_allclose(noise, np.log(sigma / alpha) / 4, rtol=1e-12)


def test_preconditioned_networks_see_unit_variance(x64):
    """The same by Monte Carlo, with levels that differ by sample and data far from Gaussian."""
    data, count = 0.7, 400_000
    alpha = RNG.uniform(0.05, 1.0, count)
    sigma = RNG.uniform(0.05, 3.0, count)
    x0 = data * RNG.choice([-1.0, 1.0], (count, 1))
    x = alpha[:, None] * x0 + sigma[:, None] * RNG.normal(size=(count, 1))
    inputs = []

    def network(x, t):
        inputs.append(x)
        return jnp.ones_like(x)

    levels = jnp.asarray(alpha), jnp.asarray(sigma)
    x = jnp.asarray(x)
    with_one = jd.precondition(network, data)(x, None, *levels)
    skipped = jd.precondition(lambda x, t: 0 * x, data)(x, None, *levels)
    target = (x0 - skipped) / (with_one - skipped)
    for values in (inputs[0], target):
        assert abs(np.mean(values**2) - 1.0) < 5 * np.sqrt(3 / count)


def test_preconditioning_passes_params_cond_and_time_on(x64):
    x, alpha, sigma = jnp.ones((2, 3)), 0.6, 0.8

    def fn(params, x, t, cond):
        return params * t + cond + 0 * x

    denoiser = jd.precondition(fn, 0.5, params=2.0, time=lambda t, alpha, sigma: 10 * t)
    assert denoiser.prediction == "x0"
    size = np.sqrt(0.6**2 * 0.25 + 0.64)
    expected = 0.6 * 0.25 / size**2 + 0.8 * 0.5 / size * (2.0 * 5.0 + 100.0)
    np.testing.assert_allclose(denoiser(x, 0.5, alpha, sigma, 100.0), expected, rtol=1e-12)
    zero = jd.precondition(lambda p, x, t: p * x, 0.5, params=0.0)  # params may be false
    np.testing.assert_allclose(zero(x, 0.5, alpha, sigma), 0.6 * 0.25 / size**2, rtol=1e-12)


def test_a_half_precision_network_is_added_in_the_states():
    """c_out F in float32: c_out itself is not rounded to bfloat16."""
    x, value = jnp.zeros((1, 4)), jnp.asarray(1.0, jnp.bfloat16)
    denoiser = jd.precondition(lambda x, t: jnp.full(x.shape, value), 0.5)
    out = denoiser(x, None, 0.6, 0.8)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, 0.4 / np.sqrt(0.09 + 0.64), rtol=1e-6)
