"""Langevin dynamics: the stationary variance in closed form, and as corrector of any predictor."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from oracles import fitted_order

import jaxdiff as jd
from jaxdiff.solvers.langevin import annealed_langevin, predictor_corrector

VP = jd.processes.vp_linear()
STD = 0.5


def gaussian():
    return jd.gaussian_mixture(np.zeros((1, 1)), np.array([STD]), np.ones(1), VP)


def marginal(grid, i):
    return (grid.alpha[i] * STD) ** 2 + grid.sigma[i] ** 2


def variance(tableau, first):
    """At the end, exactly, from N(0, first): the sampler is linear in (x_T, z_1, ...)."""
    basis = np.eye(1 + tableau.draws)
    out = jd.sample(gaussian(), tableau, basis[:, :1], noise=basis[1:, :, None])[:, 0]
    return float(out[0] ** 2 * first + (out[1:] ** 2).sum())


@pytest.mark.parametrize("snr", [0.1, 0.3, 0.6])
def test_stationary_variance_is_the_closed_form(snr, x64):
    """V / (1 - q / 2), q = 2 snr^2 sigma^2 / V: after one step of a chain, and after a thousand."""
    grid = jd.grids.from_times(VP, [0.6, 0.4])
    v, sigma = marginal(grid, 1), grid.sigma[1]
    q = 2.0 * snr**2 * sigma**2 / v
    for steps in (1, 1000):
        tableau = annealed_langevin(grid, steps, snr)
        # The chain starts at alpha' / alpha x_T.
        start = (grid.alpha[1] / grid.alpha[0]) ** 2 * 3.0
        fixed = v / (1.0 - q / 2.0)
        expected = fixed + (1.0 - q) ** (2 * steps) * (start - fixed)
        np.testing.assert_allclose(variance(tableau, 3.0), expected, rtol=1e-10)
    assert abs(variance(tableau, 3.0) - fixed) < 1e-8


def test_annealed_langevin_is_song_and_ermons(x64):
    """Their algorithm 1, in steps a_i = epsilon sigma_i^2 / sigma_L^2."""
    process = jd.processes.ve(0.1, 10.0)
    grid = jd.grids.half_log_snr(process, 4)
    snr, count = 0.2, 3
    epsilon = 4.0 * (snr * grid.sigma[-1]) ** 2
    rng = np.random.default_rng(0)
    x = 10.0 * rng.normal(size=(5, 2))
    tableau = annealed_langevin(grid, count, snr)
    noise = rng.normal(size=(tableau.draws, 5, 2))
    means, std = np.array([[1.0, -1.0]]), np.array([0.7])
    denoiser = jd.gaussian_mixture(means, std, np.ones(1), process, "score")
    out = jd.sample(denoiser, tableau, x, noise=noise)
    draws = iter(noise)
    for sigma in grid.sigma[1:]:
        step = epsilon * sigma**2 / grid.sigma[-1] ** 2
        for _ in range(count):
            score = -(x - means) / (std**2 + sigma**2)
            x = x + step / 2 * score + np.sqrt(step) * next(draws)
    np.testing.assert_allclose(out, x, rtol=1e-10)
    assert tableau.nfe == 4 * count


def by_hand(grid, x, noise, steps, snr):
    """DDPM then Langevin, as written in Song et al. (2021), for the score of N(0, STD^2)."""
    draws = iter(noise)
    for i in range(grid.steps):
        (_, a, s), (_, a1, s1) = grid.node(i), grid.node(i + 1)
        score = -x / (a**2 * STD**2 + s**2)
        ratio = a / a1
        forward = s**2 - ratio**2 * s1**2  # variance of the forward step
        x = (x + forward * score) / ratio
        if s1 > 0:
            x = x + s1 / s * np.sqrt(forward) * next(draws)
            for _ in range(steps):
                e = 2.0 * (snr * s1) ** 2
                x = x - e * x / (a1**2 * STD**2 + s1**2) + np.sqrt(2.0 * e) * next(draws)
    return x


@pytest.mark.parametrize("end", ["t_min", "zero"])
def test_predictor_then_corrector(end, x64):
    grid = jd.grids.half_log_snr(VP, 5, end=end)
    rng = np.random.default_rng(1)
    tableau = predictor_corrector(grid, steps=2, snr=0.2)
    x, noise = rng.normal(size=(3, 1)), rng.normal(size=(tableau.draws, 3, 1))
    corrected = 5 if end == "t_min" else 4
    assert tableau.nfe == 5 + 2 * corrected and tableau.draws == 3 * corrected
    got = jd.sample(gaussian(), tableau, x, noise=noise, save="nodes")
    assert got.shape == (6, 3, 1)
    np.testing.assert_allclose(got[-1], by_hand(grid, x, noise, 2, 0.2), rtol=1e-9)


def test_the_level_rule_keeps_its_bias_and_the_step_rule_has_none(x64):
    """As steps are added: V / (1 - q / 2) under the first, weak order 1 under the second."""
    grids = [jd.grids.half_log_snr(VP, n, t_max=1.0, t_min=0.3) for n in (50, 100, 200)]
    v = marginal(grids[0], -1)
    build = functools.partial(predictor_corrector, predictor=jd.solvers.ddim)
    level = [variance(build(g, snr=0.5, steps=4), marginal(g, 0)) for g in grids]
    q = 2.0 * 0.5**2 * grids[0].sigma[-1] ** 2 / v
    np.testing.assert_allclose(level[-1], v / (1.0 - q / 2.0), rtol=1e-2)
    assert abs(level[-1] - v) > 0.5 * abs(level[0] - v)
    step = [variance(build(g, snr=0.7, rule="step"), marginal(g, 0)) for g in grids]
    assert fitted_order([50, 100, 200], np.abs(np.array(step) - v)) > 0.85


def test_the_step_rule_over_ddim_is_the_reverse_sde(x64):
    """steps * snr = 1 is tau = 1: from a wrong start both forget at the rate of DDPM."""
    grid = jd.grids.half_log_snr(VP, 2000, t_max=0.8, t_min=0.1)
    tables = [
        predictor_corrector(grid, jd.solvers.ddim, snr=1.0, rule="step"), jd.solvers.ddpm(grid)
    ]  # fmt: skip
    quiet = [np.zeros((table.draws, 1, 1)) for table in tables]
    kept = [jd.sample(gaussian(), t, np.ones((1, 1)), noise=z) for t, z in zip(tables, quiet)]
    np.testing.assert_allclose(kept[0], kept[1], rtol=2e-2)


@pytest.mark.parametrize(
    "predictor",
    [jd.solvers.ddpm, jd.solvers.euler, functools.partial(jd.solvers.ddim, eta=0.5)],
)
def test_any_one_evaluation_predictor(predictor, x64):
    """A predictor whose Langevin steps are of size 0 is the predictor itself."""
    grid = jd.grids.half_log_snr(VP, 6, t_max=0.9)
    plain, still = predictor(grid), predictor_corrector(grid, predictor, snr=0.0)
    first = marginal(grid, 0)
    np.testing.assert_allclose(variance(still, first), variance(plain, first), rtol=1e-12)
    assert still.nfe == 2 * plain.nfe


def test_step_sizes_by_level_and_gradients(x64):
    grid = jd.grids.half_log_snr(VP, 4)
    level = lambda t, alpha, sigma: 0.1 + 0.2 * sigma  # noqa: E731
    tableau = predictor_corrector(grid, snr=level)
    shares = 1.0 - tableau.A[1::2, 0, 0]
    np.testing.assert_allclose(shares, 2.0 * (0.1 + 0.2 * grid.sigma[1:]) ** 2, rtol=1e-12)
    x, noise = np.ones((2, 1)), np.random.default_rng(4).normal(size=(8, 2, 1))

    def end(r):
        table = predictor_corrector(grid, snr=lambda t, alpha, sigma: r)
        return jd.sample(gaussian(), table, x, noise=noise).sum()

    slope = (end(0.3 + 1e-6) - end(0.3 - 1e-6)) / 2e-6
    np.testing.assert_allclose(jax.grad(end)(0.3), slope, rtol=1e-6)


def test_bad_options_are_named():
    grid = jd.grids.half_log_snr(VP, 4)
    for build in (predictor_corrector, annealed_langevin):
        with pytest.raises(ValueError, match="steps must be an integer from 1.*got 0"):
            build(grid, steps=0)
        with pytest.raises(ValueError, match="below 0.7 under rule 'level'.*got 0.8"):
            build(grid, snr=0.8)
        with pytest.raises(TypeError, match="snr must be a number.*got None"):
            build(grid, snr=None)
        with pytest.raises(ValueError, match="from noise to data only"):
            build(grid.reversed())
    with pytest.raises(ValueError, match="rule must be one of .*got 'norm'"):
        predictor_corrector(grid, rule="norm")
    with pytest.raises(ValueError, match="one evaluation a step.*8 for 4 steps"):
        predictor_corrector(grid, jd.solvers.heun)
    with pytest.raises(ValueError, match="one integrand"):
        predictor_corrector(grid, jd.solvers.dpm_solver_pp_multistep)
    shifted = lambda grid: dataclasses.replace(  # noqa: E731
        jd.solvers.ddim(grid), d=np.zeros((grid.steps, 1))
    )
    with pytest.raises(ValueError, match="no shift"):
        predictor_corrector(grid, shifted)


def test_noise_in_the_predictors_start_is_a_draw_of_its_own(x64):
    grid = jd.grids.half_log_snr(VP, 3)
    noisy = lambda grid: dataclasses.replace(  # noqa: E731
        jd.solvers.ddim(grid), start=jd.solvers.Start(np.ones(1), np.full(1, 0.5))
    )
    tableau = predictor_corrector(grid, noisy, snr=0.2)
    assert tableau.draws == 4 and tableau.draw.tolist() == [0, 1, 1, 2, 2, 3]
    plain = predictor_corrector(grid, jd.solvers.ddim, snr=0.2)
    np.testing.assert_allclose(variance(tableau, 1.0), variance(plain, 1.25), rtol=1e-12)
