"""SA-Solver: closed forms, its noise, and what it equals where tau or the orders make it simple."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from listed import run_all
from oracles import BROAD
from scipy.integrate import quad

import jaxdiff as jd
from jaxdiff.solvers.adams import exponential_adams
from jaxdiff.solvers.sa_solver import sa_solver

PROCESS = jd.processes.vp_linear()
GRID = jd.grids.karras(PROCESS, 6, t_min=0.01)
ORDERS = [(1, 0), (2, 0), (4, 0), (1, 2), (2, 2), (3, 4), (4, 4), (3, 1)]


def mixture():
    return jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, PROCESS)


def no_data(x, t):
    """The data prediction of data that are all 0."""
    return jnp.zeros_like(x)


@pytest.mark.parametrize("end", ["t_min", "zero"])
@pytest.mark.parametrize("lower", [False, True])
def test_without_noise_it_is_exponential_adams(x64, end, lower):
    grid = jd.grids.karras(PROCESS, 6, end=end)
    x = np.random.default_rng(0).normal(size=(4, 2))
    pairs = [(p, c) for p, c in ORDERS if c != 1]
    tables = [sa_solver(grid, p, c, tau=0.0, lower_order_final=lower) for p, c in pairs]
    same = [exponential_adams(grid, p, corrector=c, lower_order_final=lower) for p, c in pairs]
    assert not any(table.stochastic for table in tables)
    run = jax.vmap(lambda table: jd.sample(mixture(), table, x, save="nodes"))
    got, expected = (run(jd.solvers.stack(group)) for group in (tables, same))
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("end", ["t_min", "zero"])
@pytest.mark.parametrize("kind", ["x0", "eps"])
@pytest.mark.parametrize("tau", [0.0, 0.6, 1.0])
def test_without_a_corrector_it_is_the_dpm_solvers_with_tau_squared(end, kind, tau):
    """Tables, noise and clocks of SDE-DPM-Solver(++), whose eta is tau^2 and whose step is exact."""
    grid = jd.grids.karras(PROCESS, 6, end=end)
    names = {"x0": "dpm_solver_pp_sde_multistep", "eps": "dpm_solver_sde_multistep"}
    for order in (1, 2, 3):
        ours = sa_solver(grid, order, 0, tau, integrand=kind)
        theirs = getattr(jd.solvers, names[kind])(
            grid, order, tau**2, solver_type="heun", lower_order_final=False
        )
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
            np.testing.assert_allclose(a, b, rtol=1e-12)


def test_of_first_order_it_is_ddim_with_all_noise():
    ours, ddim = sa_solver(GRID, 1, 0), jd.solvers.ddim(GRID, eta=1.0)
    for field in ("A", "B", "C", "clock"):
        np.testing.assert_allclose(getattr(ours, field), getattr(ddim, field), rtol=1e-11)


@pytest.mark.parametrize("tau", [0.3, 1.0, 2.0])
def test_weights_are_the_integrals(tau):
    """alpha' k int exp(-k (h - s)) L_j(s) ds, and for eps -sigma' k int exp(h - s) L_j(s) ds."""
    lam, k, i = GRID.lam, 1 + tau**2, 4
    h, offsets = lam[i + 1] - lam[i], lam[[i, i - 1, i - 2]] - lam[i]
    kernels = {
        "x0": (GRID.alpha[i + 1] * k, lambda s: np.exp(-k * (h - s))),
        "eps": (-GRID.sigma[i + 1] * k, lambda s: np.exp(h - s)),
    }
    for integrand, (factor, kernel) in kernels.items():
        got = sa_solver(GRID, 3, 0, tau, integrand=integrand).B[i, 0, :, 0]
        for j in range(3):
            others = np.delete(offsets, j)

            def integrand_of(s, others=others, own=offsets[j], kernel=kernel):
                return kernel(s) * np.prod((s - others) / (own - others))

            np.testing.assert_allclose(got[j], factor * quad(integrand_of, 0, h)[0], rtol=1e-9)


def test_few_steps_takes_the_published_slope_and_a_quiet_last_step():
    """Degree 1: k h^2 / 2 for the slope's integral, in the predictor and in the corrector."""
    tau, i = 0.7, 3
    k, lam = 1 + tau**2, GRID.lam
    table = sa_solver(GRID, 2, 0, tau, variant="few_steps")
    h, before = lam[i + 1] - lam[i], lam[i] - lam[i - 1]
    slope = GRID.alpha[i + 1] * k * h**2 / 2 / before
    whole = GRID.alpha[i + 1] * -np.expm1(-k * h)
    np.testing.assert_allclose(table.B[i, 0, :, 0], [whole + slope, -slope], rtol=1e-11)
    # Row i: s_2 is the corrected state, in the register that came and the two predictions.
    corrected = sa_solver(GRID, 1, 2, tau, variant="few_steps")
    slope = GRID.alpha[i] * k * before / 2
    whole = GRID.alpha[i] * -np.expm1(-k * before)
    np.testing.assert_allclose(corrected.B[i, 2, :2, 0], [slope, whole - slope], rtol=1e-11)
    assert np.all(table.C[-1] == 0) and np.all(table.C[:-1, 0] > 0)


