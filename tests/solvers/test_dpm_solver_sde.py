"""SDE-DPM-Solvers: the published formulas, the noise of an inner stage, where references err."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import BROAD, fitted_order
from scipy.integrate import quad

import jaxdiff as jd
from jaxdiff.solvers.dpm_solver_sde import (
    dpm_solver_pp_sde,
    dpm_solver_pp_sde_multistep,
    dpm_solver_sde_multistep,
)
from jaxdiff.solvers.dpm_solver_sde_nodes import dpm_solver_pp_sde_singlestep

VP, EDM = jd.processes.vp_linear(), jd.processes.edm()


def grid_of(name, steps=7, end="zero"):
    process, t_max, t_min = {"vp": (VP, 0.98, 0.02), "edm": (EDM, 60.0, 0.01)}[name]
    return jd.grids.karras(process, steps, t_max=t_max, t_min=t_min, end=end)


def run(grid, table, seed=1):
    """(start, noise, the solution at the nodes)."""
    x = BROAD.sample(np.random.default_rng(0), 6, grid.alpha[0], grid.sigma[0])
    noise = np.random.default_rng(seed).normal(size=(table.draws, 6, 2))
    denoiser = jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, grid.process)
    nodes = jd.sample(denoiser, table, jnp.asarray(x), noise=jnp.asarray(noise), save="nodes")
    return x, noise, np.asarray(nodes)


def x0_of(y, rho):
    return y - rho * BROAD.eps(y, 1.0, rho)


# --- k-diffusion's, written out in y = x / alpha and rho ----------------------------------------


def ancestral(rho, rho1, eta):
    up = min(rho1, eta * np.sqrt(rho1**2 * (rho**2 - rho1**2) / rho**2))
    return np.sqrt(rho1**2 - up**2), up


@pytest.mark.parametrize(("process", "eta"), [("edm", 1.0), ("vp", 0.49)])
@pytest.mark.parametrize("r", [0.5, 0.3])
def test_dpmpp_sde_as_published(x64, process, eta, r):
    """One Brownian path in rho: W = (W_m - W) + (W' - W_m), from the two draws."""
    grid = grid_of(process)
    x, noise, nodes = run(
        grid, dpm_solver_pp_sde(grid, eta=eta, s_noise=1.1, r=r, variant="published")
    )
    rhos, y = grid.sigma / grid.alpha, x / grid.alpha[0]
    fac = 1 / (2 * r)
    for i, (rho, rho1) in enumerate(zip(rhos[:-1], rhos[1:])):
        d = x0_of(y, rho)
        if rho1 == 0:
            y = d
        else:
            middle = np.exp((1 - r) * np.log(rho) + r * np.log(rho1))
            moves = np.sqrt(rho - middle) * noise[2 * i], np.sqrt(middle - rho1) * noise[2 * i + 1]
            down, up = ancestral(rho, middle, np.sqrt(eta))
            inner = down / rho * y + (1 - down / rho) * d
            inner = inner + 1.1 * up * moves[0] / np.sqrt(rho - middle)
            mixed = (1 - fac) * d + fac * x0_of(inner, middle)
            down, up = ancestral(rho, rho1, np.sqrt(eta))
            y = down / rho * y + (1 - down / rho) * mixed
            y = y + 1.1 * up * sum(moves) / np.sqrt(rho - rho1)
        np.testing.assert_allclose(nodes[i + 1] / grid.alpha[i + 1], y, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("process", "eta"), [("edm", 1.0), ("vp", 0.6)])
@pytest.mark.parametrize("solver", ["2m_midpoint", "2m_heun", "3m"])
def test_multistep_sde_is_k_diffusions(x64, process, eta, solver):
    grid = grid_of(process)
    options = {"order": 2, "solver_type": solver[3:]}
    if solver == "3m":
        options = {"order": 3, "solver_type": "heun", "variant": "published"}
    table = dpm_solver_pp_sde_multistep(
        grid, eta=eta, s_noise=0.9, lower_order_final=False, **options
    )
    x, noise, nodes = run(grid, table)
    rhos, y, past, last = grid.sigma / grid.alpha, x / grid.alpha[0], [], []
    for i, (rho, rho1) in enumerate(zip(rhos[:-1], rhos[1:])):
        d = x0_of(y, rho)
        if rho1 == 0:
            y = d
        else:
            h = np.log(rho / rho1)
            long = (1 + eta) * h
            phi_2 = np.expm1(-long) / long + 1
            y = np.exp(-long) * y - np.expm1(-long) * d
            if solver == "3m" and len(past) == 2:
                r0, r1 = last[0] / h, last[1] / h
                d10, d11 = (d - past[0]) / r0, (past[0] - past[1]) / r1
                d1 = d10 + (d10 - d11) * r0 / (r0 + r1)
                d2 = (d10 - d11) / (r0 + r1)
                y = y + phi_2 * d1 - (phi_2 / long - 0.5) * d2
            elif past and solver == "2m_midpoint":
                y = y - 0.5 * np.expm1(-long) * (h / last[0]) * (d - past[0])
            elif past:
                y = y + phi_2 * (h / last[0]) * (d - past[0])
            y = y + 0.9 * rho1 * np.sqrt(-np.expm1(-2 * eta * h)) * noise[i]
            past, last = [d, *past][:2], [h, *last][:2]
        np.testing.assert_allclose(nodes[i + 1] / grid.alpha[i + 1], y, rtol=1e-9, atol=1e-10)


# --- diffusers', in alpha, sigma and lambda -----------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "order", "solver_type"),
    [("x0", 1, "midpoint"), ("x0", 2, "midpoint"), ("x0", 2, "heun"), ("x0", 3, "midpoint"),
     ("eps", 1, "midpoint"), ("eps", 2, "midpoint"), ("eps", 2, "heun")],
)  # fmt: skip
def test_multistep_sde_is_diffusers(x64, kind, order, solver_type):
    """sde-dpmsolver++ ("x0") and sde-dpmsolver ("eps") of DPMSolverMultistepScheduler, eta = 1."""
    grid = grid_of("vp", end="t_min")
    options = {"order": order, "solver_type": solver_type, "lower_order_final": False}
    if kind == "x0":
        table = dpm_solver_pp_sde_multistep(grid, variant="diffusers", **options)
    else:
        table = dpm_solver_sde_multistep(grid, **options)
    x, noise, nodes = run(grid, table)
    lam, seen = grid.lam, []
    for i in range(grid.steps):
        (_, a, s), (_, a1, s1) = grid.node(i), grid.node(i + 1)
        h, eps = lam[i + 1] - lam[i], BROAD.eps(x, a, s)
        seen = [(x - s * eps) / a if kind == "x0" else eps, *seen][:3]
        e = np.exp(-2 * h) if kind == "x0" else np.exp(h)
        if kind == "x0":
            x = s1 / s * np.exp(-h) * x + a1 * (1 - e) * seen[0] + s1 * np.sqrt(1 - e) * noise[i]
        else:
            x = a1 / a * x - 2 * s1 * (e - 1) * seen[0] + s1 * np.sqrt(e**2 - 1) * noise[i]
        if order > 1 and i > 0:
            r0 = (lam[i] - lam[i - 1]) / h
            d1 = d10 = (seen[0] - seen[1]) / r0
            third = order == 3 and i > 1
            if third:
                r1 = (lam[i - 1] - lam[i - 2]) / h
                d11 = (seen[1] - seen[2]) / r1
                d1 = d10 + r0 / (r0 + r1) * (d10 - d11)
                d2 = (d10 - d11) / (r0 + r1)
                x = x + a1 * ((1 - e - 2 * h) / (2 * h) ** 2 - 0.5) * d2
            exact = third or solver_type == "heun"
            if kind == "x0":
                x = x + a1 * ((1 - e) / (-2 * h) + 1 if exact else 0.5 * (1 - e)) * d1
            else:
                x = x - s1 * (2 * ((e - 1) / h - 1) if exact else e - 1) * d1
        np.testing.assert_allclose(nodes[i + 1], x, rtol=1e-9, atol=1e-10)


