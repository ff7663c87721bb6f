"""Adaptive Guidance and LinearAG: what they leave out, and what that changes."""

import conditional
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trained import digits

import jaxdiff as jd
from jaxdiff import guidance

PROCESS = jd.processes.vp_cosine()
ANGLES = 2 * np.pi * np.arange(3) / 3
MEANS = 4.0 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)
ROWS = np.concatenate([np.eye(3), np.ones((1, 3))]).astype(bool)
NULL, COUNT = 3, 256
LABELS = np.arange(COUNT) % 3
X = jax.random.normal(jax.random.key(0), (COUNT, 2))
TABLE = jd.solvers.ddim(jd.grids.uniform(PROCESS, 20))


def network():
    return conditional.conditional_mixture(MEANS, np.full(3, 0.6), ROWS)


@jax.jit
def evaluated(net, x, cond, levels):
    return net(x, *levels, cond)


def sample(denoiser, x=X, **options):
    return jd.sample(denoiser, TABLE, x, cond=jnp.asarray(LABELS[: len(x)]), **options)


def rmse(a, b):
    return float(np.sqrt(np.mean((np.asarray(a) - np.asarray(b)) ** 2)))


@pytest.fixture(scope="module")
def full():
    return sample(guidance.classifier_free(network(), 3.0, NULL))


def adaptive(threshold, calls, batch=None):
    denoiser = guidance.adaptive_guidance(network(), 3.0, NULL, threshold, calls, batch)
    state = sample(denoiser, save="state")
    return state.registers[0], state.memory


@pytest.mark.parametrize("batch", [None, COUNT])
def test_adaptive_guidance_saves_a_quarter(full, batch):
    """Castillo et al. (row 107): exact scores of a 2-D class mixture, s = 3, 20 DDIM steps, gamma
    0.9999, armed after five calls: at most 30 of 40 evaluations and 0.02 from full guidance, which is
    0.7 from none. With one flag for the batch, and with one for each sample."""
    x, memory = adaptive(0.9999, 5, batch)
    assert int(memory.calls) == 20
    assert 21 < int(memory.evaluations) <= 30
    assert rmse(x, full) <= 0.02
    assert rmse(sample(network()), full) > 0.5


def test_alignment_at_the_noise_end_is_no_crossing(full):
    """At t = 1 both predict the state: gamma is 1 before the classes part, and the published rule,
    calls=0, ends guidance there. Not the default one (11 guided calls of 20, 0.02 from full guidance);
    nor on the trained digit network, whose noises, as it predicts v, differ by alpha times the
    difference in v: it stays guided, as its gamma is never below 0.991."""
    x, memory = adaptive(0.99, 0, COUNT)
    assert 20 + float(np.mean(memory.guided)) < 24 and rmse(x, full) > 0.3
    x, memory = adaptive(0.99, None, COUNT)
    assert float(np.mean(memory.guided)) < 15 and rmse(x, full) < 0.1
    net, start = digits.denoiser("small"), jax.random.normal(jax.random.key(0), (10, 8, 8, 1))
    table = jd.solvers.ddim(jd.grids.half_log_snr(PROCESS, 10))
    guided = guidance.adaptive_guidance(net, 4.0, digits.NULL)
    state = jd.sample(guided, table, start, cond=jnp.arange(10), save="state")
    assert int(state.memory.guided) == 10 and int(state.memory.evaluations) == 20


def counting(params, x, t, cond, *, memory):
    return network()(x, *t, cond), memory + x.shape[0]


def test_evaluations_are_really_left_out():
    """The network sees 2 n states until all have crossed, then n: what `evaluations` says."""
    inner = jd.Denoiser(counting, params=0, time=lambda *a: a, memory=jnp.asarray(0))
    state = sample(guidance.adaptive_guidance(inner, 3.0, NULL, 0.9999, 5), save="state")
    assert int(state.memory.inner) == COUNT * int(state.memory.evaluations) < COUNT * 31


@pytest.mark.parametrize("calls", [None, 3])
def test_the_threshold_is_of_the_noises_cosine(x64, calls):
    """Per call and sample, in NumPy: guided up to and with the first call that rises to it."""
    n = 8
    grid, labels = jd.grids.uniform(PROCESS, 20), jnp.asarray(LABELS[:n])
    start = jnp.asarray(np.random.default_rng(0).normal(size=(n, 2)))
    x, guided = np.asarray(start), np.zeros(n, int)
    below = crossed = np.zeros(n, bool)
    for i in range(20):
        (t, a, s), (_, a1, s1) = grid.node(i), grid.node(i + 1)
        cond, uncond = (
            np.asarray(evaluated(network(), jnp.asarray(x), c, (float(t), float(a), float(s))))
            for c in (labels, jnp.full(n, NULL))
        )
        eps = np.where(crossed[:, None], cond, uncond + 3.0 * (cond - uncond))
        guided += ~crossed
        norms = np.linalg.norm(cond, axis=1) * np.linalg.norm(uncond, axis=1)
        gamma = np.sum(cond * uncond, 1) / norms
        below = below | (gamma < 0.999)
        crossed = crossed | ((gamma >= 0.999) & (below if calls is None else i >= calls))
        x = a1 * (x - s * eps) / a + s1 * eps
    denoiser = guidance.adaptive_guidance(network(), 3.0, NULL, 0.999, calls, n)
    state = sample(denoiser, start, save="state")
    np.testing.assert_array_equal(state.memory.guided, guided)
    np.testing.assert_allclose(state.registers[0], x, rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match="was made for a batch of 8, got 9"):
        sample(denoiser, X[:9])


