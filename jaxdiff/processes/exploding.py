"""alpha = 1: variance exploding, and EDM."""

import numpy as np
from jaxtyping import ArrayLike

from jaxdiff.arrays import is_concrete
from jaxdiff.processes.base import Process, check_positive, check_span, floating, register, static


@register
class VE(Process):
    """See `ve`."""

    sigma_min: ArrayLike
    sigma_max: ArrayLike
    t_min: float = static(0.0)
    t_max: float = static(1.0)

    def alpha(self, t):
        xp, t = floating(t, self)
        return xp.ones_like(t)

    def sigma(self, t):
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** floating(t, self)[1]

    def half_log_snr(self, t):
        xp, t = floating(t, self)
        return -xp.log(self.sigma(t))

    def time(self, half_log_snr):
        xp, lam = floating(half_log_snr, self)
        return -(lam + xp.log(self.sigma_min)) / xp.log(self.sigma_max / self.sigma_min)

    def rates(self, t):
        xp, t = floating(t, self)
        sigma = self.sigma(t)
        log_ratio = xp.log(self.sigma_max / self.sigma_min)
        return xp.zeros_like(sigma), 2.0 * sigma**2 * log_ratio

    @property
    def prior_std(self):
        return self.sigma_max


@register
class EDM(Process):
    """See `edm`."""

    t_min: float = static(0.002)
    t_max: float = static(80.0)
    data_time = 0.0

    def alpha(self, t):
        xp, t = floating(t)
        return xp.ones_like(t)

    def sigma(self, t):
        return floating(t)[1]

    def half_log_snr(self, t):
        xp, t = floating(t)
        with np.errstate(divide="ignore"):
            return -xp.log(t)

    def time(self, half_log_snr):
        xp, lam = floating(half_log_snr)
        return xp.exp(-lam)

    def rates(self, t):
        xp, t = floating(t)
        return xp.zeros_like(t), 2.0 * t

    @property
    def prior_std(self):
        return self.t_max


def ve(sigma_min: ArrayLike = 0.01, sigma_max: ArrayLike = 50.0) -> VE:
    """Variance exploding: alpha = 1, sigma(t) = sigma_min (sigma_max / sigma_min)^t, t in [0, 1].

    Song et al. 2021. Raises ValueError unless 0 < sigma_min < sigma_max.
    """
    check_positive(sigma_min=sigma_min, sigma_max=sigma_max)
    if is_concrete(sigma_min, sigma_max) and not sigma_min < sigma_max:
        raise ValueError(f"need sigma_min < sigma_max, got {sigma_min!r} and {sigma_max!r}")
    return VE(sigma_min=sigma_min, sigma_max=sigma_max)


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> EDM:
    """alpha = 1, sigma(t) = t, t in [sigma_min, sigma_max].

    Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (2022).
    """
    check_span(sigma_min, sigma_max, 0.0, np.inf)
    return EDM(t_min=sigma_min, t_max=sigma_max)
