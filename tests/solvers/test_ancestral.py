"""Ancestral samplers: the published formulas, for every process, and what equals what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import BROAD

import jaxdiff as jd
from jaxdiff.solvers.ancestral import (
    dpm_solver_pp_2s_ancestral,
    euler_ancestral,
    kdpm2_ancestral,
)

VP, EDM, FLOW = jd.processes.vp_linear(), jd.processes.edm(), jd.processes.flow()
SPANS = {"vp": (VP, 0.98, 0.02), "edm": (EDM, 60.0, 0.01), "flow": (FLOW, 0.99, 0.01)}
SAMPLERS = [euler_ancestral, kdpm2_ancestral, dpm_solver_pp_2s_ancestral]


def grid_of(process, steps=7, end="zero"):
    process, t_max, t_min = SPANS[process]
    return jd.grids.karras(process, steps, t_max=t_max, t_min=t_min, end=end)


def run(grid, table, noise, save="nodes"):
    process = grid.process
    denoiser = jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, process)
    x = start(grid)
    return x, np.asarray(jd.sample(denoiser, table, jnp.asarray(x), noise=noise, save=save))


def start(grid):
    return BROAD.sample(np.random.default_rng(0), 6, grid.alpha[0], grid.sigma[0])


def x0_of(y, rho):
    return y - rho * BROAD.eps(y, 1.0, rho)


# --- what k-diffusion and ComfyUI do, written out in y = x / alpha and rho ----------------------


def posterior_levels(rho, rho1, eta):
    up = min(rho1, eta * np.sqrt(rho1**2 * (rho**2 - rho1**2) / rho**2))
    return np.sqrt(rho1**2 - up**2), up


def flow_levels(rho, rho1, eta):
    """ComfyUI's, in the flow's sigma = tau; noise and levels brought to y."""
    tau, tau1 = rho / (1 + rho), rho1 / (1 + rho1)
    tau_down = tau1 * (1 + (tau1 / tau - 1) * eta)
    kept = (1 - tau1) / (1 - tau_down)
    renoise = np.sqrt(tau1**2 - tau_down**2 * kept**2)
    return tau_down / (1 - tau_down), renoise / (1 - tau1)


LEVELS = {"posterior": posterior_levels, "flow": flow_levels}


def euler_step(y, rho, down):
    return y + (y - x0_of(y, rho)) / rho * (down - rho)


def kdpm2_step(y, rho, down):
    middle = np.exp(0.5 * (np.log(rho) + np.log(down)))
    inner = euler_step(y, rho, middle)
    return y + (inner - x0_of(inner, middle)) / middle * (down - rho)


def two_stage_step(y, rho, down):
    lam, end = -np.log(rho), -np.log(down)
    middle = np.exp(-(lam + 0.5 * (end - lam)))
    inner = middle / rho * y - np.expm1(-0.5 * (end - lam)) * x0_of(y, rho)
    return down / rho * y - np.expm1(-(end - lam)) * x0_of(inner, middle)


STEPS = dict(zip(SAMPLERS, (euler_step, kdpm2_step, two_stage_step)))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("process", "down", "eta", "s_noise"),
    [
        ("edm", "posterior", 1.0, 1.0), ("vp", "posterior", 0.6, 1.1),
        ("flow", "flow", 1.0, 1.0), ("vp", "flow", 0.6, 0.9), ("edm", "posterior", 1.2, 1.0),
    ],
)  # fmt: skip
def test_it_is_the_published_formula(x64, sampler, process, down, eta, s_noise):
    grid = grid_of(process)
    table = sampler(grid, eta=eta, s_noise=s_noise, down=down)
    noise = np.random.default_rng(1).normal(size=(table.draws, 6, 2))
    x, nodes = run(grid, table, jnp.asarray(noise))
    rho = grid.sigma / grid.alpha
    y, expected = x / grid.alpha[0], [x / grid.alpha[0]]
    for i in range(grid.steps):
        if rho[i + 1] == 0:
            y = euler_step(y, rho[i], 0.0)
        else:
            lower, up = LEVELS[down](rho[i], rho[i + 1], eta)
            step = euler_step if lower == 0 else STEPS[sampler]
            y = step(y, rho[i], lower) + s_noise * up * noise[i]
        expected.append(y)
    got = nodes / grid.alpha[:, None, None]
    np.testing.assert_allclose(got, np.stack(expected), rtol=1e-9, atol=1e-10)


# --- what equals what ---------------------------------------------------------------------------


@pytest.mark.parametrize("process", SPANS)
def test_euler_ancestral_is_ddim_with_the_same_eta_and_ddpm_at_one(process):
    grid = grid_of(process)
    for eta in (0.0, 0.4, 1.0):
        ours, ddim = euler_ancestral(grid, eta=eta), jd.solvers.ddim(grid, eta=eta)
        for name in ("A", "B", "C", "clock", "t"):
            got, expected = getattr(ours, name), getattr(ddim, name)
            assert (got is None) == (expected is None)
            if got is not None:
                np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)
    ddpm = jd.solvers.ddpm(grid)
    np.testing.assert_allclose(ours.A, ddpm.A, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(ours.C, ddpm.C, rtol=1e-10)


def test_without_noise_the_two_stage_samplers_are_second_order_flow_solvers(x64):
    """eta = 0: KDPM2 and DPM-Solver++(2S), against the exact flow."""
    for sampler in (kdpm2_ancestral, dpm_solver_pp_2s_ancestral):
        errors = []
        for steps in (40, 80):
            grid = jd.grids.half_log_snr(VP, steps, t_max=0.6, t_min=0.05)
            table = sampler(grid, eta=0.0)
            assert not table.stochastic and table.brownian is None
            x, end = run(grid, table, None, "final")
            exact = BROAD.flow(x, *((grid.alpha[i], grid.sigma[i]) for i in (0, -1)))
            errors.append(np.median(np.linalg.norm(end - exact, axis=-1)))
        assert 3.5 < errors[0] / errors[1] < 4.6


def test_at_eta_one_the_middle_is_the_next_node():
    grid = grid_of("vp", end="t_min")
    table = dpm_solver_pp_2s_ancestral(grid)
    np.testing.assert_allclose(table.sigma[1::2], grid.sigma[1:], rtol=1e-9)
    np.testing.assert_allclose(table.t[1::2], grid.t[1:], rtol=1e-9)


def test_noise_above_the_next_level_is_clipped():
    grid = grid_of("edm")
    with pytest.raises(ValueError, match="more noise than sigma"):
        jd.solvers.ddim(grid, eta=1.2)
    for sampler in SAMPLERS:
        np.testing.assert_allclose(sampler(grid, eta=50.0).C[:, 0].max(), grid.sigma[1])


@pytest.mark.parametrize("noise_end", [True, False])
def test_gradients_with_respect_to_the_grid_are_finite(noise_end):
    """Also from alpha = 0 to sigma = 0, where roots and logarithms have infinite slopes."""
    process = FLOW if noise_end else VP
    grid = jd.grids.uniform(process, 3, end="t_min" if noise_end else "zero")
    assert grid.ends == (noise_end, True)

    @jax.jit
    @jax.grad
    def slope(alpha):
        moved = jd.grids.from_arrays(jnp.asarray(grid.t), alpha, jnp.asarray(grid.sigma), grid.ends)
        total = 0.0
        for sampler in (euler_ancestral, dpm_solver_pp_2s_ancestral):
            table = sampler(moved)
            total += table.A.sum() + table.B.sum() + (table.C**2).sum()
        return total

    assert np.all(np.isfinite(slope(jnp.asarray(grid.alpha, jnp.float32))))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_bad_options_are_named(sampler):
    grid = grid_of("vp", 3)
    for options, message in (
        ({"eta": -0.5}, "eta must be finite and not negative, got -0.5"),
        ({"s_noise": -1.0}, "s_noise must be finite and not negative, got -1.0"),
        ({"down": "up"}, "down must be one of .* got 'up'"),
    ):
        with pytest.raises(ValueError, match=message):
            sampler(grid, **options)
    for bad in (None, True, "1"):
        with pytest.raises(TypeError, match="eta must be a number known on the host, got"):
            sampler(grid, eta=bad)
    with pytest.raises(ValueError, match="from data to noise takes eta = 0, got 1.0"):
        sampler(grid_of("vp", 3, "t_min").reversed())
