"""Wrappers against closed forms: Gaussian data, where the first step is exact, and a chain of steps."""

import jax
import numpy as np
import pytest
from listed import SETTINGS, build, run_all
from oracles import BROAD
from scipy.integrate import solve_ivp

import jaxdiff as jd

VP = jd.processes.vp_linear()
FLOW = jd.processes.flow()
MEAN, STD = 0.7, 1.3


def gaussian(process, mean=MEAN, std=STD, dim=3):
    return jd.gaussian_mixture(np.full((1, dim), mean), np.array([std]), np.ones(1), process)


@pytest.mark.parametrize("process", [VP, FLOW, jd.processes.edm()], ids=["vp", "flow", "edm"])
def test_for_gaussian_data_the_analytic_first_step_changes_nothing(x64, process):
    """Of any sampler in the list, noisy ones included, but its evaluations: one less."""
    x = np.random.default_rng(0).normal(size=(4, 3))
    tables = []
    for end in ("t_min", "zero")[: 2 if process is VP else 1]:  # flow is at sigma = 0 at t_min
        grid = jd.grids.power(process, 4, 2.0, end=end)
        for name, (entry, setting) in SETTINGS.items():
            if grid.ends[0] and not entry.ends_of(setting)[0]:
                continue
            table = build(name, grid)
            if table.start.C is not None:  # churn: the first evaluation is not at x_T
                continue
            tables += [table, jd.solvers.analytic_first_step(table, MEAN, STD)]
            assert tables[-1].nfe == tables[-2].nfe - 1, name
    noise = np.random.default_rng(1).normal(size=(max(t.draws for t in tables), 4, 3))
    out = np.stack(run_all(gaussian(process), tables, x, noise=noise))
    np.testing.assert_allclose(out[1::2], out[::2], rtol=1e-9, atol=1e-9)


def test_the_analytic_step_takes_a_mean_for_each_coordinate(x64):
    means = np.array([0.3, -2.0, 1.1])
    denoiser = jd.gaussian_mixture(means[None], np.array([STD]), np.ones(1), VP)
    grid = jd.grids.half_log_snr(VP, 5)
    x = np.random.default_rng(0).normal(size=(4, 3))
    for name in ("dpm_solver_pp_3m", "unipc_3", "heun"):
        table = build(name, grid)
        other = jd.solvers.analytic_first_step(table, means, STD)
        for save in ("final", "nodes"):
            got, expected = (jd.sample(denoiser, t, x, save=save) for t in (other, table))
            np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["dpm_solver_pp_3m", "heun"])
def test_a_tableau_that_is_an_argument_of_jit_takes_the_analytic_step(x64, name):
    table = build(name, jd.grids.half_log_snr(VP, 5))
    expected = jd.solvers.analytic_first_step(table, MEAN, STD)
    got = jax.jit(jd.solvers.analytic_first_step)(table, MEAN, STD)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_tables_with_a_mean_for_each_coordinate_run_in_turn(x64):
    """For Gaussian data, where both pieces' analytic steps are exact: first, last or both."""
    means = np.array([0.3, -2.0, 1.1])
    denoiser = jd.gaussian_mixture(means[None], np.array([STD]), np.ones(1), VP)
    whole = jd.grids.half_log_snr(VP, 6)
    plain = [jd.solvers.ddim(jd.grids.from_times(VP, whole.t[part])) for part in (
        slice(0, 4), slice(3, 7)
    )]  # fmt: skip
    x = np.random.default_rng(0).normal(size=(4, 3))
    expected = jd.sample(denoiser, jd.solvers.ddim(whole), x)
    for analytic in [(0,), (1,), (0, 1)]:
        pieces = [
            jd.solvers.analytic_first_step(t, means, STD) if i in analytic else t
            for i, t in enumerate(plain)
        ]
        table = jd.solvers.concatenate(pieces)
        assert table.nfe == 6 - len(analytic)
        np.testing.assert_allclose(jd.sample(denoiser, table, x), expected, rtol=1e-10)


def test_state_shaped_coefficients_broadcast_from_the_last_axis(x64):
    """A mean of [3] beside one of [2, 3] is one for every row of the sample."""
    few, many = np.array([0.3, -2.0, 1.1]), np.random.default_rng(1).normal(size=(2, 3))
    grids = [jd.grids.half_log_snr(VP, 3, t_min=0.4), jd.grids.half_log_snr(VP, 3, t_max=0.4)]
    denoiser = jd.Denoiser(lambda x, t: 0.3 * x, "x0")
    x = np.random.default_rng(0).normal(size=(4, 2, 3))

    def pieces(*means):
        return [jd.solvers.analytic_first_step(jd.solvers.ddim(g), m, STD)
                for g, m in zip(grids, means)]  # fmt: skip

    expected = x
    for piece in pieces(np.broadcast_to(few, (2, 3)), many):
        expected = jd.sample(denoiser, piece, expected)
    got = jd.sample(denoiser, jd.solvers.concatenate(pieces(few, many)), x)
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    with pytest.raises(ValueError, match=r"one shape of sample, got coefficients for .*\(4,\)"):
        jd.solvers.concatenate(pieces(few, np.ones(4)))


