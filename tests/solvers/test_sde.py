"""Integrators of the reverse SDE: marginals kept exactly, closed forms, equalities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from listed import run_all
from oracles import BROAD, fitted_order

import jaxdiff as jd
from jaxdiff.solvers.adams import exponential_adams
from jaxdiff.solvers.er_sde import NOISE_SCALES, er_sde
from jaxdiff.solvers.gddim import gddim
from jaxdiff.solvers.reverse_sde import euler_maruyama, reverse_diffusion
from jaxdiff.solvers.sa_solver import sa_solver
from jaxdiff.solvers.seeds import seeds

PROCESS = jd.processes.vp_linear()
GRID = jd.grids.karras(PROCESS, 6, t_min=0.01)
FIELDS = ("A", "B", "C", "clock")


def mixture(prediction="x0"):
    return jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, PROCESS, prediction)


def no_data(x, t):
    """The data prediction of data that are all 0."""
    return jnp.zeros_like(x)


def data(x, alpha, sigma):
    return (x + sigma**2 * BROAD.score(x, alpha, sigma)) / alpha


def end_variance(tables, denoiser, first):
    """Variance of linear samplers' results from x_T ~ N(0, first): exactly, a sum of squares."""
    basis = np.eye(1 + max(table.draws for table in tables))
    x, noise = jnp.asarray(basis[:, :1]), jnp.asarray(basis[1:, :, None])
    ends = np.stack(run_all(denoiser, tables, x, noise=noise))[..., 0]
    return ends[:, 0] ** 2 * first + (ends[:, 1:] ** 2).sum(1)


def test_every_noise_keeps_the_marginal_of_a_point_mass(x64):
    """Data all 0: predictions are constant, so every step is exact: the variance is sigma'^2."""
    tables = [
        *(sa_solver(GRID, tau=tau) for tau in (0.0, 0.4, 1.0, 3.0)),
        sa_solver(GRID, window=(0.05, 1.0)),
        sa_solver(GRID, tau=lambda t, alpha, sigma: 2 * t),
        sa_solver(GRID, tau=0.6, mode="pece"),
        sa_solver(GRID, 2, 2, variant="few_steps"),
        *(seeds(GRID, stages, tau=tau) for stages in (1, 2, 3) for tau in (0.5, 1.0)),
        seeds(GRID, 2, middle=1.0, weights="phi_2"),
        *(er_sde(GRID, noise_scale=scale) for scale in NOISE_SCALES),
        er_sde(GRID, noise_scale=lambda rho: rho * np.log1p(rho)),
    ]
    variance = end_variance(tables, jd.Denoiser(no_data, "x0"), GRID.sigma[0] ** 2)
    np.testing.assert_allclose(variance, GRID.sigma[-1] ** 2, rtol=1e-10)


# --- SEEDS ---------------------------------------------------------------------------------------


def by_hand(grid, x, noise, places, tau, lines):
    """SEEDS in data prediction, stage by stage, from its kernels' closed forms."""
    k, draws = 1 + tau**2, iter(noise)
    for i in range(grid.steps):
        lam, h = grid.lam[i], grid.lam[i + 1] - grid.lam[i]
        start, found, grown, before = data(x, grid.alpha[i], grid.sigma[i]), [], 0.0, 0.0
        for j, r in enumerate([*places, 1.0]):
            level = grid.node(i + 1) if r == 1.0 else grid.at(lam + r * h)
            # phi_1 and phi_2 of -k r h, times k r h.
            one = -np.expm1(-k * r * h)
            two = 1.0 - one / (k * r * h)
            # Noise of the step so far, over sigma: shrunk, and that of this piece added.
            piece = tau**2 * (r - before) * h
            grown = np.exp(-piece) * grown + np.sqrt(-np.expm1(-2 * piece)) * next(draws)
            share = 0.0 if j == 0 else (two if lines else one / 2) / places[j - 1] * r
            mean = one * start + share * ((found[-1] if found else start) - start)
            u = level[2] / grid.sigma[i] * np.exp(-(tau**2) * r * h) * x + level[1] * mean
            u, before = u + level[2] * grown, r
            if r < 1.0:
                found.append(data(u, *level[1:]))
        x = u
    return x


