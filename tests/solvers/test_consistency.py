"""Consistency samplers: diffusers' formula, their limits, and a consistency model sampled."""

import numpy as np
import pytest
from oracles import BROAD

import jaxdiff as jd
from jaxdiff.arrays import namespace
from jaxdiff.solvers.consistency import consistency, tcd

PROCESS = jd.processes.ddpm("scaled_linear", beta_start=0.00085, beta_end=0.012)
TIMES = [999.0, 799.0, 599.0, 399.0, 199.0, 0.0]


def network(x, t):
    return namespace(x).sin(x + 0.001 * t)


def by_timesteps(x, noise, gamma):
    """diffusers' TCDScheduler, eps prediction, written in cumulative alphas."""
    for i, (t, t1) in enumerate(zip(TIMES[:-1], TIMES[1:])):
        s = np.floor((1.0 - gamma) * t1)
        bar, bar1, bar_s = (PROCESS.alpha(np.float64(k)) ** 2 for k in (t, t1, s))
        eps = network(x, t)
        x0 = (x - np.sqrt(1 - bar) * eps) / np.sqrt(bar)
        x_s = np.sqrt(bar_s) * x0 + np.sqrt(1 - bar_s) * eps
        x = np.sqrt(bar1 / bar_s) * x_s
        if i < len(TIMES) - 2:
            x = x + np.sqrt(1 - bar1 / bar_s) * noise[i]
    return x


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.75, 1.0])
def test_tcd_is_diffusers(gamma, x64):
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(3, 2)), rng.normal(size=(5, 3, 2))
    tableau = tcd(jd.grids.from_times(PROCESS, TIMES), gamma)
    denoiser = jd.Denoiser(network, "eps")
    out = jd.sample(denoiser, tableau, x, noise=noise[: tableau.draws] if gamma else None)
    np.testing.assert_allclose(out, by_timesteps(x, noise, gamma), rtol=1e-9, atol=1e-10)


def test_gamma_goes_from_ddim_to_multistep_consistency_sampling():
    process = jd.processes.vp_linear()
    for end in ("t_min", "zero"):
        grid = jd.grids.half_log_snr(process, 6, end=end)
        for variable in ("t", "rho"):
            none, all_ = tcd(grid, 0.0, variable), tcd(grid, 1.0, variable)
            assert none.C is None
            np.testing.assert_allclose(none.A, jd.solvers.ddim(grid).A, rtol=1e-12)
            for field in ("A", "B", "C"):
                expected = getattr(consistency(grid), field)
                np.testing.assert_allclose(getattr(all_, field), expected, atol=1e-15)
        np.testing.assert_array_equal(consistency(grid).A, 0.0)


def test_in_edm_time_the_two_variables_are_one():
    grid = jd.grids.karras(jd.processes.edm(), 6)
    a, b = tcd(grid, 0.4), tcd(grid, 0.4, "rho")
    for field in ("A", "B", "C"):
        np.testing.assert_allclose(getattr(a, field), getattr(b, field), rtol=1e-12)


def test_a_consistency_model_is_sampled_exactly(x64):
    """Data N(0, 0.5^2), whose consistency function is linear: the end's variance is the data's.

    With the posterior mean in its place the same sampler loses variance.
    """
    std, process = 0.5, jd.processes.vp_linear()
    grid = jd.grids.half_log_snr(process, 4, end="zero")

    def jump(x, levels):
        _, alpha, sigma = levels
        return std * x / (alpha**2 * std**2 + sigma**2) ** 0.5

    def mean(x, levels):
        _, alpha, sigma = levels
        return alpha * std**2 * x / (alpha**2 * std**2 + sigma**2)

    tableau = consistency(grid)
    basis = np.eye(1 + tableau.draws)
    first = (grid.alpha[0] * std) ** 2 + grid.sigma[0] ** 2

    def variance(fn):
        denoiser = jd.Denoiser(fn, "x0", time=jd.denoisers.level)
        out = jd.sample(denoiser, tableau, basis[:, :1], noise=basis[1:, :, None])[:, 0]
        return out[0] ** 2 * first + (out[1:] ** 2).sum()

    np.testing.assert_allclose(variance(jump), std**2, rtol=1e-12)
    assert variance(mean) < 0.97 * std**2


def test_more_steps_do_not_help_with_a_posterior_mean(x64):
    """The spread tends to half the data's variance: these samplers have no order."""
    process = jd.processes.vp_linear()
    denoiser = jd.gaussian_mixture(np.zeros((1, 1)), np.array([0.5]), np.ones(1), process)
    found = []
    for steps in (50, 200):
        grid = jd.grids.half_log_snr(process, steps, t_min=1e-4)
        tableau = consistency(grid)
        basis = np.eye(1 + tableau.draws)
        out = jd.sample(denoiser, tableau, basis[:, :1], noise=basis[1:, :, None])[:, 0]
        found.append(float((out**2).sum()))
    assert abs(found[1] - 0.125) < abs(found[0] - 0.125) < 0.02


def test_bad_options_are_named():
    grid = jd.grids.half_log_snr(jd.processes.vp_linear(), 4)
    arrays = jd.grids.from_arrays(grid.t, grid.alpha, grid.sigma)
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\], got 1.5"):
        tcd(grid, 1.5)
    with pytest.raises(TypeError, match="gamma must be a number known on the host, got None"):
        tcd(grid, None)
    with pytest.raises(ValueError, match="variable must be one of .*got 'lambda'"):
        tcd(grid, 0.5, "lambda")
    with pytest.raises(ValueError, match="data to noise takes gamma = 0"):
        tcd(grid.reversed())
    with pytest.raises(ValueError, match="take variable='rho'"):
        tcd(arrays)
    assert tcd(arrays, variable="rho").nfe == 4
    x = BROAD.sample(np.random.default_rng(0), 2, grid.alpha[-1], grid.sigma[-1])
    assert np.all(np.isfinite(jd.sample(
        jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights), tcd(grid.reversed(), 0.0), x
    )))  # fmt: skip
