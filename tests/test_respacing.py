"""Grids made from grids: truncated and shifted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd

STABLE_DIFFUSION = jd.processes.ddpm("scaled_linear", 1000, beta_start=0.00085, beta_end=0.012)


def published_timesteps(steps, nodes, rho, stop):
    """As the released code makes them: tables, and timesteps interpolated in log sigma."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = np.cumprod(1.0 - betas)
    log_sigma = 0.5 * np.log((1.0 - abar) / abar)
    ends = np.exp(log_sigma[[-1, 0]] / rho)
    sigma = (ends[0] + np.linspace(0, 1, nodes) * (ends[1] - ends[0])) ** rho
    first, last = np.interp(np.log(sigma[[0, stop]]), log_sigma, np.arange(1000.0)) ** (1 / 1.2)
    return (first + np.linspace(0, 1, steps + 1) * (last - first)) ** 1.2


@pytest.mark.parametrize(
    ("steps", "options"),
    [(8, {}), (6, {"nodes": 8, "rho": 5.0, "stop": 6}), (5, {"nodes": 8, "rho": 5.0, "stop": 6}),
     (4, {"nodes": 8, "rho": 5.0, "stop": 5})],
)  # fmt: skip
def test_truncated_karras_has_the_published_timesteps(steps, options):
    grid = jd.grids.truncated_karras(STABLE_DIFFUSION, steps, **options)
    expected = published_timesteps(steps, **{"nodes": 12, "rho": 7.0, "stop": 8, **options})
    # Between timesteps the process interpolates in another way: a hundredth of a timestep.
    np.testing.assert_allclose(grid.t, expected, rtol=0, atol=0.02)
    assert grid.sigma[-1] > 0 and not grid.ends[1]


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shifted_is_the_rectified_flow_shift_between_fixed_ends(shift):
    flow = jd.grids.uniform(jd.processes.flow(), 6)
    expected = shift * flow.sigma / (1.0 + (shift - 1.0) * flow.sigma)
    np.testing.assert_allclose(jd.grids.shifted(flow, shift).sigma, expected, atol=1e-12)
    vp = jd.grids.half_log_snr(jd.processes.vp_linear(), 6)
    moved = jd.grids.shifted(vp, shift)
    np.testing.assert_allclose(moved.lam[[0, -1]], vp.lam[[0, -1]], rtol=1e-12)
    assert np.all(np.sign(np.round(vp.lam - moved.lam, 9))[1:-1] == np.sign(np.log(shift)))
    np.testing.assert_allclose(moved.alpha**2 + moved.sigma**2, 1.0)


def test_a_shift_of_one_leaves_timesteps_whole():
    grid = jd.grids.trailing(STABLE_DIFFUSION, 10)
    assert jd.grids.shifted(grid, 1.0) is grid


def test_a_traced_shift_is_differentiated(x64):
    grid = jd.grids.half_log_snr(jd.processes.vp_linear(), 4)
    lam = lambda shift: jd.grids.shifted(grid, shift).lam  # noqa: E731
    slope = jax.jacfwd(lam)(jnp.asarray(2.0))
    expected = (lam(2.0 + 1e-5) - lam(2.0 - 1e-5)) / 2e-5
    np.testing.assert_allclose(slope, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: jd.grids.shifted(g, 0.0), "shift > 0, got 0.0"),
        (lambda g: jd.grids.shifted(g.reversed(), 2.0), "from noise to data"),
        (lambda g: jd.grids.truncated_karras(STABLE_DIFFUSION, 8, stop=12), "stop=12, nodes=12"),
    ],
)
def test_bad_respacing_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jd.grids.half_log_snr(jd.processes.vp_linear(), 4))
