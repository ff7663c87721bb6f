"""Adaptive sampling and encoding with the probability flow."""

from __future__ import annotations

from typing import Any, NamedTuple, get_origin

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Int

from jaxdiff.arrays import as_arrays, is_concrete, namespace, structure_hash
from jaxdiff.denoisers import Denoiser
from jaxdiff.ode.counting import Counted, evaluations
from jaxdiff.ode.terms import Problem, check_form, clock, probability_flow
from jaxdiff.processes import Process

# The first step in lambda, where none is given: small against the span, and nearly always accepted.
_FIRST_STEP = 0.1


class Solution(NamedTuple):
    """What `solve` returns.

    x: the state at the last t, or at every t of `save_at` ([times, batch, ...]).
    nfe: calls of the denoiser that were made: every stage of every accepted and rejected step.
      None where diffrax does not tell: implicit solvers (their root finds are not counted) and
      solvers that are not Runge-Kutta methods.
    accepted, rejected: steps.
    """

    x: Any
    nfe: Int[Array, ""] | None
    accepted: Int[Array, ""]
    rejected: Int[Array, ""]


def sample_norm(y: Any) -> jax.Array:
    """The worst sample: max over leaves and over their first axis of the root mean square.

    As `diffrax.PIDController(norm=sample_norm)` every sample meets the tolerance; diffrax's default
    averages over the whole batch, where one bad sample among 64 may be 8 times less accurate.
    """
    worst = [
        jnp.max(jnp.mean(a.reshape(a.shape[:1] + (-1,)) ** 2, -1)) if a.ndim else a**2
        for a in jax.tree.leaves(y)
    ]
    return jnp.sqrt(jnp.max(jnp.stack(worst)))


def sample(
    denoiser: Denoiser, process: Process, x_T: Any, *, t_max: ArrayLike | None = None,
    t_min: ArrayLike | None = None, **options: Any,
) -> Solution:  # fmt: skip
    """Noise to data: `solve` from t_max to t_min, by default those of the process."""
    t_max, t_min = _span(process, t_min, t_max)
    return solve(denoiser, process, x_T, t_max, t_min, **options)


def encode(
    denoiser: Denoiser, process: Process, x_0: Any, *, t_min: ArrayLike | None = None,
    t_max: ArrayLike | None = None, **options: Any,
) -> Solution:  # fmt: skip
    """Data to noise: `solve` from t_min to t_max; x_0 is the state at t_min. Inverts `sample`."""
    t_max, t_min = _span(process, t_min, t_max)
    return solve(denoiser, process, x_0, t_min, t_max, **options)


def _span(process, t_min, t_max):
    check_process(process)
    return (process.t_max if t_max is None else t_max), (process.t_min if t_min is None else t_min)


def solve(
    denoiser: Denoiser, process: Process, x: Any, t_start: ArrayLike, t_end: ArrayLike, *,
    cond: Any = None, form: str = "lambda", solver: diffrax.AbstractSolver | None = None,
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    dt0: ArrayLike | None = None, save_at: ArrayLike | None = None, max_steps: int = 4096,
    adjoint: diffrax.AbstractAdjoint | None = None,
    progress_meter: diffrax.AbstractProgressMeter | None = None,
) -> Solution:  # fmt: skip
    """Solve the probability flow from t_start to t_end, in either direction.

    The batch moves in lock-step: all samples take the same steps. With the default controller each
    meets the tolerance, and so a sample's result depends, within the tolerance, on the batch it is
    in; under `jax.vmap` over samples each takes its own steps, at the cost of the slowest. Inside
    shard_map every device takes its own; under jit with sharded x the steps are common.

    Arguments:
      denoiser: any prediction; without memory, and with one output.
      process: gives alpha, sigma, lambda and its inverse. Its parameters are traced.
      x: the state at t_start, an array or a pytree, leaves [batch, ...].
      t_start, t_end: where lambda is finite.
      cond: passed to the denoiser as it is.
      form: "lambda" or "rho"; see `jaxdiff.ode`. The tolerance is for the form's own state. On
        mixtures, at the default tolerance, lambda takes about half of rho's evaluations.
      solver: a diffrax ODE solver; default `diffrax.Tsit5()`.
      stepsize_controller: default `diffrax.PIDController(rtol=1e-5, atol=1e-5, norm=sample_norm)`,
        the tolerances of Song et al. (2021). New tolerances compile nothing.
      dt0: size of the first step in the clock (of all, with `diffrax.ConstantStepSize()`), positive
        in both directions; by default that of 0.1 in lambda.
      save_at: values of t from t_start towards t_end at which to return the state, interpolated as
        the solver does.
      max_steps: raises at run time when reached.
      adjoint: `diffrax.RecursiveCheckpointAdjoint()` (default), `DirectAdjoint`,
        `BacksolveAdjoint` (the continuous adjoint) or `ForwardMode`.
      progress_meter: for example `diffrax.TqdmProgressMeter()`.

    Returns a `Solution`. Raises, before tracing, ValueError or TypeError for what does not fit: a
    span that reaches alpha = 0 or sigma = 0 (pass t_max or t_min), a solver that is not for ODEs, a
    fixed-step solver under an adaptive controller, a denoiser with memory or several outputs.
    """
    run = prepare(
        denoiser, process, x, t_start, t_end, cond, form, solver, stepsize_controller, dt0, save_at,
        adjoint, progress_meter,
    )  # fmt: skip
    return _solve(run, save_at is not None, probability_flow(form), max_steps)


