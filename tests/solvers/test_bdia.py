"""BDIA: the published step, its exact inverse, and where rounding defeats it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import BROAD

import jaxdiff as jd
from jaxdiff.solvers.bdia import bdia

PROCESS = jd.processes.vp_linear()
FLOW = jd.processes.flow()


def mixture(process=PROCESS, prediction="x0"):
    return jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, process, prediction)


def start(grid, count=16):
    return BROAD.sample(np.random.default_rng(0), count, grid.alpha[0], grid.sigma[0])


def ddim_map(x, grid, i, j):
    """The state at node j by DDIM from x at node i."""
    e = BROAD.eps(x, grid.alpha[i], grid.sigma[i])
    return grid.alpha[j] * (x - grid.sigma[i] * e) / grid.alpha[i] + grid.sigma[j] * e


def scale(base, grid, i):
    return {"ddim": 1.0, "edm": grid.alpha[i], "dpm_solver_pp": grid.sigma[i]}[base]


def published(x, grid, gamma, base):
    """The README's form, in z = x / scale: both integrals' increments, the last one mixed."""
    size = functools.partial(scale, base, grid)
    z = [x / size(0), ddim_map(x, grid, 0, 1) / size(1)]
    for i in range(1, grid.steps):
        now = z[i] * size(i)
        backward = ddim_map(now, grid, i, i - 1) / size(i - 1) - z[i]
        forward = ddim_map(now, grid, i, i + 1) / size(i + 1) - z[i]
        z.append(
            z[i - 1] - (1 - gamma) * (z[i - 1] - z[i]) - gamma * backward + forward
        )  # fmt: skip
    return z[-1] * size(grid.steps)


def there_and_back(grid, gamma, dtype, base="ddim", process=PROCESS, x=None):
    """(x_T, the sample, x_T found again from the pair)."""
    with jax.enable_x64(dtype == np.float64):
        x = jnp.asarray((start(grid) if x is None else x).astype(dtype))
        denoiser = mixture(process)
        state = jd.sample(denoiser, bdia(grid, gamma, base), x, save="state")
        pair = state._replace(registers=state.registers[::-1])
        back = bdia(grid.reversed(), gamma, base, start="pair")
        assert back.nfe == grid.steps - 1
        again = jd.sample(denoiser, back, None, state=pair)
        return np.asarray(x), np.asarray(state.registers[0]), np.asarray(again)


@pytest.mark.parametrize("base", ["ddim", "edm", "dpm_solver_pp"])
def test_it_is_the_published_step(x64, base):
    grid = jd.grids.quadratic(PROCESS, 7)
    x = start(grid)
    got = jd.sample(mixture(), bdia(grid, 0.6, base), x)
    np.testing.assert_allclose(got, published(x, grid, 0.6, base), rtol=1e-9)


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_a_round_trip_is_exact_in_float32(steps):
    grid = jd.grids.uniform(PROCESS, steps)
    x, _, again = there_and_back(grid, 1.0, np.float32)
    assert x.dtype == np.float32 and np.abs(again - x).max() < 1e-5


def test_it_is_more_accurate_than_ddim():
    grid = jd.grids.uniform(PROCESS, 20)
    x, sample, _ = there_and_back(grid, 1.0, np.float64)
    ends = [(grid.alpha[i], grid.sigma[i]) for i in (0, -1)]
    exact = BROAD.flow(x, *ends)
    with jax.enable_x64(True):
        first_order = np.asarray(jd.sample(mixture(), jd.solvers.ddim(grid), x))
    ours, theirs = (np.sqrt(np.mean((a - exact) ** 2)) for a in (sample, first_order))
    assert ours <= 0.3 * theirs


@pytest.mark.parametrize("steps", [10, 20])
def test_a_weaker_correction_needs_float64(steps):
    """gamma = 0.5 doubles rounding errors a step."""
    x, _, again = there_and_back(jd.grids.uniform(PROCESS, steps), 0.5, np.float64)
    assert np.abs(again - x).max() < 1e-8


def test_fifty_steps_of_a_weaker_correction_fail_in_float32():
    x, _, again = there_and_back(jd.grids.uniform(PROCESS, 50), 0.5, np.float32)
    assert np.abs(again - x).max() > 1e3


@pytest.mark.parametrize("base", ["ddim", "edm"])
def test_back_from_sigma_zero(base):
    """The pair's last state is never evaluated, so that its level may be sigma = 0."""
    x, sample, again = there_and_back(
        jd.grids.uniform(PROCESS, 8, end="zero"), 1.0, np.float64, base
    )
    assert np.abs(again - x).max() < 1e-11 and np.abs(sample).max() < 5


