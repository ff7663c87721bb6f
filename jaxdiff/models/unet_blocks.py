"""The blocks of the UNets: residual and attention blocks, and where they attend."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.models.embeddings import DEFAULT_INIT
from jaxdiff.models.network import SelfAttention, scaled


def num_groups(channels: int) -> int:
    """Groups of a GroupNorm: at most 32, of at least 4 channels, and a divisor of `channels`.

    32 (ADM's number) wherever 32 divides 128 or more channels.
    """
    most = max(1, min(32, channels // 4))
    return max(g for g in range(1, most + 1) if channels % g == 0)


def num_heads(channels: int, head_channels: int) -> int:
    """Heads of an attention over `channels`; fewer channels than head_channels make one head."""
    if channels <= head_channels:
        return 1
    if channels % head_channels:
        raise ValueError(f"head_channels {head_channels} does not divide {channels} channels")
    return channels // head_channels


@dataclasses.dataclass(frozen=True)
class BlockStyle:
    """Where the papers' blocks differ.

    Attributes:
      adaptive_scale: the embedding scales and shifts after the second norm; else it is added before.
      skip_scale: factor of each sum of a residual and its skip connection.
      epsilon: of the norms.
      project: a skip connection that is resampled also goes through a 1 x 1 convolution.
      qkv_init: of the queries, keys and values.
    """

    adaptive_scale: bool = True
    skip_scale: float = 1.0
    epsilon: float = 1e-5
    project: bool = False
    qkv_init: Callable = DEFAULT_INIT

    def norm(self, x: Array, dtype: Any, name: str) -> Array:
        groups = num_groups(x.shape[-1])
        return nn.GroupNorm(groups, epsilon=self.epsilon, dtype=dtype, name=name)(x)

    def scaled(self, h: Array) -> Array:
        return h if self.skip_scale == 1.0 else h * self.skip_scale


ADM = BlockStyle()
DDPM = BlockStyle(adaptive_scale=False)


def doubled(x: Float[Array, "batch h w channels"]) -> Float[Array, "batch h2 w2 channels"]:
    """Twice the height and width: every pixel becomes four."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def halved(x: Float[Array, "batch h w channels"]) -> Float[Array, "batch h2 w2 channels"]:
    """Half the height and width: means of 2 x 2 pixels."""
    return nn.avg_pool(x, (2, 2), (2, 2))


class ResBlock(nn.Module):
    """ADM's residual block, with `resample` (`halved`, `doubled` or None) inside both branches.

        skip(x) + conv_0 silu(GN(conv silu(GN(x))) (1 + scale) + shift)

    scale and shift are linear in silu(c); conv_0 starts at zero; skip is a 1 x 1 convolution where
    the number of channels changes. A `keep` of 0 leaves skip(x), of a resampled x. `style` has what
    DDPM's and DDPM++'s blocks do otherwise.
    """

    channels: int
    resample: Callable | None
    dropout: float
    dtype: Any
    style: BlockStyle = ADM

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch h w channels"], c: Float[Array, "batch features"], train: bool,
        keep: Any = None,
    ) -> Float[Array, "batch h_out w_out channels_out"]:  # fmt: skip
        def conv(size, name, init=DEFAULT_INIT):
            return nn.Conv(
                self.channels, (size, size), kernel_init=init, dtype=self.dtype, name=name
            )

        style = self.style
        h = nn.silu(style.norm(x, self.dtype, "norm_in"))
        if self.resample is not None:
            x, h = self.resample(x), self.resample(h)
        h = conv(3, "conv_in")(h)
        modulation = nn.Dense(
            self.channels * (1 + style.adaptive_scale), kernel_init=DEFAULT_INIT, dtype=self.dtype,
            name="modulation",
        )(nn.silu(c))[:, None, None]  # fmt: skip
        if style.adaptive_scale:
            scale, shift = jnp.split(modulation, 2, axis=-1)
            h = nn.silu(style.norm(h, self.dtype, "norm_out") * (1 + scale) + shift)
        else:
            h = nn.silu(style.norm(h + modulation, self.dtype, "norm_out"))
        h = nn.Dropout(self.dropout)(h, deterministic=not train)
        h = conv(3, "conv_out", nn.initializers.zeros)(h)
        if x.shape[-1] != self.channels or (style.project and self.resample is not None):
            x = conv(1, "skip")(x)
        return style.scaled(x + scaled(keep, h))


class AttentionBlock(nn.Module):
    """x + attention(GN(x)) over all pixels; the output projection starts at zero."""

    head_channels: int
    attention: Callable
    dtype: Any
    style: BlockStyle = ADM

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch h w channels"], keep: Any = None
    ) -> Float[Array, "batch h w channels"]:
        batch, _, _, channels = x.shape
        h = self.style.norm(x, self.dtype, "norm").reshape(batch, -1, channels)
        heads = num_heads(channels, self.head_channels)
        h = SelfAttention(
            heads, None, self.attention, nn.initializers.zeros, self.dtype, self.style.qkv_init,
            name="attention",
        )(h)  # fmt: skip
        return self.style.scaled(x + scaled(keep, h.reshape(x.shape)))


def attending_levels(
    shape: tuple[int, ...], levels: int, resolutions: tuple[int, ...]
) -> list[bool]:
    """Whether each level attends, for an x of this shape: its shorter side is in `resolutions`.

    Raises ValueError for a size that 2^(levels - 1) does not divide, and for resolutions that no
    level has.
    """
    _, height, width, _ = shape
    factor = 2 ** (levels - 1)
    if height % factor or width % factor:
        raise ValueError(
            f"{levels} levels need a size divisible by {factor}, got {height} x {width}"
        )
    sizes = [min(height, width) // 2**i for i in range(levels)]
    if absent := [size for size in resolutions if size not in sizes]:
        raise ValueError(
            f"attention_resolutions {absent} are not among the feature map sizes {sizes}"
        )
    return [size in resolutions for size in sizes]
