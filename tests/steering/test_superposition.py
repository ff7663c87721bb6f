"""SuperDiff on two overlapping mixtures of two modes, one of them shared, with exact scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import Mixture

import jaxdiff as jd
from jaxdiff.guidance import product
from jaxdiff.steering import superposition

PROCESS = jd.processes.vp_linear()
MODES = np.array([[-2.5, -0.5], [0.0, 0.5], [2.5, -0.5]])
FIRST, SECOND = (Mixture(MODES[k : k + 2], np.full(2, 0.6), np.full(2, 0.5)) for k in (0, 1))
STEPS, COUNT = 1000, 1500
GRID = jd.grids.half_log_snr(PROCESS, STEPS, t_min=1e-3)
TABLE = jd.solvers.ddpm(GRID)


def exact(mixture, prediction="eps"):
    return jd.gaussian_mixture(mixture.means, mixture.std, mixture.weights, prediction=prediction)


BOTH = product([exact(FIRST), exact(SECOND, "v")], [0.5, 0.5], keep_parts=True)
X_T = jax.random.normal(jax.random.key(0), (COUNT, 2))
NOISE = jax.random.normal(jax.random.key(1), (TABLE.draws, COUNT, 2))


def run(rule, grid=GRID, noise=NOISE, table=None, x_T=X_T, **options):
    """(x, log q estimated, log q exact, state) in float64."""
    base = jd.solvers.ddpm(grid) if table is None else table
    tableau, control = superposition(BOTH, grid, base, rule, **options)
    state = jd.sample(BOTH, tableau, x_T, noise=noise, control=control, save="state")
    x = np.asarray(state.registers[0], np.float64)
    end = grid.alpha[-1], grid.sigma[-1]
    truth = np.stack([m.log_density(x, *end) for m in (FIRST, SECOND)])
    return x, np.asarray(state.aux.log_density, np.float64), truth, state.aux


def shares(x):
    nearest = np.argmin(np.linalg.norm(x[:, None] - MODES, axis=-1), 1)
    return np.bincount(nearest, minlength=3) / len(x)


INITIAL = -np.log(2 * np.pi) - 0.5 * np.sum(np.asarray(X_T) ** 2, 1)


@pytest.fixture(scope="module")
def either():
    return run("or", initial=INITIAL)


def test_or_is_the_mixture(either):
    """Skreta et al. (2025), SuperDiff: 1/4, 1/2 and 1/4 of the samples in the modes, within 0.03."""
    np.testing.assert_allclose(shares(either[0]), [0.25, 0.5, 0.25], atol=0.03)


def test_the_densities_are_followed(either):
    """Correlation above 0.99 with the exact ones at 1000 steps, for both models."""
    _, found, truth, _ = either
    for a, b in zip(found, truth):
        assert np.corrcoef(a, b)[0, 1] > 0.99
    assert np.sqrt(np.mean((found - truth) ** 2)) < 0.3


def test_bias_and_temperature_of_or():
    """l = log 9 and 0: nine tenths of the first model; T = 0: the same shares, whatever the density."""
    grid = jd.grids.half_log_snr(PROCESS, 200, t_min=1e-3)
    x, *_ = run("or", grid, NOISE[:200], bias=np.log([9.0, 1.0]))
    np.testing.assert_allclose(shares(x), [0.45, 0.5, 0.05], atol=0.04)
    *_, aux = run("or", grid, NOISE[:200], bias=np.log([3.0, 1.0]), temperature=0.0)
    np.testing.assert_allclose(aux.shares[:, 0], [0.75, 0.25], rtol=1e-5)


def test_and_is_the_shared_mode():
    """Skreta et al. (2025): at least 90% in the shared mode, median |log q1 - log q2| below 0.05.

    The mean of both scores leaves some 76% there, at 100 steps as at 1000.
    """
    x, _, truth, aux = run("and")
    grid = jd.grids.half_log_snr(PROCESS, 100, t_min=1e-3)
    mean = product([exact(FIRST), exact(SECOND, "v")], [0.5, 0.5])
    plain = jd.sample(mean, jd.solvers.ddpm(grid), X_T, noise=NOISE[:100])
    assert shares(x)[1] >= 0.9 and shares(np.asarray(plain))[1] <= 0.8
    assert np.median(np.abs(truth[0] - truth[1])) < 0.05
    total = np.asarray(aux.shares)
    np.testing.assert_allclose(total.sum(0), 1.0, atol=1e-5)
    assert total.min() >= -5 - 1e-4 and total.max() <= 6 + 1e-4


def test_and_of_two_is_the_published_formula():
    """One Euler step: k_1 in NumPy from the paper's formula, and equal changes of both densities."""
    ve = jd.processes.edm(0.01, 20.0)
    grid = jd.grids.from_times(ve, np.array([2.0, 1.98]))
    x, z = (np.asarray(a[:6], np.float64) for a in (X_T, NOISE[0]))
    drop = 2.0 * 2.0 * 0.02  # g^2 dtau
    one, two = (m.score(x, 1.0, 2.0) for m in (FIRST, SECOND))
    gap, noise = one - two, np.sqrt(drop) * z
    top = 0.5 * drop * np.sum(one**2 - two**2, 1) - np.sum((drop * two + noise) * gap, 1)
    share = top / (drop * np.sum(gap**2, 1))
    *_, aux = run(
        "and", grid, jnp.asarray(z[None], jnp.float32), jd.solvers.euler_maruyama(grid),
        jnp.asarray(x, jnp.float32), bounds=None, reference=None,
    )  # fmt: skip
    # Euler's variance is g^2 dtau, the path's is v - v': they differ by the step's half a percent.
    np.testing.assert_allclose(aux.shares[0], share, rtol=0.03, atol=0.03)
    change = np.asarray(aux.log_density)
    np.testing.assert_allclose(change[0], change[1], atol=2e-5)


