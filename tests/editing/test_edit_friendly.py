"""Edit-friendly noise maps against their definition, their statistics, and exact round trips."""

import exact_digits
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import jaxdiff as jd
from jaxdiff import editing

PROCESS = jd.processes.vp_cosine()
STEPS = 40
GRID = jd.grids.half_log_snr(PROCESS, STEPS)
DDPM = jd.solvers.ddim(GRID, eta=1.0)
KEY = jax.random.key(0)


def mixture(dtype=jnp.float32):
    o = oracles.BROAD
    return jd.gaussian_mixture(o.means, o.std, o.weights, PROCESS, prediction="eps", dtype=dtype)


@pytest.fixture(scope="module")
def data():
    return jnp.asarray(oracles.BROAD.sample(np.random.default_rng(1), 400), jnp.float32)


@pytest.fixture(scope="module")
def code(data):
    return editing.edit_friendly(mixture(), DDPM, data, KEY)


def test_it_is_the_published_extraction(x64):
    """Row by row in NumPy: mu_t of the official code at eta = 1, and z = (x_{t-1} - mu_t) / s_t."""
    x0 = oracles.BROAD.sample(np.random.default_rng(2), 5)
    code = editing.edit_friendly(mixture(jnp.float64), DDPM, jnp.asarray(x0), KEY)
    x = np.asarray(code.states)
    assert x.shape == (STEPS + 1, 5, 2)
    np.testing.assert_array_equal(x[-1] + code.residual, x0)
    for i in range(STEPS):
        (_, a, _), (_, a1, _) = GRID.node(i), GRID.node(i + 1)
        abar, abar1 = a**2, a1**2
        eps = oracles.BROAD.eps(x[i], a, GRID.sigma[i])
        variance = (1 - abar1) / (1 - abar) * (1 - abar / abar1)
        x0_hat = (x[i] - (1 - abar) ** 0.5 * eps) / abar**0.5
        mu = abar1**0.5 * x0_hat + (1 - abar1 - variance) ** 0.5 * eps
        z = (x[i + 1] - mu) / variance**0.5
        np.testing.assert_allclose(code.noise[i], z, rtol=1e-7, atol=1e-7)
    again = editing.replay(mixture(jnp.float64), DDPM, code)
    assert np.abs(again - x0).max() < 1e-10


def test_states_are_independent_noisings(code, data):
    """(x_i - alpha x_0) / sigma is standard normal, and uncorrelated between levels."""
    alpha, sigma = (np.asarray(c)[:-1, None, None] for c in (GRID.alpha, GRID.sigma))
    e = (np.asarray(code.states)[:-1] - alpha * np.asarray(data)) / sigma
    e = e.reshape(STEPS, -1)
    assert np.abs(e.std(1) - 1).max() < 4 / np.sqrt(2 * e.shape[1])
    neighbours = np.mean(e[1:] * e[:-1], axis=1)
    assert np.abs(neighbours).max() < 4 / np.sqrt(e.shape[1])


def test_round_trips(code, data):
    """Under one condition the data come back: 1e-5 in float32 (1e-10 in float64, above)."""
    again = editing.replay(mixture(), DDPM, code)
    assert np.abs(again - data).max() < 1e-5
    # The grid ends at sigma > 0, so the last row's noise does it alone.
    assert np.abs(code.residual).max() < 1e-6


def test_maps_are_wider_than_noise_and_negatively_correlated(code, data):
    """Pooled std above 1.05; that of a native run, extracted the same way, is 1 within 0.02."""
    z = np.asarray(code.noise)
    assert z.std() > 1.05
    assert np.mean(z[1:] * z[:-1]) / z.var() < -0.2
    x_T = PROCESS.prior(jax.random.key(5), data.shape)
    states = jd.sample(mixture(), DDPM, x_T, key=KEY, save="trajectory")
    native = editing.extract(mixture(), DDPM, states)
    assert abs(np.std(native.noise) - 1) < 0.02
    used = [jd.noise.normal(KEY, data, r) for r in range(STEPS)]
    # Float32 states of size 1, divided by the smallest noise.
    smallest = np.min(np.asarray(DDPM.C))
    np.testing.assert_allclose(native.noise, np.stack(used), atol=1e-5 + 1e-6 / smallest)


def test_replay_from_a_later_state(code, data):
    """The rows after `skip` alone return to the data, and are rows of the whole sampler."""
    again = editing.replay(mixture(), DDPM, code, skip=25)
    assert np.abs(again - data).max() < 1e-5
    rest = editing.tail(DDPM, 25)
    assert (rest.rows, rest.draws, rest.nfe) == (15, 15, 15)
    fresh = jd.solvers.ddim(jd.grids.from_times(PROCESS, GRID.t[25:]), eta=1.0)
    for a, b in zip(jax.tree.leaves(rest), jax.tree.leaves(fresh)):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_other_rows(data):
    """Half the noise, and SDE-DPM-Solver++(2M), whose rows look back: LEDITS++'s sampler."""
    for tableau in (
        jd.solvers.ddim(GRID, eta=0.3),
        jd.solvers.dpm_solver_pp_sde_multistep(GRID, order=2),
    ):
        code = editing.edit_friendly(mixture(), tableau, data, KEY)
        assert np.abs(editing.replay(mixture(), tableau, code) - data).max() < 1e-5
    with pytest.raises(ValueError, match="build this one on the rest of the grid"):
        editing.replay(mixture(), tableau, code, skip=3)


