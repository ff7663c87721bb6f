"""Single-step DPM-Solver with ancestral noise, k-diffusion's dpm_fast: what the catalogue's tests
do not say."""

import jax
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff.solvers.ancestral import kdpm2_ancestral
from jaxdiff.solvers.singlestep import dpm_solver_singlestep

PROCESS = jd.processes.vp_linear()
GRID = jd.grids.karras(PROCESS, 5)


@pytest.mark.parametrize("eta", [0.5, 1.0, 1.1])
def test_order_two_with_noise_is_kdpm2_ancestral_above_the_last_level(eta):
    grid = jd.grids.karras(PROCESS, 20)
    ours = dpm_solver_singlestep(grid, 2, eta=eta, s_noise=1.1)
    theirs = kdpm2_ancestral(grid, eta, 1.1)
    ratio = grid.sigma / grid.alpha
    share = 1 - eta**2 + (eta * ratio[1:] / ratio[:-1]) ** 2
    down = ratio[1:] * np.sqrt(np.maximum(share, 0.0))
    free = np.flatnonzero(down > ratio[-1])
    assert len(free) >= 2 and ours.draws == 19
    for i in free:
        rows = slice(2 * i, 2 * i + 2)
        for name in ("A", "C", "alpha", "sigma", "clock"):
            got, expected = getattr(ours, name)[rows], getattr(theirs, name)[rows]
            np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(ours.B[rows, :, :1], theirs.B[rows], rtol=1e-9, atol=1e-12)
        assert np.abs(ours.B[rows, :, 1:]).max() < 1e-12


@pytest.mark.parametrize("end", ["t_min", "zero"])
def test_noise_ends_at_the_last_level_above_zero(end):
    """Where a step would go below it, noise is what is left: sigma'^2 - (alpha' rho_last)^2."""
    grid = jd.grids.half_log_snr(PROCESS, 4, end=end)
    last = 4 if end == "t_min" else 3
    table = dpm_solver_singlestep(grid, 3, eta=1.0)
    noise = table.C[np.cumsum([3] * (last - 1)) - 1, 0]
    assert np.count_nonzero(table.C) == table.draws == last - 1
    ratio = grid.sigma / grid.alpha
    down = np.maximum(ratio[1:last] ** 2 / ratio[: last - 1], ratio[last])
    expected = np.sqrt(grid.sigma[1:last] ** 2 - (grid.alpha[1:last] * down) ** 2)
    np.testing.assert_allclose(noise, expected, rtol=1e-9)
    assert np.isclose(down[-1], ratio[last], rtol=1e-9)
    bare = jd.grids.from_arrays(grid.t, grid.alpha, grid.sigma)
    np.testing.assert_allclose(dpm_solver_singlestep(bare, 3, eta=1.0).C, table.C, rtol=1e-9)


def test_noise_that_cannot_be_is_named():
    for options, message in (
        ({"eta": -1.0}, "eta must be finite and not negative, got -1.0"),
        ({"eta": 1.0, "s_noise": np.inf}, "s_noise must be finite"),
        ({"eta": 1.0, "stages": "nodes"}, "stages='nodes' takes eta = 0, got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            dpm_solver_singlestep(GRID, **options)
    with pytest.raises(ValueError, match="from data to noise takes eta = 0"):
        dpm_solver_singlestep(GRID.reversed(), eta=1.0)
    with pytest.raises(TypeError, match="eta must be a number"):
        dpm_solver_singlestep(GRID, eta="1")
    with pytest.raises(ValueError, match="known on the host, got eta=1.5"):
        jax.jit(lambda t: dpm_solver_singlestep(jd.grids.from_times(PROCESS, t), eta=1.5).C)(
            np.array([0.9, 0.5, 0.1])
        )


# --- options --------------------------------------------------------------------------------------
