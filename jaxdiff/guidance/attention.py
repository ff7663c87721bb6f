"""Guidance by a network's own self-attention: perturbed (PAG) and self-attention guidance (SAG).

Both need no condition and no training, only a denoiser of `jaxdiff.models.from_linen` whose network
takes an `attention` (the UNets and the DiT of `jaxdiff.models`), of which they make a copy:

    eps + s (eps - eps')

with eps' of the network made worse, so s = 0 is the network alone; in the convention of the other
guidance, eps' + (s + 1) (eps - eps'). They differ in eps'. In PAG (Ahn, Cho, Min, Jang, Kim, Kim, Park,
Jin & Kim, "Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance", 2024) some attention
maps are the identity. In SAG (Hong, Lee, Jang & Kim, "Improving Sample Quality of Diffusion Models
Using Self-Attention Guidance", 2023) the state is: its x_0 is blurred where the network looks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from jaxdiff.denoisers import Denoiser, check_single, level
from jaxdiff.guidance.together import (
    Scale,
    as_scale,
    at_level,
    check_conditional,
    check_scale,
    extrapolated,
    filled,
    need_cond,
    times,
    together,
    wide,
)
from jaxdiff.models.network import SelfAttention
from jaxdiff.predictions import convert


def identity_attention(
    q: Float[Array, "n p h d"], k: Float[Array, "n p h d"], v: Float[Array, "n p h d"]
) -> Float[Array, "n p h d"]:
    """Attention whose map is the identity: every token keeps its own value."""
    return v


def attention_blocks(denoiser: Denoiser, x: Any, cond: Any = None) -> tuple[str, ...]:
    """The blocks of a denoiser's network that attend, in the order of their evaluation.

    `x`: a state, or a `jax.ShapeDtypeStruct` of it; `cond` as for `jaxdiff.sample`, if the network
    needs one. Nothing is computed. Raises TypeError for a denoiser of no such network.
    """
    module, found = _module(denoiser, "attention_blocks"), []

    def note(block, q, k, v):
        found.append(block)
        return v

    def run(x):
        return _with_attention(denoiser, note)(denoiser.params, x, 0.5, *_given(cond))

    jax.eval_shape(run, x)
    if not found:
        raise TypeError(f"{type(module).__name__} has no self-attention of jaxdiff.models here")
    return tuple(found)


def perturbed_attention(
    denoiser: Denoiser, scale: Scale, blocks: Sequence[str] = ("middle_attention",),
    guidance: Scale | None = None, null_cond: Any = None, perturb: Callable = identity_attention,
) -> Denoiser:  # fmt: skip
    """cond + s (cond - perturbed): s = 0 is the network, bit for bit; see this module.

    With `guidance` w it is uncond + w (cond - uncond) + s (cond - perturbed). All run in one evaluation
    of 2 (3) times the batch, whose last part has perturbed attention. Where s is 0, at a level of a
    schedule say, only what is needed runs (`lax.cond`).

    Arguments:
      denoiser: of `from_linen`, with the network's own attention.
      scale: s, a number, [batch] or a function of (t, alpha, sigma); the authors' examples have 5, and
        3 beside classifier-free guidance.
      blocks: names, see `attention_blocks`; the paper's is the middle one. A DiT's are block_0, ...
      guidance, null_cond: w and the condition that means none, as for `classifier_free`.
      perturb: (q, k, v) -> the attention's result, [batch, tokens, heads, head width].

    Raises TypeError for a denoiser of no such network, ValueError for no blocks, one that does not
    attend (on the first evaluation), or guidance without null_cond.
    """
    _module(denoiser, "perturbed_attention")
    if isinstance(blocks, str) or not blocks:
        raise ValueError(f"blocks must be names of some attention blocks, got {blocks!r}")
    if (guidance is None) != (null_cond is None):
        raise ValueError("give guidance= and null_cond= together, or neither")
    more = None
    if guidance is not None:
        check_conditional(denoiser, "guidance")
        more = as_scale(guidance, "guidance"), jax.tree.map(jnp.asarray, null_cond)
    params = (denoiser, (as_scale(scale, "perturbed_attention"), more))
    parts = 2 if guidance is None else 3
    fn = _Perturbed(tuple(blocks), parts, perturb)
    return Denoiser(fn, denoiser.prediction, params, level, cost=parts * denoiser.cost)


def _module(denoiser: Any, what: str) -> nn.Module:
    check_single(denoiser, what)
    module = getattr(denoiser.fn, "module", None)
    if not hasattr(module, "attention"):
        raise TypeError(
            f"{what} takes jaxdiff.models.from_linen(...) of a network with an attention= of its own, "
            f"the network's own denoiser: guidance goes around it; got {denoiser.fn!r}"
        )
    return module


def _given(cond: Any) -> tuple[Any, ...]:
    return () if cond is None else (cond,)


def _with_attention(denoiser: Denoiser, attention: Callable) -> Callable:
    """The denoiser's function with attention(block, q, k, v), block the name of where it is."""
    where = [None]

    def note(call, args, kwargs, context):
        if isinstance(context.module, SelfAttention):
            where[0] = context.module.path[-2]
        return call(*args, **kwargs)

    def attend(q, k, v):
        return attention(where[0], q, k, v)

    # No rematerialisation: an attention that notes its maps would be told those of a second trace.
    network = denoiser.fn.module.clone(attention=attend, remat=False)
    fn = dataclasses.replace(denoiser.fn, module=network)

    def run(*args):
        with nn.intercept_methods(note):
            return fn(*args)

    return run


