"""DiffIER: its iteration by hand, K = 0, and what it does to guided samples of a mixture."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import spearmanr

import jaxdiff as jd
from jaxdiff.controls import diff_ier
from jaxdiff.guidance import classifier_free
from jaxdiff.metrics import sliced_wasserstein

PROCESS = jd.processes.vp_linear()
GRID = jd.grids.half_log_snr(PROCESS, 30)
CLASSES, PER = 3, 2


def components(seed, dim):
    """Means of a mixture of three classes, each of two Gaussians of standard deviation 0.35."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(CLASSES, 1, dim))
    return (centres + 0.6 * rng.normal(size=(CLASSES, PER, dim))).reshape(-1, dim)


def expected_noise(means, x, levels, label):
    """Exact, given the class; label 3 is every class."""
    _, alpha, sigma = levels
    variance = alpha**2 * 0.35**2 + sigma**2
    delta = x[:, None] - alpha * means
    inside = (label[:, None] == CLASSES) | (label[:, None] == jnp.arange(len(means)) // PER)
    log_joint = -0.5 * jnp.sum(delta**2, -1) / variance
    share = jax.nn.softmax(jnp.where(inside, log_joint, -jnp.inf), -1)
    return sigma * jnp.sum(share[..., None] * delta, 1) / variance


def all_levels(t, alpha, sigma):
    return t, alpha, sigma


def guided(means, scale):
    inner = jd.Denoiser(expected_noise, "eps", jnp.asarray(means, jnp.float32), all_levels)
    return classifier_free(inner, scale, CLASSES)


@functools.partial(jax.jit, static_argnums=2)
def run(means, scales, iterations):
    """(samples [scales, 500, dim], accumulated error [scales]) of class 0 with DDIM."""
    x = jax.random.normal(jax.random.key(1), (500, means.shape[1]))
    label, table = jnp.zeros(500, int), jd.solvers.ddim(GRID)

    def one(scale):
        denoiser = guided(means, scale)
        control = diff_ier(denoiser, iterations, 0.1, label)
        state = jd.sample(denoiser, table, x, cond=label, control=control, save="state")
        return state.registers[0], state.aux.error.mean()

    return jax.vmap(one)(scales)


@pytest.mark.parametrize(("seed", "dim"), [(20, 16), (21, 16), (22, 16)])
def test_it_brings_guided_samples_nearer_to_the_class(seed, dim):
    """The accumulated error tells the true one, and K = 5 lowers it and flattens the curve.

    The true error is the sliced Wasserstein distance to the class. Its rank correlation with the
    accumulated error over nine scales is 1 here. `step` was chosen on seeds 10 and 11 in 2, 4 and
    16 dimensions, not on these; there the error at scales 3 and 7 fell to between 0.47 and 0.81 of
    that without, but in one case of 2 dimensions, where it stayed (1.00 and 0.97).
    """
    means = components(seed, dim)
    rng = np.random.default_rng(seed)
    target = means[rng.integers(0, PER, 4000)] + 0.35 * rng.normal(size=(4000, dim))

    def errors(samples):
        return [sliced_wasserstein(s, target, jax.random.key(0), 64) for s in samples]

    scales = np.array([1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    samples, accumulated = run(means, scales, 0)
    plain = errors(samples)
    assert spearmanr(accumulated, plain).statistic >= 0.7
    samples, less = run(means, scales[[3, 7]], 5)
    moved, without = np.array(errors(samples)), np.array(plain)[[3, 7]]
    assert np.all(moved < 0.9 * without)
    assert moved[1] - moved[0] < 0.9 * (without[1] - without[0])
    assert np.all(less < accumulated[np.array([3, 7])])


@pytest.mark.parametrize(("build", "options"), [
    (jd.solvers.unipc, {"iterations": 0}), (jd.solvers.ddpm, {"iterations": 1, "step": 0.0}),
])  # fmt: skip
def test_without_iterations_it_is_the_guided_sampler(build, options):
    """Bit for bit."""
    means, table = components(0, 4), build(jd.grids.half_log_snr(PROCESS, 5))
    key, label = jax.random.key(3), jnp.zeros(6, int)
    x = jax.random.normal(jax.random.key(0), (6, 4))
    denoiser = guided(means, 4.0)
    plain = jd.sample(denoiser, table, x, key, cond=label)
    control = diff_ier(denoiser, cond=label, **options)
    found = jd.sample(denoiser, table, x, key, cond=label, control=control)
    assert np.array_equal(found, plain)


@pytest.mark.parametrize(("prediction", "step"), [("eps", 0.2), ("v", 2.5)])
def test_the_iteration_by_hand(x64, prediction, step):
    """Gaussian data: eps(x) = sigma (alpha^2 V + sigma^2)^-1 (x - alpha mean), spelled out."""
    rng = np.random.default_rng(0)
    factor, mean, start = rng.normal(size=(3, 3)), rng.normal(size=3), rng.normal(size=(5, 3))
    cov, grid = factor @ factor.T, jd.grids.uniform(PROCESS, 6)
    denoiser = jd.gaussian_mixture(mean[None], cov[None], [1.0], PROCESS, prediction)
    x, kept, total, shorter = start, None, 0.0, 0
    for i in range(6):
        (_, a, s), (_, a1, s1) = grid.node(i), grid.node(i + 1)
        slope = s * np.linalg.inv(a**2 * cov + s**2 * np.eye(3))
        if kept is not None:
            noise = (x - a * kept) / s
            for _ in range(3):
                g = ((x - a * mean) @ slope - noise) @ slope
                most = np.sum(g**2, 1) / np.sum((g @ slope) ** 2, 1)
                shorter += np.sum(most < step * s**2)
                x = x - np.minimum(step * s**2, most)[:, None] * g
            total = total + np.sum(((x - a * mean) @ slope - noise) ** 2, 1)
        eps = (x - a * mean) @ slope
        kept = (x - s * eps) / a
        x = a1 * kept + s1 * eps
    assert (shorter > 0) == (step > 1)
    table, control = jd.solvers.ddim(grid), diff_ier(denoiser, 3, step)
    if prediction == "v":
        # A row that only fills up a stacked table changes nothing.
        both = jd.solvers.stack([table, jd.solvers.ddim(jd.grids.uniform(PROCESS, 9))])
        table = jax.tree.map(lambda a: a[0], both)
    found = jd.sample(denoiser, table, start, control=control, save="state")
    np.testing.assert_allclose(found.registers[0], x, rtol=1e-9)
    np.testing.assert_allclose(found.aux.error, total, rtol=1e-9)


def test_a_continued_run_moves_its_first_row():
    """3 + 3 rows are the 6: the pair comes with the state, though rows are counted anew."""
    denoiser, label = guided(components(0, 4), 4.0), jnp.zeros(6, int)
    control = diff_ier(denoiser, np.int64(2), cond=label)
    grid, x = jd.grids.half_log_snr(PROCESS, 6), jax.random.normal(jax.random.key(0), (6, 4))

    def run(first, last, x, state=None):
        part = jd.grids.from_times(PROCESS, grid.t[first : last + 1])
        table = jd.solvers.ddim(part)
        return jd.sample(
            denoiser, table, x, cond=label, control=control, save="state", state=state
        )

    whole, parts = run(0, 6, x), run(3, 6, None, run(0, 3, x))
    np.testing.assert_allclose(parts.registers[0], whole.registers[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(parts.aux.error, whole.aux.error, rtol=1e-5)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"iterations": -1}, ValueError, "from 0 to.*got -1"),
    ({"iterations": 1.0}, ValueError, "an integer.*got 1.0"),
    ({"step": -0.1}, ValueError, "step must be.*got -0.1"),
    ({"step": np.inf}, ValueError, "finite.*got inf"),
    ({"denoiser": None}, TypeError, "diff_ier takes a jaxdiff.Denoiser"),
    ({"denoiser": jd.Denoiser(all_levels, ("x0", "eps"))}, ValueError, "one prediction"),
])  # fmt: skip
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        diff_ier(**{"denoiser": guided(components(0, 2), 2.0), **options})
