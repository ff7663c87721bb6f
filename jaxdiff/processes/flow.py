"""Rectified flow."""

import numpy as np
from jaxtyping import ArrayLike

from jaxdiff.arrays import namespace
from jaxdiff.processes.base import Process, check_positive, check_span, register, softplus, static


@register
class Flow(Process):
    """See `flow`."""

    shift: ArrayLike
    t_min: float = static(0.0)
    t_max: float = static(1.0)
    data_time = 0.0
    noise_time = 1.0

    def sigma(self, t):
        return self.shift * t / (1.0 + (self.shift - 1.0) * t)

    def alpha(self, t):
        return (1.0 - t) / (1.0 + (self.shift - 1.0) * t)

    def half_log_snr(self, t):
        xp = namespace(t, self)
        t = xp.asarray(t) * 1.0
        with np.errstate(divide="ignore"):
            return xp.log1p(-t) - xp.log(t) - xp.log(self.shift)

    def time(self, half_log_snr):
        xp = namespace(half_log_snr, self)
        odds = xp.asarray(half_log_snr) + xp.log(self.shift)
        return xp.exp(-softplus(xp, odds))

    def rates(self, t):
        # lambda = log((1 - t) / (shift t)), sigma = shift t / (1 + (shift - 1) t).
        with np.errstate(divide="ignore"):
            slope = -1.0 / (t * (1.0 - t))
            d_log_alpha = -1.0 / (1.0 - t) - (self.shift - 1.0) / (1.0 + (self.shift - 1.0) * t)
        return d_log_alpha, -2.0 * self.sigma(t) ** 2 * slope


def flow(shift: ArrayLike = 1.0, t_min: float = 0.0, t_max: float = 1.0) -> Flow:
    """Rectified flow: alpha = 1 - u, sigma = u with u = shift t / (1 + (shift - 1) t), t in [0, 1].

    Liu et al., "Flow Straight and Fast" (2022); the resolution shift is that of Esser et al.,
    "Scaling Rectified Flow Transformers" (2024), equation 23. Both ends are exact: alpha(1) = 0,
    sigma(0) = 0. A network that wants u rather than t takes it as sigma.
    """
    check_positive(shift=shift)
    check_span(t_min, t_max, 0.0, 1.0)
    return Flow(shift=shift, t_min=t_min, t_max=t_max)
