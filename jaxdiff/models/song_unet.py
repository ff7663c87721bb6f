"""The UNets DDPM++ and NCSN++ (Song et al., "Score-based generative modeling through stochastic
differential equations", 2021) as Karras et al. ("EDM", 2022) train them."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from jaxdiff.models.embeddings import (
    DEFAULT_INIT,
    AugmentEmbedding,
    check_condition,
    check_no_augment,
    check_rate,
    check_rng,
    drop_labels,
    read_cond,
    read_times,
    sinusoidal,
)
from jaxdiff.models.network import (
    Features,
    TwoHalves,
    block_factors,
    check_image,
    check_remat,
    rematerialised,
)
from jaxdiff.models.unet_blocks import AttentionBlock, BlockStyle, ResBlock, attending_levels

EMBEDDINGS = ("positional", "fourier")
ENCODERS = ("standard", "skip", "residual")
DECODERS = ("standard", "skip")
_CONDITIONS = ("label", "augment")
_HALF = float(np.sqrt(0.5))
_STYLE = BlockStyle(
    adaptive_scale=False, skip_scale=_HALF, epsilon=1e-6, project=True,
    qkv_init=nn.initializers.variance_scaling(0.2, "fan_avg", "uniform"),
)  # fmt: skip


def resampled(
    x: Float[Array, "batch h w channels"], taps: tuple[float, ...], up: bool = False,
    padding: int | None = None,
) -> Float[Array, "batch h_out w_out channels"]:  # fmt: skip
    """x filtered by the taps along both axes, and halved or (`up`) doubled in size.

    The taps are divided by their sum, and doubled for `up`, so a constant stays what it is where
    no zero of the padding reaches: (1, 1) halves by the mean of 2 x 2 and doubles by repetition,
    (1, 3, 3, 1) is the bilinear filter. `padding` zeros are added at each edge before halving,
    by default as many as halve the size exactly.
    """
    weights = np.asarray(taps, np.float64)
    weights = jnp.asarray(weights / weights.sum() * (1 + up), x.dtype)
    count, channels = len(taps), x.shape[-1]
    padding = (count - 1) // 2 if padding is None else padding
    for axis in (0, 1):
        shape = (count, 1) if axis == 0 else (1, count)
        kernel = jnp.broadcast_to(weights.reshape(*shape, 1, 1), (*shape, 1, channels))
        factors = [2 if a == axis else 1 for a in (0, 1)]
        edge = count - 1 - padding if up else padding
        x = jax.lax.conv_general_dilated(
            x, kernel, window_strides=(1, 1) if up else factors,
            padding=[(edge, edge) if a == axis else (0, 0) for a in (0, 1)],
            lhs_dilation=factors if up else (1, 1), feature_group_count=channels,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
    return x


class _Conditioning(nn.Module):
    """Embedding of the time, the label and the augmentation, [batch, features]; in float32.

    `frequencies` random ones of the time (those of "fourier"), or how many of "positional".
    """

    features: int
    frequencies: int | tuple[float, ...]
    time_scale: float
    num_classes: int | None
    label_dropout: float
    augment_dim: int

    @nn.compact
    def __call__(
        self, t: ArrayLike, cond: dict[str, Any], batch: int, train: bool
    ) -> Float[Array, "batch features"]:
        def dense(features, name):
            return nn.Dense(features, kernel_init=DEFAULT_INIT, name=name)

        t = self.time_scale * read_times(t, batch)
        if isinstance(self.frequencies, int):
            waves = sinusoidal(t, 2 * self.frequencies, endpoint=True)
        else:
            angles = t[:, None] * (2 * np.pi * np.asarray(self.frequencies)).astype(t.dtype)
            waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        cos, sin = jnp.split(waves, 2, axis=-1)
        h = jnp.concatenate([sin, cos], axis=-1)  # the authors' order, so that weights carry over
        width = h.shape[-1]
        labels, augment, rows = (cond.get(key) for key in ("label", "augment", "rows"))
        check_condition(labels, batch, self.num_classes, self.label_dropout)
        if self.num_classes is not None:
            h = h + dense(width, "label")(self._classes(labels, batch, train, rows))
        if self.augment_dim:
            layer = AugmentEmbedding(self.augment_dim, width, DEFAULT_INIT, name="augment")
            h = h + layer(augment, batch)
        else:
            check_no_augment(augment)
        return dense(self.features, "out")(nn.silu(dense(self.features, "hidden")(h)))

    def _classes(self, labels, batch, train, rows):
        """sqrt(classes) times the one-hot labels; the null label is zero."""
        classes, null = self.num_classes, self.label_dropout > 0
        check_rng(self, "label", self.label_dropout, train)
        labels = jnp.broadcast_to(jnp.asarray(classes if labels is None else labels), (batch,))
        if train and null:
            labels = drop_labels(self.make_rng("label"), labels, classes, self.label_dropout, rows)
        one_hot = float(np.sqrt(classes)) * jax.nn.one_hot(labels, classes)
        wrong = (labels < 0) | (labels >= classes + null)
        return jnp.where(wrong[:, None], jnp.nan, one_hot)


class SongUNet(TwoHalves):
    """DDPM++ and NCSN++: `apply(variables, x, t, cond, train=False)`.

    x is [batch, height, width, channels]. The walk down and up is that of `jaxdiff.models.UNet`;
    differences: the embedding is added to a block's features, every sum with a skip connection is
    divided by sqrt(2), on the way up only the last block of a level attends, attention has one
    head, and resampling goes through `resample_filter`. The defaults are DDPM++ as EDM trains it on
    CIFAR-10; NCSN++ is `SongUNet.ncsn_pp()`. With 3 channels, 9 augmentation labels and no classes
    they have 55,733,891 and 56,397,827 parameters, as in the authors' code. What that code starts
    at 1e-5 times its usual size starts at zero here, so the output at initialisation is 0.

    Attributes:
      width: channels that the multipliers multiply.
      multipliers: one per level; the size must be divisible by 2^(levels - 1). Song et al. have
        (1, 2, 2, 2), EDM (2, 2, 2).
      num_blocks: residual blocks per level.
      attention_resolutions: feature map sizes (the shorter side, in pixels) that also attend.
      embedding: of the time, "positional" (DDPM++) or "fourier" (NCSN++), random frequencies,
        normal with the standard deviation `fourier_scale`, the same in every network.
      noise_multiplier: the embedding of the time has this many times `width` features, 2 in NCSN++.
      encoder: "standard"; "residual" (NCSN++) or "skip" also adds the input, downsampled, at each
        level.
      decoder: "standard", or "skip": the output is a sum over the levels.
      resample_filter: taps along each axis, (1, 1) or, in NCSN++, (1, 3, 3, 1).
      fourier_frequencies: the frequencies themselves, [noise_multiplier width / 2], to use weights
        trained with others; None draws them.
      num_classes: classes of the label, or None for a network without labels; num_classes itself is
        the null label.
      label_dropout: probability that training replaces a label by the null one (rng "label").
      learn_sigma: twice the output channels; see `ImageNetwork`.
      dropout: rate inside the residual blocks (rng "dropout").
      time_scale: t is multiplied by it: 1 with EDM's preconditioning, whose time is
        log(sigma) / 4; 1000 for t in [0, 1].
      dtype: of the computation; parameters, embeddings and the last layer stay float32.
      remat: recompute blocks in the backward pass; same parameters, same values. True ("full") keeps
        nothing of a block, "dots" the results of its matrix products, see `REMATS`.
      attention: (q, k, v), each [batch, pixels, heads, head width], to the same shape.
      augment_dim: labels of an augmentation that it is told of, see `jaxdiff.data.Augmentation`.

    t is a scalar or [batch]; cond None, int labels (scalar or [batch]) or a dict with "label" and
    "augment" [batch, augment_dim]; `keep` masks the blocks, see
    `jaxdiff.models.network.block_factors`. Returns x's shape in float32 (float64 for a float64 x).
    Raises ValueError as `UNet` does.
    """

    width: int = 128
    multipliers: tuple[int | float, ...] = (2, 2, 2)
    num_blocks: int = 4
    attention_resolutions: tuple[int, ...] = (16,)
    embedding: str = "positional"
    noise_multiplier: int = 1
    encoder: str = "standard"
    decoder: str = "standard"
    resample_filter: tuple[int | float, ...] = (1, 1)
    fourier_scale: float = 16.0
    fourier_frequencies: tuple[float, ...] | None = None
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
        for name, accepted in (
            ("embedding", EMBEDDINGS), ("encoder", ENCODERS), ("decoder", DECODERS)
        ):  # fmt: skip
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {accepted}, got {getattr(self, name)!r}")
        # Lists, as a saved config has them, would make the module unhashable.
        for name in ("multipliers", "attention_resolutions", "resample_filter"):
            setattr(self, name, tuple(getattr(self, name)))
        if self.fourier_frequencies is not None:
            self.fourier_frequencies = tuple(self.fourier_frequencies)
        taps = self.resample_filter
        if len(taps) < 2 or len(taps) % 2 or sum(taps) == 0 or taps != taps[::-1]:
            raise ValueError(
                "resample_filter must be an even number of taps, symmetric and not summing to 0, "
                f"got {taps}"
            )
        super().__post_init__()

    @classmethod
    def ncsn_pp(cls, **options: Any) -> "SongUNet":
        """NCSN++ as EDM trains it; `options` are other attributes."""
        return cls(**(NCSN_PP | options))

    def check_cond(self, batch: int, cond: Any) -> None:
        """Raise ValueError for a cond that this network does not take; traces nothing."""
        labels = read_cond(cond, _CONDITIONS).get("label")
        check_condition(labels, batch, self.num_classes, self.label_dropout)

    def blocks(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        """The blocks that `keep` masks, in its order, for an x of this shape."""
        attends, names = self._attends(shape), []
        last = len(attends) - 1
        for level, attend in enumerate(attends):
            names += [f"down_{level - 1}_resample"] * (level > 0)
            for i in range(self.num_blocks):
                names.append(f"down_{level}_block_{i}")
                names += [f"down_{level}_attention_{i}"] * attend
        names += ["middle_block_0", "middle_attention", "middle_block_1"]
        for level in range(last, -1, -1):
            names += [f"up_{level + 1}_resample"] * (level < last)
            names += [f"up_{level}_block_{i}" for i in range(self.num_blocks + 1)]
            names += [f"up_{level}_attention_{self.num_blocks}"] * attends[level]
        return tuple(names)

    @nn.compact
    def _run(self, x, t, cond, train, keep, part):
        """The network, or the part "encode" or "decode" of it; x of "decode" is `Features`."""
        image = x.skips[0] if part == "decode" else x
        check_image(image)
        check_rng(self, "dropout", self.dropout, train)
        attends, taps = self._attends(image.shape), self.resample_filter
        factors = block_factors(keep, self.blocks(image.shape))
        c = _Conditioning(
            4 * self.width, self._frequencies(), self.time_scale, self.num_classes,
            self.label_dropout, self.augment_dim, name="condition",
        )(t, read_cond(cond, _CONDITIONS), image.shape[0], train)  # fmt: skip
        res_block = rematerialised(ResBlock, self.remat, static_argnums=(3,))
        attention_block = rematerialised(AttentionBlock, self.remat)

        def down(h):
            return resampled(h, taps)

        def up(h):
            return resampled(h, taps, up=True)

        def residual(h, channels, name, resample=None):
            block = res_block(channels, resample, self.dropout, self.dtype, _STYLE, name=name)
            return block(h, c, train, factors[name])

        def attend(h, name):
            block = attention_block(h.shape[-1], self.attention, self.dtype, _STYLE, name=name)
            return block(h, factors[name])

        def conv(h, channels, name, size=3, padding=None, **options):
            options = {"kernel_init": DEFAULT_INIT, "dtype": self.dtype} | options
            padding = size // 2 if padding is None else padding
            return nn.Conv(channels, (size, size), padding=padding, name=name, **options)(h)

        def joined(h, image, level):
            """(features, input image) of a level, the image brought down to it."""
            name, channels = f"down_{level - 1}_input", h.shape[-1]
            if self.encoder == "skip":
                image = down(image)
                return h + conv(image, channels, name, size=1), image
            if self.encoder == "residual":
                # The filter after the convolution, whose margin it uses up.
                edge = (len(taps) - 1) // 2
                image = conv(image, channels, name, padding=1 + edge)
                h = (h + resampled(image, taps, padding=0)) * _HALF
                return h, h
            return h, image

        def output(h, features, level):
            h = nn.silu(_STYLE.norm(h, self.dtype, f"norm_out_{level}"))
            return conv(
                h, features.channels * (1 + self.learn_sigma), f"out_{level}",
                kernel_init=nn.initializers.zeros,
                dtype=jnp.promote_types(features.dtype, jnp.float32),
            )  # fmt: skip

        widths = [int(self.width * m) for m in self.multipliers]

        def encoder(x):
            h, image = conv(x, self.width, "in"), x
            skips = [h]
            for level, channels in enumerate(widths):
                if level > 0:
                    h = residual(h, h.shape[-1], f"down_{level - 1}_resample", down)
                    h, image = joined(h, image, level)
                    skips.append(h)
                for i in range(self.num_blocks):
                    h = residual(h, channels, f"down_{level}_block_{i}")
                    if attends[level]:
                        h = attend(h, f"down_{level}_attention_{i}")
                    skips.append(h)
            h = residual(h, widths[-1], "middle_block_0")
            h = attend(h, "middle_attention")
            h = residual(h, widths[-1], "middle_block_1")
            return Features(h, tuple(skips), x.shape[-1], str(x.dtype))

        def decoder(features):
            h, skips, out = features.middle, list(features.skips), None
            for level, channels in reversed(list(enumerate(widths))):
                if level < len(widths) - 1:
                    h = residual(h, h.shape[-1], f"up_{level + 1}_resample", up)
                for i in range(self.num_blocks + 1):
                    h = jnp.concatenate([h, skips.pop()], axis=-1)
                    h = residual(h, channels, f"up_{level}_block_{i}")
                if attends[level]:
                    h = attend(h, f"up_{level}_attention_{self.num_blocks}")
                if self.decoder == "skip" or level == 0:
                    here = output(h, features, level)
                    out = here if out is None else here + up(out)
            return out

        if part == "encode":
            return encoder(x)
        return decoder(x if part == "decode" else encoder(x))

    def _attends(self, shape: tuple[int, ...]) -> list[bool]:
        return attending_levels(shape, len(self.multipliers), self.attention_resolutions)

    def _frequencies(self) -> int | tuple[float, ...]:
        count = self.noise_multiplier * self.width // 2
        if self.embedding == "positional":
            return count
        if self.fourier_frequencies is not None:
            return self.fourier_frequencies
        normal = np.random.default_rng(0).standard_normal(count)
        return tuple((self.fourier_scale * normal).tolist())


NCSN_PP = {
    "embedding": "fourier", "noise_multiplier": 2, "encoder": "residual",
    "resample_filter": (1, 3, 3, 1),
}  # fmt: skip
