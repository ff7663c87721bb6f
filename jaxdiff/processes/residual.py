"""RDDM's forward process: the residual and the noise on schedules of their own.

Liu, Wang, Fan, Wang, Tang & Qu, "Residual Denoising Diffusion Models" (2024): a degraded I_in and its
clean I_0 differ by I_res = I_in - I_0, and

    I_t = I_0 + A(t) I_res + B(t) eps,    A = a_1 + ... + a_t -> 1,    B^2 = b_1^2 + ... + b_t^2,

so the end is I_in with noise of std B(T); I_in = 0 is generation. Seen from the input, x = I - I_in has

    x_t = (1 - A) x_0 + B eps,     x_0 = -I_res:

an ordinary process with alpha = 1 - A and sigma = B, on minus the residual. So every grid, solver and
guidance of this library takes it, and any process is one of RDDM: A = 1 - alpha, B = sigma, which for
DDPM are 1 - sqrt(abar) and sqrt(1 - abar). `jaxdiff.inverse.restore` goes from I_in to I_0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import ArrayLike, Float

from jaxdiff.processes.base import Process, floating, register, static


@register
class Residual(Process):
    """See `residual` and `retimed`. `kept` is alpha = 1 - A and `variance` B^2 at t = 0, 1, ...,
    num_steps, both linear in between."""

    kept: ArrayLike
    variance: ArrayLike
    t_min: float = static(0.0)
    t_max: float = static()
    noise_time: float | None = static(None)
    data_time: float | None = static(None)

    def _interpolate(self, xp, t, table):
        return xp.interp(t, xp.arange(self.kept.shape[0]), table)

    def alpha(self, t):
        xp, t = floating(t, self)
        return self._interpolate(xp, t, self.kept)

    def sigma(self, t):
        xp, t = floating(t, self)
        return xp.sqrt(self._interpolate(xp, t, self.variance))

    def half_log_snr(self, t):
        xp, t = floating(t, self)
        with np.errstate(divide="ignore"):
            return xp.log(self.alpha(t)) - xp.log(self.sigma(t))

    def time(self, half_log_snr):
        xp, lam = floating(half_log_snr, self)
        kept, variance = (xp.asarray(a) for a in (self.kept, self.variance))
        with np.errstate(divide="ignore"):
            table = xp.log(kept) - 0.5 * xp.log(variance)
        last = kept.shape[0] - 1
        left = xp.clip(xp.searchsorted(-table, -lam, side="right") - 1, 0, last - 1)
        # On a segment, with s from 0 to 1: p (a - da s)^2 = q (b + db s), q / p = exp(2 lam).
        p, q = xp.exp(-2.0 * xp.maximum(lam, 0.0)), xp.exp(2.0 * xp.minimum(lam, 0.0))
        a, b = kept[left], variance[left]
        da, db = a - kept[left + 1], variance[left + 1] - b
        half, rest = p * a * da + 0.5 * q * db, xp.maximum(p * a**2 - q * b, 0.0)
        # The smaller root of p da^2 s^2 - 2 half s + rest = 0, without cancellation.
        root = xp.sqrt(xp.maximum(half**2 - p * da**2 * rest, 0.0))
        s = rest / xp.where(half + root > 0, half + root, 1.0)
        inside = left + xp.clip(s, 0.0, 1.0)
        # Infinite on whole segments where a schedule begins or ends with no increment: the outer end.
        return xp.where(lam >= table[0], 0.0, xp.where(lam <= table[-1], 1.0 * last, inside))

    def rates(self, t):
        # The slopes at an integer are those to its right (at the last, to its left).
        xp, t = floating(t, self)
        left = xp.clip(xp.floor(t), 0, self.kept.shape[0] - 2).astype(int)
        kept, variance = (xp.asarray(a) for a in (self.kept, self.variance))
        f = (kept[left + 1] - kept[left]) / self.alpha(t)
        return f, variance[left + 1] - variance[left] - 2.0 * f * self.sigma(t) ** 2


def _increments(schedule: str | ArrayLike, num_steps: int, ratio: float, what: str) -> np.ndarray:
    if not isinstance(schedule, str):
        steps = np.asarray(schedule, np.float64)
        if steps.shape != (num_steps,) or not np.all(steps >= 0) or not steps.sum() > 0:
            raise ValueError(
                f"{what} must be {num_steps} increments, not negative and not all 0, got {steps}"
            )
        return steps / steps.sum()
    x = np.linspace(0.0, 1.0, num_steps)
    forms = {
        "increased": x**ratio,
        "decreased": (x**ratio)[::-1],
        "average": np.ones(num_steps),
        "normal": np.exp(-0.5 * (6.0 * x - 3.0) ** 2),
    }
    if schedule not in forms:
        raise ValueError(
            f"unknown {what} {schedule!r}; choose from {list(forms)}, or give increments"
        )
    return forms[schedule] / forms[schedule].sum()


def residual(
    residual_schedule: str | Float[ArrayLike, " steps"] = "decreased",
    noise_schedule: str | Float[ArrayLike, " steps"] = "increased",
    num_steps: int = 1000, noise_scale: float = 0.1, residual_ratio: float = 1.0,
    noise_ratio: float = 1.0,
) -> Residual:  # fmt: skip
    """RDDM's process with its published schedules; t in [0, num_steps], A and B the sums up to t.

    Arguments:
      residual_schedule, noise_schedule: increments a_i of A and b_i^2 of B^2, i = 1 ... num_steps:
        "increased" (i - 1)^ratio, "decreased" (the same backward), "average" (equal), "normal" (a
        Gaussian bell from -3 to 3 std); or [num_steps] numbers. Scaled to sum to 1 and noise_scale^2.
      noise_scale: B(num_steps), the noise that the input gets. The published restorations take 0.1
        (their sum_scale is its square, 0.01), generation 1.
      residual_ratio, noise_ratio: the exponents, 0 or more.

    The published index i is t = i + 1, and their -1 is t = 0. "decreased" ends with an increment of 0,
    "increased" begins with one: sample with fewer steps than num_steps. Raises ValueError for
    other schedules or numbers.
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 2:
        raise ValueError(f"num_steps must be an integer of at least 2, got {num_steps!r}")
    if not noise_scale > 0 or not residual_ratio >= 0 or not noise_ratio >= 0:
        raise ValueError(
            "noise_scale must be positive and the ratios not negative, got "
            f"{noise_scale!r}, {residual_ratio!r}, {noise_ratio!r}"
        )
    a = _increments(residual_schedule, num_steps, residual_ratio, "residual_schedule")
    b = _increments(noise_schedule, num_steps, noise_ratio, "noise_schedule")
    # Each from the end where it vanishes: 1 - A by differences would keep rounding there.
    kept = np.append(np.cumsum(a[::-1])[::-1], 0.0)
    return _build(kept / kept[0], noise_scale**2 * np.append(0.0, np.cumsum(b)))