def test_predictor_and_corrector_share_their_noise(x64):
    """A constant prediction leaves a corrector nothing to do, if its noise is the predictor's."""
    x = np.random.default_rng(1).normal(size=(3, 2))
    tables = [sa_solver(GRID, p, c, tau=0.8) for p, c in ORDERS]
    ends = run_all(jd.Denoiser(no_data, "x0"), tables, jnp.asarray(x), key=jax.random.key(1))
    for end in ends[1:]:
        np.testing.assert_allclose(end, ends[0], rtol=1e-9)


def test_noise_falls_in_the_window():
    rho = GRID.sigma / GRID.alpha
    inside = (rho[1:] >= 0.05) & (rho[1:] <= 1.0)
    assert 0 < inside.sum() < GRID.steps
    table = sa_solver(GRID, window=(0.05, 1.0))
    np.testing.assert_array_equal(table.C[:, 0] != 0, inside)
    assert table.draws == inside.sum() and table.brownian == "x0"
    assert sa_solver(GRID, tau=0.5).brownian == "x0"
    assert sa_solver(GRID, tau=0.5, integrand="eps").brownian == "eps"
    assert sa_solver(GRID, tau=0.0).brownian is None


def test_the_law_is_taken_at_the_end_of_a_step():
    law = sa_solver(GRID, 1, 0, tau=lambda t, alpha, sigma: t)
    h = np.diff(GRID.lam)
    np.testing.assert_allclose(
        law.C[:, 0], GRID.sigma[1:] * np.sqrt(-np.expm1(-2 * GRID.t[1:] ** 2 * h)), rtol=1e-12
    )