def test_and_of_three_models_changes_all_densities_alike():
    third = Mixture(MODES[[0, 2]], np.full(2, 0.6), np.array([0.3, 0.7]))
    three = product([exact(m) for m in (FIRST, SECOND, third)], keep_parts=True)
    grid = jd.grids.from_times(PROCESS, np.array([0.3, 0.295]))
    table, control = superposition(three, grid, jd.solvers.ddpm(grid), "and", bounds=None)
    state = jd.sample(three, table, X_T[:50], jax.random.key(0), control=control, save="state")
    change = np.asarray(state.aux.log_density)
    size = np.abs(np.asarray(state.aux.shares)).max(0)
    assert np.all(np.ptp(change, 0) <= 1e-4 * (1 + size))
    np.testing.assert_allclose(state.aux.shares.sum(0), 1.0, atol=1e-4 * size.max())


SHORT = jd.grids.half_log_snr(PROCESS, 20, t_min=1e-3)


@pytest.mark.parametrize(
    "denoiser, table, rule, options, error, message",
    [
        (exact(FIRST), jd.solvers.ddpm(SHORT), "or", {}, TypeError, "keep_parts=True"),
        (
            product([exact(FIRST)], keep_parts=True), jd.solvers.ddpm(SHORT), "or", {}, ValueError,
            "two models or more, got 1",
        ),
        (BOTH, jd.solvers.ddpm(SHORT), "xor", {}, ValueError, "rule must be one of"),
        (BOTH, jd.solvers.ddim(SHORT), "and", {}, ValueError, "of the reverse SDE's noise"),
        (BOTH, jd.solvers.ddim(SHORT, eta=0.5), "or", {}, ValueError, "of the reverse SDE's noise"),
        (BOTH, jd.solvers.sa_solver(SHORT), "or", {}, ValueError, "one register, one integrand"),
        (BOTH, jd.solvers.ddpm(SHORT), "or", {"bias": [1.0]}, ValueError, r"bias must be .* \(1,\)"),
        (BOTH, jd.solvers.ddpm(SHORT), "and", {"bounds": (0.6, 2.0)}, ValueError, "must hold 1 / 2"),
    ],
)  # fmt: skip
def test_bad_input_is_named(denoiser, table, rule, options, error, message):
    with pytest.raises(error, match=message):
        superposition(denoiser, SHORT, table, rule, **options)


def test_a_grid_to_the_data_is_refused():
    grid = jd.grids.half_log_snr(PROCESS, 5, end="zero")
    with pytest.raises(ValueError, match="t_min with sigma > 0"):
        superposition(BOTH, grid, jd.solvers.ddpm(grid))
