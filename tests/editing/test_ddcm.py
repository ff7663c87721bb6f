"""DDCM against the published step, and the self-attention control against a plain softmax."""

import exact_digits
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import jaxdiff as jd
from jaxdiff import editing
from jaxdiff.denoisers import level
from jaxdiff.guidance import classifier_free

PROCESS = jd.processes.vp_cosine()
KEY = jax.random.key(0)
MODELS = oracles.BROAD, oracles.Mixture(-oracles.BROAD.means, oracles.BROAD.std, np.ones(3) / 3)


def _two(params, x, levels, cond):
    """eps of one of two mixtures, by label."""
    _, alpha, sigma = levels
    eps = [mixture.expected_noise(x, alpha, sigma) for mixture in params]
    return jnp.where((cond == 0)[:, None], *eps)


def conditional(dtype):
    params = [
        jd.gaussian_mixture(m.means, m.std, m.weights, PROCESS, dtype=dtype).params for m in MODELS
    ]
    return jd.Denoiser(_two, "eps", params, level)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_it_is_the_published_sampler(x64, eta):
    """The official step in NumPy, from the same noise: both branches, for any eta."""
    grid = jd.grids.half_log_snr(PROCESS, 5, t_max=0.9, end="zero")
    x0 = oracles.BROAD.sample(np.random.default_rng(1), 6)
    rng = np.random.default_rng(2)
    first, noise = rng.normal(size=(6, 2)), rng.normal(size=(4, 6, 2))
    _, a, s = grid.node(0)
    x_s = x_t = a * x0 + s * first
    for i in range(5):
        (_, a, s), (_, a1, s1) = grid.node(i), grid.node(i + 1)
        e_s, e_t = MODELS[0].eps(x_s, a, s), MODELS[1].eps(x_t, a, s)
        e_c = (x_s - a * x0) / s
        pred = x0 + ((x_t - x_s) - s * (e_t - e_s)) / a
        direction = np.sqrt(s1**2 - eta * s1**2) * (e_t - e_s + e_c)
        fresh = np.sqrt(eta) * s1 * noise[i] if i < 4 else 0.0
        x_t, x_s = a1 * pred + direction + fresh, a1 * x0 + direction + fresh
    virtual = editing.virtual_inversion(conditional(jnp.float64), jnp.asarray(x0))
    tableau = jd.solvers.ddim(grid, np.sqrt(eta), outputs=2, noise_scale="full")
    _, a, s = grid.node(0)
    start = jnp.asarray(a * x0 + s * first)
    cond = {"source": jnp.zeros(6, int), "target": jnp.ones(6, int)}
    pair = lambda v: {"source": v, "target": v}  # noqa: E731
    got = jd.sample(virtual, tableau, pair(start), noise=pair(jnp.asarray(noise)), cond=cond)
    np.testing.assert_allclose(got["target"], x_t, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(got["source"], x_s, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(x_t, pred, rtol=1e-12)


def test_one_condition_changes_nothing():
    """To 1e-6, without inversion, at any eta."""
    x0 = jnp.asarray(oracles.BROAD.sample(np.random.default_rng(1), 50), jnp.float32)
    grid = jd.grids.half_log_snr(PROCESS, 12, end="zero")
    label = jnp.zeros(50, int)
    for eta in (0.3, 1.0):
        out = editing.ddcm(conditional(jnp.float32), grid, x0, KEY, label, label, eta=eta)
        assert np.abs(out - x0).max() < 1e-6


def test_threes_become_eights():
    """Of the target's class, and nearer than DDIM inversion's edits at as many evaluations.

    Nearer at four steps (two evaluations each), where DDIM inversion misses most; it catches up at
    about seven.
    """
    train, test = jd.data.digits("train"), jd.data.digits("test")
    denoiser = exact_digits.denoiser(train.x, train.label)
    x0 = jnp.asarray(test.x[test.label == 3])
    three, eight = jnp.full(len(x0), 3), jnp.full(len(x0), 8)
    grid = jd.grids.half_log_snr(PROCESS, 4, t_max=0.995, end="zero")
    edited = editing.ddcm(denoiser, grid, x0, KEY, three, eight)
    found = exact_digits.nearest_label(edited, train.x, train.label)
    assert np.mean(found == 8) >= 0.8
    grid = jd.grids.half_log_snr(PROCESS, 4, t_max=0.995, t_min=0.01)
    inverted = jd.sample(denoiser, jd.solvers.ddim(grid.reversed()), x0, cond=three)
    other = jd.sample(denoiser, jd.solvers.ddim(grid), inverted, cond=eight)
    far = [np.mean(np.sqrt(np.mean((np.asarray(y - x0)) ** 2, (1, 2, 3)))) for y in (edited, other)]
    assert far[0] <= far[1]


def test_sources_and_targets_may_be_guided_apart():
    """A scale for each half: at 1 the source's guidance is none, so the null label cannot matter."""
    x0 = jnp.asarray(oracles.BROAD.sample(np.random.default_rng(1), 8), jnp.float32)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(8, 2)), jnp.float32)
    net, half = conditional(jnp.float32), (0.5, PROCESS.alpha(0.5), PROCESS.sigma(0.5))
    scale = jnp.repeat(jnp.asarray([1.0, 3.0]), 8)
    virtual = editing.virtual_inversion(classifier_free(net, scale, 0), x0)
    cond = {"source": jnp.zeros(8, int), "target": jnp.ones(8, int)}

    @jax.jit
    def both(x):
        d = lambda y, k: net.predict("x0", y, *half, jnp.full(8, k))  # noqa: E731
        guided = d(x + 1, 0) + 3.0 * (d(x + 1, 1) - d(x + 1, 0))
        got = virtual({"source": x, "target": x + 1}, *half, cond)[0]["target"]
        return got, x0 + guided - d(x, 0)

    np.testing.assert_allclose(*both(x), rtol=1e-4, atol=1e-4)
    assert virtual.cost == 4