def test_pece_evaluates_corrected_states_too(x64):
    """By hand: predict, evaluate, correct, evaluate, with two evaluations a polynomial."""
    grid, tau = jd.grids.half_log_snr(PROCESS, 3, t_min=0.05), 0.5
    k, lam, x = 1 + tau**2, grid.lam, np.random.default_rng(2).normal(size=(4, 2))
    noise = np.random.default_rng(3).normal(size=(3, 4, 2))

    def data(x, i):
        a, s = grid.alpha[i], grid.sigma[i]
        return (x + s**2 * BROAD.score(x, a, s)) / a

    def line(i, places):
        """Weights of the predictions at two places in step i."""
        h, (p, q) = lam[i + 1] - lam[i], (lam[places] - lam[i])
        slope = quad(lambda s: k * np.exp(-k * (h - s)) * (s - q) / (p - q), 0, h)[0]
        return grid.alpha[i + 1] * np.array([slope, -np.expm1(-k * h) - slope])

    table = sa_solver(grid, 2, 2, tau, mode="pece")
    got = jd.sample(mixture(), table, x, noise=jnp.asarray(noise), save="nodes")
    states, seen = [x], [data(x, 0)]
    for i in range(3):
        h = lam[i + 1] - lam[i]
        held = grid.sigma[i + 1] / grid.sigma[i] * np.exp(-(tau**2) * h) * states[-1]
        held = held + grid.sigma[i + 1] * np.sqrt(-np.expm1(-2 * tau**2 * h)) * noise[i]
        w = line(i, [i, i - 1]) if i else [grid.alpha[1] * -np.expm1(-k * h), 0.0]
        predicted = held + w[0] * seen[-1] + (w[1] * seen[-2] if i else 0.0)
        if i < 2:
            w = line(i, [i + 1, i])
            states.append(held + w[0] * data(predicted, i + 1) + w[1] * seen[-1])
            seen.append(data(states[-1], i + 1))
        else:
            states.append(predicted)
    assert table.nfe == 5
    np.testing.assert_allclose(got, np.stack(states), rtol=1e-9)


IN_EPS = {"predictor": 2, "corrector": 3, "integrand": "eps"}


@pytest.mark.parametrize(
    ("end", "mode", "options"),
    [("t_min", "pec", {}), ("t_min", "pece", IN_EPS), ("zero", "pec", IN_EPS), ("zero", "pece", {})],
)
def test_a_corrected_last_state_is_what_the_next_step_would_start_from(x64, end, mode, options):
    """The longer run's corrected node; to sigma = 0, x0 at that state."""
    whole = jd.grids.karras(PROCESS, 6, t_min=0.01)
    part = jd.grids.from_times(PROCESS, whole.t[:-1], end=end)
    x = np.random.default_rng(4).normal(size=(3, 2))
    noise = jnp.asarray(np.random.default_rng(5).normal(size=(6, 3, 2)))
    options = {**options, "mode": mode, "tau": 0.6}
    nodes = jd.sample(mixture(), sa_solver(whole, **options), x, noise=noise, save="nodes")
    corrected = np.asarray(nodes[-2])
    table = sa_solver(part, correct_last=True, **options)
    assert table.nfe == sa_solver(part, **options).nfe + 1 and table.draws == 5
    got = jd.sample(mixture(), table, x, noise=noise[:5], save="nodes")
    expected = [corrected]
    if end == "zero":
        _, a, sigma = whole.node(5)
        expected.append((corrected + sigma**2 * BROAD.score(corrected, a, sigma)) / a)
    np.testing.assert_allclose(got[5:], np.stack(expected), rtol=1e-9)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"predictor": 5}, ValueError, "predictor must be an integer from 1 to 4, got 5"),
        ({"predictor": 0}, ValueError, "predictor must be an integer from 1 to 4, got 0"),
        ({"corrector": 5}, ValueError, "corrector must be an integer from 0 to 4, got 5"),
        ({"tau": -0.5}, ValueError, "tau must be finite and not negative, got -0.5 at node 1"),
        ({"tau": None}, TypeError, "tau must be a number or a function"),
        ({"tau": True}, TypeError, "tau must be a number or a function"),
        ({"window": (1.0, 0.1)}, ValueError, r"window must be .*\(1.0, 0.1\)"),
        ({"integrand": "v"}, ValueError, "integrand must be one of .*'v'"),
        ({"mode": "pecec"}, ValueError, "mode must be one of .*'pecec'"),
        ({"corrector": 0, "correct_last": True}, ValueError, "needs a corrector, got corrector=0"),
        ({"variant": "more_steps"}, ValueError, "variant must be one of .*'more_steps'"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        sa_solver(GRID, **options)


def test_a_backward_grid_takes_no_noise():
    with pytest.raises(ValueError, match="from data to noise takes tau = 0, got 1.0"):
        sa_solver(GRID.reversed())
    assert not sa_solver(GRID.reversed(), tau=0.0).stochastic
