"""DPM-Encoder, CycleDiffusion and plug-and-play guidance against closed forms."""

import exact_digits
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

import jaxdiff as jd
from jaxdiff import editing

PROCESS = jd.processes.vp_cosine()
GRID = jd.grids.half_log_snr(PROCESS, 40)
DDPM = jd.solvers.ddim(GRID, eta=1.0)
KEY = jax.random.key(0)

# Modes far apart in units of their width, so that a mode is a fact about a sample.
MEANS = np.array([[2.0, 0.0], [-2.0, 0.5], [0.0, -2.5], [0.5, 2.5]])
SHIFT = np.array([0.6, -0.4])


def mixture(shift=0.0):
    return jd.gaussian_mixture(MEANS + shift, np.full(4, 0.25), np.ones(4), PROCESS)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(1)
    x = MEANS[rng.integers(0, 4, 600)] + 0.25 * rng.normal(size=(600, 2))
    return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_the_chain_has_the_marginals_of_the_forward_process(eta):
    """q(x_i | x_0) is N(alpha x_0, sigma^2) at every node; neighbours as the DDIM family says."""
    x0 = jnp.full((4000, 1), 1.5)
    chain = editing.posterior_chain(jd.solvers.ddim(GRID, eta=eta), x0, KEY)
    assert chain.shape == (41, 4000, 1)
    np.testing.assert_array_equal(chain[-1], x0)
    alpha, sigma = (np.asarray(c)[:-1] for c in (GRID.alpha, GRID.sigma))
    e = (np.asarray(chain)[:-1, :, 0] - alpha[:, None] * 1.5) / sigma[:, None]
    assert np.abs(e.mean(1)).max() < 4.5 / np.sqrt(4000)
    assert np.abs(e.std(1) - 1).max() < 4.5 / np.sqrt(2 * 4000)
    # x' - alpha' x0 = sqrt(sigma'^2 - s^2) e + s z: the noises' correlation is the first root / sigma'.
    share = -np.expm1(2 * (GRID.lam[:-2] - GRID.lam[1:-1]))
    want = np.sqrt(1 - eta**2 * share)
    np.testing.assert_allclose(np.mean(e[1:] * e[:-1], 1), want, atol=4.5 / np.sqrt(4000))


def test_decoding_is_exact(data):
    code = editing.dpm_encoder(mixture(), DDPM, data, KEY)
    assert np.abs(editing.replay(mixture(), DDPM, code) - data).max() < 1e-5
    # A Markov chain, so its code is nearly the sampler's own noise: not edit-friendly's.
    friendly = editing.edit_friendly(mixture(), DDPM, data, KEY)
    assert np.std(code.noise) < 1.25 < 1.5 < np.std(friendly.noise)


def test_the_code_of_a_perfect_sampler_is_normal():
    """Gaussian data, a fine grid: the code is standard normal, and neighbours are uncorrelated.

    Up to the error of first-order steps of 0.12 in lambda; and but for the last map, as the grid's
    last state has noise of its own, and x_0 stands in for it.
    """
    denoiser = jd.gaussian_mixture([[0.5]], [0.7], [1.0], PROCESS)
    x0 = jnp.asarray(0.5 + 0.7 * np.random.default_rng(3).normal(size=(4000, 1)), jnp.float32)
    tableau = jd.solvers.ddim(jd.grids.half_log_snr(PROCESS, 150), eta=1.0)
    z = np.asarray(editing.dpm_encoder(denoiser, tableau, x0, KEY).noise)[:-1, :, 0]
    assert np.abs(z.mean(1)).max() < 4.5 / np.sqrt(4000)
    assert np.abs(z.std(1) - 1).max() < 0.12 and abs(z.std() - 1) < 0.05
    assert np.abs(np.mean(z[1:] * z[:-1])) < 0.02


