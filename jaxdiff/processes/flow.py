"""Rectified flow."""

import numpy as np
from jaxtyping import ArrayLike

from jaxdiff.processes.base import (
    Process,
    check_positive,
    check_span,
    floating,
    register,
    softplus,
    static,
)


@register
class Flow(Process):
    """See `flow`."""

    shift: ArrayLike
    t_min: float = static(0.0)
    t_max: float = static(1.0)
    data_time = 0.0
    noise_time = 1.0

    def alpha(self, t):
        _, t = floating(t, self)
        return (1.0 - t) / (1.0 + (self.shift - 1.0) * t)

    def sigma(self, t):
        _, t = floating(t, self)
        return self.shift * t / (1.0 + (self.shift - 1.0) * t)

    def half_log_snr(self, t):
        xp, t = floating(t, self)
        with np.errstate(divide="ignore"):
            return xp.log1p(-t) - xp.log(t) - xp.log(self.shift)

    def time(self, half_log_snr):
        xp, lam = floating(half_log_snr, self)
        return xp.exp(-softplus(xp, lam + xp.log(self.shift)))

    def rates(self, t):
        # d log(alpha) / dt = -shift / ((1 - t) size), d lambda / dt = -1 / (t (1 - t)).
        _, t = floating(t, self)
        size = 1.0 + (self.shift - 1.0) * t
        with np.errstate(divide="ignore"):
            f = -self.shift / ((1.0 - t) * size)
        return f, -2.0 * f * self.sigma(t)


def flow(shift: ArrayLike = 1.0, t_min: float = 0.0, t_max: float = 1.0) -> Flow:
    """Rectified flow: alpha = 1 - u, sigma = u with u = shift t / (1 + (shift - 1) t), t in [0, 1].

    Liu et al., "Flow Straight and Fast" (2022); the resolution shift is that of Esser et al.,
    "Scaling Rectified Flow Transformers" (2024). Both ends are exact: alpha(1) = 0,
    sigma(0) = 0. A network that wants u rather than t takes it as sigma.
    """
    check_positive(shift=shift)
    check_span(t_min, t_max, 0.0, 1.0)
    return Flow(shift=shift, t_min=t_min, t_max=t_max)