@pytest.mark.parametrize(
    ("stages", "places", "weights"),
    [(1, (), "phi_1"), (2, (0.5,), "phi_1"), (2, (0.7,), "phi_2"), (3, (1 / 3, 2 / 3), "phi_1")],
)
def test_seeds_by_hand(x64, stages, places, weights):
    grid = jd.grids.half_log_snr(PROCESS, 4, t_min=0.05)
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(5, 2)), rng.normal(size=(4 * stages, 5, 2))
    table = seeds(grid, stages, tau=0.8, middle=places or None, weights=weights)
    got = jd.sample(mixture(), table, x, noise=jnp.asarray(noise))
    lines = stages == 3 or weights == "phi_2"
    np.testing.assert_allclose(got, by_hand(grid, x, noise, places, 0.8, lines), rtol=1e-9)


def test_seeds_of_one_stage_is_known_by_other_names():
    for other in (jd.solvers.ddim(GRID, eta=1.0), sa_solver(GRID, 1, 0), er_sde(GRID, 1, "sde")):
        for field in FIELDS:
            a, b = (getattr(table, field) for table in (seeds(GRID), other))
            np.testing.assert_allclose(a, b, rtol=1e-11)
    eps = seeds(GRID, integrand="eps")
    h, (alpha, sigma) = np.diff(GRID.lam), (GRID.alpha, GRID.sigma)
    np.testing.assert_allclose(eps.A[:, 0, 0], alpha[1:] / alpha[:-1], rtol=1e-12)
    np.testing.assert_allclose(eps.B[:, 0, 0, 0], -2 * sigma[1:] * np.expm1(h), rtol=1e-11)
    np.testing.assert_allclose(eps.C[:, 0], sigma[1:] * np.sqrt(np.expm1(2 * h)), rtol=1e-12)


# --- ER-SDE --------------------------------------------------------------------------------------


def test_er_sde_without_noise_is_exponential_adams_in_rho():
    for order in (1, 2, 3):
        ours, adams = er_sde(GRID, order, "ode"), exponential_adams(GRID, order, "x0", "rho")
        assert not ours.stochastic
        np.testing.assert_allclose(ours.A, adams.A, rtol=1e-12)
        np.testing.assert_allclose(ours.B, adams.B, rtol=1e-10, atol=1e-13)


def test_a_power_of_rho_is_a_tau():
    """phi = rho^(1 + tau^2)."""
    for scale, tau in (("sde_2", 0.5**0.5), ("sde_3", 1.5**0.5)):
        ours, other = er_sde(GRID, 1, scale), sa_solver(GRID, 1, 0, tau)
        for field in ("A", "B", "C"):
            np.testing.assert_allclose(getattr(ours, field), getattr(other, field), rtol=1e-10)


PHI = {
    "ode": lambda x: x,
    "sde": lambda x: x**2,
    "sde_1": lambda x: x * (np.exp(-1 / x) + 10),
    "sde_2": lambda x: x**1.5,
    "sde_3": lambda x: x**2.5,
    "sde_4": lambda x: x**0.9 * np.log10(1 + 100 * x**1.5),
    "sde_5": lambda x: x * (np.exp(x**0.3) + 10),
}


@pytest.mark.parametrize("scale", [name for name in NOISE_SCALES if name != "ode"])
def test_noise_scales_are_their_formulas(scale):
    named, given = er_sde(GRID, 3, scale), er_sde(GRID, 3, PHI[scale])
    for field in ("A", "B", "C"):
        np.testing.assert_allclose(getattr(named, field), getattr(given, field), rtol=1e-9)


@pytest.mark.parametrize("scale", ["sde_5", "sde"])
def test_the_published_formula_by_hand(x64, scale):
    """Taylor's formula in rho, its integrals by 100 left rectangles, small noise dropped."""
    grid, phi = jd.grids.half_log_snr(PROCESS, 6, t_min=1e-3), PHI[scale]
    rng = np.random.default_rng(1)
    x, noise = rng.normal(size=(5, 2)), rng.normal(size=(6, 5, 2))
    rho, y, seen, slopes = grid.sigma / grid.alpha, x / grid.alpha[0], [], []
    for i in range(6):
        seen.append(data(grid.alpha[i] * y, grid.alpha[i], grid.sigma[i]))
        a, b = rho[i], rho[i + 1]
        r, u = phi(b) / phi(a), b + np.arange(100) / 100 * (a - b)
        y = r * y + (1 - r) * seen[-1]
        if i > 0:
            slopes.append((seen[-1] - seen[-2]) / (a - rho[i - 1]))
            y = y + (b - a + phi(b) * np.sum((a - b) / 100 / phi(u))) * slopes[-1]
        if i > 1:
            bend = 2 * (slopes[-1] - slopes[-2]) / (a - rho[i - 2])
            y = y + ((b - a) ** 2 / 2 + phi(b) * np.sum((u - a) / phi(u) * (a - b) / 100)) * bend
        variance = b**2 - a**2 * r**2
        y = y + (np.sqrt(variance) * noise[i] if variance >= 1e-6 else 0.0)
    table = er_sde(grid, 3, scale, variant="published")
    got = jd.sample(mixture(), table, x, noise=jnp.asarray(noise[: table.draws]))
    np.testing.assert_allclose(got, grid.alpha[-1] * y, rtol=1e-9)


