"""Processes with a linear beta: variance preserving, and sub-VP; the cosine schedules."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from jaxdiff.arrays import namespace
from jaxdiff.processes.base import (
    Process,
    VariancePreserving,
    check_positive,
    check_span,
    half_log_snr_of_log_alpha,
    register,
    softplus,
    static,
)


@register
class VPLinear(VariancePreserving):
    """See `vp_linear`."""

    beta_min: ArrayLike
    beta_max: ArrayLike
    t_min: float = static(1e-3)
    t_max: float = static(1.0)
    data_time = 0.0

    def _log_alpha(self, xp, t):
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def half_log_snr(self, t):
        xp = namespace(t, self)
        t = xp.asarray(t, dtype=None if xp is jnp else np.float64)
        return half_log_snr_of_log_alpha(xp, self._log_alpha(xp, t))

    def time(self, half_log_snr):
        xp = namespace(half_log_snr, self)
        return _linear_beta_time(xp, self, softplus(xp, -2.0 * xp.asarray(half_log_snr)))

    def slope(self, t):
        xp = namespace(t, self)
        beta = self.beta_min + t * (self.beta_max - self.beta_min)
        # sigma^2 = 1 - alpha^2 from expm1: no cancellation near t = 0.
        return 0.5 * beta / xp.expm1(2.0 * self._log_alpha(xp, t))


def _linear_beta_time(xp: Any, process: Any, minus_two_log_alpha: Any) -> Any:
    # The positive root of (beta_max - beta_min) t^2 / 2 + beta_min t = -2 log(alpha).
    b, slope = minus_two_log_alpha, process.beta_max - process.beta_min
    return 2.0 * b / (process.beta_min + xp.sqrt(process.beta_min**2 + 2.0 * slope * b))


@register
class SubVP(Process):
    """See `sub_vp`."""

    beta_min: ArrayLike
    beta_max: ArrayLike
    t_min: float = static(1e-3)
    t_max: float = static(1.0)
    data_time = 0.0

    def _log_alpha(self, xp, t):
        t = xp.asarray(t, dtype=None if xp is jnp else np.float64)
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def alpha(self, t):
        xp = namespace(t, self)
        return xp.exp(self._log_alpha(xp, t))

    def sigma(self, t):
        xp = namespace(t, self)
        return -xp.expm1(2.0 * self._log_alpha(xp, t))

    def half_log_snr(self, t):
        xp = namespace(t, self)
        with np.errstate(divide="ignore"):
            return self._log_alpha(xp, t) - xp.log(self.sigma(t))

    def time(self, half_log_snr):
        # alpha^2 + exp(-lambda) alpha - 1 = 0 has the root alpha = exp(-asinh(exp(-lambda) / 2)).
        xp = namespace(half_log_snr, self)
        log_alpha = -xp.arcsinh(0.5 * xp.exp(-xp.asarray(half_log_snr)))
        return _linear_beta_time(xp, self, -2.0 * log_alpha)

    def rates(self, t):
        xp = namespace(t, self)
        beta = self.beta_min + t * (self.beta_max - self.beta_min)
        return -0.5 * beta, -beta * xp.expm1(4.0 * self._log_alpha(xp, t))


@register
class VPCosine(VariancePreserving):
    """See `vp_cosine` and `shifted_cosine`."""

    s: ArrayLike
    shift: ArrayLike
    t_min: float = static(1e-3)
    t_max: float = static(0.9946)
    data_time = 0.0
    noise_time = 1.0

    def _complement(self, t):
        # pi / 2 minus the cosine's angle, so that alpha is an exact 0 at t = 1.
        return 0.5 * np.pi * (1.0 - t) / (1.0 + self.s)

    def half_log_snr(self, t):
        xp = namespace(t, self)
        t = xp.asarray(t, dtype=None if xp is jnp else np.float64)
        ratio = xp.sin(self._complement(t)) / xp.sin(self._complement(0.0))
        with np.errstate(divide="ignore"):
            log_alpha = xp.log(ratio)
        return half_log_snr_of_log_alpha(xp, log_alpha) + self.shift

    def time(self, half_log_snr):
        xp = namespace(half_log_snr, self)
        base = xp.asarray(half_log_snr) - self.shift
        alpha = xp.exp(-0.5 * softplus(xp, -2.0 * base))
        angle = xp.arcsin(alpha * xp.sin(self._complement(0.0)))
        return 1.0 - angle * (1.0 + self.s) * 2.0 / np.pi

    def slope(self, t):
        xp = namespace(t, self)
        angle = self._complement(t)
        ratio = xp.sin(angle) / xp.sin(self._complement(0.0))
        return -0.5 * np.pi / (1.0 + self.s) / xp.tan(angle) / (1.0 - ratio**2)


def _check_betas(beta_min: ArrayLike, beta_max: ArrayLike) -> None:
    if namespace(beta_min, beta_max) is np and not 0 <= beta_min < beta_max:
        raise ValueError(f"need 0 <= beta_min < beta_max, got {beta_min!r} and {beta_max!r}")


def vp_linear(
    beta_min: ArrayLike = 0.1, beta_max: ArrayLike = 20.0, t_min: float = 1e-3, t_max: float = 1.0
) -> VPLinear:
    """Variance preserving, beta(t) = beta_min + t (beta_max - beta_min), t in [0, 1].

    log alpha = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2, sigma^2 = 1 - alpha^2
    (Song et al. 2021, equation 33). Raises ValueError for a span outside [0, 1] or betas out of
    order.
    """
    _check_betas(beta_min, beta_max)
    check_span(t_min, t_max, 0.0, 1.0)
    return VPLinear(beta_min=beta_min, beta_max=beta_max, t_min=t_min, t_max=t_max)


def sub_vp(
    beta_min: ArrayLike = 0.1, beta_max: ArrayLike = 20.0, t_min: float = 1e-3, t_max: float = 1.0
) -> SubVP:
    """Sub-VP: alpha of `vp_linear`, sigma = 1 - alpha^2 (Song et al. 2021, equation 36)."""
    _check_betas(beta_min, beta_max)
    check_span(t_min, t_max, 0.0, 1.0)
    return SubVP(beta_min=beta_min, beta_max=beta_max, t_min=t_min, t_max=t_max)


def vp_cosine(
    s: ArrayLike = 0.008, shift: ArrayLike = 0.0, t_min: float = 1e-3, t_max: float = 0.9946
) -> VPCosine:
    """Variance preserving with alpha(t) = cos((t + s) / (1 + s) pi/2) / cos(s / (1 + s) pi/2).

    Nichol & Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (2021), equation 17.
    `shift` is added to lambda (see `shifted_cosine`). The default t_max keeps alpha away from 0 as
    DPM-Solver does; t_max=1 is zero terminal SNR.
    """
    check_span(t_min, t_max, 0.0, 1.0)
    return VPCosine(s=s, shift=shift, t_min=t_min, t_max=t_max)


def shifted_cosine(
    resolution: int, base: int = 64, t_min: float = 1e-3, t_max: float = 0.9946
) -> VPCosine:
    """Cosine schedule shifted for a resolution: lambda(t) = -log tan(pi t / 2) + log(base / resolution).

    Hoogeboom, Heek & Salimans, "simple diffusion" (2023), equation 3 (there for 2 lambda).
    """
    check_positive(resolution=resolution, base=base)
    check_span(t_min, t_max, 0.0, 1.0)
    return VPCosine(s=0.0, shift=float(np.log(base / resolution)), t_min=t_min, t_max=t_max)
