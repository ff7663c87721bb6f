"""DualFast: what it replaces, and where it helps and cannot."""

import jax
import numpy as np
import pytest
from oracles import BROAD

import jaxdiff as jd
from jaxdiff.solvers.dual_fast import dual_fast, dual_fast_multistep
from jaxdiff.solvers.pndm import ipndm

PROCESS = jd.processes.vp_linear()


def mixture(prediction="x0", process=PROCESS):
    return jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, process, prediction)


def start(grid, count=64):
    return BROAD.sample(np.random.default_rng(0), count, grid.alpha[0], grid.sigma[0])


@pytest.mark.parametrize("base", ["dpm_solver", "dpm_solver_pp"])
@pytest.mark.parametrize("tau", ["previous", "first"])
def test_zero_strength_is_the_base(x64, base, tau):
    grid = jd.grids.half_log_snr(PROCESS, 6)
    x = start(grid, 5)
    plain = getattr(jd.solvers, f"{base}_multistep")(grid, order=2)
    table = dual_fast_multistep(grid, base, 2, 0.0, tau)
    assert table.nfe == plain.nfe
    got, expected = (jd.sample(mixture(), t, x) for t in (table, plain))
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def second_order_loop(x, grid, c, tau):
    """DPM-Solver-2M (midpoint) in eps, its first-order term's eps replaced."""
    lam, seen = grid.lam, []
    for i in range(grid.steps):
        a, s, a1, s1 = grid.alpha[i], grid.sigma[i], grid.alpha[i + 1], grid.sigma[i + 1]
        seen.append(BROAD.eps(x, a, s))
        h = lam[i + 1] - lam[i]
        new = seen[-1]
        if i:
            new = (1 + c[i]) * seen[-1] - c[i] * (seen[-2] if tau == "previous" else seen[0])
        step = a1 / a * x - s1 * np.expm1(h) * new
        if 0 < i < grid.steps - 1:
            slope = (seen[-1] - seen[-2]) * h / (lam[i] - lam[i - 1])
            step = step - s1 * np.expm1(h) * slope / 2
        x = step
    return x


@pytest.mark.parametrize("tau", ["previous", "first"])
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_it_replaces_eps_in_the_first_order_term(x64, tau, schedule):
    grid = jd.grids.half_log_snr(PROCESS, 6)
    x = start(grid, 5)
    c = 0.3 * (np.linspace(0.0, 1.0, 6) if schedule == "linear" else np.ones(6))
    expected = second_order_loop(x, grid, c, tau)
    for prediction in ("eps", "x0"):
        table = dual_fast_multistep(grid, "dpm_solver", 2, 0.3, tau, schedule)
        got = jd.sample(mixture(prediction), table, x)
        np.testing.assert_allclose(got, expected, rtol=1e-9)
    one_by_one = dual_fast(jd.solvers.dpm_solver_multistep(grid, order=2), c, tau)
    np.testing.assert_allclose(one_by_one.B, table.B, rtol=1e-13)


@pytest.mark.parametrize("tau", ["previous", "first"])
def test_over_ddim_the_integrand_does_not_matter(x64, tau):
    """Holding x, a change of eps is -sigma / alpha times that of x0."""
    grid = jd.grids.karras(PROCESS, 7)
    x = start(grid, 5)
    tables = [dual_fast_multistep(grid, base, 1, 0.4, tau) for base in ("dpm_solver", "dpm_solver_pp")]
    tables.append(dual_fast(jd.solvers.ddim(grid), 0.4, tau))
    first, *others = (jd.sample(mixture(), table, x) for table in tables)
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-9)


def test_half_of_the_previous_is_adams_bashforth(x64):
    """Over DDIM, for every grid: iPNDM of order 2 has constant coefficients."""
    grid = jd.grids.quadratic(PROCESS, 8)
    x = start(grid, 5)
    got = jd.sample(mixture(), dual_fast_multistep(grid, c=0.5), x)
    np.testing.assert_allclose(got, jd.sample(mixture(), ipndm(grid, 2), x), rtol=1e-9)


def rms(build, steps):
    """Root mean square error on `steps` uniform in t, of 64 samples."""
    grid = jd.grids.uniform(PROCESS, steps)
    x = start(grid)
    exact = BROAD.flow(x, *((grid.alpha[i], grid.sigma[i]) for i in (0, -1)))
    with jax.enable_x64(True):
        return float(np.sqrt(np.mean((np.asarray(jd.sample(mixture(), build(grid), x)) - exact) ** 2)))


@pytest.mark.parametrize("steps", [5, 6])
def test_it_helps_ddim_in_few_steps(steps):
    """With an exact network: this is discretisation error."""
    assert rms(dual_fast_multistep, steps) <= 0.8 * rms(jd.solvers.ddim, steps)


def test_the_first_prediction_leaves_an_error_that_steps_do_not_remove():
    """Unless c falls with their number."""

    def first(strength):
        return lambda grid: dual_fast_multistep(grid, c=strength(grid.steps), tau="first")

    plateau = first(lambda steps: 0.5)
    assert rms(plateau, 50) > 4 * rms(jd.solvers.ddim, 50)
    assert rms(plateau, 200) > 0.9 * rms(plateau, 50)
    assert rms(first(lambda steps: 2.0 / steps), 200) < 0.3 * rms(first(lambda steps: 2.0 / steps), 50)


def test_from_pure_noise_and_to_the_data(x64):
    """alpha = 0 first and sigma = 0 last: the first row's eps is x_T, later ones are compared to it."""
    flow = jd.processes.flow()
    grid = jd.grids.uniform(flow, 8)
    assert grid.ends == (True, True)
    x = np.random.default_rng(2).normal(size=(2000, 2))
    for tau in ("previous", "first"):
        table = dual_fast_multistep(grid, c=0.1, tau=tau)
        samples = np.asarray(jd.sample(mixture("flow", flow), table, x))
        np.testing.assert_allclose(samples.mean(0), BROAD.moments()[0], atol=0.15)


def test_a_traced_strength(x64):
    grid = jd.grids.half_log_snr(PROCESS, 4)
    slope = jax.jit(jax.jacfwd(lambda c: dual_fast_multistep(grid, order=2, c=c).B))(0.3)
    ends = [dual_fast_multistep(grid, order=2, c=c).B for c in (0.0, 1.0)]
    np.testing.assert_allclose(slope, ends[1] - ends[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda g: dual_fast_multistep(g, tau="T"), "tau must be one of .* got 'T'"),
        (lambda g: dual_fast_multistep(g, schedule="cosine"), "schedule must be one of"),
        (lambda g: dual_fast_multistep(g, "unipc"), "base must be one of .* got 'unipc'"),
        (lambda g: dual_fast_multistep(g, c=[0.1, 0.2]), r"each of 5 rows, got \(2,\)"),
        (lambda g: dual_fast(jd.solvers.unipc(g)), "register 0 alone"),
        (lambda g: dual_fast(jd.solvers.ddim(g, outputs=2)), "one output"),
        (lambda g: dual_fast(jd.solvers.stack([jd.solvers.ddim(g)])), "not stacked"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(jd.grids.half_log_snr(PROCESS, 5))
