"""Restart sampling: the official algorithm, its pieces, and what it does to an error."""

import functools

import numpy as np
import pytest
from oracles import BROAD

import jaxdiff as jd
from jaxdiff.solvers.restart import Interval, restart

EDM = jd.processes.edm()
VP = jd.processes.vp_linear()


def denoised(x, sigma):
    return x - sigma * BROAD.eps(x, 1.0, sigma)


def spaced(low, high, count, rho=7.0):
    return np.linspace(high ** (1 / rho), low ** (1 / rho), count) ** rho


def official(x, noise, steps, info, s_noise):
    """restart_sampler of the official code, without churn: info [[nodes, K, t_min, t_max], ...]."""
    sigmas = np.append(spaced(0.002, 80.0, steps), 0.0)
    places = {int(np.argmin(abs(sigmas - v[2]))): v for v in info}
    draws = iter(noise)

    def heun(x, a, b):
        slope = (x - denoised(x, a)) / a
        y = x + (b - a) * slope
        return y if b == 0 else x + (b - a) * 0.5 * (slope + (y - denoised(y, b)) / b)

    for i in range(steps):
        x = heun(x, sigmas[i], sigmas[i + 1])
        if i + 1 in places:
            count, repeats, _, high = places[i + 1]
            again = spaced(sigmas[i + 1], high, count)
            for _ in range(repeats):
                x = x + next(draws) * np.sqrt(again[0] ** 2 - again[-1] ** 2) * s_noise
                for a, b in zip(again[:-1], again[1:]):
                    x = heun(x, a, b)
    return x


def mixture(process):
    return jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, process, "x0")


INFO = [[3, 2, 0.06, 0.30], [4, 1, 1.09, 1.92]]


@pytest.mark.parametrize("s_noise", [1.0, 1.003])
def test_the_official_algorithm(s_noise, x64):
    rng = np.random.default_rng(0)
    x, noise = 80.0 * rng.normal(size=(4, 2)), rng.normal(size=(3, 4, 2))
    intervals = [Interval(low, high, k, n - 1) for n, k, low, high in INFO]
    # As many nodes as the official 18, and a last step to 0.
    tableau = restart(jd.grids.karras(EDM, 18, end="zero"), intervals, s_noise)
    assert tableau.draws == 3 and tableau.nfe == 35 + 2 * (2 * 2 + 3)
    out = jd.sample(mixture(EDM), tableau, x, noise=noise)
    np.testing.assert_allclose(out, official(x, noise, 18, INFO, s_noise), rtol=1e-9, atol=1e-9)


def test_the_noise_is_one_forward_step_for_every_process(x64):
    """On VP as on EDM: in y = x / alpha, rho = sigma / alpha they are one sampler."""
    lam = np.linspace(-3.0, 3.0, 9)
    grids = [jd.grids.from_times(p, p.time(lam)) for p in (VP, EDM)]
    rng = np.random.default_rng(1)
    y, noise = rng.normal(size=(4, 2)), rng.normal(size=(2, 4, 2))
    ends = []
    for process, grid in zip((VP, EDM), grids):
        tableau = restart(grid, [(0.2, 1.0, 2)])
        x = jd.sample(mixture(process), tableau, grid.alpha[0] * y, noise=noise)
        ends.append(x / grid.alpha[-1])
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-9)


def test_its_own_nodes_are_revisited():
    grid = jd.grids.half_log_snr(VP, 12, t_min=1e-2)
    rho = np.exp(-grid.lam)
    tableau = restart(grid, [(0.2, 1.5, 2)], base=jd.solvers.ddim)
    place = int(np.argmin(abs(rho - 0.2)))
    inner = np.flatnonzero((rho < 1.5) & (np.arange(13) < place))
    visited = np.exp(-np.log(tableau.alpha / tableau.sigma))
    once = [1.5, *rho[inner]]
    expected = [*rho[:place], *once, *once, *rho[place:-1]]
    np.testing.assert_allclose(visited, expected, rtol=1e-9)
    # The solution at each node, repeated ones too; at the joints it has the noise already.
    assert tableau.nodes.shape == (tableau.rows + 1, 2)


