"""DPM-Solver-12 and -23: the published step, order, exact end points, counted calls."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import counted
from oracles import BROAD, fitted_order, median_error

import jaxdiff as jd
from jaxdiff import ode

VP = jd.processes.vp_linear()
PAIRS = {2: ode.DPMSolver12, 3: ode.DPMSolver23}
KINDS = [(i, s) for i in ("x0", "eps") for s in ("dpm_solver", "taylor")]
CONSTANT = diffrax.ConstantStepSize()


def level(t, process=VP):
    return float(process.alpha(t)), float(process.sigma(t))


def pid(tolerance):
    return diffrax.PIDController(rtol=tolerance, atol=tolerance, norm=ode.sample_norm)


def mixture(prediction="eps"):
    return jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, prediction=prediction)


def start(count, t, seed=0):
    return BROAD.sample(np.random.default_rng(seed), count, *level(t))


# --- fixed steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("integrand", "solver_type"), KINDS)
@pytest.mark.parametrize("order", PAIRS)
def test_fixed_steps_have_the_order_of_the_higher_member(order, integrand, solver_type, x64):
    x, steps = start(32, 0.9), [20, 40, 80]
    exact = BROAD.flow(x, level(0.9), level(0.05))
    span = float(VP.half_log_snr(0.05) - VP.half_log_snr(0.9))
    solver = PAIRS[order](integrand, solver_type)
    errors = [
        median_error(
            ode.sample(
                mixture(), VP, x, t_max=0.9, t_min=0.05, solver=solver, dt0=span / n,
                stepsize_controller=CONSTANT,
            ).x,
            exact,
        )
        for n in steps
    ]  # fmt: skip
    assert order - 0.15 < fitted_order(steps, errors) < order + 0.5


def one_step(x, lam, h, order, integrand, solver_type, process=VP):
    """(lower, higher) of a pair in NumPy, as the official singlestep updates write them."""

    def at(r):
        t = process.time(lam + r * h)
        return process.alpha(t), process.sigma(t)

    def m(r, y):
        a, s = at(r)
        eps = BROAD.eps(y, a, s)
        return eps if integrand == "eps" else (y - s * eps) / a

    sign = 1.0 if integrand == "eps" else -1.0
    (a0, s0), e = at(0.0), np.expm1

    def linear(r):
        a, s = at(r)
        return (a / a0, -s) if integrand == "eps" else (s / s0, -a)

    def first(r):
        carry, outer = linear(r)
        return carry * x + outer * e(sign * r * h) * m0

    m0 = m(0.0, x)
    carry, outer = linear(1.0)
    phi_1, phi_2 = e(sign * h), e(sign * h) / h - sign
    phi_3 = phi_2 / h - 0.5

    def second(r, m1):
        if solver_type == "dpm_solver":
            return first(1.0) + outer * phi_1 * (m1 - m0) / (2 * r)
        return first(1.0) + sign * outer * phi_2 * (m1 - m0) / r

    if order == 2:
        return first(1.0), second(0.5, m(0.5, first(0.5)))
    m1 = m(1 / 3, first(1 / 3))
    part = e(sign * 2 / 3 * h) / (2 / 3 * h) - sign
    _, outer_2 = linear(2 / 3)
    m2 = m(2 / 3, first(2 / 3) + sign * outer_2 * 2.0 * part * (m1 - m0))
    if solver_type == "dpm_solver":
        return second(1 / 3, m1), first(1.0) + sign * outer * 1.5 * phi_2 * (m2 - m0)
    d0, d1 = 3.0 * (m1 - m0), 1.5 * (m2 - m0)
    slope, bend = 2.0 * d0 - d1, 6.0 * (d1 - d0)
    higher = first(1.0) + sign * outer * phi_2 * slope + outer * phi_3 * bend
    return second(1 / 3, m1), higher


@pytest.mark.parametrize(("integrand", "solver_type"), KINDS)
@pytest.mark.parametrize("order", PAIRS)
def test_a_step_is_the_published_formula_in_both_directions(order, integrand, solver_type, x64):
    solver = PAIRS[order](integrand, solver_type)
    for first, last in ((0.7, 0.4), (0.4, 0.7)):
        x = start(4, first)
        lam, lam1 = (float(VP.half_log_snr(t)) for t in (first, last))
        expected = one_step(x, lam, lam1 - lam, order, integrand, solver_type)
        # y1 and the error estimate, as a controller sees it.
        higher, error, *_ = solver.step(
            ode.probability_flow("lambda"), lam, lam1, jnp.asarray(x),
            ode.Problem(mixture("x0"), VP), None, False,
        )  # fmt: skip
        np.testing.assert_allclose(higher, expected[1], rtol=1e-10)
        np.testing.assert_allclose(error, expected[1] - expected[0], rtol=1e-8, atol=1e-13)


def test_a_linear_integrand_is_integrated_exactly_by_taylor(x64):
    """m linear in lambda, whatever x: the first order moments of phi_1 and phi_2."""
    denoiser = jd.Denoiser(_linear, "eps", jnp.asarray([0.3, -0.7]))
    first, last = 0.7, 0.2
    lam, end = (float(VP.half_log_snr(t)) for t in (first, last))
    (a, _), (a1, _) = level(first), level(last)
    x, rho = np.array([[0.4, -1.0]]), np.exp(-np.array([lam, end]))
    # d(x / alpha) = eps drho, eps = p + q lambda: integral p rho - q (rho log(rho) - rho).
    inside = 0.3 * rho + 0.7 * (rho * np.log(rho) - rho)
    expected = a1 * (x / a + inside[1] - inside[0])
    for solver in (ode.DPMSolver12("eps", "taylor"), ode.DPMSolver23("eps")):
        out = ode.solve(
            denoiser, VP, x, first, last, solver=solver, dt0=end - lam, stepsize_controller=CONSTANT
        )
        np.testing.assert_allclose(out.x, expected, rtol=1e-11)


def _linear(params, x, t):
    lam = VP.half_log_snr(t)
    return jnp.full_like(x, params[0] + params[1] * lam)


# --- adaptive -------------------------------------------------------------------------------------


@pytest.mark.parametrize("integrand", ["x0", "eps"])
@pytest.mark.parametrize("order", PAIRS)
def test_end_points_to_the_tolerance(order, integrand, x64):
    """A hundred times less tolerance costs 100^(1/order) times more, and errors follow."""
    x, solver = start(16, 1.0), PAIRS[order](integrand)
    exact = BROAD.flow(x, level(1.0), level(1e-3))
    run = lambda tol: ode.sample(  # noqa: E731
        mixture(), VP, x, solver=solver, stepsize_controller=pid(tol)
    )
    rough, fine = run(1e-3), None
    with counted() as compiled:
        fine = run(1e-5)
    assert not compiled
    for tolerance, out in ((1e-3, rough), (1e-5, fine)):
        assert np.abs(out.x - exact).max() < 10 * tolerance
    growth = np.log(int(fine.accepted) / int(rough.accepted)) / np.log(100.0)
    assert abs(growth - 1 / order) < 0.12


def test_the_published_controller_and_tolerance(x64):
    """rtol 0.05, atol 0.0078, as published: within 0.1 of the end point in about 30 evaluations."""
    x = start(16, 1.0)
    exact = BROAD.flow(x, level(1.0), level(1e-3))
    controller = diffrax.PIDController(rtol=0.05, atol=0.0078, norm=ode.sample_norm)
    for solver in (ode.DPMSolver12(), ode.DPMSolver23()):
        out = ode.sample(mixture(), VP, x, solver=solver, stepsize_controller=controller)
        assert int(out.nfe) < 50 and median_error(out.x, exact) < 0.1


def test_encode_inverts_and_saved_times_are_between_steps(x64):
    x, times = start(4, 1.0), [0.6, 0.3, 0.05]
    solver, options = ode.DPMSolver23("eps"), {"stepsize_controller": pid(1e-7)}
    path = ode.sample(mixture(), VP, x, solver=solver, save_at=times, t_min=0.01, **options)
    for t, got in zip(times, path.x):
        np.testing.assert_allclose(got, BROAD.flow(x, level(1.0), level(t)), rtol=0, atol=2e-5)
    back = ode.encode(mixture(), VP, path.x[1], t_min=0.3, t_max=0.8, solver=solver, **options)
    np.testing.assert_allclose(back.x, BROAD.flow(x, level(1.0), level(0.8)), rtol=0, atol=5e-5)


def test_from_a_flow_process_and_in_float32():
    process = jd.processes.flow()
    x = BROAD.sample(np.random.default_rng(1), 8, *level(0.99, process)).astype(np.float32)
    out = ode.sample(
        mixture("v"), process, x, t_max=0.99, t_min=1e-3, solver=ode.DPMSolver23(),
        stepsize_controller=pid(1e-4),
    )  # fmt: skip
    exact = BROAD.flow(np.float64(x), level(0.99, process), level(1e-3, process))
    assert out.x.dtype == jnp.float32
    np.testing.assert_allclose(out.x, exact, rtol=0, atol=1e-3)


# --- what is reported, and what is refused --------------------------------------------------------

_calls = []


def _counting(params, x, levels):
    jax.debug.callback(lambda: _calls.append(1))
    return mixture().fn(params, x, levels)


@pytest.mark.parametrize("order", PAIRS)
def test_nfe_is_the_number_of_calls(order):
    """Accepted or rejected, a step costs `order`; a first step of 6 in lambda is rejected."""
    denoiser = jd.Denoiser(_counting, "eps", mixture().params, mixture().time)
    _calls.clear()
    out = ode.sample(
        denoiser, VP, start(2, 1.0), solver=PAIRS[order](), stepsize_controller=pid(1e-3), dt0=6.0
    )
    jax.effects_barrier()
    assert out.rejected > 0
    assert out.nfe == len(_calls) == order * (out.accepted + out.rejected)


def _scaled(params, x, levels):
    scale, exact = params
    return scale * mixture().fn(exact, x, levels)


def test_gradients_are_those_of_differences(x64):
    x = start(3, 0.8)

    def total(scale):
        denoiser = jd.Denoiser(_scaled, "eps", (scale, mixture().params), mixture().time)
        out = ode.sample(
            denoiser, VP, x, t_max=0.8, t_min=0.1, solver=ode.DPMSolver12(), dt0=0.4,
            stepsize_controller=CONSTANT, max_steps=16,
        )  # fmt: skip
        return jnp.sum(out.x**2)

    h = 1e-5
    slope = (total(1.0 + h) - total(1.0 - h)) / (2 * h)
    np.testing.assert_allclose(jax.grad(total)(1.0), slope, rtol=1e-7)


def test_what_does_not_fit_is_named():
    x = jnp.zeros((2, 2))
    with pytest.raises(ValueError, match="integrand must be one of .*'x0', 'eps'.*got 'v'"):
        ode.DPMSolver12("v")
    with pytest.raises(ValueError, match="solver_type must be one of .*got 'heun'"):
        ode.DPMSolver23(solver_type="heun")
    with pytest.raises(ValueError, match="DPMSolver12 solves the probability flow in lambda only"):
        ode.sample(mixture(), VP, x, form="rho", solver=ode.DPMSolver12())
    with pytest.raises(ValueError, match="no BacksolveAdjoint"):
        jax.grad(
            lambda x: ode.sample(
                mixture(), VP, x, solver=ode.DPMSolver23(), adjoint=diffrax.BacksolveAdjoint()
            ).x.sum()
        )(x)
