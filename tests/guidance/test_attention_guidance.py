"""Perturbed-attention and self-attention guidance against separate evaluations, and on digits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
from trained.digits import NULL, denoiser

import jaxdiff as jd
from jaxdiff import guidance
from jaxdiff.guidance import attention
from jaxdiff.predictions import convert

PROCESS = jd.processes.vp_cosine()
BLOCKS = ("down_1_attention_0", "middle_attention", "up_1_attention_0", "up_1_attention_1")
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(4, 8, 8, 1)), jnp.float32)
LABELS, NONE = jnp.asarray([1, 2, 0, 1]), jnp.full(4, 3)
LEVELS = 0.5, float(PROCESS.alpha(0.5)), float(PROCESS.sigma(0.5))
DIT = jd.models.DiT(width=8, depth=3, num_heads=2, num_classes=3)
SHAPES = jax.eval_shape(DIT.init, jax.random.key(0), X, 0.5, LABELS)
WEIGHTS = jax.tree.map(lambda a: jnp.asarray(0.4 * RNG.normal(size=a.shape), jnp.float32), SHAPES)


def transformer(**options):
    """A v-network, of random weights."""
    return jd.models.from_linen(DIT.clone(**options), WEIGHTS, "v")


@jax.jit
def evaluated(net, x, cond, levels):
    return net(x, *levels, cond)


def run(net, cond=LABELS, x=X, levels=LEVELS):
    return evaluated(net, x, cond, levels)


class InTurn:
    """An attention that counts its calls: another function for some of them, in the network's order."""

    def __init__(self, chosen, other):
        self.chosen, self.other, self.calls = chosen, other, 0

    def __call__(self, q, k, v):
        self.calls += 1
        plain = jax.nn.dot_product_attention
        return (self.other if self.calls - 1 in self.chosen else plain)(q, k, v)


def altered(net, chosen, other):
    module = net.fn.module.clone(attention=InTurn(chosen, other))
    return dataclasses.replace(net, fn=dataclasses.replace(net.fn, module=module))


def worse(net, chosen):
    return altered(net, chosen, lambda q, k, v: v)


def test_blocks_are_named_in_their_order():
    unet = denoiser("small")
    assert guidance.attention_blocks(unet, X, jnp.full(4, NULL)) == BLOCKS
    assert guidance.attention_blocks(transformer(), X) == ("block_0", "block_1", "block_2")


@pytest.mark.parametrize("remat", [False, True])
def test_perturbed_attention_is_two_evaluations(remat):
    """Ahn et al.: eps + s (eps - eps') with the identity for some maps, here of a v-network."""
    net = transformer()
    plain, bad = run(net), run(worse(net, (0, 2)))
    assert np.max(np.abs(plain - bad)) > 0.1
    guided = guidance.perturbed_attention(transformer(remat=remat), 2.0, ("block_0", "block_2"))
    np.testing.assert_allclose(run(guided), plain + 2.0 * (plain - bad), rtol=1e-4, atol=1e-4)
    assert guided.cost == 2


def test_it_goes_with_classifier_free_guidance():
    net = transformer()
    plain, without, bad = run(net), run(net, NONE), run(worse(net, (1,)))
    guided = guidance.perturbed_attention(net, 2.0, ["block_1"], guidance=3.0, null_cond=3)
    expected = without + 3.0 * (plain - without) + 2.0 * (plain - bad)
    np.testing.assert_allclose(run(guided), expected, rtol=1e-4, atol=1e-4)
    assert guided.cost == 3


def test_perturbed_maps_are_the_identity():
    """Row by row: values that are unit vectors come back as they are."""
    tokens = 5
    q, k = jax.random.normal(jax.random.key(1), (2, 1, tokens, 1, tokens))
    basis = jnp.eye(tokens)[None, :, None]
    found = guidance.identity_attention(q, k, basis)[0, :, 0]
    np.testing.assert_array_equal(found, np.eye(tokens))
    weights = attention.attention_map(q, k)[0]
    plain = jax.nn.dot_product_attention(q, k, basis)[0, :, 0]
    np.testing.assert_allclose(weights, plain, rtol=1e-5)


