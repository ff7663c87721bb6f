"""log p(x) of a diffusion model: the probability flow's change of variables.

Along a flow dx/ds = F(x, s) the log-density changes by -div F ds (Chen et al., "Neural ODEs", 2018;
Grathwohl et al., "FFJORD", 2019; Song et al., "Score-Based Generative Modeling through SDEs", 2021,
appendix D.2). In the forms of `jaxdiff.ode` the linear part of the drift is exact, and with d the size
of one sample all that is left of the divergence is that of the denoised x0: of l = log p_t(x) +
d log(sigma), the log-density of x / sigma,

    lambda   dx/dlambda = c x - sigma eps,    dl/dlambda = -alpha div x0
    rho      d(x/alpha)/drho = eps,           dl/drho    =  alpha div x0 / rho

so that for the flow through x at t_min that ends at x_T at t_max

    log p(x) = log p_T(x_T) + d log(sigma_max / sigma_min) - int alpha div x0 dlambda.

alpha div x0 lies between 0 (noise) and d (data), where x0 is a posterior mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from jaxdiff.arrays import is_concrete
from jaxdiff.denoisers import Denoiser
from jaxdiff.ode.solve import Run, check_forward, check_process, integrate, prepare
from jaxdiff.ode.terms import Problem, eps_of, lambda_slope, level_at
from jaxdiff.ode.traces import Trace, check_trace, exact, flatten, value_and_trace
from jaxdiff.predictions import convert
from jaxdiff.processes import EDM, VE, Process

_DEQUANTISE = (
    "a density is for continuous data: dequantise first, with "
    "jaxdiff.ode.uniform_dequantisation or variational_dequantisation"
)


class LogLikelihood(NamedTuple):
    """What `log_likelihood` returns.

    log_prob: log p(x) in nats, [batch].
    x_T: the state at t_max that x is encoded to, with x's structure.
    nfe: evaluations: every call of the denoiser, and every product with its Jacobian as one more.
      None where diffrax does not tell, as in `Solution`.
    standard_error: of log_prob over the random probes, [batch]; None for the exact trace and for a
      single probe. It does not see the solver's error.
    accepted, rejected: steps.
    """

    log_prob: Float[Array, " batch"]
    x_T: Any
    nfe: Int[Array, ""] | None
    standard_error: Float[Array, " batch"] | None
    accepted: Int[Array, ""]
    rejected: Int[Array, ""]


def log_likelihood(
    denoiser: Denoiser, process: Process, x: Any, *, trace: Trace | None = None, key: Any = None,
    prior: float | Callable | None = None, t_min: ArrayLike | None = None,
    t_max: ArrayLike | None = None, data_range: tuple[float, float] | None = None, cond: Any = None,
    form: str = "lambda", solver: diffrax.AbstractSolver | None = None,
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    dt0: ArrayLike | None = None, max_steps: int = 4096,
    adjoint: diffrax.AbstractAdjoint | None = None,
    progress_meter: diffrax.AbstractProgressMeter | None = None,
) -> LogLikelihood:  # fmt: skip
    """log p(x) at t_min in nats, of the model whose samples `jaxdiff.ode.sample` draws.

    It is the density of the state at t_min: of data with noise of standard deviation sigma(t_min),
    times alpha(t_min). The tolerance is for the state and for the integral above, of a size of d times
    the part of the span in lambda that lies above the noise; float32 leaves some 1e-6 of that.

    Arguments:
      denoiser, process, cond, form, solver, stepsize_controller, dt0, max_steps, adjoint,
        progress_meter: as in `jaxdiff.ode.solve`; but for the exponential pairs `DPMSolver12` and
        `DPMSolver23`, which solve for the state alone. The denoiser needs a forward derivative.
      x: the state at t_min, an array or pytree of floating-point leaves [batch, ...].
      trace: `exact()` (the default: d products an evaluation, up to its max_dim), `hutchinson()` or
        `hutch_pp()`. Random probes stay the same over the whole path, so that the solver sees one
        smooth flow and log_prob is unbiased.
      key: of the probes: one key, or one per sample (`jaxdiff.sample_keys`).
      prior: log p_T. None: the normal distribution that `process.prior` draws from, of variance
        sigma^2 + alpha^2 at t_max (VE and EDM: sigma^2). A number s: sigma^2 + s^2 alpha^2, for data
        of standard deviation s. A function of x_T that returns [batch]: any other, such as the
        exact marginal of a mixture.
      t_min, t_max: by default those of the process; t_min < t_max, lambda finite at both.
      data_range: (low, high): raise unless x lies inside, as a check of units. Without it floats that
        are all whole numbers, some beyond 2, are taken for grey levels, and raise.

    Returns a `LogLikelihood`; `jaxdiff.ode.bits_per_dim` converts it. Raises, before tracing,
    ValueError or TypeError: what `solve` raises; for a reversed span; for integers, grey levels, or x
    outside `data_range`, naming the functions that dequantise; for a trace without its key, or larger
    than it accepts.
    """
    check_process(process)
    trace = exact() if trace is None else trace
    t_min = process.t_min if t_min is None else t_min
    t_max = process.t_max if t_max is None else t_max
    check_continuous(x, data_range)
    check_forward(t_min, t_max)
    run = prepare(
        denoiser, process, x, t_min, t_max, cond, form, solver, stepsize_controller, dt0, None,
        adjoint, progress_meter,
    )  # fmt: skip
    dim = check_trace(trace, run.x, key)
    probes = trace.probes(key, run.x)
    x_T, change, nfe, stats = _solve(run, trace, probes, max_steps, form)
    start, end = process.sigma(t_min), process.sigma(t_max)
    log_prior = _log_prior(prior, process, t_max, x_T)
    scale = jnp.asarray(dim * (jnp if not is_concrete(start, end) else np).log(end / start))
    estimates = log_prior[:, None] + scale.astype(change.dtype) + change
    error = None
    if change.shape[1] > 1:
        error = jnp.std(change, axis=1, ddof=1) / math.sqrt(change.shape[1])
    return LogLikelihood(
        jnp.mean(estimates, 1), x_T, nfe, error,
        stats["num_accepted_steps"], stats["num_rejected_steps"],
    )  # fmt: skip


class _Args(NamedTuple):
    problem: Problem
    trace: Trace
    probes: Any


@eqx.filter_jit
def _solve(run: Run, trace, probes, max_steps, form):
    rows, _ = flatten(run.x)
    estimates = jax.eval_shape(lambda: trace.estimate(lambda v: v, probes, rows)).shape[1]
    zero = jnp.zeros((rows.shape[0], estimates), rows.dtype)
    y0 = jax.tree.map(lambda a: a / run.alphas[0], run.x), zero
    args = _Args(run.args, trace, probes)
    solution, nfe = integrate(run, _TERMS[form], y0, args, None, max_steps)
    y, change = jax.tree.map(lambda a: a[0], solution.ys)
    # log p + d log(sigma) has changed by `change` on the way to t_max.
    x_T = jax.tree.map(lambda a: run.alphas[-1] * a, y)
    nfe = None if nfe is None else nfe * (1 + trace.products(rows.shape[1]))
    return x_T, -change, nfe, solution.stats


def _eps_and_change(level, x, args):
    """((o, u, w) with eps = u o + w x, estimates of -alpha div x0)."""
    prediction = args.problem.denoiser.prediction

    def denoised(x):
        eps = eps_of(level, x, args.problem)
        return convert(eps[0], x, prediction, "x0", *level[1:]), eps

    _, eps, trace = value_and_trace(args.trace, denoised, x, args.probes)
    return eps, -level[1] * trace


def _rho_term(rho, state, args):
    y, _ = state
    level = level_at(-jnp.log(rho), rho, args.problem, y)
    x = jax.tree.map(lambda a: level[1] * a, y)
    (out, u, w), change = _eps_and_change(level, x, args)
    return jax.tree.map(lambda o, a: u * o + w * a, out, x), -change / jnp.asarray(
        rho, change.dtype
    )


def _lambda_term(lam, state, args):
    x, _ = state
    level = level_at(lam, jnp.exp(-lam), args.problem, x)
    eps, change = _eps_and_change(level, x, args)
    return lambda_slope(level, eps, x, args.problem), change


_TERMS = {"rho": diffrax.ODETerm(_rho_term), "lambda": diffrax.ODETerm(_lambda_term)}


def normal_log_density(x: Any, variance: ArrayLike) -> Float[Array, " batch"]:
    """log N(x; 0, variance I) in nats, [batch], of a pytree with leaves [batch, ...]."""
    rows, _ = flatten(x)
    variance = jnp.asarray(variance, rows.dtype)
    return -0.5 * (
        jnp.sum(rows**2, 1) / variance + rows.shape[1] * jnp.log(2.0 * jnp.pi * variance)
    )


def prior_variance(process: Process, t_max: ArrayLike, data_std: ArrayLike | None = None) -> Any:
    """sigma^2 + s^2 alpha^2 at t_max, with s = `data_std`, by default as `process.prior_std`."""
    if data_std is None:
        data_std = 0.0 if isinstance(process, (VE, EDM)) else 1.0
    return process.sigma(t_max) ** 2 + (data_std * process.alpha(t_max)) ** 2


def _log_prior(prior, process, t_max, x_T):
    if not callable(prior):
        return normal_log_density(x_T, prior_variance(process, t_max, prior))
    value = jnp.asarray(prior(x_T))
    batch = jax.tree.leaves(x_T)[0].shape[0]
    if value.shape != (batch,):
        raise ValueError(f"prior must return one number a sample, ({batch},), got {value.shape}")
    return value


def check_continuous(x: Any, data_range: tuple[float, float] | None = None) -> None:
    """Raise TypeError for integers, ValueError for numbers outside `data_range`.

    Without a `data_range`, ValueError for floats that are all whole numbers, not all within [-2, 2].
    """
    for leaf in jax.tree.leaves(x):
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"{_DEQUANTISE}; got {dtype}")
        if not is_concrete(leaf) or not np.size(leaf):
            continue
        if data_range is None:
            if getattr(leaf, "is_fully_addressable", True) and _looks_like_levels(np.asarray(leaf)):
                raise ValueError(
                    f"x holds whole numbers alone, up to {np.abs(np.asarray(leaf)).max():g}, which "
                    f"look like grey levels: {_DEQUANTISE}, which also scale; if they are the data, "
                    "pass data_range=(low, high)"
                )
        else:
            low, high = data_range
            least, most = (float(f(np.asarray(leaf))) for f in (np.min, np.max))
            if not low <= least <= most <= high:
                raise ValueError(
                    f"x must lie in [{low:g}, {high:g}], got numbers from {least:g} to {most:g}; if "
                    f"these are grey levels, {_DEQUANTISE}, which also scale"
                )


def _looks_like_levels(x: np.ndarray) -> bool:
    return bool(np.abs(x).max() > 2) and bool(np.all(x == np.rint(x)))