# --- what is right ------------------------------------------------------------------------------


def test_order_one_is_ddpm():
    grid = grid_of("vp")
    ours, ddpm = dpm_solver_pp_sde_multistep(grid, order=1), jd.solvers.ddpm(grid)
    for name in ("A", "B", "C", "clock"):
        np.testing.assert_allclose(getattr(ours, name), getattr(ddpm, name), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("order", "kind"), [(2, "x0"), (3, "x0"), (3, "eps")])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_a_step_integrates_polynomials_exactly(order, kind, eta):
    """x0 or eps = a polynomial of degree order - 1 in lambda: the integral by quadrature."""
    grid = grid_of("vp", end="t_min")
    build = dpm_solver_pp_sde_multistep if kind == "x0" else dpm_solver_sde_multistep
    table = build(grid, order=order, eta=eta, solver_type="heun", lower_order_final=False)
    polynomial = np.polynomial.Polynomial([0.3, -0.7, 0.2][:order])
    lam, i = grid.lam, grid.steps - 1
    got = sum(table.B[i, 0, k, 0] * polynomial(lam[i - k]) for k in range(order))
    first, last = lam[i], lam[i + 1]

    def inside(place):
        if kind == "x0":
            return grid.alpha[-1] * np.exp(-(1 + eta) * (last - place)) * polynomial(place)
        return -grid.sigma[-1] * np.exp(last - place) * polynomial(place)

    expected = (1 + eta) * quad(inside, first, last, epsabs=1e-13)[0]
    np.testing.assert_allclose(got, expected, rtol=1e-10)