def test_a_last_row_without_noise_leaves_a_residual(data):
    """To sigma = 0 the sampler ends in D(x_1), and the residual is the rest."""
    grid = jd.grids.half_log_snr(PROCESS, STEPS, end="zero")
    tableau = jd.solvers.ddim(grid, eta=1.0)
    code = editing.edit_friendly(mixture(), tableau, data, KEY)
    assert code.noise.shape[0] == tableau.draws == STEPS - 1
    last = mixture().predict("x0", code.states[-2], *grid.node(STEPS - 1))
    np.testing.assert_allclose(code.residual, data - last, atol=1e-6)
    assert np.abs(code.residual).max() > 1e-3
    again = editing.replay(mixture(), tableau, code, residual=False)
    np.testing.assert_allclose(again, data - code.residual, atol=1e-5)
    assert np.abs(editing.replay(mixture(), tableau, code) - data).max() < 1e-5


def elementwise(x, t):
    return jax.tree.map(lambda a: jnp.tanh(3 * a), x)


def test_a_shifted_code_is_a_shifted_picture():
    """For a denoiser that commutes with shifts; a code is a pytree, so an edit is a tree map."""
    denoiser = jd.Denoiser(elementwise, "x0")
    tableau = jd.solvers.ddim(jd.grids.half_log_snr(PROCESS, 8), eta=1.0)
    rng = np.random.default_rng(0)
    shapes = {"image": (2, 6, 6, 1), "depth": (2, 4, 4, 2)}
    x0 = {k: np.asarray(rng.normal(size=shape), np.float32) for k, shape in shapes.items()}
    code = editing.edit_friendly(denoiser, tableau, x0, KEY)
    moved = jax.tree.map(lambda a: jnp.roll(a, 2, axis=-2), code)
    again = editing.replay(denoiser, tableau, moved)
    for k, x in x0.items():
        np.testing.assert_allclose(again[k], np.roll(x, 2, axis=-2), atol=1e-5)


def test_digits_return_and_are_edited():
    """Threes become eights, and stay nearer to themselves than other eights are."""
    train, test = jd.data.digits("train"), jd.data.digits("test")
    denoiser = exact_digits.denoiser(train.x, train.label)
    x0 = jnp.asarray(test.x[test.label == 3][:24])
    three, eight = jnp.full(len(x0), 3), jnp.full(len(x0), 8)
    tableau = jd.solvers.ddim(jd.grids.half_log_snr(PROCESS, 40), eta=1.0)
    code = editing.edit_friendly(denoiser, tableau, x0, KEY, three)
    again, edited = (
        editing.replay(denoiser, tableau, code, cond, skip=12) for cond in (three, eight)
    )
    assert np.abs(again - x0).max() < 1e-5
    labels = exact_digits.nearest_label(edited, train.x, train.label)
    assert np.mean(labels == 8) >= 0.9
    others = jnp.asarray(test.x[test.label == 8][:24])
    kept, far = (np.sqrt(np.mean((a - x0) ** 2)) for a in (edited, others))
    assert kept < 0.9 * far


def test_samples_do_not_depend_on_their_batch(data):
    keys = jd.sample_keys(KEY, np.arange(len(data)))
    one = editing.edit_friendly(mixture(), DDPM, data, keys)
    two = editing.edit_friendly(mixture(), DDPM, jnp.roll(data, 7, 0), jnp.roll(keys, 7))
    np.testing.assert_allclose(jnp.roll(one.states, 7, 1), two.states, atol=1e-5)


def test_bad_input_is_named(data):
    ode, rk = jd.solvers.ddim(GRID), jd.solvers.dpm_solver_pp_sde(GRID)
    with pytest.raises(ValueError, match="stochastic tableau.*jaxdiff.inversion"):
        editing.edit_friendly(mixture(), ode, data, KEY)
    with pytest.raises(ValueError, match="one register.*got 2 registers"):
        editing.edit_friendly(mixture(), rk, data, KEY)
    with pytest.raises(TypeError, match="takes a Tableau"):
        editing.edit_friendly(mixture(), GRID, data, KEY)
    with pytest.raises(
        ValueError, match=r"rows \+ 1, batch, ...\] with 40 rows, got \(40, 400, 2\)"
    ):
        editing.extract(mixture(), DDPM, jnp.zeros((40, 400, 2)))
    with pytest.raises(ValueError, match="floating-point, got int"):
        editing.edit_friendly(mixture(), DDPM, jnp.zeros((4, 2), int), KEY)
    with pytest.raises(ValueError, match=r"skip must be an integer in 0..39, got 40"):
        editing.tail(DDPM, 40)