def test_perturbed_attention_makes_surer_digits():
    """Ahn et al. (row 98): unconditional digits at s = 2, the classifier's mean largest probability up
    by 0.03 or more, and the MMD to the data no more than 1.2 times that of the network alone; s = 0 is
    the network bit for bit."""
    net, n = denoiser("large"), 128
    table = jd.solvers.dpm_solver_pp_multistep(jd.grids.half_log_snr(PROCESS, 6))
    start = jax.random.normal(jax.random.key(0), (n, 8, 8, 1))
    real = jd.data.digits("all").x
    kernel = jd.metrics.rbf(jd.metrics.median_bandwidth(real, real))

    def sample(network):
        return np.asarray(jd.sample(network, table, start, cond=jnp.full(n, NULL)))

    def measure(x):
        x = np.clip(x, -1, 1)
        sure = jax.nn.softmax(jd.metrics.digit_classifier().logits(x), -1)
        apart = jd.metrics.mmd(x, real, kernel, unbiased=False)
        return float(np.mean(np.max(sure, 1))), np.sqrt(apart)

    base, none, guided = (
        sample(d)
        for d in (net, *(guidance.perturbed_attention(net, s, BLOCKS[:2]) for s in (0, 2)))
    )
    np.testing.assert_array_equal(none, base)
    (sure, apart), (surer, guided_apart) = measure(base), measure(guided)
    assert surer >= sure + 0.03
    assert guided_apart <= 1.2 * apart


# --- self-attention guidance ----------------------------------------------------------------------


def test_self_attention_guidance_is_the_published_step():
    """Hong et al.: the authors' attention_masking in NumPy, with the map of one block."""
    net, std = transformer(), 0.8
    seen = []

    def note(q, k, v):
        seen.append((q, k))
        return jax.nn.dot_product_attention(q, k, v)

    def noted(net):
        return net(X, *LEVELS, LABELS), seen

    (v, ((q, k),)), (_, alpha, sigma) = jax.jit(noted)(altered(net, (1,), note)), LEVELS
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    logits = np.einsum("nqhd,nkhd->nhqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mask = weights.mean(1).sum(1).reshape(4, 4, 4) > 1.0
    mask = np.kron(mask, np.ones((2, 2)))[..., None]
    assert 0.1 < mask.mean() < 0.9

    x0, eps = (np.asarray(convert(v, X, "v", p, alpha, sigma), np.float64) for p in ("x0", "eps"))
    kernel = np.exp(-0.5 * (np.arange(-7, 8) / std) ** 2)
    kernel /= kernel.sum()
    blurred = x0
    for axis in (1, 2):
        blurred = ndimage.correlate1d(blurred, kernel, axis, mode="mirror")
    state = jnp.asarray(alpha * (mask * blurred + (1 - mask) * x0) + sigma * eps, jnp.float32)
    other = convert(run(net, x=state), state, "v", "eps", alpha, sigma)
    expected = eps + 0.75 * (eps - np.asarray(other, np.float64))

    guided = guidance.self_attention_guidance(net, 0.75, "block_1", blur=std)
    got = convert(run(guided), X, "v", "eps", alpha, sigma)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)
    assert np.max(np.abs(expected - eps)) > 0.05 and guided.cost == 2
    none = guidance.self_attention_guidance(net, 0.0, "block_1", blur=std)
    np.testing.assert_allclose(run(none), run(net), rtol=1e-5, atol=1e-5)
    # Where the state is all noise, nothing is known of x_0 and guidance is 0.
    noise = 1.0, 0.0, 1.0
    np.testing.assert_allclose(
        run(guided, levels=noise), run(net, levels=noise), rtol=1e-5, atol=1e-5
    )


def test_bad_arguments_are_named():
    net = transformer()

    def trace(guided):
        return jax.eval_shape(lambda: guided(X, *LEVELS, LABELS))

    with pytest.raises(TypeError, match="takes jaxdiff.models.from_linen"):
        guidance.perturbed_attention(guidance.classifier_free(net, 2.0, 3), 1.0)
    with pytest.raises(TypeError, match="takes jaxdiff.models.from_linen"):
        guidance.self_attention_guidance(jd.Denoiser(lambda x, t: x), 1.0)
    for blocks in ("middle_attention", ()):
        with pytest.raises(ValueError, match="blocks must be names"):
            guidance.perturbed_attention(net, 1.0, blocks)
    with pytest.raises(ValueError, match=r"blocks \['middle'\] do not attend; those that do are"):
        trace(guidance.perturbed_attention(net, 1.0, ["middle"]))
    with pytest.raises(ValueError, match="guidance= and null_cond= together"):
        guidance.perturbed_attention(net, 1.0, guidance=2.0)
    with pytest.raises(ValueError, match="blur must be positive"):
        guidance.self_attention_guidance(net, 1.0, blur=0.0)
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        guidance.self_attention_guidance(net, 1.0, kernel_size=4)
    with pytest.raises(ValueError, match="kernel_size must be at most 15"):
        trace(guidance.self_attention_guidance(net, 1.0, "block_1", kernel_size=17))
    with pytest.raises(ValueError, match="'middle' does not attend"):
        trace(guidance.self_attention_guidance(net, 1.0, "middle"))