@pytest.mark.parametrize("eta", [0.4, 1.0])
@pytest.mark.parametrize("r", [0.5, 0.3])
def test_the_inner_stages_noise_is_the_steps_own(eta, r):
    """Covariance of the noises in y at the stage and at the end, against the SDE's Ito integral."""
    grid = grid_of("vp", end="t_min")
    table = dpm_solver_pp_sde(grid, eta=eta, r=r)
    i = 3
    first, end = grid.lam[i], grid.lam[i + 1]
    middle = first + r * (end - first)
    stage = table.C[2 * i, 0] / grid.at(middle)[1], 0.0
    whole = table.C[2 * i, 1] / grid.alpha[i + 1], table.C[2 * i + 1, 0] / grid.alpha[i + 1]

    def covariance(to, to_other):
        def inside(place):
            both = np.exp(-(1 + eta) * (to + to_other - 2 * place))
            return 2 * eta * np.exp(-2 * place) * both

        return quad(inside, first, min(to, to_other), epsabs=0, epsrel=1e-12)[0]

    np.testing.assert_allclose(np.dot(stage, stage), covariance(middle, middle), rtol=1e-9)
    np.testing.assert_allclose(np.dot(stage, whole), covariance(middle, end), rtol=1e-9)
    np.testing.assert_allclose(np.dot(whole, whole), covariance(end, end), rtol=1e-9)


def variance_error(table, std=0.5):
    """Error of the end's variance for data N(0, std^2), whose denoiser is linear: exact.

    Each register is followed as its coefficients of x_T, unit variance, and of every draw.
    """
    size = lambda a, s: (a * std) ** 2 + s**2  # noqa: E731
    basis = np.eye(1 + table.draws)
    first = np.sqrt(size(table.alpha[0], table.sigma[0]))
    registers, history = [first * basis[0]] * table.registers, []
    for r in range(table.rows):
        slope = table.alpha[r] * std**2 / size(table.alpha[r], table.sigma[r])
        history = [slope * registers[0], *history][: table.history]
        registers = [
            sum(a * s for a, s in zip(table.A[r, i], registers))
            + sum(b * m for b, m in zip(table.B[r, i, :, 0], history))
            + table.C[r, i] * basis[1 + table.draw[r]]
            for i in range(table.registers)
        ]
    return abs(np.sum(registers[0] ** 2) - size(VP.alpha(1e-2), VP.sigma(1e-2)))


