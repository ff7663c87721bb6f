"""Classifier-free guidance against two explicit calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import counted

import jaxdiff as jd
from jaxdiff.guidance import classifier_free
from jaxdiff.predictions import PREDICTIONS, convert

PROCESS = jd.processes.vp_linear()
NULL = 3
RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(4, 2)).astype(np.float32)
X = jnp.asarray(RNG.normal(size=(5, 2)), jnp.float32)
LABELS = jnp.asarray([0, 1, 2, 1, 0])
LEVELS = 0.4, 0.6, 0.8


def network(weight, x, t, label):
    """Not linear in anything; t is a scalar or [batch]."""
    t = jnp.asarray(t)[..., None] if jnp.ndim(t) else t
    return jnp.tanh(x * weight[label] + t) + weight[label]


def denoiser(prediction="eps", **kwargs):
    return jd.Denoiser(network, prediction, params=jnp.asarray(WEIGHT), **kwargs)


def explicit(scale, x=X, t=0.4, label=LABELS, null=NULL):
    """uncond + s (cond - uncond), two calls, in float64."""
    cond, uncond = (
        np.asarray(network(jnp.asarray(WEIGHT), x, t, k), np.float64)
        for k in (label, jnp.full_like(label, null))
    )
    return uncond + np.asarray(scale)[..., None] * (cond - uncond)


@pytest.mark.parametrize("scale", [0.0, 1.0, 0.5, 7.3, -1.0])
def test_it_is_two_calls_and_a_line(scale):
    """s = 0 is unconditional, s = 1 conditional; beyond 1 it extrapolates."""
    guided = classifier_free(denoiser(), scale, NULL)
    np.testing.assert_allclose(guided(X, *LEVELS, LABELS), explicit(scale), rtol=1e-5, atol=1e-6)
    if scale in (0.0, 1.0):
        label = LABELS if scale else jnp.full_like(LABELS, NULL)
        plain = denoiser()(X, *LEVELS, label)
        np.testing.assert_allclose(guided(X, *LEVELS, LABELS), plain, rtol=1e-6, atol=1e-7)


def test_scales_and_times_may_belong_to_samples():
    scale, t = jnp.asarray([0.0, 1.0, 2.0, 3.0, 4.0]), jnp.linspace(0.1, 0.9, 5)
    guided = classifier_free(denoiser(), scale, NULL)
    got = guided(X, t, PROCESS.alpha(t), PROCESS.sigma(t), LABELS)
    np.testing.assert_allclose(got, explicit(scale, t=t), rtol=1e-5, atol=1e-6)


def test_conditions_may_be_trees_and_null_may_be_an_array():
    def fn(x, t, cond):
        return x * cond["gain"] + cond["label"][:, None].astype(x.dtype)

    cond = {"gain": jnp.full((5, 2), 3.0), "label": LABELS}
    null = {"gain": jnp.asarray([0.5, 0.25]), "label": 9}
    guided = classifier_free(jd.Denoiser(fn), 2.0, null)
    uncond = X * np.array([0.5, 0.25]) + 9.0
    expected = uncond + 2.0 * (X * 3.0 + LABELS[:, None] - uncond)
    np.testing.assert_allclose(guided(X, *LEVELS, cond), expected, rtol=1e-6, atol=1e-6)


def test_states_may_be_trees():
    def fn(x, t, label):
        return jax.tree.map(lambda a: a * (1.0 + label.reshape(-1, *(1,) * (a.ndim - 1))), x)

    x = {"a": X, "b": jnp.ones((5, 2, 3))}
    got = classifier_free(jd.Denoiser(fn), 3.0, NULL)(x, *LEVELS, LABELS)
    for name, leaf in x.items():
        label = LABELS.reshape(-1, *(1,) * (leaf.ndim - 1))
        expected = leaf * (4.0 + 3.0 * (1.0 + label - 4.0))
        np.testing.assert_allclose(got[name], expected, rtol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_it_commutes_with_conversion(prediction):
    """Guiding v and converting to x_0 is guiding x_0."""
    guided = classifier_free(denoiser(prediction), 4.0, NULL)
    assert guided.prediction == prediction
    cond, uncond = (
        convert(denoiser(prediction)(X, *LEVELS, k), X, prediction, "x0", *LEVELS[1:])
        for k in (LABELS, jnp.full_like(LABELS, NULL))
    )
    got = guided.predict("x0", X, *LEVELS, LABELS)
    np.testing.assert_allclose(got, uncond + 4.0 * (cond - uncond), rtol=2e-5, atol=2e-5)


def test_cost_doubles():
    assert classifier_free(denoiser(), 2.0, NULL).cost == 2
    assert classifier_free(denoiser(cost=3), 2.0, NULL).cost == 6


def counting(weight, x, t, label, *, memory):
    return network(weight, x, t, label), memory + x.shape[0]


def test_memory_passes_through():
    """One evaluation of twice the batch a call."""
    inner = jd.Denoiser(counting, "eps", params=jnp.asarray(WEIGHT), memory=jnp.asarray(100))
    guided = classifier_free(inner, 2.0, NULL)
    out, memory = guided.evaluate(X, *LEVELS, LABELS, guided.memory)
    np.testing.assert_allclose(out, explicit(2.0), rtol=1e-5, atol=1e-6)
    assert memory == 110


def test_guidance_wraps_thresholding_and_is_wrapped():
    clipped = jd.clip_x0(denoiser("x0"), -0.3, 0.3)
    inner = classifier_free(clipped, 2.0, NULL)(X, *LEVELS, LABELS)
    raw = [np.asarray(denoiser("x0")(X, *LEVELS, k)) for k in (LABELS, jnp.full_like(LABELS, NULL))]
    cond, uncond = (np.clip(r, -0.3, 0.3) for r in raw)
    np.testing.assert_allclose(inner, uncond + 2 * (cond - uncond), rtol=1e-5, atol=1e-6)
    outer = jd.clip_x0(classifier_free(denoiser("x0"), 2.0, NULL), -0.3, 0.3)
    expected = np.clip(raw[1] + 2 * (raw[0] - raw[1]), -0.3, 0.3)
    np.testing.assert_allclose(outer(X, *LEVELS, LABELS), expected, rtol=1e-5, atol=1e-6)
    assert outer.cost == 2


def test_a_scale_is_data():
    """Sampling with another scale compiles nothing, and scales vmap."""
    tableau = jd.solvers.ddim(jd.grids.half_log_snr(PROCESS, 4))

    def run(scale):
        return jd.sample(classifier_free(denoiser(), scale, NULL), tableau, X, cond=LABELS)

    results = {2.0: run(2.0)}
    with counted() as compiled:
        for scale in (3.5, 5, np.float64(1.0), jnp.zeros(())):
            results[float(scale)] = run(scale)
    assert compiled == []
    scales = jnp.asarray(list(results))
    vmapped = jax.vmap(run)(scales)
    np.testing.assert_allclose(vmapped, np.stack(list(results.values())), rtol=1e-5, atol=1e-6)
    unconditional = jd.sample(denoiser(), tableau, X, cond=jnp.full_like(LABELS, NULL))
    np.testing.assert_allclose(results[0.0], unconditional, rtol=1e-5, atol=1e-6)


def test_scales_keep_double_precision(x64):
    fn = jd.Denoiser(lambda x, t, c: x * c[:, None], "eps")
    x = jnp.ones((1, 1), jnp.float64)
    got = classifier_free(fn, 7.3, 0.0)(x, *LEVELS, jnp.ones(1, jnp.float64))
    assert got.dtype == jnp.float64 and float(got[0, 0]) == 7.3


def test_a_half_precision_network_is_guided_in_the_states():
    """s is not rounded to bfloat16, nor the extrapolation."""
    fn = jd.Denoiser(lambda x, t, c: (0 * x + c[:, None]).astype(jnp.bfloat16), "eps")
    got = classifier_free(fn, 7.3, 0.0)(X, *LEVELS, jnp.ones(5))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, 7.3, rtol=1e-6)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="one prediction, got .'x0', 'eps'."):
        classifier_free(jd.Denoiser(network, ("x0", "eps")), 2.0, NULL)
    with pytest.raises(TypeError, match="guidance takes a jaxdiff.Denoiser, got function"):
        classifier_free(network, 2.0, NULL)
    guided = classifier_free(denoiser(), 2.0, NULL)
    with pytest.raises(ValueError, match="needs cond="):
        guided(X, *LEVELS)
    tableau = jd.solvers.ddim(jd.grids.half_log_snr(PROCESS, 2))
    with pytest.raises(ValueError, match="needs cond="):
        jd.sample(guided, tableau, X)
