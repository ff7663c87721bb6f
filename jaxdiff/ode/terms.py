"""Probability flow and reverse SDE as diffrax terms; the equations are in `jaxdiff.ode`."""

from __future__ import annotations

from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import ArrayLike

from jaxdiff.arrays import namespace
from jaxdiff.denoisers import Denoiser
from jaxdiff.noise import per_sample
from jaxdiff.predictions import affine
from jaxdiff.processes import Process
from jaxdiff.rows import like

FORMS = ("rho", "lambda")


class Problem(NamedTuple):
    """What the terms integrate, given to diffrax as `args`: all of it data, none of it recompiles.

    `eta`, the amount of noise, is read by `reverse_sde` alone; `structure` by nobody, it keeps
    programs of different classes apart (`jaxdiff.arrays.structure_hash`).
    """

    denoiser: Denoiser
    process: Process
    cond: Any = None
    eta: ArrayLike = 1.0
    structure: int = 0


def check_form(form: Any) -> None:
    """Raise ValueError unless `form` is one of `FORMS`."""
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; choose from {list(FORMS)}")


def clock(process: Process, t: ArrayLike, form: str = "rho") -> Any:
    """The form's independent variable at t: sigma / alpha, or lambda."""
    check_form(form)
    lam = process.half_log_snr(t)
    return namespace(lam).exp(-lam) if form == "rho" else lam


def probability_flow(form: str = "rho") -> diffrax.ODETerm:
    """The probability flow in "rho" (state x / alpha) or "lambda" (state x); `args` is a `Problem`.

    diffrax runs both ways: towards the data rho falls and lambda rises.
    """
    check_form(form)
    return _FLOWS[form]


def reverse_sde(path: diffrax.AbstractBrownianPath) -> diffrax.MultiTerm:
    """The reverse SDE in lambda (state x, lambda rising: towards the data); `args` is a `Problem`.

        dx = (c x - (1 + eta^2) sigma eps) dlambda + sqrt(2) eta sigma dW

    has the process's marginals for every eta: eta = 1 is the time reversal of Anderson (1982) as
    used by Song et al. (2021), equation 6; eta = 0 the probability flow; between them the family of
    Karras et al. (2022), equation 6. The noise is additive: Ito and Stratonovich agree, and the
    solvers `diffrax.SRA1`, `SEA`, `ShARK` keep their high order. `path` has one Brownian motion for
    each number of the state, over the interval of lambda; see `SamplePaths`.
    """
    return diffrax.MultiTerm(
        diffrax.ODETerm(_reverse_drift), diffrax.ControlTerm(_reverse_diffusion, path)
    )


class SamplePaths(diffrax.AbstractBrownianPath):
    """One `diffrax.VirtualBrownianTree` per sample, so a sample does not depend on its batch.

    Arguments:
      t0, t1: the interval of the clock.
      like: the state, leaves [batch, ...] (only shapes and dtypes are used).
      key: one key, or one per sample (`jaxdiff.sample_keys`).
      tol: resolution of the tree; below the smallest step.
      levy_area: `diffrax.BrownianIncrement`, or `SpaceTimeLevyArea` for solvers that need it.
    """

    t0: ArrayLike
    t1: ArrayLike
    tol: ArrayLike
    keys: jax.Array
    shape: Any = eqx.field(static=True)
    levy_area: type = eqx.field(static=True)

    def __init__(self, t0, t1, like, key, tol, levy_area=diffrax.BrownianIncrement):
        self.t0, self.t1, self.tol, self.levy_area = t0, t1, tol, levy_area
        self.shape = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), like)
        self.keys = per_sample(key, jax.tree.leaves(like)[0].shape[0])

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        def one(key):
            tree = diffrax.VirtualBrownianTree(
                self.t0, self.t1, self.tol, self.shape, key, self.levy_area
            )
            return tree.evaluate(t0, t1, left, use_levy)

        out = jax.vmap(one)(self.keys)
        # The increment's length is one number for the whole batch.
        return eqx.tree_at(lambda o: o.dt, out, out.dt[0]) if use_levy else out


def level_at(lam, rho, args, x):
    """(t, alpha, sigma) in the state's dtype; alpha / sigma is the clock's to rounding."""
    t = args.process.time(lam)
    alpha = args.process.alpha(t)
    dtype = jnp.result_type(*jax.tree.leaves(x))
    return tuple(jnp.asarray(a, dtype) for a in (t, alpha, rho * alpha))


def eps_of(level, x, args):
    """(o, u, w) with eps = u o + w x."""
    denoiser = args.denoiser
    return (
        like(x, denoiser(x, *level, args.cond)),
        *affine(denoiser.prediction, "eps", *level[1:]),
    )


def _rho_flow(rho, y, args):
    level = level_at(-jnp.log(rho), rho, args, y)
    x = jax.tree.map(lambda a: level[1] * a, y)
    out, u, w = eps_of(level, x, args)
    return jax.tree.map(lambda o, a: u * o + w * a, out, x)


def _lambda_drift(lam, x, args, factor):
    level = level_at(lam, jnp.exp(-lam), args, x)
    return lambda_slope(level, eps_of(level, x, args), x, args, factor)


def lambda_slope(level, eps, x, args, factor=1.0):
    """c x - factor sigma eps, one coefficient for x, so that nothing large cancels.

    `eps` is (o, u, w) of `eps_of`.
    """
    t, _, sigma = level
    f, g2 = args.process.rates(t)
    c = jnp.asarray(-2.0 * f / g2, sigma.dtype) * sigma**2
    out, u, w = eps
    k = jnp.asarray(factor, sigma.dtype) * sigma
    return jax.tree.map(lambda o, a: -k * u * o + (c - k * w) * a, out, x)


def _lambda_flow(lam, x, args):
    return _lambda_drift(lam, x, args, 1.0)


def _reverse_drift(lam, x, args):
    return _lambda_drift(lam, x, args, 1.0 + jnp.asarray(args.eta) ** 2)


def _reverse_diffusion(lam, x, args):
    *_, sigma = level_at(lam, jnp.exp(-lam), args, x)
    size = np.sqrt(2.0) * args.eta * sigma
    return lx.DiagonalLinearOperator(jax.tree.map(lambda a: jnp.full_like(a, size), x))


_FLOWS = {"rho": diffrax.ODETerm(_rho_flow), "lambda": diffrax.ODETerm(_lambda_flow)}