# --- LinearAG -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paths():
    found = guidance.record_guidance(network(), 3.0, NULL, TABLE, X, jnp.asarray(LABELS))
    return [jax.tree.map(lambda a, p=p: a[:, p], found) for p in (slice(64), slice(64, None))]


def test_recorded_paths_are_the_predictions_of_every_row(paths):
    """The first two rows, by hand."""
    grid, x, conds = jd.grids.uniform(PROCESS, 20), np.asarray(X), (LABELS, np.full(COUNT, NULL))
    for i in range(2):
        (t, a, s), (_, a1, s1) = grid.node(i), grid.node(i + 1)
        levels = float(t), float(a), float(s)
        pair = [evaluated(network(), jnp.asarray(x), jnp.asarray(c), levels) for c in conds]
        for got, expected in zip(paths[0], pair):
            np.testing.assert_allclose(got[i], expected[:64], rtol=1e-4, atol=1e-5)
        eps = np.asarray(pair[1] + 3.0 * (pair[0] - pair[1]))
        x = (a1 / a * x + (s1 - a1 * s / a) * eps).astype(np.float32)


def test_linear_ag_predicts_held_out_paths(paths, full):
    """Castillo et al. (row 107): fitted on 64 paths, under 10% off on 192 others; every second row of 20
    without its unconditional half is 30 evaluations, and samples are within 0.02 of full guidance
    (without guidance 0.65)."""
    fit = guidance.fit_linear_ag(paths[0])
    held_out = guidance.linear_residuals(fit, paths[1])
    np.testing.assert_allclose(guidance.linear_residuals(fit, paths[0]), fit.residuals, atol=1e-6)
    assert np.sum(fit.replaced) == 10 and np.all(held_out[fit.replaced] > 0)
    assert np.max(held_out) < 0.1
    state = sample(guidance.linear_guidance(network(), 3.0, NULL, fit, X), save="state")
    assert int(state.memory.evaluations) == 30
    assert rmse(state.registers[0], full) <= 0.02


def test_a_replaced_row_is_the_least_squares_combination():
    """Against NumPy's normal equations, on made-up predictions that are such combinations and noise."""
    rng = np.random.default_rng(3)
    cond, uncond = rng.normal(size=(2, 4, 30, 2))
    uncond[2] = 0.5 * cond[0] - 2.0 * cond[2] + 1.5 * uncond[1] + 0.01 * uncond[2]
    fit = guidance.fit_linear_ag(jd.guidance.linear_ag.Predictions(cond, uncond), [2])
    columns = np.stack([cond[0], cond[1], cond[2], uncond[0], uncond[1]]).reshape(5, -1)
    expected = np.linalg.solve(columns @ columns.T, columns @ uncond[2].ravel())
    np.testing.assert_allclose(fit.coefficients[2, 0, :3], expected[:3], rtol=1e-8)
    np.testing.assert_allclose(fit.coefficients[2, 1, :2], expected[3:], rtol=1e-8)
    assert not np.any(fit.coefficients[[0, 1, 3]])


def test_bad_fits_are_named(paths):
    for rows in ([0], [20], []):
        with pytest.raises(ValueError, match="replaced must be some of the rows 1 to 19"):
            guidance.fit_linear_ag(paths[0], rows)
    few = jax.tree.map(lambda a: a[:, :10], paths[0])
    with pytest.raises(ValueError, match="record more"):
        guidance.fit_linear_ag(few)
    fit = guidance.fit_linear_ag(paths[0], [3])
    with pytest.raises(ValueError, match="fitted for 20 rows, this sampler has 2"):
        table = jd.solvers.ddim(jd.grids.uniform(PROCESS, 2))
        denoiser = guidance.linear_guidance(network(), 3.0, NULL, fit, X)
        jd.sample(denoiser, table, X, cond=jnp.asarray(LABELS))
    with pytest.raises(TypeError, match="must be a LinearAG"):
        guidance.linear_guidance(network(), 3.0, NULL, paths[0], X)
