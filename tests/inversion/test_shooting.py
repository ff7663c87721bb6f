"""Newton on the whole run: any deterministic sampler."""

import jax.numpy as jnp
import numpy as np
import pytest
from oracles import BROAD

import jaxdiff as jd
from jaxdiff.inversion import NotConvergedError, shoot

PROCESS = jd.processes.vp_linear()
GRID = jd.grids.uniform(PROCESS, 8)


def mixture():
    return jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, PROCESS, "x0")


def start():
    return BROAD.sample(np.random.default_rng(0), 6, GRID.alpha[0], GRID.sigma[0])


@pytest.mark.parametrize("name", ["unipc_3", "heun"])
def test_predictor_corrector_and_runge_kutta_are_inverted(x64, name):
    tableau, x = jd.solvers.build(name, GRID), start()
    x_0 = jd.sample(mixture(), tableau, x)
    found = shoot(mixture(), tableau, x_0)
    assert np.abs(found.x_T - x).max() < 1e-10 and int(found.iterations) <= 6
    assert np.all(found.converged) and np.max(found.residual) <= 1e-12
    # The same noise from elsewhere: the run is one to one here.
    other = shoot(mixture(), tableau, x_0, guess=jnp.asarray(x) + 0.3)
    np.testing.assert_allclose(other.x_T, x, atol=1e-10)


def test_a_clean_end_has_an_answer_for_whole_runs(x64):
    """To sigma = 0 a single step forgets the noise (`solve_back` refuses): a whole run does not."""
    grid = jd.grids.uniform(PROCESS, 8, end="zero")
    tableau = jd.solvers.build("unipc_3", grid)
    x_0 = jd.sample(mixture(), tableau, start())
    found = shoot(mixture(), tableau, x_0, max_iterations=40)
    np.testing.assert_allclose(jd.sample(mixture(), tableau, found.x_T), x_0, atol=1e-11)


def test_what_is_not_reached_is_named(x64):
    tableau, x = jd.solvers.build("unipc_3", GRID), start()
    x_0 = jd.sample(mixture(), tableau, x)
    with pytest.raises(NotConvergedError, match="6 of 6 samples .* in 1 iterations: .*residual"):
        shoot(mixture(), tableau, x_0, max_iterations=1)
    found = shoot(mixture(), tableau, x_0, max_iterations=1, throw=False)
    assert not np.any(found.converged)


def test_noise_is_named():
    with pytest.raises(ValueError, match="deterministic samplers, got one that draws noise"):
        shoot(mixture(), jd.solvers.ddpm(GRID), jnp.zeros((2, 2)))