def test_a_noise_scale_must_outgrow_rho():
    with pytest.raises(ValueError, match="grows more slowly than rho between nodes 0 and 1"):
        er_sde(GRID, noise_scale=np.sqrt)
    with pytest.raises(ValueError, match="'sde_4' does not support .*alpha = 0"):
        er_sde(jd.grids.uniform(jd.processes.flow(), 4), noise_scale="sde_4")


# --- score_sde's predictors ----------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1.0, 0.0])
def test_predictors_by_hand(x64, tau):
    """One step, from the drift, the diffusion and the score."""
    grid = jd.grids.from_times(PROCESS, np.array([0.6, 0.55]))
    rng = np.random.default_rng(0)
    x, z = rng.normal(size=(2, 5, 2))
    (t, t1), alpha, sigma = grid.t, grid.alpha, grid.sigma
    score = BROAD.score(x, alpha[0], sigma[0])
    beta, dt = 0.1 + t * 19.9, t1 - t
    drift = -0.5 * beta * x - 0.5 * (1 + tau**2) * beta * score
    maruyama = x + dt * drift + tau * np.sqrt(-beta * dt) * z
    a = alpha[0] / alpha[1]
    b = 1 - a**2  # one forward step's beta, where variance is preserved
    diffusion = (2 - a) * x + 0.5 * (1 + tau**2) * b * score + tau * np.sqrt(b) * z
    noise = jnp.asarray(z[None]) if tau else None
    for table, expected in (
        (euler_maruyama(grid, tau), maruyama), (reverse_diffusion(grid, tau), diffusion)
    ):  # fmt: skip
        got = jd.sample(mixture("eps"), table, x, noise=noise)
        np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_ancestral_sampling_is_ddpm(x64):
    """score_sde's ancestral predictor, for VP with beta and for VE with sigma^2 - sigma'^2."""
    rng = np.random.default_rng(0)
    x, z = rng.normal(size=(2, 5, 2))
    ve = jd.processes.ve(sigma_min=0.01, sigma_max=50.0)
    for process, variance in ((PROCESS, "fixed_large"), (ve, "fixed_small")):
        grid = jd.grids.from_times(process, np.array([0.6, 0.55]))
        (alpha, alpha1), (sigma, sigma1) = grid.alpha, grid.sigma
        score = BROAD.score(x, alpha, sigma)
        if process is ve:
            v = sigma**2 - sigma1**2
            expected = x + v * score + np.sqrt(sigma1**2 * v / sigma**2) * z
        else:
            beta = 1 - (alpha / alpha1) ** 2
            expected = (x + beta * score) / np.sqrt(1 - beta) + np.sqrt(beta) * z
        denoiser = jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, process)
        table = jd.solvers.ddpm(grid, variance)
        got = jd.sample(denoiser, table, x, noise=jnp.asarray(z[None]))
        np.testing.assert_allclose(got, expected, rtol=1e-8)
    # Where alpha is 1 the reverse-diffusion predictor is ddpm too, with all of the step's noise.
    grid = jd.grids.half_log_snr(ve, 5)
    x, one = 10 * x, jax.random.key(0)
    denoiser = jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, ve)
    ends = run_all(
        denoiser, [reverse_diffusion(grid), jd.solvers.ddpm(grid, "fixed_large")], x, key=one
    )
    np.testing.assert_allclose(*ends, rtol=1e-9)


def test_only_euler_maruyama_needs_the_process():
    arrays = jd.grids.from_arrays(GRID.t, GRID.alpha, GRID.sigma)
    with pytest.raises(ValueError, match="no process, so no drift and diffusion"):
        euler_maruyama(arrays)
    np.testing.assert_array_equal(reverse_diffusion(arrays).B, reverse_diffusion(GRID).B)
    with pytest.raises(ValueError, match="from data to noise takes tau = 0, got 1.0"):
        reverse_diffusion(GRID.reversed())


