"""The probability flow and the reverse SDE against SciPy, closed forms and counted calls."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import counted
from oracles import BROAD, fitted_order, median_error

import jaxdiff as jd
from jaxdiff import ode

# Spans away from the infinite ends.
PROCESSES = {
    "vp_linear": (jd.processes.vp_linear(), 1.0, 1e-3),
    "vp_cosine": (jd.processes.vp_cosine(), 0.9946, 1e-3),
    "sub_vp": (jd.processes.sub_vp(), 1.0, 1e-3),
    "ve": (jd.processes.ve(), 1.0, 0.0),
    "edm": (jd.processes.edm(), 80.0, 0.002),
    "flow": (jd.processes.flow(shift=3.0), 0.999, 1e-3),
    "ddpm": (jd.processes.ddpm(), 999.0, 0.0),
    "zero_terminal_snr": (
        jd.processes.zero_terminal_snr(jd.processes.ddpm("scaled_linear")), 998.0, 0.0
    ),
}  # fmt: skip
VP = PROCESSES["vp_linear"][0]
# One Gaussian with a scale for each axis: its flow is known in closed form.
MEAN, STD = np.array([[0.7, -0.4]]), np.array([[0.5, 1.3]])


def level(process, t):
    return float(process.alpha(t)), float(process.sigma(t))


def pid(tolerance):
    return diffrax.PIDController(rtol=tolerance, atol=tolerance, norm=ode.sample_norm)


def mixture(prediction="eps"):
    return jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, prediction=prediction)


def gaussian():
    return jd.gaussian_mixture(MEAN, STD, [1.0], prediction="eps")


def ratio(start, end, std=STD):
    """Marginal standard deviation at `end` over that at `start`, for data of scale `std`."""
    variance = [alpha**2 * std**2 + sigma**2 for alpha, sigma in (start, end)]
    return np.sqrt(variance[1] / variance[0])


def gaussian_flow(x, t_start, t_end, process=VP, mean=MEAN):
    """x(t) = alpha m + sqrt(alpha^2 s^2 + sigma^2) times the standardised start."""
    start, end = level(process, t_start), level(process, t_end)
    return end[0] * mean + ratio(start, end) * (x - start[0] * mean)


@pytest.fixture
def x_T():
    return np.random.default_rng(0).normal(size=(6, 2))


# --- end points -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROCESSES)
def test_both_forms_end_where_scipy_does(name, x64):
    process, t_max, t_min = PROCESSES[name]
    start, end = level(process, t_max), level(process, t_min)
    x = BROAD.sample(np.random.default_rng(1), 8, *start)
    exact = BROAD.flow(x, start, end)
    for form in ode.FORMS:
        out = ode.sample(
            mixture(), process, x, t_max=t_max, t_min=t_min, form=form,
            stepsize_controller=pid(1e-10),
        )  # fmt: skip
        np.testing.assert_allclose(out.x, exact, rtol=0, atol=2e-9, err_msg=form)


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_any_prediction_drives_the_flow(prediction, x64):
    process, t_max, t_min = PROCESSES["flow"]
    x = BROAD.sample(np.random.default_rng(1), 4, *level(process, t_max))
    exact = BROAD.flow(x, level(process, t_max), level(process, t_min))
    out = ode.sample(
        mixture(prediction), process, x, t_max=t_max, t_min=t_min, stepsize_controller=pid(1e-9)
    )
    np.testing.assert_allclose(out.x, exact, rtol=0, atol=1e-8)


@pytest.mark.parametrize("form", ode.FORMS)
def test_default_tolerance_in_float32(form):
    x = BROAD.sample(np.random.default_rng(2), 8, *level(VP, 1.0)).astype(np.float32)
    out = ode.sample(mixture(), VP, x, form=form)
    exact = BROAD.flow(x.astype(np.float64), level(VP, 1.0), level(VP, 1e-3))
    assert out.x.dtype == jnp.float32
    np.testing.assert_allclose(out.x, exact, rtol=0, atol=2e-4)


@pytest.mark.parametrize("form", ode.FORMS)
def test_gaussian_trajectory_is_the_closed_form_in_both_directions(form, x_T, x64):
    times = [0.8, 0.5, 0.2, 0.01]
    options = {"form": form, "stepsize_controller": pid(1e-10)}
    path = ode.sample(gaussian(), VP, x_T, save_at=times, **options)
    assert path.x.shape == (4, 6, 2)
    for t, x in zip(times, path.x):
        np.testing.assert_allclose(x, gaussian_flow(x_T, 1.0, t), rtol=0, atol=5e-9)
    back = ode.encode(gaussian(), VP, path.x[2], t_min=0.2, t_max=0.8, **options)
    np.testing.assert_allclose(back.x, gaussian_flow(x_T, 1.0, 0.8), rtol=0, atol=5e-9)


@pytest.mark.parametrize("form", ode.FORMS)
def test_encode_inverts_sample(form, x64):
    x = BROAD.sample(np.random.default_rng(3), 8, *level(VP, 1.0))
    options = {"form": form, "stepsize_controller": pid(1e-11)}
    data = ode.sample(mixture(), VP, x, **options)
    noise = ode.encode(mixture(), VP, data.x, **options)
    np.testing.assert_allclose(noise.x, x, rtol=0, atol=1e-8)


def test_error_follows_the_tolerance_and_nothing_recompiles(x_T, x64):
    exact = gaussian_flow(x_T, 1.0, 1e-3)
    tolerances = 10.0 ** -np.arange(4, 11)
    first = ode.sample(gaussian(), VP, x_T, stepsize_controller=pid(1e-3))
    with counted() as compiled:
        out = [ode.sample(gaussian(), VP, x_T, stepsize_controller=pid(t)) for t in tolerances]
    assert not compiled
    errors = np.array([np.abs(o.x - exact).max() for o in out])
    assert np.all(errors < 5 * tolerances), errors
    assert 0.8 < np.polyfit(np.log(tolerances), np.log(errors), 1)[0] < 1.2
    assert np.all(np.diff([first.nfe, *(o.nfe for o in out)]) > 0)


@pytest.mark.parametrize(
    "solver, order",
    [(diffrax.Euler(), 1), (diffrax.Heun(), 2), (diffrax.Bosh3(), 3), (diffrax.Tsit5(), 5)],
    ids=lambda v: type(v).__name__,
)
def test_fixed_steps_have_the_order_of_the_solver(solver, order, x64):
    x = BROAD.sample(np.random.default_rng(4), 32, *level(VP, 0.9))
    exact = BROAD.flow(x, level(VP, 0.9), level(VP, 0.05))
    span = float(VP.half_log_snr(0.05) - VP.half_log_snr(0.9))
    steps = [40, 80, 160] if order < 5 else [12, 24, 48]
    errors = [
        median_error(
            ode.sample(
                mixture(), VP, x, t_max=0.9, t_min=0.05, solver=solver, dt0=span / n,
                stepsize_controller=diffrax.ConstantStepSize(),
            ).x,
            exact,
        )
        for n in steps
    ]  # fmt: skip
    assert order - 0.25 < fitted_order(steps, errors) < order + 0.75


def test_euler_in_rho_is_ddim(x_T, x64):
    grid = jd.grids.half_log_snr(VP, 7)
    table = jd.sample(mixture(), jd.solvers.ddim(grid), jnp.asarray(x_T))
    out = ode.sample(
        mixture(), VP, x_T, form="rho", solver=diffrax.Euler(),
        stepsize_controller=diffrax.StepTo(ode.clock(VP, grid.t, "rho")),
    )  # fmt: skip
    assert out.nfe == 7
    np.testing.assert_allclose(out.x, table, rtol=0, atol=1e-12)


# --- what is reported -----------------------------------------------------------------------------

_calls = []


def _counting(params, x, levels):
    jax.debug.callback(lambda: _calls.append(1))
    return gaussian().fn(params, x, levels)


CONSTANT = diffrax.ConstantStepSize()
LOOSE = diffrax.PIDController(rtol=1e-3, atol=1e-3)
JUMPS = diffrax.PIDController(rtol=1e-3, atol=1e-3, jump_ts=np.array([-1.0, 0.3], np.float32))


@pytest.mark.parametrize(
    "solver, controller, dt0",
    [
        (diffrax.Tsit5(), LOOSE, None),
        (diffrax.Tsit5(), LOOSE, 6.0),  # the first step is rejected: no stage to reuse yet
        (diffrax.Tsit5(), JUMPS, None),  # nor after a jump
        (diffrax.Heun(), LOOSE, None),
        (diffrax.Bosh3(), CONSTANT, 0.5),
        (diffrax.Euler(), CONSTANT, 0.5),
        (diffrax.HalfSolver(diffrax.Bosh3()), LOOSE, 6.0),
    ],
)
def test_nfe_is_the_number_of_calls(solver, controller, dt0, x_T):
    denoiser = jd.Denoiser(_counting, "eps", gaussian().params, gaussian().time)
    _calls.clear()
    out = ode.sample(denoiser, VP, x_T, solver=solver, stepsize_controller=controller, dt0=dt0)
    jax.effects_barrier()
    assert out.nfe == len(_calls)
    if dt0 == 6.0:
        assert out.rejected > 0


def test_nfe_of_an_implicit_solver_is_not_claimed(x_T, x64):
    out = ode.sample(gaussian(), VP, x_T, solver=diffrax.Kvaerno5(), stepsize_controller=pid(1e-6))
    np.testing.assert_allclose(out.x, gaussian_flow(x_T, 1.0, 1e-3), rtol=0, atol=1e-5)
    assert out.nfe is None
    assert out.accepted > 0


def test_sample_norm_is_the_worst_samples():
    a, b = np.random.default_rng(5).normal(size=(5, 3, 2)), np.arange(5.0)
    worst = max(*(np.sqrt(np.mean(row**2)) for row in a), 4.0)
    np.testing.assert_allclose(ode.sample_norm((a, b)), worst, rtol=1e-6)
    np.testing.assert_allclose(ode.sample_norm((a, jnp.asarray(-7.0))), 7.0, rtol=1e-6)


def test_under_vmap_each_sample_takes_its_own_steps(x64):
    x = BROAD.sample(np.random.default_rng(6), 3, *level(VP, 1.0))
    alone = [ode.sample(mixture(), VP, row[None]) for row in x]
    each = jax.vmap(lambda row: ode.sample(mixture(), VP, row[None]))(jnp.asarray(x))
    np.testing.assert_array_equal(each.nfe, [out.nfe for out in alone])
    np.testing.assert_allclose(each.x[:, 0], [out.x[0] for out in alone], rtol=0, atol=1e-12)
    assert len(set(each.nfe.tolist())) > 1
    together = ode.sample(mixture(), VP, x)
    np.testing.assert_allclose(together.x, each.x[:, 0], rtol=0, atol=1e-3)


# --- state, condition, compilation ----------------------------------------------------------------


def _conditional_tree(scale, x, levels, cond):
    """eps of independent Gaussians of mean cond["mean"] and standard deviation `scale`."""
    _, alpha, sigma = levels
    variance = (alpha * scale) ** 2 + sigma**2
    return jax.tree.map(lambda a: sigma * (a - alpha * _along(cond["mean"], a)) / variance, x)


def _along(mean, a):
    return mean.reshape(-1, *[1] * (a.ndim - 1))


def test_pytree_state_per_sample_condition_and_half_precision():
    x = {
        name: np.random.default_rng(7).normal(size=shape).astype(dtype)
        for name, shape, dtype in (("a", (4, 3), np.float16), ("b", (4, 2, 2), np.float32))
    }
    mean = np.array([0.0, 1.0, -2.0, 0.5])
    denoiser = jd.Denoiser(_conditional_tree, "eps", 0.8, lambda *level: level)
    out = ode.sample(denoiser, VP, x, cond={"mean": mean}, t_min=0.01)
    start, end = level(VP, 1.0), level(VP, 0.01)
    for name, value in out.x.items():
        centre = _along(mean, value)
        exact = end[0] * centre + ratio(start, end, 0.8) * (x[name] - start[0] * centre)
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, exact, rtol=0, atol=1e-4)


def test_new_parameters_spans_and_steps_compile_nothing(x_T):
    def run(mean, t_min, dt0):
        denoiser = jd.gaussian_mixture(mean, STD, [1.0], prediction="eps")
        return ode.sample(denoiser, VP, x_T, t_min=t_min, dt0=dt0).x

    run(MEAN, 1e-3, 0.1)
    with counted() as compiled:
        out = run(MEAN + 1.0, 0.05, 0.2)
    assert not compiled
    exact = gaussian_flow(x_T, 1.0, 0.05, mean=MEAN + 1.0)
    np.testing.assert_allclose(out, exact, rtol=0, atol=1e-4)


def test_processes_of_one_shape_are_different_programs():
    # Same leaves, same static span: only the class differs.
    rates = eqx.filter_jit(lambda process, t: process.rates(t))
    for process in (jd.processes.vp_linear(), jd.processes.sub_vp()):
        np.testing.assert_allclose(rates(process, 0.3), process.rates(0.3), rtol=1e-5)


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "adjoint, form",
    [
        (diffrax.RecursiveCheckpointAdjoint(), "lambda"),
        (diffrax.DirectAdjoint(), "lambda"),
        (diffrax.BacksolveAdjoint(), "rho"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_gradients_are_the_closed_form(adjoint, form, x_T, x64):
    weight = np.random.default_rng(8).normal(size=x_T.shape)

    def loss(params, x):
        denoiser = jd.Denoiser(gaussian().fn, "eps", params, gaussian().time)
        out = ode.sample(
            denoiser, VP, x, form=form, stepsize_controller=pid(1e-8), adjoint=adjoint,
            max_steps=256,
        )  # fmt: skip
        return jnp.sum(weight * out.x)

    params, x = jax.grad(loss, (0, 1))(gaussian().params, jnp.asarray(x_T))
    (a0, s0), (a1, s1) = level(VP, 1.0), level(VP, 1e-3)
    v0, v1 = (a**2 * STD**2 + s**2 for a, s in ((a0, s0), (a1, s1)))
    r = np.sqrt(v1 / v0)
    np.testing.assert_allclose(x, weight * r, rtol=0, atol=1e-6)
    np.testing.assert_allclose(params.means, [(weight * (a1 - r * a0)).sum(0)], rtol=0, atol=1e-6)
    slope = r / 2 * (a1**2 / v1 - a0**2 / v0)
    exact = [(weight * (x_T - a0 * MEAN) * slope).sum(0)]
    np.testing.assert_allclose(params.variances, exact, rtol=0, atol=1e-6)


def test_forward_mode_is_the_closed_form(x_T, x64):
    def run(x):
        options = {"stepsize_controller": pid(1e-8), "adjoint": diffrax.ForwardMode()}
        return ode.sample(gaussian(), VP, x, **options).x

    _, tangent = jax.jvp(run, (jnp.asarray(x_T),), (jnp.ones_like(x_T),))
    exact = np.broadcast_to(ratio(level(VP, 1.0), level(VP, 1e-3)), x_T.shape)
    np.testing.assert_allclose(tangent, exact, rtol=0, atol=1e-6)


# --- errors ---------------------------------------------------------------------------------------


def _with_memory(x, t, memory):
    return x, memory


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"form": "sigma"}, ValueError, "unknown form 'sigma'.*rho.*lambda"),
        ({"denoiser": lambda x, t: x}, TypeError, "Denoiser"),
        ({"process": "vp"}, TypeError, "process of jaxdiff.processes, got str"),
        ({"process": jd.processes.flow()}, ValueError, "alpha = 0 at t = 1.*smaller t_max"),
        (
            {"process": jd.processes.flow(), "t_max": 0.9},
            ValueError,
            "sigma = 0 at t = 0.*larger t_min",
        ),
        ({"t_max": 1.5}, ValueError, r"t must lie in \[0, 1\].*1.5"),
        ({"t_max": 0.5, "t_min": 0.5}, ValueError, "t_start != t_end"),
        ({"save_at": [0.2, 0.5]}, ValueError, "from t_start towards t_end.*0.2, 0.5"),
        ({"save_at": [2.0]}, ValueError, "t must lie in"),
        ({"solver": diffrax.SRA1()}, ValueError, "SRA1 is not a solver for ODEs"),
        ({"solver": diffrax.SemiImplicitEuler()}, ValueError, "not a solver for ODEs"),
        ({"solver": "tsit5"}, TypeError, "AbstractSolver, got 'tsit5'"),
        ({"solver": diffrax.Euler()}, ValueError, "Euler gives no error estimate"),
        ({"stepsize_controller": diffrax.ConstantStepSize()}, ValueError, "needs dt0="),
        ({"stepsize_controller": 1e-3}, TypeError, "AbstractStepSizeController, got 0.001"),
        ({"adjoint": diffrax.ImplicitAdjoint()}, ValueError, "steady states"),
        ({"x": np.zeros((2, 2), int)}, ValueError, "floating-point arrays.*int"),
        ({"x": np.float32(1.0)}, ValueError, "batch"),
        (
            {"denoiser": jd.Denoiser(_with_memory, memory=jnp.zeros(()))},
            ValueError,
            "no denoiser with memory",
        ),
        (
            {"denoiser": jd.clip_x0(gaussian(), keep_eps=True)},
            ValueError,
            r"one output, got \('x0', 'eps'\)",
        ),
        (
            {"denoiser": jd.Denoiser(lambda x, t: x[:, :1])},
            ValueError,
            r"output has shape \(2, 1\), the state \(2, 2\)",
        ),
    ],
)
def test_errors_say_what_to_do(options, error, message):
    options = {"denoiser": gaussian(), "process": VP, "x": np.zeros((2, 2)), **options}
    denoiser, process, x = (options.pop(name) for name in ("denoiser", "process", "x"))
    with pytest.raises(error, match=message):
        ode.sample(denoiser, process, x, **options)


def test_zero_terminal_snr_needs_a_smaller_t_max(x_T):
    process = PROCESSES["zero_terminal_snr"][0]
    with pytest.raises(ValueError, match="alpha = 0 at t = 999.*smaller t_max"):
        ode.encode(gaussian(), process, x_T)
