"""Boundary conditions of consistency models: at the smallest noise level x0 is the state itself."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from jaxdiff.arrays import is_concrete, to_batch
from jaxdiff.denoisers import Denoiser, check_single, wrap
from jaxdiff.predictions import convert


def consistency_boundary(
    denoiser: Denoiser, sigma_min: ArrayLike = 0.002, sigma_data: ArrayLike = 0.5
) -> Denoiser:
    """A consistency model's x0 from the network F of an EDM-preconditioned `denoiser`.

    With rho = sigma / alpha, y = x / alpha, s = sigma_data, e = sigma_min, F in
    `precondition`'s x0 = c_skip y + c_out F is kept and

        x0 = c_skip' y + c_out' F,   c_skip' = s^2 / ((rho - e)^2 + s^2),
        c_out' = s (rho - e) / sqrt(rho^2 + s^2),

    so that x0 = y at rho = e. Song, Dhariwal, Chen & Sutskever, "Consistency Models" (2023),
    appendix C, where alpha = 1. F enters through D, the denoiser's x0: c_out' F = (1 - e / rho) (D -
    c_skip y), also for a D that is not of that form. From alpha = 0 on, and sigma / alpha >= e.

    Arguments:
      denoiser: usually `precondition(fn, sigma_data, ...)`; any single prediction.
      sigma_min: e, the sigma / alpha at which the trajectory ends: at least 0, where x0 = D.
      sigma_data: that of the preconditioning, positive.

    Raises ValueError for other numbers, or a denoiser of several predictions.
    """
    _check_sigma_data(sigma_data)
    if is_concrete(sigma_min) and not np.all(np.asarray(sigma_min) >= 0):
        raise ValueError(f"sigma_min must not be negative, got {sigma_min!r}")
    return _bounded(_shifted, denoiser, (sigma_min, sigma_data))


def latent_consistency_boundary(
    denoiser: Denoiser, timestep_scaling: ArrayLike = 10.0, sigma_data: ArrayLike = 0.5
) -> Denoiser:
    """A latent consistency model's x0 from that of `denoiser`.

        x0 = c_skip x + c_out D,    c_skip = s^2 / ((k t)^2 + s^2),
        c_out = k t / sqrt((k t)^2 + s^2)

    with D the denoiser's x0, s = sigma_data and k = timestep_scaling, so that x0 = x at t = 0.
    Luo, Tan, Huang, Li & Zhao, "Latent Consistency Models" (2023), their code and diffusers'
    LCMScheduler, which clips D before: `latent_consistency_boundary(clip_x0(...))`.

    Arguments:
      denoiser: any single prediction.
      timestep_scaling: k, positive; the default is for timesteps 0..999 (`processes.ddpm`), for
        times in [0, 1] it would be 10,000.
      sigma_data: s, positive.

    Raises ValueError for other numbers, or a denoiser of several predictions.
    """
    _check_sigma_data(sigma_data)
    if is_concrete(timestep_scaling) and not np.all(np.asarray(timestep_scaling) > 0):
        raise ValueError(f"timestep_scaling must be positive, got {timestep_scaling!r}")
    return _bounded(_scaled, denoiser, (timestep_scaling, sigma_data))


def _check_sigma_data(sigma_data: Any) -> None:
    if is_concrete(sigma_data) and not np.all(np.asarray(sigma_data) > 0):
        raise ValueError(f"sigma_data must be positive, got {sigma_data!r}")


def _bounded(rule: Callable, denoiser: Denoiser, strengths: Any) -> Denoiser:
    check_single(denoiser, "a boundary condition")
    return wrap(_Bounded(rule, denoiser.prediction), denoiser, strengths, "x0")


@dataclasses.dataclass(frozen=True)
class _Bounded:
    rule: Callable
    source: str

    def __call__(self, evaluate, strengths, x, levels, cond):
        out = evaluate(x, *levels, cond)
        # In the state's precision, not the network's.
        out = jax.tree.map(lambda a, y: a.astype(jnp.promote_types(a.dtype, y.dtype)), out, x)
        skip, gain = self.rule(*levels, *strengths)
        x0 = convert(out, x, self.source, "x0", *levels[1:])
        scaled = lambda c, a: to_batch(c, a).astype(a.dtype) * a  # noqa: E731
        return jax.tree.map(lambda a, d: scaled(skip, a) + scaled(gain, d), x, x0)


def _shifted(t, alpha, sigma, sigma_min, sigma_data):
    """Coefficients of x and D, written so that alpha = 0 is finite."""
    signal, gain = alpha * sigma_data**2, 1.0 - sigma_min * alpha / sigma
    ours = signal / ((sigma - sigma_min * alpha) ** 2 + (alpha * sigma_data) ** 2)
    edm = signal / (sigma**2 + (alpha * sigma_data) ** 2)
    return ours - gain * edm, gain


def _scaled(t, alpha, sigma, timestep_scaling, sigma_data):
    scaled = timestep_scaling * t
    square = scaled**2 + sigma_data**2
    return sigma_data**2 / square, scaled / jnp.sqrt(square)