# --- gDDIM ---------------------------------------------------------------------------------------


def test_isotropic_gddim_is_ddim_and_its_kin():
    for tau in (0.0, 0.6, 1.0):
        ours, sa = gddim(GRID, tau=tau), sa_solver(GRID, 1, 0, tau)
        h = np.diff(GRID.lam)
        eta = np.sqrt(np.expm1(-2 * tau**2 * h) / np.expm1(-2 * h))
        # In x0: x - sigma eps = alpha x0.
        data_weight = -ours.B[:, 0, 0, 0] * GRID.alpha[:-1] / GRID.sigma[:-1]
        carry = ours.A[:, 0, 0] + ours.B[:, 0, 0, 0] / GRID.sigma[:-1]
        np.testing.assert_allclose(data_weight, sa.B[:, 0, 0, 0], rtol=1e-9)
        np.testing.assert_allclose(carry, sa.A[:, 0, 0], rtol=1e-7)
        if tau:
            np.testing.assert_allclose(ours.C[:, 0], sa.C[:, 0], rtol=1e-12)
            posterior = jd.solvers.ddim(GRID, eta=1.0).C[:, 0]
            np.testing.assert_allclose(ours.C[:, 0], eta * posterior, rtol=1e-10)
    for order in (2, 3, 4):
        adams = exponential_adams(GRID, order, "eps", "lambda")
        np.testing.assert_allclose(gddim(GRID, order).B, adams.B, rtol=1e-8, atol=1e-12)


WAVES, SPREAD = np.array([0.0, 0.5, 1.5]), np.array([1.0, 0.5, 0.2])


def blur(t):
    """Damping of three frequencies, as in blurring diffusion."""
    xp = jnp if isinstance(t, jax.Array) else np
    return xp.exp(-(WAVES**2) * xp.sin(0.5 * np.pi * t) ** 4)


def blurred(t):
    alpha, sigma = PROCESS.alpha(t), PROCESS.sigma(t)
    return alpha * blur(t), sigma


def blurred_eps(y, t):
    """E[eps | y] of components N(0, SPREAD^2)."""
    a, sigma = blurred(t)
    return sigma * y / (a**2 * SPREAD**2 + sigma**2)


def blurred_data(y, t):
    a, sigma = blurred(t)
    return a * SPREAD**2 * y / (a**2 * SPREAD**2 + sigma**2)


def no_blurred_data(y, t):
    """eps of data that are all 0."""
    return y / blurred(t)[1]


@pytest.mark.parametrize(("order", "expected"), [(1, 1), (2, 2), (4, 2)])
def test_gddim_follows_every_frequency(x64, order, expected):
    """The flow of a Gaussian scales each component by its standard deviation."""
    y, steps = jnp.ones((1, 3)), (20, 40, 80)
    tables = [
        gddim(jd.grids.half_log_snr(PROCESS, n, t_min=0.05), order, scaling=blur) for n in steps
    ]
    first, last = (np.sqrt(a**2 * SPREAD**2 + s**2) for a, s in map(blurred, (1.0, 0.05)))
    ends = np.stack(run_all(jd.Denoiser(blurred_eps, "eps"), tables, y))[:, 0]
    errors = np.abs(ends - last / first).max(1)
    assert fitted_order(steps, errors) >= expected - 0.25
    # The same from a network that predicts y0, converted by component.
    other = np.stack(run_all(jd.Denoiser(blurred_data, "x0"), tables, y))[:, 0]
    np.testing.assert_allclose(other, ends, rtol=1e-6)


def test_noisy_gddim_keeps_the_marginal_of_a_point_mass(x64):
    grid = jd.grids.half_log_snr(PROCESS, 5, t_min=0.05)
    denoiser = jd.Denoiser(no_blurred_data, "eps")
    for tau in (0.0, 0.7, 1.0):
        table = gddim(grid, tau=tau, scaling=blur)
        basis = np.eye(1 + table.draws)
        x, noise = (jnp.asarray(np.repeat(b, 3, -1)) for b in (basis[:, :1], basis[1:, :, None]))
        ends = np.asarray(jd.sample(denoiser, table, x, noise=noise if tau else None))
        variance = ends[0] ** 2 * grid.sigma[0] ** 2 + (ends[1:] ** 2).sum(0)
        np.testing.assert_allclose(variance, grid.sigma[-1] ** 2, rtol=1e-9)