def retimed(
    process: Process, residual_times: Float[ArrayLike, " nodes"], noise_times: Float[ArrayLike, " nodes"]
) -> Residual:  # fmt: skip
    """A(t) and B(t) of `process`, each along times of its own: RDDM's independent schedules.

        A_i = 1 - process.alpha(residual_times[i]),    B_i = process.sigma(noise_times[i])

    Arguments:
      residual_times, noise_times: [num_steps + 1] times of `process`, from data to noise, not
        decreasing; the new process has t in [0, num_steps].

    Equal times sample `process` as it is (DDPM as RDDM). Raises ValueError where A or B falls.
    """
    first, second = (np.asarray(a, np.float64) for a in (residual_times, noise_times))
    if first.ndim != 1 or first.shape != second.shape or len(first) < 3:
        raise ValueError(
            "residual_times and noise_times must be vectors of one length of at least 3, got shapes "
            f"{first.shape} and {second.shape}"
        )
    return _build(np.asarray(process.alpha(first)), np.asarray(process.sigma(second)) ** 2)


def _build(kept: Any, variance: Any) -> Residual:
    moved = np.stack([-np.diff(kept), np.diff(variance)])
    bad = np.flatnonzero((moved < -1e-12).any(0))
    if bad.size:
        i = bad[0]
        raise ValueError(
            f"A and B must not fall from one step to the next; from {i} to {i + 1} they change by "
            f"{moved[0][i]:.3g} and (squared) {moved[1][i]:.3g}"
        )
    last = float(len(kept) - 1)
    return Residual(
        kept=kept, variance=variance, t_max=last,
        noise_time=last if kept[-1] == 0.0 else None,
        data_time=0.0 if kept[0] == 1.0 and variance[0] == 0.0 else None,
    )  # fmt: skip