def test_cycle_recovers_a_shift_and_keeps_modes(data):
    """Two models whose data differ by a shift: x' - x is the shift within 0.1, mode by mode."""
    moved = editing.cycle(mixture(), mixture(SHIFT), DDPM, data, KEY)
    found = np.asarray(moved - data)
    np.testing.assert_allclose(found.mean(0), SHIFT, atol=0.1)
    assert np.mean(np.linalg.norm(found - SHIFT, axis=1)) < 0.1

    def mode(x, shift):
        return np.argmin(np.linalg.norm(np.asarray(x)[:, None] - MEANS - shift, axis=-1), 1)

    assert np.mean(mode(moved, SHIFT) == mode(data, 0.0)) >= 0.95
    same = editing.cycle(mixture(), mixture(), DDPM, data, KEY)
    assert np.abs(same - data).max() < 1e-5


def bold(images):
    """Strokes a neighbour wider, by half."""
    wide = ndimage.grey_dilation(np.asarray(images), size=(1, 2, 2, 1))
    return np.float32(0.5 * (images + wide))


@pytest.mark.parametrize("eta", [0.1, 1.0])
def test_digits_become_bold(eta):
    """Model A has digits, model B bold ones: the class is kept, and the strokes get wider.

    From the early stop T_es = 0.15: from the noise's end (t = 1) exact denoisers keep two in three.
    """
    train, test = jd.data.digits("train"), jd.data.digits("test")
    a = exact_digits.denoiser(train.x, train.label)
    b = exact_digits.denoiser(bold(train.x), train.label)
    x0, labels = jnp.asarray(test.x[:100]), test.label[:100]
    tableau = jd.solvers.ddim(jd.grids.half_log_snr(PROCESS, 40), eta=eta)
    moved = editing.cycle(a, b, tableau, x0, KEY, skip=25)
    found = exact_digits.nearest_label(moved, bold(train.x), train.label)
    assert np.mean(found == labels) >= 0.9
    ink = [float(np.mean(np.asarray(y))) for y in (x0, moved, bold(x0))]
    assert ink[1] - ink[0] > 0.4 * (ink[2] - ink[0])


def pull(x):
    return 0.5 * jnp.sum((x - jnp.asarray([1.0, -1.0], x.dtype)) ** 2, -1) / 0.5**2


def test_guided_codes_have_the_posterior_of_their_energy():
    """G is linear for Gaussian data, so N(z; 0, I) exp(-E(G(z))) is Gaussian, and known."""
    denoiser = jd.gaussian_mixture([[0.3, 0.3]], [1.0], [1.0], PROCESS)
    tableau = jd.solvers.ddim(jd.grids.half_log_snr(PROCESS, 6, t_max=0.9), eta=1.0)
    x_T = PROCESS.prior(KEY, (1500, 2))
    plain = np.asarray(jd.sample(denoiser, tableau, x_T, key=KEY), np.float64)
    mean, variance = plain.mean(0), plain.var(0)
    precision = 1 / variance + 1 / 0.25
    want = (mean / variance + np.array([1.0, -1.0]) / 0.25) / precision
    step = 0.05
    x, energies = editing.langevin_codes(
        denoiser, tableau, pull, x_T, jax.random.key(4), steps=100, step_size=step
    )
    x = np.asarray(x, np.float64)
    assert energies.shape == (100, 1500) and energies[-1].mean() < 0.3 * energies[0].mean()
    np.testing.assert_allclose(x.mean(0), want, atol=0.1)
    # Unadjusted dynamics of step h widen a variance v by about 1 / (1 - h / (4 v)) in z's units.
    np.testing.assert_allclose(x.var(0), 1 / precision, rtol=0.25)


def test_bad_input_is_named(data):
    ode = jd.solvers.ddim(GRID)
    with pytest.raises(ValueError, match="needs a stochastic tableau"):
        editing.dpm_encoder(mixture(), ode, data, KEY)
    with pytest.raises(ValueError, match="needs a stochastic tableau"):
        editing.cycle(mixture(), mixture(), ode, data, KEY)
    with pytest.raises(ValueError, match="step_size must be a positive number, got 0"):
        editing.langevin_codes(mixture(), DDPM, pull, data, KEY, step_size=0)
    with pytest.raises(ValueError, match="steps must be an integer from 1"):
        editing.langevin_codes(mixture(), DDPM, pull, data, KEY, steps=0)