# --- traced grids, options -----------------------------------------------------------------------


BUILDERS = {
    "sa_solver": sa_solver,
    "sa_solver_window": functools.partial(sa_solver, window=(0.05, 1.0), variant="few_steps"),
    "sa_solver_eps": functools.partial(sa_solver, integrand="eps", mode="pece"),
    "seeds": functools.partial(seeds, stages=3),
    "er_sde": er_sde,
    "er_sde_published": functools.partial(er_sde, variant="published"),
    "euler_maruyama": euler_maruyama,
    "reverse_diffusion": reverse_diffusion,
    "gddim": functools.partial(gddim, order=2, scaling=blur),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_a_traced_grid_gives_the_same_table(x64, name):
    """And one that can be differentiated with respect to its times."""
    times, tangent = np.linspace(0.9, 0.1, 5), np.array([0.1, -0.3, 0.5, 0.2, -0.1])

    def coefficients(t):
        table = BUILDERS[name](jd.grids.from_times(PROCESS, t))
        return [a for a in (table.A, table.B, table.C) if a is not None]

    run = jax.jit(lambda t: jax.jvp(coefficients, (t,), (jnp.asarray(tangent),)))
    values, slopes = run(jnp.asarray(times))
    ahead, behind = (coefficients(times + step * tangent) for step in (1e-5, -1e-5))
    for value, slope, a, b, c in zip(values, slopes, coefficients(times), ahead, behind):
        np.testing.assert_allclose(value, a, rtol=1e-8, atol=1e-11)
        np.testing.assert_allclose(slope, (b - c) / 2e-5, rtol=1e-4, atol=1e-6)


def test_a_traced_grid_may_have_both_ends(x64):
    """From alpha = 0 to sigma = 0: the limits are chosen by the grid's ends, not by values."""
    times = np.linspace(1.0, 0.0, 6)
    builds = (sa_solver, functools.partial(seeds, stages=2), er_sde)

    def coefficients(t):
        grid = jd.grids.from_times(jd.processes.flow(), t, ends=(True, True))
        return [(table.A, table.B, table.C) for table in (build(grid) for build in builds)]

    tangent = jnp.asarray([0.0, 0.1, -0.1, 0.2, 0.1, 0.0])
    values, slopes = jax.jit(lambda t: jax.jvp(coefficients, (t,), (tangent,)))(jnp.asarray(times))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12),
        values, coefficients(times),
    )  # fmt: skip
    assert all(np.all(np.isfinite(slope)) for slope in jax.tree.leaves(slopes))


@pytest.mark.parametrize(
    ("build", "options", "error", "message"),
    [
        (seeds, {"stages": 4}, ValueError, "stages must be an integer from 1 to 3, got 4"),
        (seeds, {"integrand": "v"}, ValueError, "integrand must be one of .*'v'"),
        (seeds, {"stages": 2, "middle": 1.5}, ValueError, r"middle must be 1 .*got 1.5"),
        (seeds, {"stages": 3, "middle": 0.5}, ValueError, r"middle must be 2 .*got 0.5"),
        (seeds, {"stages": 3, "middle": (0.6, 0.3)}, ValueError, r"middle must be 2 increasing"),
        (seeds, {"weights": "phi_3"}, ValueError, "weights must be one of .*'phi_3'"),
        (seeds, {"tau": -1.0}, ValueError, "tau must be finite and not negative, got -1.0"),
        (er_sde, {"order": 4}, ValueError, "order must be an integer from 1 to 3, got 4"),
        (er_sde, {"noise_scale": "sde_6"}, ValueError, "noise_scale must be one of .*'sde_6'"),
        (er_sde, {"variant": "old"}, ValueError, "variant must be one of .*'old'"),
        (gddim, {"order": 5}, ValueError, "order must be an integer from 1 to 4, got 5"),
        (gddim, {"order": 2, "tau": 1.0}, ValueError, "order 2 takes tau = 0, got 1.0"),
        (gddim, {"scaling": 2.0}, TypeError, "scaling must be a function of t or None, got 2.0"),
        (reverse_diffusion, {"tau": "1"}, TypeError, "tau must be a number or a function"),
    ],
)
def test_bad_options_are_named(build, options, error, message):
    with pytest.raises(error, match=message):
        build(GRID, **options)
