"""The diffusion transformer, DiT (Peebles & Xie, "Scalable diffusion models with transformers",
2023)."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.models.embeddings import (
    DEFAULT_INIT,
    ConditionEmbedding,
    check_condition,
    check_rate,
    check_rng,
    read_cond,
    sincos_2d,
)
from jaxdiff.models.network import (
    QK_NORMS,
    ImageNetwork,
    SelfAttention,
    block_factors,
    check_image,
    check_remat,
    rematerialised,
    scaled,
)

_SHAPES = {
    "S": {"depth": 12, "width": 384, "num_heads": 6},
    "B": {"depth": 12, "width": 768, "num_heads": 12},
    "L": {"depth": 24, "width": 1024, "num_heads": 16},
    "XL": {"depth": 28, "width": 1152, "num_heads": 16},
}
SIZES = {
    f"DiT-{name}/{patch}": {"patch_size": patch, **shape}
    for name, shape in _SHAPES.items()
    for patch in (2, 4, 8)
}


def patchify(
    x: Float[Array, "batch height width channels"], patch: int
) -> Float[Array, "batch tokens features"]:
    """Patches as tokens, in rows: token i w / patch + j is patch (i, j), its pixels then channels.

    Raises ValueError if `patch` does not divide the height and the width.
    """
    batch, height, width, channels = x.shape
    if height % patch or width % patch:
        raise ValueError(f"patch_size {patch} does not divide the image size {height} x {width}")
    x = x.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.swapaxes(2, 3).reshape(batch, -1, patch * patch * channels)


def unpatchify(
    tokens: Float[Array, "batch tokens features"], height: int, width: int, patch: int
) -> Float[Array, "batch height width channels"]:
    """Inverse of `patchify` for an image of height x width pixels."""
    batch = tokens.shape[0]
    x = tokens.reshape(batch, height // patch, width // patch, patch, patch, -1)
    return x.swapaxes(2, 3).reshape(batch, height, width, -1)


def _modulated_norm(x, shift, scale, dtype):
    """LayerNorm without parameters, then the adaptive scale and shift."""
    norm = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, dtype=dtype)
    return norm(x) * (1 + scale) + shift


class DiTBlock(nn.Module):
    """Transformer block with adaLN-zero: the identity at initialisation.

        x <- x + g_1 attention(norm(x) (1 + s_1) + b_1)
        x <- x + g_2 mlp(norm(x) (1 + s_2) + b_2)

    The shifts b, scales s and gates g are linear in silu(c) and start at zero.
    """

    num_heads: int
    mlp_ratio: float
    qk_norm: str | None
    dropout: float
    attention: Callable
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], c: Float[Array, "batch width"], train: bool,
        keep: Any = None,
    ) -> Float[Array, "batch tokens width"]:  # fmt: skip
        def dense(features, name, init=DEFAULT_INIT):
            return nn.Dense(features, kernel_init=init, dtype=self.dtype, name=name)

        drop = nn.Dropout(self.dropout, deterministic=not train)
        width = x.shape[-1]
        modulation = dense(6 * width, "modulation", nn.initializers.zeros)(nn.silu(c))[:, None]
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(modulation, 6, axis=-1)
        h = _modulated_norm(x, shift_1, scale_1, self.dtype)
        h = SelfAttention(
            self.num_heads, self.qk_norm, self.attention, dtype=self.dtype, name="attention"
        )(h)
        x = x + scaled(keep, gate_1) * drop(h)
        h = _modulated_norm(x, shift_2, scale_2, self.dtype)
        h = drop(nn.gelu(dense(int(width * self.mlp_ratio), "mlp_in")(h), approximate=True))
        return x + scaled(keep, gate_2) * drop(dense(width, "mlp_out")(h))


class DiT(ImageNetwork):
    """Diffusion transformer: `apply(variables, x, t, cond, train=False)`.

    x is [batch, height, width, channels]. Patches of patch_size x patch_size pixels become tokens
    with fixed 2-D sin-cos positions; `depth` adaLN-zero blocks conditioned on the embedding of
    (t, label); a modulated linear layer back to pixels. Initialised as the authors' code:
    Xavier-uniform kernels, normal(0.02) embeddings, zero modulation and zero last layer, so the
    output at initialisation is exactly 0.

    With num_classes=1000, learn_sigma=True at 32 x 32 x 4, DiT-XL/2 has 674,834,720 parameters; the
    authors' 675,129,632 also counts the 256 x 1152 fixed positions, which are no parameters here.

    Attributes:
      patch_size: side of a patch; divides the height and the width (which may differ).
      width, depth, num_heads, mlp_ratio: of the transformer. `DiT.from_size` has the paper's.
      num_classes: classes of `cond`, or None for a network without labels; the label num_classes is
        the null one.
      label_dropout: probability that training replaces a label by the null one (rng "label").
      qk_norm: None, "rms" or "layer": normalise queries and keys (see `SelfAttention`).
      learn_sigma: twice the output channels; see `ImageNetwork`.
      dropout: rate after the attention and in the MLP (rng "dropout").
      time_scale: t is multiplied by it before the sinusoids (periods 2 pi to 20000 pi): 1000 for t
        in [0, 1], 1 for integer timesteps.
      dtype: of the computation; parameters, embeddings and the last layer stay float32.
      remat: recompute blocks in the backward pass; same parameters, same values. True ("full") keeps
        nothing of a block, "dots" the results of its matrix products, see `REMATS`.
      attention: (q, k, v), each [batch, tokens, heads, head width], to the same shape.
      augment_dim: labels of an augmentation that it is told of, see `jaxdiff.data.Augmentation`.

    t is a scalar or [batch]; cond is None, int labels (scalar or [batch]) or {"label": labels,
    "augment": [batch, augment_dim]}; `keep` masks the blocks, see
    `jaxdiff.models.network.block_factors`. Returns x's shape in float32 (float64 for a float64 x).
    Raises ValueError for sizes that do not divide, wrong shapes, labels out of range, a label
    without classes, missing keys in training.
    """

    patch_size: int = 2
    width: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    num_classes: int | None = None
    label_dropout: float = 0.1
    qk_norm: str | None = None
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
        if self.patch_size < 1:
            raise ValueError(f"patch_size must be at least 1, got {self.patch_size}")
        if self.width % self.num_heads or self.width % 4:
            raise ValueError(
                f"width {self.width} must be a multiple of 4 and of num_heads {self.num_heads}"
            )
        if self.qk_norm not in QK_NORMS:
            raise ValueError(f"qk_norm must be one of {list(QK_NORMS)}, got {self.qk_norm!r}")
        super().__post_init__()

    # Megatron's layout (Shoeybi et al., 2019): columns of the first product, rows of the second, so
    # that only the sum after the second crosses devices.
    tensor_rules = (
        r"block_\d+/(attention/qkv|mlp_in)/kernel=-,tensor",
        r"block_\d+/(attention/qkv|mlp_in)/bias=tensor",
        r"block_\d+/(attention/out|mlp_out)/kernel=tensor,-",
    )

    @classmethod
    def from_size(cls, name: str, **options: Any) -> "DiT":
        """One of the paper's networks, "DiT-S/2" to "DiT-XL/8"; `options` are other attributes."""
        if name not in SIZES:
            raise ValueError(f"unknown size {name!r}; known: {', '.join(SIZES)}")
        return cls(**(SIZES[name] | options))

    def check_cond(self, batch: int, cond: Any) -> None:
        """Raise ValueError for a cond that this network does not take; traces nothing."""
        labels = read_cond(cond, ("label", "augment")).get("label")
        check_condition(labels, batch, self.num_classes, self.label_dropout)

    def blocks(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        """The blocks that `keep` masks, in its order, for an x of this shape."""
        return tuple(f"block_{i}" for i in range(self.depth))

    @nn.compact
    def _forward(self, x, t, cond, train, keep):
        check_image(x)
        check_rng(self, "dropout", self.dropout, train)
        batch, height, width, channels = x.shape
        cond = read_cond(cond, ("label", "augment"))
        normal = nn.initializers.normal(0.02)
        c = ConditionEmbedding(
            self.width, 256, self.time_scale, self.num_classes, self.label_dropout, normal, normal,
            self.augment_dim, name="condition",
        )(t, cond.get("label"), batch, train, cond.get("augment"), cond.get("rows"))  # fmt: skip
        patches = patchify(x, self.patch_size)
        h = nn.Dense(self.width, kernel_init=DEFAULT_INIT, dtype=self.dtype, name="in")(patches)
        grid = (height // self.patch_size, width // self.patch_size)
        h = h + sincos_2d(*grid, self.width).reshape(-1, self.width).astype(h.dtype)
        block = rematerialised(DiTBlock, self.remat, static_argnums=(3,))
        for name, factor in block_factors(keep, self.blocks(x.shape)).items():
            h = block(
                self.num_heads, self.mlp_ratio, self.qk_norm, self.dropout, self.attention,
                self.dtype, name=name,
            )(h, c, train, factor)  # fmt: skip

        def zero_dense(features, dtype, name):
            zeros = nn.initializers.zeros
            return nn.Dense(features, kernel_init=zeros, dtype=dtype, name=name)

        modulation = zero_dense(2 * self.width, self.dtype, "modulation")(nn.silu(c))[:, None]
        h = _modulated_norm(h, *jnp.split(modulation, 2, axis=-1), self.dtype)
        out_features = self.patch_size**2 * channels * (1 + self.learn_sigma)
        out = zero_dense(out_features, jnp.promote_types(x.dtype, jnp.float32), "out")(h)
        return unpatchify(out, height, width, self.patch_size)
