"""Guidance by an energy of the denoised x0^: universal guidance and FreeDoM.

An energy is any function of clean data that is to be small, fn(params, x0) -> [batch]: a distance
between features, a loss of a detector, minus a log-probability. With x0^(x_t) the denoiser's,

    g = grad_{x_t} E(x0^(x_t)),

one product with the transposed Jacobian of the network, which is called once. Three sizes of step:

    "score"     score - s g, so eps + s sigma g          forward universal guidance
    "x0"        x0^ - s g                                FreeDoM, rho = s alpha' of the step's end
    "relative"  x0^ - s rms(sigma eps / alpha) / rms(g) g    FreeDoM where the energy has no scale

Bansal, Chu, Schwarzschild, Sengupta, Goldblum, Geiping & Goldstein, "Universal Guidance for Diffusion
Models" (2023); Yu, Wang, Zhao, Ghanem & Zhang, "FreeDoM: Training-Free Energy-Guided Conditional
Diffusion Model" (2023). Both repeat steps with new noise: `jaxdiff.solvers.time_travel` is a
tableau that does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxdiff.arrays import as_arrays
from jaxdiff.denoisers import Denoiser, check_single, wrap
from jaxdiff.guidance.classifier import add_to_score
from jaxdiff.guidance.together import Scale, as_scale, at_level, check_scale
from jaxdiff.predictions import convert
from jaxdiff.solvers.clocks import check_choice, check_order

Energy = Callable[[Any, Array], Float[Array, " batch"]]
SIZES = ("score", "x0", "relative")


def check_memoryless(denoiser: Denoiser, what: str) -> None:
    """Raise unless `denoiser` predicts one thing and keeps nothing: what is differentiated twice
    remembers wrongly."""
    check_single(denoiser, what)
    if denoiser.memory is not None:
        raise ValueError(f"{what} differentiates the denoiser, and takes none with memory")


def energy_guidance(
    denoiser: Denoiser, energy: Energy, params: Any, scale: Scale = 1.0, size: str = "score",
    keep_eps: bool = False,
) -> Denoiser:  # fmt: skip
    """score - s grad_{x_t} E(x0^(x_t)): s = 0 is the denoiser itself; the module has the sizes.

    Where E = -log p(y | x0^) this is uncond + s (cond - uncond) as far as p(y | x_t) is p(y | x0^).
    With size="score" it is universal guidance's forward step (equation 6, s(t) = s sigma), on any
    tableau. FreeDoM's x' - rho grad E, after a step of DDPM or DDIM, is a shift of x0^ in it: "x0"
    with `keep_eps=True` and `ddim(grid, eta, outputs=2)` is the published code for faces, eta = 1/2
    (whose rho is s times the alpha of the step's start, here of its end); "relative" and
    `ddpm(grid)` the one for CLIP, s = 0.02. One evaluation of the denoiser, and its vjp. At alpha = 0
    there is no guidance.

    Arguments:
      denoiser: any single prediction; without memory.
      energy: see the module; a module-level function or a hashable object.
      params: its pytree.
      scale: s, a number, [batch] or a function of (t, alpha, sigma); a leaf.
      keep_eps: predict ("x0", "eps") with eps unguided; otherwise the denoiser's own prediction.

    Raises ValueError for an unknown size, a scale that is not finite, or a denoiser of several
    predictions or with memory; and, when traced, for an energy that is not [batch].
    """
    check_memoryless(denoiser, "energy_guidance")
    check_choice("size", size, SIZES)
    scale = as_scale(scale, "energy_guidance")
    guided = _Guided(energy, denoiser.prediction, size, bool(keep_eps))
    prediction = ("x0", "eps") if keep_eps else denoiser.prediction
    return wrap(guided, denoiser, as_arrays((params, scale)), prediction)


@dataclasses.dataclass(frozen=True)
class _Guided:
    energy: Energy
    prediction: str
    size: str
    keep_eps: bool

    def check_strengths(self, strengths, batch, alpha):
        check_scale(strengths[1], batch)

    def __call__(self, evaluate, strengths, x, levels, cond):
        params, scale = strengths[0], at_level(strengths[1], levels)
        alpha, sigma = levels[1:]

        def of_x0(y):
            out = evaluate(y, *levels, cond).astype(y.dtype)
            x0 = convert(out, y, self.prediction, "x0", alpha, sigma)
            return summed(self.energy, params, x0), out

        g, out = jax.grad(of_x0, has_aux=True)(x)
        eps = convert(out, x, self.prediction, "eps", alpha, sigma)
        factor = -jnp.asarray(scale)
        if self.size == "x0":
            factor = factor * alpha / sigma**2
        elif self.size == "relative":
            factor = factor * _rms(eps) / (sigma * jnp.maximum(_rms(g), jnp.finfo(g.dtype).tiny))
        guided = add_to_score(out, g, factor, self.prediction, alpha, sigma)
        if not self.keep_eps:
            return guided
        return convert(guided, x, self.prediction, "x0", alpha, sigma), eps


def summed(energy: Energy, params: Any, x0: Array) -> Array:
    """The sum of the energies of a batch; ValueError unless they are [batch]."""
    found = energy(params, x0)
    if jnp.shape(found) != x0.shape[:1]:
        raise ValueError(f"the energy must be [{len(x0)}], one a sample, got {jnp.shape(found)}")
    return jnp.sum(found)


def _rms(a: Array) -> Float[Array, " batch"]:
    return jnp.sqrt(jnp.mean(jnp.square(a).reshape(len(a), -1), 1))


def backward_guidance(
    denoiser: Denoiser, energy: Energy, params: Any, steps: int,
    optimizer: optax.GradientTransformation,
) -> Denoiser:  # fmt: skip
    """x0^ + Delta, with Delta from `steps` of descent on E(x0^ + Delta); predicts x0.

    Universal guidance's backward step (equations 7 to 9): in terms of noise, eps - alpha / sigma
    Delta. No Jacobian of the network. After a forward step, as in their algorithm 1, it is
    `backward_guidance(energy_guidance(denoiser, ...), ...)`.

    Arguments:
      denoiser: any single prediction.
      energy, params: as in `energy_guidance`.
      steps: m, at least 1.
      optimizer: from optax, started anew in every call, `optax.sgd` or the published `optax.adam`;
        one made anew is a new program.

    Raises TypeError or ValueError for steps below 1, or an optimizer or denoiser that is none.
    """
    check_single(denoiser, "backward_guidance")
    check_order(steps, 10**6, "steps")
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(f"optimizer must be an optax.GradientTransformation, got {optimizer!r}")
    guided = _Backward(energy, denoiser.prediction, int(steps), optimizer)
    return wrap(guided, denoiser, as_arrays(params), "x0")


@dataclasses.dataclass(frozen=True)
class _Backward:
    energy: Energy
    prediction: str
    steps: int
    optimizer: optax.GradientTransformation

    def __call__(self, evaluate, strengths, x, levels, cond):
        out = evaluate(x, *levels, cond).astype(x.dtype)
        x0 = convert(out, x, self.prediction, "x0", *levels[1:])

        def descend(carry, _):
            x0, state = carry
            slope = jax.grad(lambda y: summed(self.energy, strengths, y))(x0)
            change, state = self.optimizer.update(slope, state, x0)
            return (optax.apply_updates(x0, change), state), None

        return jax.lax.scan(descend, (x0, self.optimizer.init(x0)), None, length=self.steps)[0][0]
