"""Forward processes: how data becomes noise.

Every process is the Gaussian perturbation

    x_t = alpha(t) x_0 + sigma(t) eps,      eps ~ N(0, I),      t from t_min (data) to t_max (noise)

described by its half-log-SNR  lambda(t) = log(alpha(t) / sigma(t)), strictly decreasing in t. It is
the marginal of the linear SDE  dx = f(t) x dt + g(t) dW  with

    f = d log(alpha) / dt,       g^2 = d sigma^2 / dt - 2 f sigma^2 = -2 sigma^2 d lambda / dt

(Kingma et al., "Variational Diffusion Models", 2021, appendix; Song et al., "Score-Based Generative
Modeling through SDEs", 2021). Functions take NumPy or JAX arrays of any shape and keep the kind:
float64 on the host, whatever JAX uses on a device. Parameters are pytree leaves; the span
[t_min, t_max] is static.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from jaxdiff.arrays import namespace, to_batch
from jaxdiff.noise import normal


def _static(default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


def _register(cls: type) -> type:
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, kw_only=True)(cls))


def _softplus(xp: Any, x: ArrayLike) -> Any:
    return xp.logaddexp(xp.zeros_like(x), x)


class Process:
    """A forward process. Subclasses give `alpha`, `sigma`, `half_log_snr`, `time` and `rates`."""

    t_min: float
    t_max: float
    # Where the limits lie, if the span may reach them: alpha = 0 (pure noise), sigma = 0 (data).
    noise_time: float | None = None
    data_time: float | None = None

    def alpha(self, t: ArrayLike) -> Any:
        """alpha(t), the factor of the data."""
        raise TypeError(f"{type(self).__name__} does not define alpha")

    def sigma(self, t: ArrayLike) -> Any:
        """sigma(t), the standard deviation of the noise."""
        raise TypeError(f"{type(self).__name__} does not define sigma")

    def half_log_snr(self, t: ArrayLike) -> Any:
        """lambda(t) = log(alpha(t) / sigma(t)); -inf where alpha = 0, +inf where sigma = 0."""
        raise TypeError(f"{type(self).__name__} does not define half_log_snr")

    def time(self, half_log_snr: ArrayLike) -> Any:
        """The t at which lambda(t) equals `half_log_snr`: the exact inverse."""
        raise TypeError(f"{type(self).__name__} does not define time")

    def rates(self, t: ArrayLike) -> tuple[Any, Any]:
        """(f, g^2) of the forward SDE dx = f x dt + g dW at t."""
        raise TypeError(f"{type(self).__name__} does not define rates")

    @property
    def prior_std(self) -> Any:
        """Standard deviation of the state at t_max, data taken as negligible or of unit scale."""
        return 1.0

    def drift(self, x: Any, t: ArrayLike) -> Any:
        """f(t) x, the drift of the forward SDE. `t` is a scalar or `[batch]`."""
        return to_batch(self.rates(t)[0], x) * x

    def diffusion(self, t: ArrayLike) -> Any:
        """g(t), the diffusion coefficient of the forward SDE."""
        xp = namespace(t, self)
        return xp.sqrt(self.rates(t)[1])

    def perturb(self, x0: Any, eps: Any, t: ArrayLike) -> Any:
        """x_t = alpha(t) x_0 + sigma(t) eps, for pytrees of arrays; `t` is a scalar or `[batch]`."""
        alpha, sigma = self.alpha(t), self.sigma(t)
        return jax.tree.map(lambda x, e: to_batch(alpha, x) * x + to_batch(sigma, x) * e, x0, eps)

    def prior(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        """Draw x_T ~ N(0, prior_std^2 I), `shape` = [batch, ...].

        `key` is one key, or one per sample (see `jaxdiff.sample_keys`): then sample i depends on
        its own key alone, whatever the batch it is drawn in.
        """
        noise = normal(key, jax.ShapeDtypeStruct(shape, dtype))
        return jnp.asarray(self.prior_std, dtype) * noise


class VariancePreserving(Process):
    """alpha^2 + sigma^2 = 1. Subclasses give lambda(t), its inverse and its slope."""

    def slope(self, t: ArrayLike) -> Any:
        """d lambda / dt."""
        raise TypeError(f"{type(self).__name__} does not define slope")

    def alpha(self, t):
        xp = namespace(t, self)
        return xp.exp(-0.5 * _softplus(xp, -2.0 * self.half_log_snr(t)))

    def sigma(self, t):
        xp = namespace(t, self)
        return xp.exp(-0.5 * _softplus(xp, 2.0 * self.half_log_snr(t)))

    def rates(self, t):
        # alpha^2 = sigmoid(2 lambda), so d log(alpha) / dt = sigma^2 d lambda / dt.
        f = self.sigma(t) ** 2 * self.slope(t)
        return f, -2.0 * f


def _half_log_snr_of_log_alpha(xp: Any, log_alpha: Any) -> Any:
    with np.errstate(divide="ignore"):
        return log_alpha - 0.5 * xp.log(-xp.expm1(2.0 * log_alpha))


@_register
class VPLinear(VariancePreserving):
    """See `vp_linear`."""

    beta_min: ArrayLike
    beta_max: ArrayLike
    t_min: float = _static(1e-3)
    t_max: float = _static(1.0)
    data_time = 0.0

    def _log_alpha(self, xp, t):
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def half_log_snr(self, t):
        xp = namespace(t, self)
        t = xp.asarray(t, dtype=None if xp is jnp else np.float64)
        return _half_log_snr_of_log_alpha(xp, self._log_alpha(xp, t))

    def time(self, half_log_snr):
        xp = namespace(half_log_snr, self)
        return _linear_beta_time(xp, self, _softplus(xp, -2.0 * xp.asarray(half_log_snr)))

    def slope(self, t):
        xp = namespace(t, self)
        beta = self.beta_min + t * (self.beta_max - self.beta_min)
        # sigma^2 = 1 - alpha^2 from expm1: no cancellation near t = 0.
        return 0.5 * beta / xp.expm1(2.0 * self._log_alpha(xp, t))


def _linear_beta_time(xp: Any, process: Any, minus_two_log_alpha: Any) -> Any:
    # The positive root of (beta_max - beta_min) t^2 / 2 + beta_min t = -2 log(alpha).
    b, slope = minus_two_log_alpha, process.beta_max - process.beta_min
    return 2.0 * b / (process.beta_min + xp.sqrt(process.beta_min**2 + 2.0 * slope * b))


@_register
class SubVP(Process):
    """See `sub_vp`."""

    beta_min: ArrayLike
    beta_max: ArrayLike
    t_min: float = _static(1e-3)
    t_max: float = _static(1.0)
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


@_register
class VPCosine(VariancePreserving):
    """See `vp_cosine` and `shifted_cosine`."""

    s: ArrayLike
    shift: ArrayLike
    t_min: float = _static(1e-3)
    t_max: float = _static(0.9946)
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
        return _half_log_snr_of_log_alpha(xp, log_alpha) + self.shift

    def time(self, half_log_snr):
        xp = namespace(half_log_snr, self)
        base = xp.asarray(half_log_snr) - self.shift
        alpha = xp.exp(-0.5 * _softplus(xp, -2.0 * base))
        angle = xp.arcsin(alpha * xp.sin(self._complement(0.0)))
        return 1.0 - angle * (1.0 + self.s) * 2.0 / np.pi

    def slope(self, t):
        xp = namespace(t, self)
        angle = self._complement(t)
        ratio = xp.sin(angle) / xp.sin(self._complement(0.0))
        return -0.5 * np.pi / (1.0 + self.s) / xp.tan(angle) / (1.0 - ratio**2)


@_register
class DDPM(VariancePreserving):
    """See `ddpm`. `table` holds lambda at t = 0, 1, ..., num_steps - 1."""

    table: ArrayLike
    t_min: float = _static(0.0)
    t_max: float = _static(999.0)

    def half_log_snr(self, t):
        xp = namespace(t, self)
        return xp.interp(xp.asarray(t), xp.arange(self.table.shape[0]), self.table)

    def time(self, half_log_snr):
        xp = namespace(half_log_snr, self)
        steps = xp.arange(self.table.shape[0])
        return xp.interp(-xp.asarray(half_log_snr), -self.table, steps * 1.0)

    def slope(self, t):
        xp = namespace(t, self)
        left = xp.clip(xp.floor(xp.asarray(t)), 0, self.table.shape[0] - 2).astype(int)
        return xp.asarray(self.table)[left + 1] - xp.asarray(self.table)[left]


@_register
class ZeroTerminalSNR(VariancePreserving):
    """See `zero_terminal_snr`."""

    base: VariancePreserving
    t_min: float = _static()
    t_max: float = _static()
    noise_time: float | None = _static()
    data_time: float | None = _static()

    def _ends(self):
        return self.base.alpha(self.data_time or 0.0), self.base.alpha(self.t_max)

    def _alpha(self, t):
        first, last = self._ends()
        return (self.base.alpha(t) - last) * first / (first - last)

    def half_log_snr(self, t):
        xp = namespace(t, self)
        alpha = self._alpha(t)
        with np.errstate(divide="ignore"):
            return xp.log(alpha) - 0.5 * xp.log1p(-(alpha**2))

    def time(self, half_log_snr):
        xp = namespace(half_log_snr, self)
        first, last = self._ends()
        alpha = xp.exp(-0.5 * _softplus(xp, -2.0 * xp.asarray(half_log_snr)))
        alpha = alpha * (first - last) / first + last
        with np.errstate(divide="ignore"):
            return self.base.time(xp.log(alpha) - 0.5 * xp.log1p(-(alpha**2)))

    def slope(self, t):
        first, last = self._ends()
        alpha, base_alpha = self._alpha(t), self.base.alpha(t)
        d_alpha = self.base.rates(t)[0] * base_alpha * first / (first - last)
        return d_alpha / (alpha * (1.0 - alpha**2))


@_register
class VE(Process):
    """See `ve`."""

    sigma_min: ArrayLike
    sigma_max: ArrayLike
    t_min: float = _static(0.0)
    t_max: float = _static(1.0)

    def alpha(self, t):
        xp = namespace(t, self)
        return xp.ones_like(xp.asarray(t) * 1.0)

    def sigma(self, t):
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def half_log_snr(self, t):
        xp = namespace(t, self)
        return -xp.log(self.sigma(t))

    def time(self, half_log_snr):
        xp = namespace(half_log_snr, self)
        log_ratio = xp.log(self.sigma_max / self.sigma_min)
        return (-xp.asarray(half_log_snr) - xp.log(self.sigma_min)) / log_ratio

    def rates(self, t):
        xp = namespace(t, self)
        sigma = self.sigma(t)
        log_ratio = xp.log(self.sigma_max / self.sigma_min)
        return xp.zeros_like(sigma), 2.0 * sigma**2 * log_ratio

    @property
    def prior_std(self):
        return self.sigma_max


@_register
class EDM(Process):
    """See `edm`."""

    t_min: float = _static(0.002)
    t_max: float = _static(80.0)
    data_time = 0.0

    def alpha(self, t):
        xp = namespace(t)
        return xp.ones_like(xp.asarray(t) * 1.0)

    def sigma(self, t):
        xp = namespace(t)
        return xp.asarray(t) * 1.0

    def half_log_snr(self, t):
        xp = namespace(t)
        with np.errstate(divide="ignore"):
            return -xp.log(xp.asarray(t) * 1.0)

    def time(self, half_log_snr):
        xp = namespace(half_log_snr)
        return xp.exp(-xp.asarray(half_log_snr))

    def rates(self, t):
        xp = namespace(t)
        t = xp.asarray(t) * 1.0
        return xp.zeros_like(t), 2.0 * t

    @property
    def prior_std(self):
        return self.t_max


@_register
class Flow(Process):
    """See `flow`."""

    shift: ArrayLike
    t_min: float = _static(0.0)
    t_max: float = _static(1.0)
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
        return xp.exp(-_softplus(xp, odds))

    def rates(self, t):
        # lambda = log((1 - t) / (shift t)), sigma = shift t / (1 + (shift - 1) t).
        with np.errstate(divide="ignore"):
            slope = -1.0 / (t * (1.0 - t))
            d_log_alpha = -1.0 / (1.0 - t) - (self.shift - 1.0) / (1.0 + (self.shift - 1.0) * t)
        return d_log_alpha, -2.0 * self.sigma(t) ** 2 * slope


def _check_span(t_min: float, t_max: float, low: float, high: float) -> None:
    if not low <= t_min < t_max <= high:
        raise ValueError(
            f"need {low:g} <= t_min < t_max <= {high:g}, got t_min={t_min!r}, t_max={t_max!r}"
        )


def _check_positive(**values: ArrayLike) -> None:
    for name, value in values.items():
        if not isinstance(value, jax.Array) and not np.all(np.asarray(value) > 0):
            raise ValueError(f"{name} must be positive, got {value!r}")


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
    _check_span(t_min, t_max, 0.0, 1.0)
    return VPLinear(beta_min=beta_min, beta_max=beta_max, t_min=t_min, t_max=t_max)


def sub_vp(
    beta_min: ArrayLike = 0.1, beta_max: ArrayLike = 20.0, t_min: float = 1e-3, t_max: float = 1.0
) -> SubVP:
    """Sub-VP: alpha of `vp_linear`, sigma = 1 - alpha^2 (Song et al. 2021, equation 36)."""
    _check_betas(beta_min, beta_max)
    _check_span(t_min, t_max, 0.0, 1.0)
    return SubVP(beta_min=beta_min, beta_max=beta_max, t_min=t_min, t_max=t_max)


def vp_cosine(
    s: ArrayLike = 0.008, shift: ArrayLike = 0.0, t_min: float = 1e-3, t_max: float = 0.9946
) -> VPCosine:
    """Variance preserving with alpha(t) = cos((t + s) / (1 + s) pi/2) / cos(s / (1 + s) pi/2).

    Nichol & Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (2021), equation 17.
    `shift` is added to lambda (see `shifted_cosine`). The default t_max keeps alpha away from 0 as
    DPM-Solver does; t_max=1 is zero terminal SNR.
    """
    _check_span(t_min, t_max, 0.0, 1.0)
    return VPCosine(s=s, shift=shift, t_min=t_min, t_max=t_max)


def shifted_cosine(
    resolution: int, base: int = 64, t_min: float = 1e-3, t_max: float = 0.9946
) -> VPCosine:
    """Cosine schedule shifted for a resolution: lambda(t) = -log tan(pi t / 2) + log(base / resolution).

    Hoogeboom, Heek & Salimans, "simple diffusion" (2023), equation 3 (there for 2 lambda).
    """
    _check_positive(resolution=resolution, base=base)
    _check_span(t_min, t_max, 0.0, 1.0)
    return VPCosine(s=0.0, shift=float(np.log(base / resolution)), t_min=t_min, t_max=t_max)


def _cosine_betas(num_steps: int) -> np.ndarray:
    u = np.arange(num_steps + 1) / num_steps
    bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1.0 - bar[1:] / bar[:-1], 0.999)


# schedule name -> (default beta_start, default beta_end, betas)
_DDPM_SCHEDULES = {
    "linear": (1e-4, 0.02, np.linspace),
    "scaled_linear": (0.00085, 0.012, lambda a, b, n: np.linspace(a**0.5, b**0.5, n) ** 2),
    "squaredcos": (None, None, lambda a, b, n: _cosine_betas(n)),
}


def ddpm(
    schedule: str = "linear",
    num_steps: int = 1000,
    beta_start: float | None = None,
    beta_end: float | None = None,
    betas: ArrayLike | None = None,
) -> DDPM:
    """A discrete DDPM schedule bridged to continuous time: t in [0, num_steps - 1].

    At an integer t, alpha^2 = prod_{i <= t} (1 - beta_i), exactly the discrete model; between
    integers lambda is linear in t (Karras et al. 2022 interpolate log sigma so for their
    "iDDPM" networks). A network trained on integer timesteps therefore takes t as it is.

    `schedule`: "linear" (Ho et al. 2020; 1e-4 to 0.02), "scaled_linear" (latent diffusion; betas
    whose square roots are linear, 0.00085 to 0.012), "squaredcos" (Nichol & Dhariwal 2021, betas
    capped at 0.999); or give `betas`, shape [num_steps]. Raises ValueError for anything else.
    """
    if betas is None:
        if schedule not in _DDPM_SCHEDULES:
            raise ValueError(f"unknown schedule {schedule!r}; choose from {list(_DDPM_SCHEDULES)}")
        start, end, function = _DDPM_SCHEDULES[schedule]
        if start is None and (beta_start is not None or beta_end is not None):
            raise ValueError(f"schedule {schedule!r} takes no beta_start or beta_end")
        if num_steps < 2:
            raise ValueError(f"num_steps must be at least 2, got {num_steps!r}")
        betas = function(
            start if beta_start is None else beta_start, end if beta_end is None else beta_end,
            num_steps,
        )  # fmt: skip
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or betas.size < 2 or not np.all((betas > 0) & (betas < 1)):
        raise ValueError("betas must be a vector of at least 2 numbers in (0, 1)")
    log_alpha = 0.5 * np.cumsum(np.log1p(-betas))
    table = _half_log_snr_of_log_alpha(np, log_alpha)
    return DDPM(table=table, t_min=0.0, t_max=float(betas.size - 1))


def zero_terminal_snr(process: VariancePreserving) -> ZeroTerminalSNR:
    """Shift and scale alpha so that it is 0 at t_max and unchanged at the clean end.

    alpha'(t) = (alpha(t) - alpha(t_max)) alpha(0) / (alpha(0) - alpha(t_max)), sigma'^2 = 1 - alpha'^2
    (Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", 2024, algorithm 1).
    At the first node an eps or score network says nothing about x_0: use v, x0 or flow.
    """
    if not isinstance(process, VariancePreserving):
        raise TypeError(
            f"zero_terminal_snr takes a variance-preserving process, got {type(process).__name__}"
        )
    return ZeroTerminalSNR(
        base=process, t_min=process.t_min, t_max=process.t_max,
        noise_time=process.t_max, data_time=process.data_time,
    )  # fmt: skip


def ve(sigma_min: ArrayLike = 0.01, sigma_max: ArrayLike = 50.0) -> VE:
    """Variance exploding: alpha = 1, sigma(t) = sigma_min (sigma_max / sigma_min)^t, t in [0, 1].

    Song et al. 2021, equation 31.
    """
    _check_positive(sigma_min=sigma_min, sigma_max=sigma_max)
    return VE(sigma_min=sigma_min, sigma_max=sigma_max)


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> EDM:
    """alpha = 1, sigma(t) = t, t in [sigma_min, sigma_max].

    Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (2022).
    """
    _check_span(sigma_min, sigma_max, 0.0, np.inf)
    return EDM(t_min=sigma_min, t_max=sigma_max)


def flow(shift: ArrayLike = 1.0, t_min: float = 0.0, t_max: float = 1.0) -> Flow:
    """Rectified flow: alpha = 1 - u, sigma = u with u = shift t / (1 + (shift - 1) t), t in [0, 1].

    Liu et al., "Flow Straight and Fast" (2022); the resolution shift is that of Esser et al.,
    "Scaling Rectified Flow Transformers" (2024), equation 23. Both ends are exact: alpha(1) = 0,
    sigma(0) = 0. A network that wants u rather than t takes it as sigma.
    """
    _check_positive(shift=shift)
    _check_span(t_min, t_max, 0.0, 1.0)
    return Flow(shift=shift, t_min=t_min, t_max=t_max)