class Run(NamedTuple):
    """Checked arguments of a call, as arrays; `clocks` and `alphas` at its times."""

    args: Problem
    x: Any
    clocks: Any
    alphas: Any
    dt0: Any
    solver: diffrax.AbstractSolver
    controller: diffrax.AbstractStepSizeController
    adjoint: diffrax.AbstractAdjoint
    meter: diffrax.AbstractProgressMeter


def prepare(
    denoiser: Any, process: Any, x: Any, t_start: Any, t_end: Any, cond: Any, form: str, solver: Any,
    controller: Any, dt0: Any, save_at: Any, adjoint: Any, meter: Any,
) -> Run:  # fmt: skip
    """The arguments of `solve`, with its defaults and its errors, for one compiled program."""
    solver = diffrax.Tsit5() if solver is None else solver
    if controller is None:
        controller = diffrax.PIDController(rtol=1e-5, atol=1e-5, norm=sample_norm)
    adjoint = diffrax.RecursiveCheckpointAdjoint() if adjoint is None else adjoint
    meter = diffrax.NoProgressMeter() if meter is None else meter
    check_form(form)
    check_process(process)
    _check_denoiser(denoiser)
    _check_method(solver, controller, dt0, adjoint)
    x = jax.tree.map(_as_state, x)
    wide = jnp.result_type(*jax.tree.leaves(x))
    # start, saved ..., end: in float64 on the host, unless something is traced.
    saved = () if save_at is None else (save_at,)
    xp = namespace(t_start, t_end, saved)
    times = xp.concatenate([xp.atleast_1d(xp.asarray(t) * 1.0) for t in (t_start, *saved, t_end)])
    _check_times(process, times)
    clocks = clock(process, times, form)
    if dt0 is None and isinstance(controller, diffrax.AbstractAdaptiveStepSizeController):
        dt0 = _first_step(process, t_start, t_end, form)
    alphas = process.alpha(times) if form == "rho" else xp.ones_like(times)
    clocks, alphas, dt0, controller, adjoint = jax.tree.map(
        lambda a: jnp.asarray(a, wide) if _is_real(a) else a,
        (clocks, alphas, dt0, controller, adjoint),
    )
    args = as_arrays(Problem(denoiser, process, cond))
    args = args._replace(structure=structure_hash(args, x))
    return Run(args, x, clocks, alphas, dt0, solver, controller, adjoint, meter)


def _is_real(leaf: Any) -> bool:
    # equinox's is_inexact_array_like fails on tracers of jax 0.10.2.
    return isinstance(leaf, (float, np.floating)) or (
        isinstance(leaf, (np.ndarray, jax.Array)) and jnp.issubdtype(leaf.dtype, jnp.floating)
    )


def _first_step(process, t_start, t_end, form):
    lam = process.half_log_snr(t_start)
    xp = namespace(lam)
    step = xp.clip(process.half_log_snr(t_end) - lam, -_FIRST_STEP, _FIRST_STEP)
    return xp.abs(xp.exp(-lam) * xp.expm1(-step) if form == "rho" else step)


@eqx.filter_jit
def _solve(run, saves, term, max_steps):
    y0 = jax.tree.map(lambda a: a / run.alphas[0], run.x)
    solution, nfe = integrate(
        run, term, y0, run.args, run.clocks[1:-1] if saves else None, max_steps
    )
    if saves:
        x = jax.tree.map(lambda a: jax.vmap(jnp.multiply)(run.alphas[1:-1], a), solution.ys)
    else:
        x = jax.tree.map(lambda a: run.alphas[-1] * a[0], solution.ys)
    stats = solution.stats
    return Solution(x, nfe, stats["num_accepted_steps"], stats["num_rejected_steps"])


def integrate(run: Run, term: Any, y0: Any, args: Any, ts: Any, max_steps: int) -> tuple[Any, Any]:
    """(diffrax's solution at the clocks `ts`, or at the end if None; evaluations, or None)."""
    counts = isinstance(run.controller, diffrax.AbstractAdaptiveStepSizeController)
    start, end = run.clocks[0], run.clocks[-1]
    solution = diffrax.diffeqsolve(
        term, run.solver, start, end,
        None if run.dt0 is None else jnp.abs(run.dt0) * jnp.sign(end - start), y0, args,
        saveat=diffrax.SaveAt(ts=ts, t1=ts is None, controller_state=counts),
        stepsize_controller=Counted(run.controller) if counts else run.controller,
        adjoint=run.adjoint, max_steps=max_steps, progress_meter=run.meter,
    )  # fmt: skip
    return solution, evaluations(run.solver, solution.stats["num_steps"], solution.controller_state)