@pytest.mark.parametrize(
    ("build", "options", "low", "high"),
    [
        (dpm_solver_pp_sde, {}, 1.8, 2.3),
        (dpm_solver_pp_sde, {"variant": "published"}, 1.8, 2.3),
        (dpm_solver_pp_sde, {"variant": "independent"}, 0.8, 1.2),
        (dpm_solver_pp_sde_multistep, {"order": 3, "variant": "published"}, 1.8, 2.3),
        (dpm_solver_pp_sde_multistep, {"order": 3, "variant": "diffusers"}, 0.8, 1.2),
        (dpm_solver_pp_sde_singlestep, {"order": 2}, 1.8, 2.3),
        (dpm_solver_pp_sde_singlestep, {"order": 2, "variant": "diffusers"}, 0.6, 1.2),
        (dpm_solver_pp_sde_singlestep, {"variant": "diffusers"}, -0.5, 0.0),  # it does not converge
    ],
)
def test_weak_order_is_one_with_independent_noises_and_with_diffusers_third_order(
    build, options, low, high
):
    steps = (40, 80, 160)
    grids = [jd.grids.half_log_snr(VP, n, t_max=1.0, t_min=1e-2) for n in steps]
    assert low < fitted_order(steps, [variance_error(build(g, **options)) for g in grids]) < high


def test_diffusers_third_order_parts_from_the_sde_as_steps_are_added(x64):
    """The tenth of paths furthest from the right formula's, on the same noise, get further away.

    Those of k-diffusion's formula get nearer.
    """
    denoiser = jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, VP)

    @functools.partial(jax.jit, static_argnums=0)
    def far(steps):
        grid = jd.grids.half_log_snr(VP, steps, t_max=0.9, t_min=0.05)
        x = BROAD.sample(np.random.default_rng(0), 256, grid.alpha[0], grid.sigma[0])
        ends = [
            jd.sample(
                denoiser, dpm_solver_pp_sde_multistep(grid, order=3, variant=variant),
                jnp.asarray(x), jax.random.key(1),
            )
            for variant in ("corrected", "published", "diffusers")
        ]  # fmt: skip
        gaps = [jnp.linalg.norm(end - ends[0], axis=-1) for end in ends[1:]]
        return jnp.quantile(jnp.stack(gaps), 0.9, axis=1)

    few, many = np.asarray(far(80)), np.asarray(far(640))
    assert many[0] < 0.1 * few[0] < 1e-3
    assert many[1] > 3 * few[1] > 0.3


def test_the_mixtures_moments_come_out(x64):
    """Every sampler of the SDE family and every ancestral one, 40 steps: the marginal's moments."""
    entries = [
        (entry, setting)
        for entry in jd.solvers.CATALOGUE.values()
        for setting in entry.settings.values()
        if entry.build.__module__.endswith(("dpm_solver_sde", "ancestral"))
    ]
    grid = jd.grids.half_log_snr(VP, 40, t_max=0.9, t_min=0.05)
    count = 4096
    x = BROAD.sample(np.random.default_rng(2), count, grid.alpha[0], grid.sigma[0])
    denoiser = jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, VP)
    tables = jd.solvers.stack([entry.build(grid, **setting.options) for entry, setting in entries])
    run = jax.vmap(lambda table: jd.sample(denoiser, table, jnp.asarray(x), jax.random.key(5)))
    mean, cov = BROAD.moments(grid.alpha[-1], grid.sigma[-1])
    for (_, setting), end in zip(entries, np.asarray(run(tables))):
        # Five standard errors, and the discretisation's own error.
        bias = 0.1 if setting.order == 1 else 0.02
        np.testing.assert_allclose(end.mean(0), mean, atol=0.08 + 0.5 * bias)
        np.testing.assert_allclose(np.cov(end.T), cov, atol=0.12 + bias)