def test_one_spread_gives_the_published_rule(x64):
    """eps = x / sqrt(1 + sigma^2), on EDM's grid."""
    grid = jd.grids.karras(jd.processes.edm(), 3)
    x = np.random.default_rng(0).normal(size=(4, 3)) * 80.0
    std = np.sqrt(80.0 * (np.hypot(1.0, 80.0) - 80.0))
    table = jd.solvers.analytic_first_step(jd.solvers.euler(grid), std=std)
    first = jd.sample(gaussian(jd.processes.edm()), table, x, save="nodes")[1]
    expected = x + (grid.sigma[1] - 80.0) * x / np.sqrt(1 + 80.0**2)
    np.testing.assert_allclose(first, expected, rtol=1e-10)


@pytest.mark.parametrize("process", [VP, FLOW], ids=["vp", "flow"])
def test_teleport_is_the_flow_of_a_rank_deficient_gaussian(x64, process):
    """Against DOP853 on the flow in rho (row 74: five dimensions, rank three)."""
    rng = np.random.default_rng(3)
    factor, mean = rng.normal(size=(5, 3)), rng.normal(size=5)
    cov = factor @ factor.T
    whole = jd.grids.half_log_snr(process, 8, t_max=0.95, t_min=0.05)
    rest = jd.grids.from_times(process, whole.t[3:])
    (a, s), (a1, s1) = ((whole.alpha[i], whole.sigma[i]) for i in (0, 3))
    x = rng.normal(size=(6, 5))

    def field(log_rho, y):
        rho = np.exp(log_rho)
        y = y.reshape(x.shape)
        return (rho**2 * np.linalg.solve(cov + rho**2 * np.eye(5), (y - mean).T).T).ravel()

    span = np.log([s / a, s1 / a1])
    solved = solve_ivp(field, span, (x / a).ravel(), method="DOP853", rtol=1e-12, atol=1e-13)
    expected = a1 * solved.y[:, -1].reshape(x.shape)
    table = jd.solvers.teleport(jd.solvers.ddim(rest), a, s, mean, cov)
    got = jd.sample(jd.Denoiser(lambda x, t: x), table, x, save="nodes")[0]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-8)
    assert table.nfe == 5


def test_denoise_to_zero_is_x0_at_the_last_node(x64):
    grid = jd.grids.half_log_snr(VP, 4)
    denoiser = jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, VP)
    x = np.random.default_rng(0).normal(size=(5, 2))
    table = jd.solvers.deis(grid, order=3)
    last = np.asarray(jd.sample(denoiser, table, x))
    a, s = grid.alpha[-1], grid.sigma[-1]
    got = jd.sample(denoiser, jd.solvers.denoise_to_zero(table, grid), x)
    np.testing.assert_allclose(got, (last + s**2 * BROAD.score(last, a, s)) / a, rtol=1e-10)


GRID = jd.grids.half_log_snr(VP, 4)
DDIM = jd.solvers.ddim(GRID)
first_step, teleport = jd.solvers.analytic_first_step, jd.solvers.teleport
corrected, KARRAS = jd.solvers.corrected, jd.grids.karras


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: first_step(jd.solvers.ddim(jd.grids.uniform(VP, 1))), "at least 2"),
        (lambda: first_step(DDIM, std=0.0), "one positive number, got 0.0"),
        (lambda: first_step(jd.solvers.euler(GRID, s_churn=9.0)), "start is plain"),
        (lambda: first_step(jd.solvers.stack([DDIM])), "stacked"),
        (lambda: first_step(DDIM, std=np.ones(2)), "one positive number"),
        (lambda: teleport(DDIM, 0.9, 0.1, np.zeros(2), np.eye(2)), "more noise than the tableau's"),
        (lambda: teleport(DDIM, 0.1, 1.0, np.zeros(3), np.eye(2)), r"\(3, 3\)"),
        (lambda: teleport(DDIM, 0.1, 1.0, np.zeros(2), -np.eye(2)), "eigenvalue"),
        (
            lambda: jd.solvers.denoise_to_zero(DDIM, jd.grids.half_log_snr(VP, 4, end="zero")),
            "ends at sigma > 0",
        ),
        (
            lambda: jd.solvers.denoise_to_zero(DDIM, jd.grids.half_log_snr(VP, 4, t_min=0.1)),
            "another grid: its last evaluation is at sigma / alpha = 0.115.* from .* to 0.340",
        ),
        (
            lambda: jd.solvers.denoise_to_zero(jd.solvers.ddpm(GRID), jd.grids.uniform(VP, 999)),
            "another grid: its last evaluation is at sigma / alpha = 0.115.* from .* to 0.0104",
        ),
        (lambda: corrected(jd.solvers.ddpm(GRID), GRID), "deterministic"),
        (lambda: corrected(DDIM, GRID, integrand="eps"), "not 'eps'"),
        (lambda: corrected(DDIM, KARRAS(VP, 4)), "does not evaluate"),
        (lambda: corrected(DDIM, KARRAS(VP, 5)), "each of .* 6 nodes"),
        (lambda: corrected(DDIM, GRID, [2, 2]), "one number or 4, got 2"),
        (lambda: corrected(DDIM, GRID, 1), "from 2"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_every_sampler_on_the_grid_is_denoised_to_zero():
    """Churn evaluates at more noise than a node has, Langevin steps and Heun at the last node."""
    grid = jd.grids.half_log_snr(VP, 4)
    for name in SETTINGS:
        table = build(name, grid)
        assert jd.solvers.denoise_to_zero(table, grid).nfe == table.nfe + 1, name
