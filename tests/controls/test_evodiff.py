"""EVODiff against the authors' code, DPM-Solver++(2M), and the exact flow."""

import calibrated_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

import jaxdiff as jd
from jaxdiff.controls import evodiff

CASES = calibrated_cases.load("evodiff")


@pytest.mark.parametrize("prediction", ["x0", "eps"])
@pytest.mark.parametrize(("facts", "arrays"), CASES, ids=[str(f) for f, _ in CASES])
def test_the_authors_code_makes_the_same_states(x64, facts, arrays, prediction):
    """Every input of the network, and the result; per channel as theirs."""
    shape = (3, 2, 2, 1) if facts["channels"] == 1 else (3, 1, 1, 4)
    table, control = evodiff(calibrated_cases.grid(arrays), per="channel")
    found = jd.sample(
        shaped(prediction), table, arrays["start"].reshape(shape), control=control,
        save="trajectory",
    )  # fmt: skip
    want = np.concatenate([arrays["inputs"], arrays["result"][None]])
    np.testing.assert_allclose(found.reshape(want.shape), want, rtol=0, atol=1e-9 * abs(want).max())


def flat(params, x, levels):
    inner, (t, alpha, sigma) = params, levels
    out = inner(x.reshape(len(x), -1), t, alpha, sigma)
    return out.reshape(x.shape)


def levels_of(t, alpha, sigma):
    return t, alpha, sigma


def shaped(prediction):
    inner = calibrated_cases.mixture(prediction)
    return jd.Denoiser(flat, prediction, inner, levels_of)


# --- DPM-Solver++(2M) ----------------------------------------------------------------------------

EDM = jd.processes.edm(sigma_min=0.03, sigma_max=14.6)


def second_order(grid):
    return jd.solvers.dpm_solver_pp_multistep(grid, order=2, lower_order_final=True)


@pytest.mark.parametrize("grid", [
    jd.grids.karras(EDM, 7), jd.grids.half_log_snr(EDM, 5, end="zero"),
    jd.grids.uniform(jd.processes.vp_linear(), 6), jd.grids.uniform(jd.processes.vp_cosine(), 2),
])  # fmt: skip
@pytest.mark.parametrize("prediction", ["x0", "eps"])
def test_without_its_variances_it_is_dpm_solver_pp(x64, grid, prediction):
    table, control = evodiff(grid, adaptive=False, end="first_order")
    denoiser = calibrated_cases.mixture(prediction)
    start = np.random.default_rng(1).standard_normal((5, 4)) * grid.sigma[0]
    found, want = (
        jd.sample(denoiser, t, start, control=c, save="nodes")
        for t, c in ((table, control), (second_order(grid), None))
    )
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-12 * np.abs(want).max())


def errors(seed, steps, **options):
    """RMSE on a mixture of 4 in 16 dimensions: EVODiff's, and that of DPM-Solver++(2M)."""
    means = np.random.default_rng(seed).normal(size=(4, 16))
    denoiser = jd.gaussian_mixture(means, np.full(4, 0.2), np.ones(4))
    x = EDM.prior(jax.random.key(2), (256, 16))
    grid = jd.grids.half_log_snr(EDM, steps)
    exact = jd.sample(denoiser, second_order(jd.grids.half_log_snr(EDM, 160)), x)
    return [
        float(jnp.sqrt(jnp.mean((jd.sample(denoiser, t, x, control=c) - exact) ** 2)))
        for t, c in (evodiff(grid, **options), (second_order(grid), None))
    ]


@pytest.mark.parametrize("end", ["published", "first_order"])
@pytest.mark.parametrize(("seed", "steps"), [(0, 6), (0, 10), (1, 10), (2, 10)])
def test_few_steps_have_less_error_than_second_order(seed, steps, end):
    found, base = errors(seed, steps, end=end)
    assert found <= 0.8 * base


def test_digits():
    """A kernel density of digits, 10 evaluations: the distance to others is no larger."""
    data = load_digits().data / 8.0 - 1.0
    data = data[np.random.default_rng(0).permutation(len(data))]
    process = jd.processes.edm()
    denoiser = jd.gaussian_mixture(data[:300], np.full(300, 0.1), np.ones(300))
    x = process.prior(jax.random.key(2), (512, 64))
    grid = jd.grids.half_log_snr(process, 10)
    kernel = jd.metrics.rbf(jd.metrics.median_bandwidth(data[:500], data[500:1000]))
    found, base = (
        jd.metrics.mmd(jd.sample(denoiser, t, x, control=c), data[800:], kernel)
        for t, c in (evodiff(grid, end="first_order"), (second_order(grid), None))
    )
    assert found <= base


# --- the rest -------------------------------------------------------------------------------------


def test_a_stacked_grid_runs_under_vmap_and_a_gradient_is_finite():
    """Coefficients are leaves: three spans in one program, and the last level's derivative."""
    denoiser = calibrated_cases.mixture("x0")
    x = 14.6 * np.random.default_rng(3).standard_normal((2, 4)).astype(np.float32)
    grids = [jd.grids.half_log_snr(EDM, 5), jd.grids.karras(EDM, 5)]
    pairs = [evodiff(grid) for grid in grids]
    stacked = jax.tree.map(lambda *a: jnp.stack([jnp.asarray(v) for v in a]), *pairs)
    run = lambda pair: jd.sample(denoiser, pair[0], x, control=pair[1])  # noqa: E731
    together = jax.vmap(run)(stacked)
    for pair, found in zip(pairs, together):
        np.testing.assert_allclose(found, run(pair), rtol=0, atol=2e-5)

    def loss(sigma):
        levels = jnp.asarray(grids[0].sigma).at[2].set(sigma)
        grid = jd.grids.from_arrays(levels, jnp.ones(6), levels)
        return jnp.sum(run(evodiff(grid)) ** 2)

    sigma, step = float(grids[0].sigma[2]), 0.01
    want = (loss(sigma + step) - loss(sigma - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(loss)(sigma), want, rtol=0.05)


def test_leaves_of_a_state_are_one_sample(x64):
    """A state in two leaves is the state in one."""
    table, control = evodiff(jd.grids.half_log_snr(EDM, 5))
    inner = calibrated_cases.mixture("x0")

    def split(params, x, levels):
        out = params(jnp.concatenate([x["a"], x["b"]], 1), *levels)
        return {"a": out[:, :1], "b": out[:, 1:]}

    x = 14.6 * np.random.default_rng(3).standard_normal((2, 4))
    found = jd.sample(
        jd.Denoiser(split, "x0", inner, levels_of), table, {"a": x[:, :1], "b": x[:, 1:]},
        control=control,
    )  # fmt: skip
    want = jd.sample(inner, table, x, control=control)
    np.testing.assert_allclose(np.concatenate([found["a"], found["b"]], 1), want, atol=1e-12)


@pytest.mark.parametrize(("grid", "options", "message"), [
    (jd.grids.karras(EDM, 5), {"end": "probe"}, "end must be one of"),
    (jd.grids.karras(EDM, 5), {"per": "pixel"}, "per must be one of"),
    (jd.grids.karras(EDM, 1), {}, "at least 2 steps"),
    (jd.grids.karras(EDM, 5).reversed(), {}, "from noise to data"),
    (jd.grids.uniform(jd.processes.flow(), 5), {}, "alpha = 0"),
])  # fmt: skip
def test_what_it_does_not_take(grid, options, message):
    with pytest.raises(ValueError, match=message):
        evodiff(grid, **options)
