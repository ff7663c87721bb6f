"""Autoguidance on a Gaussian, whose guided flow is known."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

import jaxdiff as jd
from jaxdiff.guidance import autoguidance

PROCESS = jd.processes.vp_cosine()


def gaussian(std, prediction):
    return jd.gaussian_mixture(np.zeros((1, 2)), [std], [1.0], PROCESS, prediction)


@pytest.mark.parametrize("scale", [1.0, 2.0, 3.0])
def test_a_wider_model_narrows_a_gaussian(x64, scale):
    """Karras et al., D = s D_good + (1 - s) D_bad; good and bad predict different things.

    In y = x / alpha and rho = sigma / alpha the flow is dy/drho = rho y sum_i s_i / (std_i^2 + rho^2).
    """
    guided = autoguidance(gaussian(0.5, "v"), gaussian(0.9, "eps"), scale)
    grid = jd.grids.half_log_snr(PROCESS, 400, t_max=0.99, t_min=0.01)
    x = jnp.asarray([[1.0, -0.5]])
    got = jd.sample(guided, jd.solvers.dpm_solver_pp_multistep(grid), x)

    def rate(rho):
        return rho * (scale / (0.25 + rho**2) + (1 - scale) / (0.81 + rho**2))

    rho = grid.sigma / grid.alpha
    change = -quad(rate, rho[-1], rho[0])[0]
    factor = np.exp(change) * grid.alpha[-1] / grid.alpha[0]
    np.testing.assert_allclose(got, factor * np.asarray(x), rtol=5e-4)
    assert guided.cost == 2 and guided.prediction == "v"


def counting(params, x, t, cond=None, *, memory):
    return params * x, memory + 1


def test_each_network_has_its_memory_and_its_condition():
    def fn(x, t, cond=None):
        return x if cond is None else x + cond[:, None]

    good = jd.Denoiser(counting, "eps", params=2.0, memory=jnp.asarray(0))
    guided = autoguidance(good, jd.Denoiser(fn), 3.0, each_cond=True)
    x, cond = jnp.ones((2, 3)), (jnp.ones(2), None)
    out, memory = guided.evaluate(x, 0.5, 0.6, 0.8, cond, guided.memory)
    np.testing.assert_allclose(out, 1.0 + 3.0 * (2.0 - 1.0))
    assert memory == (1, None)
    table = jd.solvers.ddim(jd.grids.half_log_snr(PROCESS, 2))
    with pytest.raises(ValueError, match="a pair of conditions"):
        jd.sample(guided, table, x, cond=jnp.ones(2))
    with pytest.raises(TypeError, match="autoguidance takes a jaxdiff.Denoiser"):
        autoguidance(good, fn, 3.0)
    with pytest.raises(ValueError, match="the bad model: .* 'eps' network does not determine 'v'"):
        table = jd.solvers.ddim(jd.grids.from_arrays([1.0, 0.5], [0.0, 0.6], [1.0, 0.8]))
        jd.sample(
            autoguidance(gaussian(1.0, "v"), gaussian(1.0, "eps"), 2.0), table, jnp.ones((2, 2))
        )