def _evaluator(denoiser: Denoiser, run: Callable) -> Callable:
    """An evaluation as `jaxdiff.denoisers.wrap` passes it, of another function."""

    def evaluate(x, t, alpha, sigma, cond):
        time = t if denoiser.time is None else denoiser.time(t, alpha, sigma)
        return run(denoiser.params, x, time, *_given(cond))

    return evaluate


@dataclasses.dataclass(frozen=True)
class _Perturbed:
    blocks: tuple[str, ...]
    parts: int
    perturb: Callable

    def __call__(self, params, x, levels, cond=None):
        denoiser, (scale, more) = params
        scale, seen = at_level(scale, levels), []
        conds = [cond, cond]
        if more is not None:
            need_cond(cond, "perturbed_attention with guidance")
            conds = [cond, filled(more[1], cond), cond]

        def attention(block, q, k, v):
            seen.append(block)
            plain = denoiser.fn.module.attention
            if block not in self.blocks:
                return plain(q, k, v)
            kept = q.shape[0] * (self.parts - 1) // self.parts
            worse = self.perturb(q[kept:], k[kept:], v[kept:])
            return jnp.concatenate([plain(q[:kept], k[:kept], v[:kept]), worse])

        def perturbed():
            run = _with_attention(denoiser, attention)
            target, *rest = together(_evaluator(denoiser, run), x, levels, conds)
            out = target
            if more is not None:
                out = extrapolated(rest[0], target, at_level(more[0], levels))
            apart = jax.tree.map(jnp.subtract, target, rest[-1])
            return jax.tree.map(jnp.add, out, times(scale, apart))

        def plain():
            evaluate = _evaluator(denoiser, denoiser.fn)
            if more is None:
                return wide(evaluate(x, *levels, cond), x)
            target, without = together(evaluate, x, levels, conds[:2])
            return extrapolated(without, target, at_level(more[0], levels))

        out = jax.lax.cond(jnp.all(scale == 0), plain, perturbed)
        if absent := set(self.blocks) - set(seen):
            raise ValueError(
                f"blocks {sorted(absent)} do not attend; those that do are {list(dict.fromkeys(seen))}"
            )
        return out

    def check(self, params, batch, cond, alpha):
        denoiser, (scale, more) = params
        check_scale(scale, batch)
        denoiser.check(batch, cond, alpha)
        if more is not None:
            check_scale(more[0], batch, "guidance")
            need_cond(cond, "perturbed_attention with guidance")
            denoiser.check(batch, more[1], alpha)


# --- self-attention guidance ----------------------------------------------------------------------


def self_attention_guidance(
    denoiser: Denoiser, scale: Scale, block: str = "middle_attention", blur: float = 1.0,
    threshold: ArrayLike = 1.0, kernel_size: int | None = None,
) -> Denoiser:  # fmt: skip
    """eps + s (eps - eps of the state blurred where the network looks): s = 0 is the network.

    See this module. With A the attention map of a block (mean over heads), m = [sum over queries of A
    > threshold] at image size and x_0 the denoised state,

        x' = alpha (m blur(x_0) + (1 - m) x_0) + sigma eps,    eps' = eps(x')

    so the two evaluations follow each other (cost 2). The published code's guide_scale is s + 1.

    Arguments:
      denoiser: of `from_linen`, with the network's own attention; x [batch, height, width, channels].
      scale: s, a number, [batch] or a function of (t, alpha, sigma); the authors' examples have 0.01
        to 0.5.
      block: whose map masks, see `attention_blocks`.
      blur: standard deviation of the Gaussian, in pixels (9 at 256 x 256 in the paper, 3 at 128).
      threshold: of a token's share of attention, whose mean is 1.
      kernel_size: pixels of the blur's kernel, odd; None for the published 31, or less where the
        reflected image ends.

    Raises TypeError for a denoiser of no such network, ValueError for a blur that is not positive, an
    even kernel or one that does not fit, or a block that does not attend (on the first evaluation).
    """
    _module(denoiser, "self_attention_guidance")
    if not 0 < blur < np.inf:
        raise ValueError(f"blur must be positive, in pixels, got {blur!r}")
    if kernel_size is not None and (kernel_size < 1 or kernel_size % 2 == 0):
        raise ValueError(f"kernel_size must be odd, got {kernel_size!r}")
    strengths = as_scale(scale, "self_attention_guidance"), jnp.asarray(threshold, jnp.float32)
    fn = _Blurred(block, denoiser.prediction, float(blur), kernel_size)
    return Denoiser(fn, denoiser.prediction, (denoiser, strengths), level, cost=2 * denoiser.cost)


