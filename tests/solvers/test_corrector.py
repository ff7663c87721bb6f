"""A corrector over predictors of every kind: the order that it adds, and where it does not."""

import jax
import numpy as np
import pytest
from listed import run_all
from oracles import BROAD, fitted_order, median_error

import jaxdiff as jd

PROCESS = jd.processes.vp_linear()
STEPS = (80, 160, 320)


def order(make):
    """Fitted on the inner span, 2-D: `make` takes a grid."""
    grids = [jd.grids.half_log_snr(PROCESS, n, t_max=0.6, t_min=0.05) for n in STEPS]
    (a, s), (a1, s1) = ((g, h) for g, h in zip(grids[0].alpha[[0, -1]], grids[0].sigma[[0, -1]]))
    x = BROAD.sample(np.random.default_rng(0), 64, a, s)
    with jax.enable_x64(True):
        denoiser = jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, PROCESS)
        ends = run_all(denoiser, [make(grid) for grid in grids], x)
    exact = BROAD.flow(x, (a, s), (a1, s1))
    return fitted_order(STEPS, [median_error(end, exact) for end in ends])


@pytest.mark.parametrize(
    ("name", "options", "low", "high"),
    [
        ("ddim", {"order": 2}, 1.9, 2.2),
        ("dpm_solver_pp_2s", {"order": 3}, 2.85, 3.3),
        # Stages stand at states of low order.
        ("dpm_solver_pp_2s", {"order": 3, "stages": True}, 1.8, 2.3),
        ("dpm_solver_pp_3s", {"order": 4, "ramp": False}, 3.75, 4.3),
        # Its first corrected steps, of order 2 and 3, are worse than the predictor's.
        ("dpm_solver_pp_3s", {"order": 4}, 2.8, 3.4),
        ("rk4", {"order": 5, "integrand": "eps", "ramp": False}, 3.75, 5.3),
    ],
)
def test_the_order_that_a_corrector_gives(name, options, low, high):
    found = order(lambda grid: jd.solvers.corrected(jd.solvers.build(name, grid), grid, **options))
    assert low <= found <= high


@pytest.mark.parametrize("name", ["heun", "rk4"])
def test_two_evaluations_at_one_level_are_named(name):
    grid = jd.grids.half_log_snr(PROCESS, 6)
    with pytest.raises(ValueError, match="twice at one level.*stages=False"):
        jd.solvers.corrected(jd.solvers.build(name, grid), grid, 3, "eps", stages=True)


@pytest.mark.parametrize("traced_grid", [False, True])
def test_a_tableau_that_is_an_argument_of_jit_is_corrected(x64, traced_grid):
    grid = jd.grids.half_log_snr(PROCESS, 6)
    table = jd.solvers.build("dpm_solver_pp_2m", grid)
    expected = jd.solvers.corrected(table, grid, 3)
    if traced_grid:
        got = jax.jit(lambda t, g: jd.solvers.corrected(t, g, 3))(table, grid)
    else:
        got = jax.jit(lambda t: jd.solvers.corrected(t, grid, 3))(table)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("heun", "2 registers and 12 rows for 6 steps"),
        ("unipc_2", "2 registers and 6 rows for 6 steps"),
    ],
)
def test_a_traced_tableau_whose_nodes_are_not_evident_is_refused(name, text):
    grid = jd.grids.half_log_snr(PROCESS, 6)
    table = jd.solvers.build(name, grid)
    with pytest.raises(ValueError, match=f"{text}.*outside of jax.jit"):
        jax.jit(lambda t: jd.solvers.corrected(t, grid, 3, "eps"))(table)


# --- time as the variable, where the grid knows few times ------------------------------------------

DDPM = jd.processes.ddpm("linear", 1000)


@pytest.mark.parametrize(
    "grid",
    [
        jd.grids.trailing(DDPM, 8), jd.grids.leading(DDPM, 8), jd.grids.linspace(DDPM, 8),
        jd.grids.half_log_snr(PROCESS, 8, end="zero"),
    ],
    ids=["trailing", "leading", "linspace", "half-log-SNR"],
)  # fmt: skip
def test_deis_in_time_reaches_sigma_zero_on_every_spacing(x64, grid):
    """The last step's weights sum to the first-order one's: exact for a constant eps."""
    for table in (
        jd.solvers.deis(grid), jd.solvers.exponential_adams(grid, 3, "x0", "t"),
        jd.solvers.exponential_adams(grid, 3, "v", "t"),
    ):  # fmt: skip
        assert np.all(np.isfinite(table.B))
    one = jd.solvers.ddim(jd.grids.from_arrays(*(a[-2:] for a in (grid.t, grid.alpha, grid.sigma))))
    eps = one.B[0, 0, 0, 0] * -grid.sigma[-2] / grid.alpha[-2]  # of x0 = (x - sigma eps) / alpha
    np.testing.assert_allclose(jd.solvers.deis(grid).B[-1, 0, :, 0].sum(), eps, rtol=1e-9)


def test_repeated_times_are_refused_for_time_alone():
    base = jd.grids.half_log_snr(PROCESS, 6)
    t = base.t.copy()
    t[3] = t[2]
    grid = jd.grids.from_arrays(t, base.alpha, base.sigma)
    assert np.all(np.isfinite(jd.solvers.exponential_adams(grid, 3).B))
    with pytest.raises(ValueError, match="nodes 2 and 3 are both at t"):
        jd.solvers.deis(grid)