def test_restarts_contract_an_error(x64):
    """From a start of three times the spread the end is nearer to the data with each restart."""
    grid = jd.grids.half_log_snr(VP, 40, t_max=0.5, t_min=1e-2)
    denoiser = jd.gaussian_mixture(np.zeros((1, 1)), np.array([0.5]), np.ones(1), VP)
    first, last = ((grid.alpha[i] * 0.5) ** 2 + grid.sigma[i] ** 2 for i in (0, -1))
    errors = []
    for repeats in (1, 2, 4):
        tableau = restart(grid, [(0.2, 2.0, repeats)])
        basis = np.eye(1 + tableau.draws)
        out = jd.sample(denoiser, tableau, basis[:, :1], noise=basis[1:, :, None])[:, 0]
        errors.append(abs(9.0 * first * out[0] ** 2 + (out[1:] ** 2).sum() - last))
    # x_T's share of a state shrinks by (c + low^2) / (c + high^2) a time, c the data's variance.
    ratio = (0.25 + 0.2**2) / (0.25 + 2.0**2)
    np.testing.assert_allclose(errors[1] / errors[0], ratio, rtol=0.2)


def test_any_base_and_churn_within(x64):
    x = BROAD.sample(np.random.default_rng(2), 3, VP.alpha(0.9), VP.sigma(0.9))
    grid = jd.grids.half_log_snr(VP, 10, t_max=0.9, end="zero")
    churned = functools.partial(jd.solvers.euler, s_churn=4.0, s_max=3.0)
    for base in (jd.solvers.unipc, jd.solvers.ddpm, churned):
        tableau = restart(grid, [(0.2, 1.0, 2)], base=base)
        noise = np.random.default_rng(3).normal(size=(tableau.draws, 3, 2))
        out = jd.sample(mixture(VP), tableau, x, noise=noise)
        assert np.abs(out).max() < 4.5
    # Churn and the restart's own noise raise an interval's first level together.
    level = np.max(np.exp(-np.log(tableau.alpha / tableau.sigma)[6:]))
    assert level > 1.0


def test_a_grid_without_a_node_to_restart_from_runs_without():
    grid = jd.grids.half_log_snr(VP, 1, end="zero")
    assert restart(grid).nfe == jd.solvers.heun(grid).nfe == 1


def test_bad_options_are_named():
    grid = jd.grids.half_log_snr(VP, 8)
    for interval, message in (
        ((0.3, 0.06), "0 < low < high, got low=0.3, high=0.06"),
        ((0.06,), "an interval is"),
        ((0.06, 0.3, 0), "repeats of an interval must be an integer >= 1, got 0"),
        ((0.06, 0.3, 1, 2.5), "steps of an interval must be an integer >= 1, got 2.5"),
    ):
        with pytest.raises(ValueError, match=message):
            restart(grid, [interval])
    with pytest.raises(ValueError, match="s_noise must be a finite number.*got -1"):
        restart(grid, s_noise=-1)
    with pytest.raises(ValueError, match="from noise to data"):
        restart(grid.reversed())
    with pytest.raises(ValueError, match="lies outside the process's"):
        restart(jd.grids.half_log_snr(jd.processes.ddpm(), 8), [(0.3, 1e6)])


def test_every_noise_of_a_stochastic_base_is_a_draw_of_its_own():
    """The way up is drawn as one with the row before it; no other two rows share a normal."""
    grid = jd.grids.half_log_snr(VP, 5, t_max=0.9)
    table = restart(grid, [Interval(0.3, 1.0, 2)], base=functools.partial(jd.solvers.ddim, eta=1.0))
    noisy = np.flatnonzero(table.C[:, 0])
    assert len(noisy) == table.rows == 7
    np.testing.assert_array_equal(table.draw, np.arange(7))
