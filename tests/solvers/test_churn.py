"""Churn: Karras et al.'s algorithm 2, and levels that a process does not have."""

import jax.numpy as jnp
import numpy as np
import pytest
from oracles import BROAD

import jaxdiff as jd

EDM = jd.processes.edm()


def algorithm_2(x, sigmas, noise, s_churn, s_min, s_max, s_noise):
    """Karras et al. (2022), algorithm 2, with the denoiser D(x; sigma) of the mixture."""
    steps, draws = len(sigmas) - 1, iter(noise)
    states = [x]
    for i in range(steps):
        gamma = min(s_churn / steps, np.sqrt(2) - 1) if s_min <= sigmas[i] <= s_max else 0.0
        t_hat = sigmas[i] + gamma * sigmas[i]
        if gamma > 0:
            x = x + np.sqrt(t_hat**2 - sigmas[i] ** 2) * s_noise * next(draws)
        d = -t_hat * BROAD.score(x, 1.0, t_hat)
        after = x + (sigmas[i + 1] - t_hat) * d
        if sigmas[i + 1] != 0:
            d_after = -sigmas[i + 1] * BROAD.score(after, 1.0, sigmas[i + 1])
            after = x + (sigmas[i + 1] - t_hat) * (d + d_after) / 2
        x = after
        states.append(x)
    return np.stack(states)


PUBLISHED = {"s_churn": 40.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003}
SMALL = {"s_churn": 3.0, "s_min": 0.0, "s_max": np.inf, "s_noise": 1.0}


@pytest.mark.parametrize("churn, arrays", [(PUBLISHED, False), (PUBLISHED, True), (SMALL, False)])
def test_heun_with_churn_is_algorithm_2(x64, churn, arrays):
    """With gamma at its cap inside [S_tmin, S_tmax], and below the cap everywhere."""
    grid = jd.grids.karras(EDM, 12, end="zero")
    if arrays:
        grid = jd.grids.from_arrays(grid.t, grid.alpha, grid.sigma)
    tableau = jd.solvers.heun(grid, **churn)
    rng = np.random.default_rng(0)
    x, noise = 80.0 * rng.normal(size=(6, 2)), rng.normal(size=(tableau.draws, 6, 2))
    expected = algorithm_2(x, grid.sigma, noise, **churn)
    denoiser = jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, EDM)
    nodes = jd.sample(denoiser, tableau, jnp.asarray(x), noise=jnp.asarray(noise), save="nodes")
    np.testing.assert_allclose(nodes, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", [jd.solvers.euler, jd.solvers.heun])
def test_a_level_that_does_not_exist_is_named(solver):
    """A table ends at its last timestep, arrays at their first node: no noise is above them."""
    ddpm = jd.grids.trailing(jd.processes.ddpm(), 10)
    edm = jd.grids.karras(EDM, 6)
    for grid in (ddpm, jd.grids.from_arrays(edm.t, edm.alpha, edm.sigma)):
        with pytest.raises(ValueError, match=r"churn raises .* node 0 .* lower s_max \(now inf\)"):
            solver(grid, s_churn=4.0)


def test_churn_of_a_discrete_process_stays_on_its_table():
    """Below s_max every churned row is at (1 + gamma) rho, and alpha, sigma, t agree with it."""
    process = jd.processes.ddpm()
    grid = jd.grids.trailing(process, 10)
    tableau = jd.solvers.euler(grid, s_churn=4.0, s_max=100.0)
    rho = (grid.sigma / grid.alpha)[:-1]
    gamma = np.where(rho <= 100.0, 0.4, 0.0)
    assert gamma[0] == 0 and gamma[1] > 0
    np.testing.assert_allclose(tableau.sigma / tableau.alpha, (1 + gamma) * rho, rtol=1e-10)
    np.testing.assert_allclose(tableau.alpha, process.alpha(tableau.t), rtol=1e-12)


@pytest.mark.parametrize("end", ["t_min", "zero"])
def test_runge_kuttas_churn_is_that_of_euler_and_heun(end):
    """In "rho" tables and noise are theirs; in another clock the noise is."""
    churn = {"s_churn": 3.0, "s_min": 0.1, "s_max": 10.0, "s_noise": 1.01}
    grid = jd.grids.karras(jd.processes.vp_linear(), 5, end=end)
    for name in ("euler", "heun"):
        ours = jd.solvers.runge_kutta(grid, name, **churn)
        theirs = getattr(jd.solvers, name)(grid, **churn)
        for field in ("A", "B", "t", "sigma"):
            np.testing.assert_allclose(
                getattr(ours, field), getattr(theirs, field), rtol=1e-9, atol=1e-12
            )
        np.testing.assert_array_equal(ours.nodes[1:-1], theirs.nodes[1:-1])
        other = jd.solvers.runge_kutta(grid, name, "t", **churn)
        assert other.draws == ours.draws == theirs.draws > 0
        for table in (ours, other):
            np.testing.assert_allclose(table.C, theirs.C, rtol=1e-9)
            np.testing.assert_allclose(table.alpha, theirs.alpha, rtol=1e-9)