@dataclasses.dataclass(frozen=True)
class _Blurred:
    block: str
    prediction: str
    blur: float
    kernel_size: int | None

    def __call__(self, params, x, levels, cond=None):
        denoiser, (scale, threshold) = params
        (_, alpha, sigma), maps, seen = levels, [], []

        def attention(block, q, k, v):
            seen.append(block)
            if block == self.block:
                maps.append(attention_map(q, k))
            return denoiser.fn.module.attention(q, k, v)

        run = _with_attention(denoiser, attention)
        out = wide(_evaluator(denoiser, run)(x, *levels, cond), x)
        if not maps:
            raise ValueError(f"block {self.block!r} does not attend; those that do are {seen}")
        x0 = convert(out, x, self.prediction, "x0", alpha, sigma)
        eps = convert(out, x, self.prediction, "eps", alpha, sigma)
        mask = attention_mask(maps[0], x.shape, threshold)
        worse = jnp.where(mask, gaussian_blur(x0, self.blur, self.kernel_size), x0)
        state = jax.tree.map(jnp.add, times(alpha, worse), times(sigma, eps))
        other = wide(_evaluator(denoiser, denoiser.fn)(state, *levels, cond), x)
        other = convert(other, state, self.prediction, "eps", alpha, sigma)
        # What is added to eps, in the network's own prediction at x. At alpha = 0 both states are one.
        noisy = jnp.asarray(alpha) == 0
        moved = convert(other, x, "eps", self.prediction, jnp.where(noisy, 1.0, alpha), sigma)
        strength = jnp.where(noisy, 0.0, at_level(scale, levels))
        return jax.tree.map(jnp.add, out, times(strength, jax.tree.map(jnp.subtract, out, moved)))

    def check(self, params, batch, cond, alpha):
        check_scale(params[1][0], batch)
        params[0].check(batch, cond, alpha)


def attention_map(
    q: Float[Array, "batch queries heads d"], k: Float[Array, "batch keys heads d"]
) -> Float[Array, "batch queries keys"]:
    """softmax(q k^T / sqrt(d)) over the keys, its mean over heads."""
    logits = jnp.einsum("nqhd,nkhd->nhqk", q, k) / np.sqrt(q.shape[-1])
    return jnp.mean(jax.nn.softmax(logits.astype(jnp.float32), -1), 1)


def attention_mask(
    weights: Float[Array, "batch queries keys"], shape: tuple[int, ...], threshold: ArrayLike = 1.0
) -> Array:
    """Whether each pixel of a state of `shape` gets more than `threshold` of the attention.

    A key's share is the sum over queries, 1 on average; keys are the pixels of an image that is smaller
    by one factor in both directions. Returns booleans [batch, height, width, 1].
    """
    _, height, width, _ = shape
    factor = round(np.sqrt(height * width / weights.shape[-1]))
    small = jnp.sum(weights, 1).reshape(-1, height // factor, width // factor, 1) > threshold
    return small.repeat(factor, 1).repeat(factor, 2)


def gaussian_blur(
    x: Float[Array, "batch height width channels"], std: float, kernel_size: int | None = None
) -> Float[Array, "batch height width channels"]:
    """Images blurred by a Gaussian of `std` pixels, reflected at the borders.

    The kernel's `kernel_size` weights (odd, at most 2 size - 1; None for at most 31) sum to 1. Raises
    ValueError for a kernel that reaches beyond the reflected image.
    """
    most = 2 * min(x.shape[1:3]) - 1
    size = min(31, most) if kernel_size is None else kernel_size
    if size > most:
        raise ValueError(
            f"kernel_size must be at most {most} for {x.shape[1:3]} pixels, got {size}"
        )
    rows, columns = (jnp.asarray(_blur_matrix(n, std, size), x.dtype) for n in x.shape[1:3])
    return jnp.einsum("ij,njkc,lk->nilc", rows, x, columns)


def _blur_matrix(n: int, std: float, size: int) -> np.ndarray:
    offsets = np.arange(size) - size // 2
    weights = np.exp(-0.5 * (offsets / std) ** 2)
    period = max(2 * (n - 1), 1)
    place = np.abs((np.arange(n)[:, None] + offsets) % period)
    place = np.where(place >= n, period - place, place)
    matrix = np.zeros((n, n))
    np.add.at(matrix, (np.arange(n)[:, None], place), weights / weights.sum())
    return matrix
