"""Two concepts blended by turns, the turn decided by what an option on each would cost.

Kothandaraman, Lin & Manocha, "Financial Models in Generative Art: Black-Scholes-Inspired Concept
Blending in Text-to-Image Diffusion" (2024). After every evaluation the denoised x0^ is scored for each
concept j, S_j, the "spot" price; a call option on it, with strike K, is worth V_j, and the next
evaluation is conditioned on the concept with the lowest value, the one that is least there.

V rises with S, so the next concept is the one with the lowest score, whatever the strike, rate and
volatility (but for rounding, where both options are worth nothing). The published code has
exp(-d^2 / 2) in place of the normal distribution Phi (mode "density"); as S exp(-d1^2 / 2) = K
exp(-r tau) exp(-d2^2 / 2), that value is 0 for every spot, and rounding decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, ArrayLike

from jaxdiff.arrays import as_arrays, is_concrete, namespace
from jaxdiff.denoisers import Denoiser, check_single, level
from jaxdiff.predictions import convert
from jaxdiff.processes.base import Process
from jaxdiff.processes.discrete import is_discrete
from jaxdiff.solvers.clocks import check_choice, check_order

MODES = ("cdf", "density")


def option_value(
    spot: ArrayLike, strike: ArrayLike, rate: ArrayLike, volatility: ArrayLike,
    maturity: ArrayLike, mode: str = "cdf",
) -> Any:  # fmt: skip
    """V = S Phi(d1) - K exp(-r tau) Phi(d2): the Black-Scholes value of a call option.

        d1 = (log(S / K) + (r + v^2 / 2) tau) / (v sqrt(tau)),    d2 = d1 - v sqrt(tau)

    Arguments (broadcast): spot S >= 0, strike K > 0, rate r, volatility v > 0, maturity tau > 0.
      mode: "cdf" has the normal distribution Phi (Black & Scholes 1973), "density" exp(-d^2 / 2) in
        its place, as the published code of the blending, which makes V zero but for rounding.

    In the arguments' namespace and precision. Raises ValueError for an unknown mode, or values out
    of range where the host knows them.
    """
    check_choice("mode", mode, MODES)
    positive = {"strike": strike, "volatility": volatility, "maturity": maturity}
    for name, value in positive.items():
        if is_concrete(value) and not np.all(np.asarray(value) > 0):
            raise ValueError(f"{name} must be positive, got {value!r}")
    if is_concrete(spot) and not np.all(np.asarray(spot) >= 0):
        raise ValueError(f"spot must be at least 0, got {spot!r}")
    xp = namespace(spot, strike, rate, volatility, maturity)
    spot = xp.asarray(spot) * 1.0
    spread = volatility * xp.sqrt(maturity)
    with np.errstate(divide="ignore"):
        d1 = (xp.log(spot / strike) + (rate + volatility**2 / 2) * maturity) / spread
    d2 = d1 - spread
    if mode == "cdf":
        share = scipy.special.ndtr if xp is np else jax.scipy.special.ndtr
    else:
        share = lambda d: xp.exp(-0.5 * d * d)  # noqa: E731
    return spot * share(d1) - strike * xp.exp(-rate * maturity) * share(d2)


def step_volatility(process: Process, t: ArrayLike) -> Any:
    """sigma sqrt(1 - exp(-2 h)): the noise of DDPM's posterior for a short step that ends at t.

    The volatility of the published code, sqrt((1 - abar') / (1 - abar) (1 - abar / abar')) at
    neighbouring timesteps: a thousandth of the span, or a step of a discrete process.
    """
    span = process.t_max - process.t_min
    size = 1.0 if is_discrete(process) else span / 1000
    xp = namespace(t)
    before = xp.clip(xp.asarray(t) * 1.0, process.t_min, process.t_max - size)
    (a, s), (a1, s1) = ((process.alpha(u), process.sigma(u)) for u in (before, before + size))
    return s * xp.sqrt(1.0 - (a1 * s / (a * s1)) ** 2)


def black_scholes(
    denoiser: Denoiser, concepts: Sequence[Any], score: Callable[[Any, Array], Array], params: Any,
    process: Process, steps: int, strike: ArrayLike = 100.0, mode: str = "cdf",
) -> Denoiser:  # fmt: skip
    """The denoiser under the condition whose turn it is, each sample's own; see the module.

    Call i of N has maturity N - i, rate 1 / N, and the volatility of `step_volatility`. The first is
    conditioned on the first concept; of equal values the last wins, as published. It keeps which
    concept is next, and the call, in its memory, so `sample` needs no cond; one evaluation a call.

    Arguments:
      denoiser: a single prediction, conditional, without memory; guided (s of the convention
        uncond + s (cond - uncond)) or not.
      concepts: the conditions, two or more, each a pytree with leaves [batch, ...].
      score: fn(params, x0) -> [batch, concepts], at least 0, of the size of `strike`: 100 times a
        similarity.
      process: of the tableau, for the volatility.
      steps: N, the tableau's evaluations (`tableau.nfe`).
      strike: K, positive; a leaf.
      mode: "cdf", the paper's, or "density", the published code's.

    Raises ValueError for fewer than two concepts or concepts that differ in shape, steps below 1, a
    strike that is not positive, an unknown mode, or a denoiser of several predictions or with memory.
    """
    check_single(denoiser, "black_scholes")
    check_choice("mode", mode, MODES)
    check_order(steps, 10**9, "steps")
    if denoiser.memory is not None:
        raise ValueError("black_scholes has a memory of its own, and takes a denoiser without")
    if is_concrete(strike) and not np.all(np.asarray(strike) > 0):
        raise ValueError(f"strike must be positive, got {strike!r}")
    concepts = [jax.tree.map(jnp.asarray, concept) for concept in concepts]
    shapes = [jax.tree.map(jnp.shape, concept) for concept in concepts]
    if len(concepts) < 2 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"need two concepts or more, of one shape, got {shapes}")
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *concepts)
    batch = {leaf.shape[1] if leaf.ndim > 1 else None for leaf in jax.tree.leaves(stacked)}
    if len(batch) != 1 or None in batch:
        raise ValueError(f"concepts must have leaves [batch, ...] of one batch, got {shapes[0]}")
    memory = Turn(jnp.zeros(batch.pop(), jnp.int32), jnp.zeros((), jnp.int32))
    strengths = as_arrays((params, strike, 1.0 * steps))
    fn = _Blended(score, mode)
    inside = (denoiser, stacked, process, strengths)
    return Denoiser(fn, denoiser.prediction, inside, level, memory, denoiser.cost)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turn:
    """What a blended denoiser keeps: the next concept of every sample [batch], and the call."""

    concept: Array
    call: Array


@dataclasses.dataclass(frozen=True)
class _Blended:
    score: Callable
    mode: str

    def __call__(self, params, x, levels, cond=None, *, memory):
        denoiser, concepts, process, (score_params, strike, steps) = params
        t, alpha, sigma = levels
        rows = jnp.arange(len(memory.concept))
        chosen = jax.tree.map(lambda leaf: leaf[memory.concept, rows], concepts)
        out = denoiser(x, t, alpha, sigma, chosen)
        x0 = convert(out.astype(x.dtype), x, denoiser.prediction, "x0", alpha, sigma)
        spot = self.score(score_params, x0)
        volatility = jnp.asarray(step_volatility(process, jnp.asarray(t)))[..., None]
        maturity = jnp.maximum(steps - memory.call, 1.0)
        value = option_value(spot, strike, 1.0 / steps, volatility, maturity, self.mode)
        last = value.shape[-1] - 1
        lowest = last - jnp.argmin(value[:, ::-1], -1).astype(jnp.int32)
        return out, Turn(lowest, memory.call + 1)

    def check(self, params, batch, cond, alpha):
        denoiser, concepts = params[:2]
        if cond is not None:
            raise ValueError("a blended denoiser has its conditions already: sample without cond=")
        found = jax.tree.leaves(concepts)[0].shape[1]
        if found != batch:
            raise ValueError(f"the concepts are for a batch of {found}, the state has {batch}")
        for i in range(jax.tree.leaves(concepts)[0].shape[0]):
            denoiser.check(batch, jax.tree.map(lambda leaf, i=i: leaf[i], concepts), alpha)
