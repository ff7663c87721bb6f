"""The convolutional UNet of DDPM (Ho et al., 2020) in ADM's form (Dhariwal & Nichol, "Diffusion
models beat GANs on image synthesis", 2021)."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff.models.embeddings import (
    DEFAULT_INIT,
    ConditionEmbedding,
    check_condition,
    check_rate,
    check_rng,
    read_cond,
)
from jaxdiff.models.network import (
    Features,
    TwoHalves,
    block_factors,
    check_image,
    check_remat,
    rematerialised,
)
from jaxdiff.models.unet_blocks import (
    ADM,
    DDPM,
    AttentionBlock,
    ResBlock,
    attending_levels,
    doubled,
    halved,
)

RESAMPLINGS = ("block", "conv")
_CONDITIONS = ("label", "image", "augment")


class UNet(TwoHalves):
    """ADM's UNet: `apply(variables, x, t, cond, train=False)`.

    x is [batch, height, width, channels]. Level i works at 1 / 2^i of the size with width *
    multipliers[i] channels; it has num_blocks residual blocks on the way down and num_blocks + 1 on
    the way up, each of those with a skip connection; in the middle are two around an attention. The
    embedding of (t, label) scales and shifts in each block. Convolutions start as DDPM's
    (Xavier-uniform), the last one of each block and of the network at zero, so the output at
    initialisation is 0.

    `encode` and `decode` are the way down with the middle, and the way up, on the same variables.

    With ADM's settings for ImageNet 64 (width 192, multipliers (1, 2, 3, 4), 3 blocks, attention at
    32, 16, 8, 1000 classes without null label, learn_sigma) it has the paper's 296M parameters;
    with DDPM's for CIFAR-10 (the defaults, resample "conv", adaptive_scale False, head_channels 256)
    its 35.7M.

    Attributes:
      width: channels that the multipliers multiply.
      multipliers: one per level; the size must be divisible by 2^(levels - 1).
      num_blocks: residual blocks per level.
      attention_resolutions: feature map sizes (the shorter side, in pixels) that also attend.
      head_channels: channels of one attention head; fewer channels make one head.
      resample: "block", down and up inside a residual block (ADM, DDPM++), or "conv", a strided
        convolution and a nearest-neighbour upsampling with a convolution (DDPM).
      adaptive_scale: the embedding scales and shifts in each block (ADM), or is added to its
        features (DDPM).
      image_channels: channels of cond["image"], which is concatenated to x; 0 for none.
      num_classes: classes of the label, or None for a network without labels; num_classes itself is
        the null label.
      label_dropout: probability that training replaces a label by the null one (rng "label").
      learn_sigma: twice the output channels; see `ImageNetwork`.
      dropout: rate inside the residual blocks (rng "dropout").
      time_scale: t is multiplied by it before the sinusoids (periods 2 pi to 20000 pi): 1000 for t
        in [0, 1], 1 for integer timesteps.
      dtype: of the computation; parameters, embeddings and the last layer stay float32.
      remat: recompute blocks in the backward pass; same parameters, same values. True ("full") keeps
        nothing of a block, "dots" the results of its matrix products, see `REMATS`.
      attention: (q, k, v), each [batch, pixels, heads, head width], to the same shape.
      augment_dim: labels of an augmentation that it is told of, see `jaxdiff.data.Augmentation`.

    t is a scalar or [batch]; cond None, int labels (scalar or [batch]) or a dict with "label",
    "image" [batch, height, width, image_channels] and "augment" [batch, augment_dim]; `keep` masks
    the blocks, each residual block and each attention, see `jaxdiff.models.network.block_factors`.
    Returns x's shape in float32 (float64 for a float64 x). Raises ValueError for sizes that do not
    divide, resolutions that no level has, wrong shapes, labels out of range, a label or an image
    that is missing or not wanted, missing keys.
    """

    width: int = 128
    multipliers: tuple[int | float, ...] = (1, 2, 2, 2)
    num_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    head_channels: int = 64
    resample: str = "block"
    adaptive_scale: bool = True
    image_channels: int = 0
    num_classes: int | None = None
    label_dropout: float = 0.1
    dropout: float = 0.0
    time_scale: float = 1000.0
    dtype: Any = jnp.float32
    remat: bool | str = False
    attention: Callable = jax.nn.dot_product_attention
    augment_dim: int = 0

    def __post_init__(self):
        check_rate("dropout", self.dropout)
        check_rate("label_dropout", self.label_dropout)
        check_remat(self.remat)
        if self.resample not in RESAMPLINGS:
            raise ValueError(f"resample must be one of {RESAMPLINGS}, got {self.resample!r}")
        # Lists, as a saved config has them, would make the module unhashable.
        self.multipliers = tuple(self.multipliers)
        self.attention_resolutions = tuple(self.attention_resolutions)
        super().__post_init__()

    def check_cond(self, batch: int, cond: Any) -> None:
        """Raise ValueError for a cond that this network does not take; traces nothing."""
        labels = read_cond(cond, _CONDITIONS).get("label")
        check_condition(labels, batch, self.num_classes, self.label_dropout)

    def blocks(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        """The blocks that `keep` masks, in its order, for an x of this shape."""
        attends = self._attends(shape)
        last, names = len(attends) - 1, []

        def add(side, level, count, resample):
            for i in range(count):
                names.append(f"{side}_{level}_block_{i}")
                names.extend([f"{side}_{level}_attention_{i}"] * attends[level])
            names.extend([f"{side}_{level}_resample"] * (resample and self.resample == "block"))

        for level in range(last + 1):
            add("down", level, self.num_blocks, level < last)
        names += ["middle_block_0", "middle_attention", "middle_block_1"]
        for level in range(last, -1, -1):
            add("up", level, self.num_blocks + 1, level > 0)
        return tuple(names)

    @nn.compact
    def _run(self, x, t, cond, train, keep, part):
        """The network, or the part "encode" or "decode" of it; x of "decode" is `Features`."""
        image = x.skips[0] if part == "decode" else x
        check_image(image)
        check_rng(self, "dropout", self.dropout, train)
        attends = self._attends(image.shape)
        factors = block_factors(keep, self.blocks(image.shape))
        cond = read_cond(cond, _CONDITIONS)
        c = ConditionEmbedding(
            4 * self.width, self.width, self.time_scale, self.num_classes, self.label_dropout,
            augment_dim=self.augment_dim, name="condition",
        )(
            t, cond.get("label"), image.shape[0], train, cond.get("augment"), cond.get("rows")
        )  # fmt: skip
        res_block = rematerialised(ResBlock, self.remat, static_argnums=(3,))
        attention_block = rematerialised(AttentionBlock, self.remat)

        style = ADM if self.adaptive_scale else DDPM

        def residual(h, channels, name, resample=None):
            block = res_block(channels, resample, self.dropout, self.dtype, style, name=name)
            return block(h, c, train, factors[name])

        def attend(h, name):
            block = attention_block(
                self.head_channels, self.attention, self.dtype, style, name=name
            )
            return block(h, factors[name])

        def conv(h, channels, name, **options):
            options = {"kernel_init": DEFAULT_INIT, "dtype": self.dtype} | options
            return nn.Conv(channels, (3, 3), padding=1, name=name, **options)(h)

        def down(h, name):
            if self.resample == "block":
                return residual(h, h.shape[-1], name, halved)
            return conv(h, h.shape[-1], name, strides=2)

        def up(h, name):
            if self.resample == "block":
                return residual(h, h.shape[-1], name, doubled)
            return conv(doubled(h), h.shape[-1], name)

        widths = [int(self.width * m) for m in self.multipliers]

        def encoder(x):
            h = conv(self._inputs(x, cond), widths[0], "in")
            skips = [h]
            for level, channels in enumerate(widths):
                for i in range(self.num_blocks):
                    h = residual(h, channels, f"down_{level}_block_{i}")
                    if attends[level]:
                        h = attend(h, f"down_{level}_attention_{i}")
                    skips.append(h)
                if level < len(widths) - 1:
                    h = down(h, f"down_{level}_resample")
                    skips.append(h)
            h = residual(h, widths[-1], "middle_block_0")
            h = attend(h, "middle_attention")
            h = residual(h, widths[-1], "middle_block_1")
            return Features(h, tuple(skips), x.shape[-1], str(x.dtype))

        def decoder(features):
            h, skips = features.middle, list(features.skips)
            for level, channels in reversed(list(enumerate(widths))):
                for i in range(self.num_blocks + 1):
                    h = jnp.concatenate([h, skips.pop()], axis=-1)
                    h = residual(h, channels, f"up_{level}_block_{i}")
                    if attends[level]:
                        h = attend(h, f"up_{level}_attention_{i}")
                if level > 0:
                    h = up(h, f"up_{level}_resample")
            h = nn.silu(style.norm(h, self.dtype, "norm_out"))
            return conv(
                h, features.channels * (1 + self.learn_sigma), "out",
                kernel_init=nn.initializers.zeros,
                dtype=jnp.promote_types(features.dtype, jnp.float32),
            )  # fmt: skip

        if part == "encode":
            return encoder(x)
        return decoder(x if part == "decode" else encoder(x))

    def _attends(self, shape: tuple[int, ...]) -> list[bool]:
        return attending_levels(shape, len(self.multipliers), self.attention_resolutions)

    def _inputs(self, x: Array, cond: dict[str, Any]) -> Array:
        """x, with the conditioning image behind its channels."""
        image = cond.get("image")
        if self.image_channels == 0:
            if image is not None:
                raise ValueError("an image was given to a network with image_channels=0")
            return x
        expected = (*x.shape[:3], self.image_channels)
        if image is None:
            raise ValueError(f'cond["image"] of shape {expected} is needed, got none')
        if jnp.shape(image) != expected:
            raise ValueError(f'cond["image"] must have shape {expected}, got {jnp.shape(image)}')
        return jnp.concatenate([x, jnp.asarray(image, x.dtype)], axis=-1)