# --- checks ---------------------------------------------------------------------------------------


def check_process(process: Any) -> None:
    """Raise TypeError for anything but a process."""
    if not isinstance(process, Process):
        raise TypeError(f"expected a process of jaxdiff.processes, got {type(process).__name__}")


def _check_denoiser(denoiser: Any) -> None:
    if not isinstance(denoiser, Denoiser):
        raise TypeError(f"expected a jaxdiff.Denoiser, got {type(denoiser).__name__}")
    if not isinstance(denoiser.prediction, str):
        raise ValueError(f"the probability flow takes one output, got {denoiser.prediction}")
    if denoiser.memory is not None:
        raise ValueError("an ODE solver may repeat a step: it takes no denoiser with memory")


def _as_state(leaf: Any) -> jax.Array:
    leaf = jnp.asarray(leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or not leaf.ndim:
        raise ValueError(
            "the state must be floating-point arrays [batch, ...], got "
            f"{leaf.dtype} of shape {leaf.shape}"
        )
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _check_method(solver: Any, controller: Any, dt0: Any, adjoint: Any) -> None:
    for value, base in (
        (solver, diffrax.AbstractSolver),
        (controller, diffrax.AbstractStepSizeController),
        (adjoint, diffrax.AbstractAdjoint),
    ):
        if not isinstance(value, base):
            raise TypeError(f"expected a diffrax.{base.__name__}, got {value!r}")
    name = type(solver).__name__
    structure = get_origin(solver.term_structure) or solver.term_structure
    if not isinstance(structure, type) or not issubclass(diffrax.ODETerm, structure):
        raise ValueError(f"{name} is not a solver for ODEs: it needs {solver.term_structure}")
    if isinstance(controller, diffrax.AbstractAdaptiveStepSizeController):
        if not isinstance(solver, diffrax.AbstractAdaptiveSolver):
            raise ValueError(
                f"{name} gives no error estimate for {type(controller).__name__}: pass "
                "stepsize_controller=diffrax.ConstantStepSize() with dt0=, or diffrax.StepTo"
            )
    elif isinstance(controller, diffrax.ConstantStepSize) and dt0 is None:
        raise ValueError("diffrax.ConstantStepSize needs dt0=, the step in the form's clock")
    if hasattr(adjoint, "prepare"):  # as jaxdiff.sample asks
        raise ValueError(
            f"{type(adjoint).__name__} walks a tableau's rows back, and a flow has none: take "
            "diffrax.BacksolveAdjoint (jaxdiff.gradients.adjoint_dpm) or RecursiveCheckpointAdjoint"
        )
    if isinstance(adjoint, diffrax.ImplicitAdjoint):
        raise ValueError("ImplicitAdjoint is for steady states, which the probability flow has not")


def check_inside(process: Process, times: Any) -> np.ndarray:
    """The vector of times in float64; raise ValueError unless the process is defined there."""
    times = np.asarray(times, np.float64)
    low = process.t_min if process.data_time is None else process.data_time
    high = process.t_max if process.noise_time is None else process.noise_time
    if times.ndim != 1 or not np.all((times >= low) & (times <= high)):
        raise ValueError(
            f"t must lie in [{low:g}, {high:g}] for {type(process).__name__}, got {times.tolist()}"
        )
    return times


def check_forward(t_min: Any, t_max: Any) -> None:
    """Raise ValueError unless t_min < t_max."""
    if is_concrete(t_min, t_max) and not t_min < t_max:
        raise ValueError(f"need t_min < t_max, got t_min = {t_min:g} and t_max = {t_max:g}")


def _check_times(process: Process, times: Any) -> None:
    if not is_concrete(process, times):
        return
    times = check_inside(process, times)
    alpha, sigma = process.alpha(times), process.sigma(times)
    for scale, name, fix in ((alpha, "alpha", "smaller t_max"), (sigma, "sigma", "larger t_min")):
        if np.any(scale == 0):
            raise ValueError(
                f"{name} = 0 at t = {times[scale == 0][0]:g}, where lambda is infinite: pass a "
                f"{fix}"
            )
    steps = np.diff(times) * np.sign(times[-1] - times[0])
    if np.any(steps[1:-1] <= 0) or steps[0] < 0 or steps[-1] < 0 or times[0] == times[-1]:
        raise ValueError(
            "need t_start != t_end, and save_at from t_start towards t_end, got "
            f"{times[1:-1].tolist()} between {times[0]:g} and {times[-1]:g}"
        )
