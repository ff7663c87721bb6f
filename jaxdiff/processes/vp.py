"""Processes with a linear beta: variance preserving, and sub-VP; the cosine schedules."""

from typing import Any

import numpy as np
from jaxtyping import ArrayLike

from jaxdiff.arrays import namespace
from jaxdiff.processes.base import (
    Process,
    VariancePreserving,
    check_positive,
    check_span,
    floating,
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

    def half_log_snr(self, t):
        xp, t = floating(t, self)
        return half_log_snr_of_log_alpha(xp, _linear_beta_log_alpha(self, t))

    def time(self, half_log_snr):
        xp, lam = floating(half_log_snr, self)
        return _linear_beta_time(xp, self, softplus(xp, -2.0 * lam))

    def log_alpha_rate(self, t):
        return -0.5 * _linear_beta(self, floating(t, self)[1])


def _linear_beta(process: Any, t: Any) -> Any:
    return process.beta_min + t * (process.beta_max - process.beta_min)


def _linear_beta_log_alpha(process: Any, t: Any) -> Any:
    return -0.25 * t**2 * (process.beta_max - process.beta_min) - 0.5 * t * process.beta_min


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

    def alpha(self, t):
        xp, t = floating(t, self)
        return xp.exp(_linear_beta_log_alpha(self, t))

    def sigma(self, t):
        xp, t = floating(t, self)
        return -xp.expm1(2.0 * _linear_beta_log_alpha(self, t))

    def half_log_snr(self, t):
        xp, t = floating(t, self)
        with np.errstate(divide="ignore"):
            return _linear_beta_log_alpha(self, t) - xp.log(self.sigma(t))

    def time(self, half_log_snr):
        # alpha^2 + exp(-lambda) alpha - 1 = 0 has the root alpha = exp(-asinh(exp(-lambda) / 2)).
        xp, lam = floating(half_log_snr, self)
        log_alpha = -xp.arcsinh(0.5 * xp.exp(-lam))
        return _linear_beta_time(xp, self, -2.0 * log_alpha)

    def rates(self, t):
        xp, t = floating(t, self)
        beta = _linear_beta(self, t)
        return -0.5 * beta, -beta * xp.expm1(4.0 * _linear_beta_log_alpha(self, t))


@register
class VPCosine(VariancePreserving):
    """See `vp_cosine` and `shifted_cosine`."""

    s: ArrayLike
    shift: ArrayLike
    t_min: float = static(1e-3)
    t_max: float = static(0.9946)
    data_time = 0.0
    noise_time = 1.0

    def _angles(self):
        """(k, b): the cosine's angle is v = k t + b, and pi / 2 at t = 1."""
        rate = 0.5 * np.pi / (1.0 + self.s)
        return rate, rate * self.s

    def _signal_and_noise(self, xp, t):
        """(a, b) with lambda = log(a) - log(b) / 2, neither from a difference of close numbers.

        Without a shift sigma^2 = 1 - cos^2(v) / cos^2(b) = sin(v - b) sin(v + b) / cos^2(b).
        """
        rate, offset = self._angles()
        # cos(v) as a sine of what is left to pi / 2: an exact 0 at t = 1.
        signal = xp.exp(self.shift) * xp.sin(rate * (1.0 - t))
        return signal, xp.sin(rate * t) * xp.sin(rate * t + 2.0 * offset)

    def alpha(self, t):
        xp, t = floating(t, self)
        signal, noise = self._signal_and_noise(xp, t)
        return signal / xp.sqrt(signal**2 + noise)

    def sigma(self, t):
        xp, t = floating(t, self)
        signal, noise = self._signal_and_noise(xp, t)
        return xp.sqrt(noise / (signal**2 + noise))

    def half_log_snr(self, t):
        xp, t = floating(t, self)
        signal, noise = self._signal_and_noise(xp, t)
        with np.errstate(divide="ignore"):
            return xp.log(signal) - 0.5 * xp.log(noise)

    def time(self, half_log_snr):
        xp, lam = floating(half_log_snr, self)
        rate, offset = self._angles()
        twice = 2.0 * (lam - self.shift)
        cos_v = xp.exp(-0.5 * softplus(xp, -twice)) * xp.cos(offset)
        sin_v2 = xp.sin(offset) ** 2 + xp.exp(-softplus(xp, twice)) * xp.cos(offset) ** 2
        return (xp.arctan2(xp.sqrt(sin_v2), cos_v) - offset) / rate

    def log_alpha_rate(self, t):
        xp, t = floating(t, self)
        rate, offset = self._angles()
        signal, noise = self._signal_and_noise(xp, t)
        with np.errstate(divide="ignore"):
            tangent = xp.sin(rate * t + offset) / xp.sin(rate * (1.0 - t))
        return -rate * tangent * xp.cos(offset) ** 2 / (signal**2 + noise)


def _check_betas(beta_min: ArrayLike, beta_max: ArrayLike) -> None:
    if namespace(beta_min, beta_max) is np and not 0 <= beta_min < beta_max:
        raise ValueError(f"need 0 <= beta_min < beta_max, got {beta_min!r} and {beta_max!r}")


def vp_linear(
    beta_min: ArrayLike = 0.1, beta_max: ArrayLike = 20.0, t_min: float = 1e-3, t_max: float = 1.0
) -> VPLinear:
    """Variance preserving, beta(t) = beta_min + t (beta_max - beta_min), t in [0, 1].

    log alpha = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2, sigma^2 = 1 - alpha^2
    (Song et al. 2021). Raises ValueError for a span outside [0, 1] or betas out of
    order.
    """
    _check_betas(beta_min, beta_max)
    check_span(t_min, t_max, 0.0, 1.0)
    return VPLinear(beta_min=beta_min, beta_max=beta_max, t_min=t_min, t_max=t_max)


def sub_vp(
    beta_min: ArrayLike = 0.1, beta_max: ArrayLike = 20.0, t_min: float = 1e-3, t_max: float = 1.0
) -> SubVP:
    """Sub-VP: alpha of `vp_linear`, sigma = 1 - alpha^2 (Song et al. 2021)."""
    _check_betas(beta_min, beta_max)
    check_span(t_min, t_max, 0.0, 1.0)
    return SubVP(beta_min=beta_min, beta_max=beta_max, t_min=t_min, t_max=t_max)


def vp_cosine(
    s: ArrayLike = 0.008, shift: ArrayLike = 0.0, t_min: float = 1e-3, t_max: float = 0.9946
) -> VPCosine:
    """Variance preserving with alpha(t) = cos((t + s) / (1 + s) pi/2) / cos(s / (1 + s) pi/2).

    Nichol & Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (2021).
    `shift` is added to lambda (see `shifted_cosine`). The default t_max keeps alpha away from 0 as
    DPM-Solver does; t_max=1 is zero terminal SNR. Raises ValueError for s < 0 or a span outside
    [0, 1].
    """
    if namespace(s) is np and not np.all(np.asarray(s) >= 0):
        raise ValueError(f"s must not be negative, got {s!r}")
    check_span(t_min, t_max, 0.0, 1.0)
    return VPCosine(s=s, shift=shift, t_min=t_min, t_max=t_max)


def shifted_cosine(
    resolution: int, base: int = 64, t_min: float = 1e-3, t_max: float = 0.9946
) -> VPCosine:
    """Cosine schedule shifted for a resolution.

    lambda(t) = -log tan(pi t / 2) + log(base / resolution);
    Hoogeboom, Heek & Salimans, "simple diffusion" (2023; there for 2 lambda).
    """
    check_positive(resolution=resolution, base=base)
    check_span(t_min, t_max, 0.0, 1.0)
    return VPCosine(s=0.0, shift=float(np.log(base / resolution)), t_min=t_min, t_max=t_max)