@pytest.mark.parametrize("groups", [1, 2])
def test_targets_attend_where_their_sources_do(groups):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(4 * groups, 5, 2, 3)).astype(np.float32) for _ in range(3))
    got = editing.SourceLayout(groups)(*map(jnp.asarray, (q, k, v)))
    for i in range(4 * groups):
        j = i if i % 4 < 2 else i - 2
        logits = np.einsum("qhd,khd->hqk", q[j], k[j]) / np.sqrt(3)
        weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        np.testing.assert_allclose(got[i], np.einsum("hqk,khd->qhd", weights, v[i]), atol=1e-5)


def test_the_layout_is_used_at_early_times_only():
    """t > until takes the other denoiser: here one that is told apart by its output."""
    x0, x = jnp.zeros((3, 2)), jnp.ones((3, 2))
    plain = jd.Denoiser(lambda y, t: jnp.arange(1.0, 7.0)[:, None] * y, "x0")
    other = jd.Denoiser(lambda y, t: 10.0 * jnp.arange(1.0, 7.0)[:, None] * y, "x0")
    virtual = editing.virtual_inversion(plain, x0, layout=other, until=0.5)
    for t, factor in ((0.6, 10.0), (0.5, 1.0), (0.4, 1.0)):
        (out, _) = virtual({"source": x, "target": x}, t, 0.8, 0.6)
        np.testing.assert_allclose(out["target"], np.full((3, 2), 3.0 * factor), rtol=1e-6)


def test_bad_input_is_named():
    x0, grid = jnp.zeros((4, 2)), jd.grids.half_log_snr(PROCESS, 4, end="zero")
    net = conditional(jnp.float32)
    with pytest.raises(ValueError, match=r"eta must be a number in \[0, 1\], got 2"):
        editing.ddcm(net, grid, x0, KEY, eta=2)
    with pytest.raises(ValueError, match='build it with end="zero"'):
        editing.ddcm(net, jd.grids.half_log_snr(PROCESS, 4), x0, KEY)
    flow = jd.processes.flow()
    with pytest.raises(ValueError, match="says nothing about x_0 at alpha = 0"):
        editing.ddcm(net, jd.grids.uniform(flow, 4), x0, KEY)
    with pytest.raises(ValueError, match="both source_cond and target_cond"):
        editing.ddcm(net, grid, x0, KEY, jnp.zeros(4, int))
    virtual = editing.virtual_inversion(net, x0)
    tableau = jd.solvers.ddim(grid, outputs=2)
    with pytest.raises(ValueError, match='takes cond={"source"'):
        jd.sample(virtual, tableau, {"source": x0, "target": x0}, cond=jnp.zeros(4, int))
    with pytest.raises(ValueError, match="batches of a multiple of 4"):
        editing.SourceLayout(2)(*[jnp.zeros((6, 2, 1, 1))] * 3)
    with pytest.raises(ValueError, match="layout must predict 'eps'"):
        editing.virtual_inversion(net, x0, layout=jd.Denoiser(_two, "x0", net.params))
