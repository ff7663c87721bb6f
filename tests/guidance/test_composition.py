"""Composable Diffusion on a grid of cells with exact scores, and products in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import counted
from conditional import conditional_mixture

import jaxdiff as jd
from jaxdiff.guidance import classifier_free, compose, product

PROCESS = jd.processes.vp_linear()
CELLS = np.array([[3.0 * i, 3.0 * j] for i in (-1, 0, 1) for j in (-1, 0, 1)])
COLUMN, ROW, NULL = (lambda i: i), (lambda j: 3 + j), 6
SUBSETS = [CELLS[:, 0] == 3.0 * (i - 1) for i in range(3)]
SUBSETS += [CELLS[:, 1] == 3.0 * (j - 1) for j in range(3)] + [np.ones(9, bool)]
NET = conditional_mixture(CELLS, np.full(9, 0.3), SUBSETS)
COUNT = 1000
GRID = jd.grids.half_log_snr(PROCESS, 100)
X_T = PROCESS.prior(jax.random.key(0), (COUNT, 2))


def same(k):
    return jnp.full(COUNT, k)


def cell_of(x):
    return np.argmin(np.linalg.norm(np.asarray(x)[:, None] - CELLS, axis=-1), 1)


def sampled(denoiser, *conds):
    return jd.sample(denoiser, jd.solvers.ddim(GRID), X_T, cond=conds)


def test_and_is_the_right_cell_and_not_leaves_it():
    """Liu et al. (2022), Composable Diffusion: at least 95% of AND's samples, at most 2% of NOT's.

    AND with weights 1; NOT with weight -2. With -1 DDIM leaves 8% and DDPM 4%: nothing in the method
    says that they should all go, p(x) / p(x | row) being finite in the row.
    """
    composed = compose(NET, [1.0, 1.0], NULL)
    x = sampled(composed, same(COLUMN(2)), same(ROW(0)))
    assert np.mean(cell_of(x) == 6) >= 0.95
    # The weights are leaves: the same program, with a negation.
    negated = compose(NET, [1.0, -2.0], NULL)
    with counted() as programs:
        x = sampled(negated, same(COLUMN(2)), same(ROW(0)))
    assert not programs
    cells = cell_of(x)
    assert np.mean(cells == 6) <= 0.02
    assert np.mean(CELLS[cells, 0] == 3.0) >= 0.95


def test_one_condition_is_guidance():
    """w = 1 is conditional sampling to 1e-6, and any w classifier-free guidance."""
    label = jnp.asarray([0, 2, 4, 5, 1])
    x, level = X_T[:5], (0.5, PROCESS.alpha(0.5), PROCESS.sigma(0.5))
    plain = NET(x, *level, label)
    np.testing.assert_allclose(compose(NET, [1.0], NULL)(x, *level, (label,)), plain, atol=1e-6)
    guided = classifier_free(NET, 3.5, NULL)(x, *level, label)
    np.testing.assert_allclose(
        compose(NET, [3.5], NULL)(x, *level, (label,)), guided, rtol=1e-5, atol=1e-5
    )


def test_all_conditions_are_one_call_with_weights_of_samples_and_of_time():
    """The network's predictions one by one, summed in float64; cost is the calls' batch."""
    sizes = []

    def fn(x, t, cond):
        sizes.append(x["a"].shape[0])
        shift = cond[:, None] + jnp.asarray(t)[..., None]
        return jax.tree.map(lambda a: jnp.sin(a) * shift, x)

    net = jd.Denoiser(fn, "v")
    t = jnp.linspace(0.1, 0.9, 4)
    level = t, PROCESS.alpha(t), PROCESS.sigma(t)
    x = {"a": jnp.arange(8.0).reshape(4, 2), "b": jnp.ones((4, 3))}
    weights = [jnp.asarray([0.5, 1.0, -2.0, 3.0]), lambda t, alpha, sigma: 2.0 * sigma]
    conds = jnp.asarray([1.0, 2, 3, 4]), jnp.asarray([-1.0, 0, 1, 2])
    composed = compose(net, weights, jnp.float32(0.25), keep_parts=True)
    assert composed.prediction == ("v",) * 4 and composed.cost == 3
    found = composed(x, *level, conds)
    assert sizes == [12]
    base, *others = (fn(x, t, jnp.broadcast_to(c, (4,))) for c in (0.25, *conds))
    factors = np.asarray(weights[0]), 2.0 * np.asarray(level[2])
    for leaf in x:
        want = np.asarray(base[leaf], np.float64)
        for factor, other in zip(factors, others):
            want = want + factor[:, None] * (np.asarray(other[leaf], np.float64) - base[leaf])
        np.testing.assert_allclose(found[0][leaf], want, rtol=2e-5, atol=2e-5)
        for part, alone in zip(found[1:], (base, *others)):
            np.testing.assert_allclose(part[leaf], alone[leaf], rtol=1e-6, atol=1e-6)


def test_a_product_of_networks_has_the_product_s_score():
    """Gaussians, of three predictions, with powers: the precisions add at every level."""
    level = 0.4, PROCESS.alpha(0.4), PROCESS.sigma(0.4)
    means, stds, powers = [0.5, -1.0, 2.0], [0.6, 1.0, 0.8], [1.0, -0.5, 2.0]
    parts = [
        jd.gaussian_mixture([[m, -m]], [s], [1.0], prediction=p)
        for m, s, p in zip(means, stds, ("x0", "v", "score"))
    ]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)), jnp.float32)
    found = product(parts, powers).predict("score", x, *level)
    _, a, s = level
    variance = a**2 * np.square(stds) + s**2
    centre = a * np.array(means)[:, None] * np.array([1.0, -1.0])
    want = -np.einsum("k,knd->nd", powers / variance, np.asarray(x) - centre[:, None])
    np.testing.assert_allclose(found, want, rtol=2e-4, atol=2e-5)


def test_memories_of_the_networks_are_kept_apart():
    """Two counters, one of which counts by tens; a third network has none."""

    def counting(step, x, t, memory):
        return x, memory + step

    nets = [jd.Denoiser(counting, "eps", jnp.asarray(s), memory=jnp.asarray(0)) for s in (1, 10)]
    nets.append(jd.Denoiser(lambda x, t: 0.0 * x, "eps"))
    table = jd.solvers.ddim(jd.grids.half_log_snr(PROCESS, 3))
    state = jd.sample(product(nets), table, jnp.ones((2, 1)), save="state")
    assert [int(m) for m in state.memory[:2]] == [3, 30] and state.memory[2] is None


def test_bad_input_is_named():
    table = jd.solvers.ddim(jd.grids.half_log_snr(PROCESS, 2))
    x = jnp.zeros((3, 2))
    with pytest.raises(ValueError, match="at least one weight"):
        compose(NET, [], NULL)
    with pytest.raises(ValueError, match="a scale must be a finite number"):
        compose(NET, [np.nan], NULL)
    with pytest.raises(ValueError, match="needs a conditional model"):
        compose(jd.gaussian_mixture(CELLS, np.full(9, 0.3), np.ones(9)), [1.0], NULL)
    with pytest.raises(ValueError, match="2 weights: sample with cond= a tuple .* got NoneType"):
        jd.sample(compose(NET, [1.0, 1.0], NULL), table, x)
    with pytest.raises(ValueError, match="1 weights: sample with cond= .* got 2"):
        jd.sample(compose(NET, [1.0], NULL), table, x, cond=(jnp.zeros(3, int),) * 2)
    with pytest.raises(ValueError, match=r"\[batch\] = \(3,\), got shape \(2,\)"):
        jd.sample(compose(NET, [jnp.ones(2)], NULL), table, x, cond=(jnp.zeros(3, int),))
    with pytest.raises(ValueError, match="got 3 weights for 2 denoisers"):
        product([NET, NET], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="one prediction"):
        product([jd.clip_x0(NET, keep_eps=True)])
    with pytest.raises(TypeError, match="takes a jaxdiff.Denoiser"):
        product([None])
