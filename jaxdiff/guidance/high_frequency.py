"""PromptFix's high-frequency guidance: the edges of an image are kept while it is restored.

Yu, Zeng, Hua, Fu & Luo, "PromptFix: You Prompt and We Fix the Photo" (2024). Before each evaluation
the state is moved, some times over, against the gradient of

    L = 1/2 (|F(x0^) - F(y)|^2 + |S(x0^) - S(y)|^2) exp(-lam t),

the means over pixels, where y is the input image, x0^ the denoised of the state clipped to [-1, 1]
(beyond, a pixel has no gradient), F the luminance without its low frequencies, and S its Sobel edges,
both over their largest value in the image.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from jaxdiff.arrays import as_arrays, is_concrete, to_batch
from jaxdiff.denoisers import Denoiser, wrap
from jaxdiff.guidance.energy import check_memoryless
from jaxdiff.predictions import convert
from jaxdiff.solvers.clocks import check_order

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, of red, green and blue
_TINY = 1e-8


def luminance(x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w"]:
    """Grey levels in [0, 1] of images in [-1, 1]: 0.299 R + 0.587 G + 0.114 B; of one channel, itself.

    Raises ValueError for other shapes.
    """
    if jnp.ndim(x) != 4 or x.shape[-1] not in (1, 3):
        raise ValueError(f"images must be [batch, h, w, 1 or 3], got shape {jnp.shape(x)}")
    grey = (x + 1) / 2
    return grey[..., 0] if x.shape[-1] == 1 else grey @ np.asarray(_LUMA, grey.dtype)


def high_pass(x: Float[Array, "batch h w c"], cutoff: float) -> Float[Array, "batch h w"]:
    """|the luminance without frequencies up to `cutoff`| over its largest value.

    `cutoff` in cycles an image: the frequencies (i, j), -h/2 <= i < h/2, with |(i, j)| > cutoff stay.
    """
    grey = luminance(x)
    rows, columns = (np.fft.fftfreq(n, 1 / n) for n in grey.shape[1:])
    kept = np.hypot(rows[:, None], columns) > cutoff
    left = jnp.abs(jnp.fft.ifft2(jnp.fft.fft2(grey) * kept).real)
    return left / _largest(left)


def sobel(x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w"]:
    """Sobel's gradient of the luminance (zeros around), its size over the largest of the image."""
    padded = jnp.pad(luminance(x), ((0, 0), (1, 1), (1, 1)))
    smooth = lambda a, b, c: a + 2 * b + c  # noqa: E731
    down = padded[:, 2:] - padded[:, :-2]
    right = padded[:, :, 2:] - padded[:, :, :-2]
    vertical = smooth(down[..., :-2], down[..., 1:-1], down[..., 2:])
    horizontal = smooth(right[:, :-2], right[:, 1:-1], right[:, 2:])
    size = jnp.sqrt(vertical**2 + horizontal**2 + _TINY)
    return size / _largest(size)


def _largest(a: Array) -> Array:
    return jnp.maximum(jnp.max(a, (1, 2), keepdims=True), _TINY)


def high_frequency_loss(
    x0: Float[Array, "batch h w c"], image: Float[Array, "batch h w c"], cutoff: float,
    mask: ArrayLike = 1.0,
) -> Float[Array, " batch"]:  # fmt: skip
    """1/2 (mean m (F(x0) - F(y))^2 + mean m (S(x0) - S(y))^2), m the mask, [h, w] or [batch, h, w]."""
    gaps = high_pass(x0, cutoff) - high_pass(image, cutoff), sobel(x0) - sobel(image)
    return sum(jnp.mean(mask * gap**2, (1, 2)) for gap in gaps) / 2


def high_frequency_guidance(
    denoiser: Denoiser, image: Float[ArrayLike, "batch h w c"], cutoff: float = 30.0,
    repeats: int = 5, step: ArrayLike = 1.0, decay: ArrayLike = 1.0, mask: ArrayLike = 1.0,
) -> Denoiser:  # fmt: skip
    """x0^ at the state after `repeats` times x <- x - step grad_x L; step = 0 is the denoiser itself.

    As published, the state is moved for the evaluation alone: the sampler goes on from the one it
    had. Predicts x0, on any tableau. `repeats` + 1 evaluations of the denoiser and as many vjps less
    one; `cost` counts the evaluations.

    Deviations from the published code, on images of a latent diffusion: it moves x / alpha and gives
    the network x / sigma where its training has x / sqrt(alpha^2 + sigma^2); its F and S are divided by
    the largest value of the batch, of one image there; and a constant image is NaN.

    Arguments:
      denoiser: any single prediction, without memory, of images in [-1, 1]. (For latents, wrap the
        decoder's images; the guidance in PromptFix also has InstructPix2Pix's two scales, for which
        see the multi-conditional guidance.)
      image: y, the image to keep the edges of.
      cutoff: of F, in cycles an image, at least 0; 30 is for 512 pixels.
      repeats: inner steps a row, 5 as published; at least 1.
      step: their size, 1 as published for L a mean over pixels; a leaf.
      decay: lam, per unit of t: 0.001 as published where t counts 1000 steps, so 1 for t in [0, 1].
      mask: [h, w] or [batch, h, w], where edges are kept: 1 for all, 0 in the region to be made anew.

    Raises ValueError for an image of another shape, a cutoff that keeps no frequency of it, repeats
    below 1, a mask of another shape, or a denoiser of several predictions or with memory.
    """
    check_memoryless(denoiser, "high_frequency_guidance")
    check_order(repeats, 10**6, "repeats")
    image = jnp.asarray(image)
    luminance(image)
    half = np.hypot(*(n // 2 for n in image.shape[1:3]))
    if not 0 <= cutoff < half:
        raise ValueError(
            f"cutoff must be at least 0 and below {half:.4g}, the highest frequency of images of "
            f"{image.shape[1]} x {image.shape[2]}, got {cutoff!r}"
        )
    if np.shape(mask) not in ((), image.shape[1:3], image.shape[:3]):
        raise ValueError(f"mask must be {image.shape[1:3]}, got shape {np.shape(mask)}")
    if is_concrete(step) and not np.all(np.isfinite(step)):
        raise ValueError(f"step must be finite, got {step!r}")
    strengths = as_arrays((image, mask, step, decay))
    guided = _Guided(denoiser.prediction, float(cutoff), int(repeats))
    return wrap(guided, denoiser, strengths, "x0", cost=(repeats + 1) * denoiser.cost)


@dataclasses.dataclass(frozen=True)
class _Guided:
    prediction: str
    cutoff: float
    repeats: int

    def __call__(self, evaluate, strengths, x, levels, cond):
        image, mask, step, decay = strengths
        t, alpha, sigma = levels

        def denoised(x):
            out = evaluate(x, t, alpha, sigma, cond).astype(x.dtype)
            return convert(out, x, self.prediction, "x0", alpha, sigma)

        def loss(x):
            x0 = jnp.clip(denoised(x), -1.0, 1.0)
            each = high_frequency_loss(x0, image.astype(x.dtype), self.cutoff, mask)
            return jnp.sum(each * jnp.exp(-decay * t))

        def move(x, _):
            g = jax.grad(loss)(x)
            return x - to_batch(step, g).astype(g.dtype) * g, None

        return denoised(jax.lax.scan(move, x, None, length=self.repeats)[0])