def test_back_to_pure_noise():
    """alpha = 0 at the noise end, where the first step forgets x_T but the second uses it."""
    grid = jd.grids.uniform(FLOW, 8)
    x = np.random.default_rng(1).normal(size=(16, 2))
    x, _, again = there_and_back(grid, 0.8, np.float64, "ddim", FLOW, x)
    assert np.abs(again - x).max() < 1e-10


def test_an_encoder_starts_from_a_sample_alone(x64):
    """As the authors edit images: a first step of DDIM makes the pair; back from it is exact."""
    grid = jd.grids.half_log_snr(PROCESS, 12)
    sample = BROAD.sample(np.random.default_rng(3), 16, grid.alpha[-1], grid.sigma[-1])
    encoder = bdia(grid.reversed(), 0.9)
    assert encoder.nfe == 12
    state = jd.sample(mixture(), encoder, sample, save="state")
    pair = state._replace(registers=state.registers[::-1])
    again = jd.sample(mixture(), bdia(grid, 0.9, start="pair"), None, state=pair)
    np.testing.assert_allclose(again, sample, atol=1e-10)
    ends = [(grid.alpha[i], grid.sigma[i]) for i in (-1, 0)]
    noise = np.asarray(state.registers[0])
    assert np.median(np.linalg.norm(noise - BROAD.flow(sample, *ends), axis=1)) < 0.05


def test_no_correction_is_ddim(x64):
    grid = jd.grids.half_log_snr(PROCESS, 6, end="zero")
    x = start(grid)
    expected = jd.sample(mixture(), jd.solvers.ddim(grid), x)
    for base in ("ddim", "edm", "dpm_solver_pp"):
        got = jd.sample(mixture(), bdia(grid, 0.0, base), x)
        np.testing.assert_allclose(got, expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda g: bdia(g, 1.5), r"gamma must be in \[0, 1\], and not 0 backward, got 1.5"),
        (lambda g: bdia(g.reversed(), 0.0), "not 0 backward, got 0.0"),
        (lambda g: bdia(g, base="heun"), "base must be one of .* got 'heun'"),
        (lambda g: bdia(g, start="two"), "start must be one of .* got 'two'"),
        (lambda g: bdia(jd.grids.uniform(PROCESS, 1), start="pair"), "at least 2 steps, got 1"),
        (lambda g: bdia(jd.grids.uniform(FLOW, 4), base="edm"), "bdia over edm .*alpha = 0"),
        (
            lambda g: bdia(jd.grids.uniform(PROCESS, 4, end="zero").reversed()),
            "backward from sigma = 0 only from a pair",
        ),
        (
            lambda g: bdia(
                jd.grids.uniform(PROCESS, 4, end="zero").reversed(), 1.0, "dpm_solver_pp", "pair"
            ),
            "base='dpm_solver_pp'",
        ),
        (lambda g: bdia(jd.grids.uniform(FLOW, 4).reversed(), 1.0, "edm"), "end with alpha = 0"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(jd.grids.uniform(PROCESS, 4))


def test_a_strength_that_is_no_number_is_named():
    with pytest.raises(TypeError, match="gamma must be a number, got None"):
        bdia(jd.grids.uniform(PROCESS, 4), gamma=None)