@pytest.mark.parametrize("noise_end", [True, False])
def test_gradients_with_respect_to_the_grid_are_finite(noise_end):
    """Also from alpha = 0 to sigma = 0, where lambda is infinite."""
    process = jd.processes.flow() if noise_end else VP
    grid = jd.grids.uniform(process, 3, end="t_min" if noise_end else "zero")
    assert grid.ends == (noise_end, True)
    kinds = [dpm_solver_pp_sde, dpm_solver_pp_sde_multistep]
    if not noise_end:
        published = functools.partial(dpm_solver_pp_sde, variant="published", eta=0.5)
        kinds = [published, dpm_solver_sde_multistep]

    @jax.jit
    @jax.grad
    def slope(alpha):
        moved = jd.grids.from_arrays(jnp.asarray(grid.t), alpha, jnp.asarray(grid.sigma), grid.ends)
        tables = [kind(moved) for kind in kinds]
        return sum(table.A.sum() + table.B.sum() + (table.C**2).sum() for table in tables)

    assert np.all(np.isfinite(slope(jnp.asarray(grid.alpha, jnp.float32))))


def test_eta_above_one_is_allowed_but_not_as_published():
    grid = grid_of("vp")
    assert np.all(np.isfinite(dpm_solver_pp_sde(grid, eta=1.5).C))
    with pytest.raises(ValueError, match="variant='published' takes eta <= 1, got 1.5"):
        dpm_solver_pp_sde(grid, eta=1.5, variant="published")


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (dpm_solver_pp_sde, {"r": 1.0}, r"r must be a number in \(0, 1\), got 1.0"),
        (dpm_solver_pp_sde, {"variant": "right"}, "variant must be one of .* got 'right'"),
        (dpm_solver_pp_sde, {"eta": -1}, "eta must be finite and not negative, got -1"),
        (dpm_solver_pp_sde_multistep, {"order": 4}, "order must be an integer from 1 to 3, got 4"),
        (dpm_solver_pp_sde_multistep, {"solver_type": "x"}, "solver_type must be .* got 'x'"),
        (dpm_solver_pp_sde_multistep, {"variant": "x"}, "variant must be one of .* got 'x'"),
        (dpm_solver_sde_multistep, {"order": 0}, "order must be an integer from 1 to 3, got 0"),
        (dpm_solver_sde_multistep, {"s_noise": -1.0}, "s_noise must be finite and not negative"),
    ],
)
def test_bad_options_are_named(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(grid_of("vp", 3), **options)


@pytest.mark.parametrize(
    "build", [dpm_solver_pp_sde, dpm_solver_pp_sde_multistep, dpm_solver_sde_multistep]
)
def test_noise_does_not_run_backward_but_the_flow_does(build):
    grid = grid_of("vp", 3, "t_min").reversed()
    with pytest.raises(ValueError, match="from data to noise takes eta = 0, got 1.0"):
        build(grid)
    assert not build(grid, eta=0.0).stochastic


@pytest.mark.parametrize("order", [2, 3])
def test_single_steps_on_nodes_without_noise_are_dpm_solver_pps(order, x64):
    grid, x = jd.grids.half_log_snr(VP, 9), np.random.default_rng(0).normal(size=(8, 2))
    tables = (
        dpm_solver_pp_sde_singlestep(grid, order, eta=0.0),
        jd.solvers.dpm_solver_singlestep(grid, order, "x0", "taylor", stages="nodes"),
    )
    denoiser = jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, VP)
    ends = [jd.sample(denoiser, table, x) for table in tables]
    np.testing.assert_allclose(*ends, rtol=1e-12, atol=1e-12)
