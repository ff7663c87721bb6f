"""Classifier-free guidance, and what has been made of it: intervals, rescaling, CFG++, CFG-Zero*."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from jaxdiff.arrays import is_concrete, to_batch
from jaxdiff.denoisers import Denoiser, check_single, wrap
from jaxdiff.guidance.together import (
    Scale,
    as_scale,
    at_level,
    check_conditional,
    check_scale,
    dot,
    extrapolated,
    filled,
    need_cond,
    times,
    together,
)
from jaxdiff.predictions import convert
from jaxdiff.processes.base import Process

INTERVAL_CLOCKS = ("t", "half_log_snr", "noise_level")


def classifier_free(
    denoiser: Denoiser, scale: Scale, null_cond: Any, *,
    interval: tuple[ArrayLike, ArrayLike] | None = None, rescale: ArrayLike = 0.0,
    process: Process | None = None,
) -> Denoiser:  # fmt: skip
    """uncond + s (cond - uncond): s = 1 is conditional, s = 0 unconditional.

    Ho & Salimans, "Classifier-Free Diffusion Guidance" (2022), whose w is s - 1. Both halves run in
    one evaluation of twice the batch (cost 2). It is linear, so it commutes with the conversion
    between predictions, but for `rescale`.

    Arguments:
      scale: s, a scalar or [batch]; a leaf, so that a new scale compiles nothing and vmaps. Or a
        function of (t, alpha, sigma): see `jaxdiff.guidance.schedules`.
      null_cond: the condition that means none, with `cond`'s structure, each leaf broadcast against
        its own (for the models of `jaxdiff.models`: num_classes).
      interval: (low, high), the times with guidance; outside the network runs once, under `cond`. See
        `limited`, which has other clocks.
      rescale: phi in [0, 1]; the guided prediction g becomes phi g std(cond) / std(g) + (1 - phi) g,
        with a sample's standard deviations over all its elements (of each leaf): Lin, Liu, Li & Yang,
        "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2023), section 3.4, for 0.7 and
        a v-network. It is applied to what the network predicts.
      process: if given, the interval must lie in its time. Without it times above the sampler's are no
        error: they mean no guidance.

    Raises ValueError for a network without conditions, one of several predictions, a scale or a share
    that is out of range, and when sampling without `cond`.
    """
    _check_fraction("rescale", rescale)
    check_conditional(denoiser, "classifier-free guidance")
    rescaled = not is_concrete(rescale) or bool(np.any(np.asarray(rescale) != 0))
    more = (jnp.asarray(rescale, jnp.result_type(float)),) if rescaled else ()
    rule = _rescaled if rescaled else _plain
    guided = pair_guided(rule, denoiser, scale, null_cond, denoiser.prediction, more)
    return guided if interval is None else limited(guided, denoiser, *interval, process=process)


def limited(
    guided: Denoiser, otherwise: Denoiser, low: ArrayLike, high: ArrayLike, clock: str = "t",
    process: Process | None = None,
) -> Denoiser:  # fmt: skip
    """`guided` at the noise levels from `low` to `high` (both included), `otherwise` at the others.

    Kynkaanniemi, Aittala, Karras, Laine, Aila & Lehtinen, "Applying Guidance in a Limited Interval
    Improves Sample and Distribution Quality in Diffusion Models" (2024). `otherwise` is the network
    alone, and outside the interval only that runs (`lax.switch`, where t is one number):

        guided = jd.guidance.classifier_free(denoiser, 3.0, null)
        better = jd.guidance.limited(guided, denoiser, 0.2, 0.8)
        jd.acceleration.average_cost(better, tableau) * tableau.nfe     # network evaluations

    Any two denoisers of one prediction each do. With a memory each keeps its own (three: of
    `otherwise` at more noise, of `guided`, of `otherwise` at less).

    Arguments:
      low, high: of the clock; leaves. An infinite one leaves that side open.
      clock: "t"; "half_log_snr", log(alpha / sigma); or "noise_level", sigma / alpha, the paper's.
      process: if given, finite low and high must lie in its span.

    Raises ValueError for an unknown clock, an empty interval, or one outside the time: below 0 in "t"
    and "noise_level", or out of the process's span.
    """
    from jaxdiff.acceleration.stitch import stitch  # its package imports flax

    if clock not in INTERVAL_CLOCKS:
        raise ValueError(f"clock must be one of {INTERVAL_CLOCKS}, got {clock!r}")
    for denoiser in (guided, otherwise):
        check_single(denoiser, "limited")
    if is_concrete(low, high):
        _check_interval(float(low), float(high), clock, process)
    if clock == "noise_level":
        with np.errstate(divide="ignore"):
            log = np.log if is_concrete(low, high) else jnp.log
            low, high = -log(high), -log(low)
    # Beyond either end, as stitch leaves out the first switch and levels are rounded: by a step of
    # float32 in t, by what two logarithms and their difference may lose in the others.
    low, high = jnp.asarray(low, jnp.float32), jnp.asarray(high, jnp.float32)
    if clock == "t":
        low, high = jnp.nextafter(low, -jnp.inf), jnp.nextafter(high, jnp.inf)
    else:
        clock, room = "half_log_snr", 4.0 * jnp.finfo(jnp.float32).eps
        low, high = low - room * (1.0 + jnp.abs(low)), high + room * (1.0 + jnp.abs(high))
    switches = jnp.stack([high, low] if clock == "t" else [low, high])
    return stitch([otherwise, guided, otherwise], switches, clock)


def _check_interval(low: float, high: float, clock: str, process: Any) -> None:
    if not low <= high:
        raise ValueError(f"the interval must have low <= high, got ({low}, {high})")
    if process is not None:
        ends = process.t_min, process.t_max
        if clock != "t":
            with np.errstate(divide="ignore", over="ignore"):
                ends = sorted(float(process.half_log_snr(t)) for t in ends)
                if clock == "noise_level":
                    ends = [float(np.exp(-end)) for end in reversed(ends)]
        for value in (low, high):
            if np.isfinite(value) and not ends[0] <= value <= ends[1]:
                raise ValueError(
                    f"the interval ({low}, {high}) is outside the process's {clock}, from "
                    f"{ends[0]:g} to {ends[1]:g}"
                )
    if clock != "half_log_snr" and (high < 0 or -np.inf < low < 0):
        raise ValueError(f"the interval ({low}, {high}) is outside time: {clock} is not negative")


def cfg_plus_plus(denoiser: Denoiser, scale: Scale, null_cond: Any) -> Denoiser:
    """x_0 of uncond + s (cond - uncond), and the noise of uncond: predicts ("x0", "eps").

    Chung, Kim, Park, Nam & Ye, "CFG++: Manifold-Constrained Classifier Free Guidance for Diffusion
    Models" (2024): a DDIM step renoises the guided x_0 with the unconditional noise, so it leaves the
    noisy manifold less, and s (their lambda) is from 0 to 1. Sample with `ddim(grid, outputs=2)`:

        x' = alpha' x_0(uncond + s (cond - uncond)) + sigma' eps(uncond)

    Arguments and errors as for `classifier_free`; cost 2.
    """
    check_conditional(denoiser, "CFG++")
    rule = _PlusPlus(denoiser.prediction)
    return pair_guided(rule, denoiser, scale, null_cond, ("x0", "eps"))


def cfg_zero_star(
    denoiser: Denoiser, scale: Scale, null_cond: Any, zero_above: ArrayLike = np.inf
) -> Denoiser:
    """c uncond + s (cond - c uncond) of the flow, c the share of cond in uncond: predicts "flow".

    Fan, Zheng, Yeh & Liu, "CFG-Zero*: Improved Classifier-Free Guidance for Flow Matching Models"
    (2025). c = <cond, uncond> / |uncond|^2 of each sample makes up for a flow that was not learnt well;
    s = 1 is conditional. At times above `zero_above` (their first few per cent of the steps) the flow
    is 0. It is for flow-matching processes, x_t = (1 - t) x_0 + t eps.

    Arguments and errors otherwise as for `classifier_free`; cost 2.
    """
    check_conditional(denoiser, "CFG-Zero*")
    rule, more = _ZeroStar(denoiser.prediction), (jnp.asarray(zero_above, jnp.result_type(float)),)
    return pair_guided(rule, denoiser, scale, null_cond, "flow", more)


def pair_guided(
    rule: Callable, denoiser: Denoiser, scale: Scale, null_cond: Any,
    prediction: str | tuple[str, ...], more: tuple[Any, ...] = (),
) -> Denoiser:  # fmt: skip
    """A denoiser of rule(cond's prediction, uncond's, s, more, x, levels), both in one evaluation."""
    null = jax.tree.map(jnp.asarray, null_cond)
    strengths = (as_scale(scale, "guidance"), null, more)
    return wrap(_Pair(rule), denoiser, strengths, prediction, cost=2 * denoiser.cost)


@dataclasses.dataclass(frozen=True)
class _Pair:
    rule: Callable

    def check_strengths(self, strengths, batch, alpha):
        check_scale(strengths[0], batch)

    def check(self, check, strengths, cond):
        need_cond(cond, "classifier-free guidance")
        check(cond)
        check(strengths[1])

    def __call__(self, evaluate, strengths, x, levels, cond):
        need_cond(cond, "classifier-free guidance")
        scale, null, more = strengths
        with_cond, without = together(evaluate, x, levels, [cond, filled(null, cond)])
        return self.rule(with_cond, without, at_level(scale, levels), more, x, levels)


def _plain(with_cond, without, scale, more, x, levels):
    return extrapolated(without, with_cond, scale)


def _rescaled(with_cond, without, scale, more, x, levels):
    (share,) = more

    def leaf(a, target):
        over = tuple(range(1, a.ndim))
        size = jnp.std(a, over, keepdims=True)
        ratio = jnp.std(target, over, keepdims=True) / jnp.where(size > 0, size, 1.0)
        return a * (1.0 + to_batch(share, a).astype(a.dtype) * (ratio - 1.0))

    return jax.tree.map(leaf, extrapolated(without, with_cond, scale), with_cond)


@dataclasses.dataclass(frozen=True)
class _PlusPlus:
    prediction: str

    def __call__(self, with_cond, without, scale, more, x, levels):
        guided = extrapolated(without, with_cond, scale)
        _, alpha, sigma = levels
        return (
            convert(guided, x, self.prediction, "x0", alpha, sigma),
            convert(without, x, self.prediction, "eps", alpha, sigma),
        )


@dataclasses.dataclass(frozen=True)
class _ZeroStar:
    prediction: str

    def __call__(self, with_cond, without, scale, more, x, levels):
        (zero_above,), (t, alpha, sigma) = more, levels
        with_cond, without = (
            convert(a, x, self.prediction, "flow", alpha, sigma) for a in (with_cond, without)
        )
        # The authors' 1e-8, against a flow of 0.
        without = times(dot(with_cond, without) / (dot(without, without) + 1e-8), without)
        guided = extrapolated(without, with_cond, scale)
        return times(jnp.where(t > zero_above, 0.0, 1.0), guided)


def _check_fraction(name: str, value: ArrayLike) -> None:
    if is_concrete(value):
        values = np.asarray(value)
        if values.ndim > 1 or not np.all((values >= 0) & (values <= 1)):
            raise ValueError(f"{name} must be in [0, 1], a number or [batch], got {value!r}")
