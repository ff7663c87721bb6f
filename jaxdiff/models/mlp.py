"""A multilayer perceptron for vectors: toy distributions, latents, states."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from jaxdiff.models.embeddings import (
    DEFAULT_INIT,
    ConditionEmbedding,
    check_condition,
    check_rate,
    check_rng,
    read_cond,
)
from jaxdiff.models.network import block_factors, check_remat, rematerialised, scaled


class MLPBlock(nn.Module):
    """h + W_2 silu(scale-shift(W_1 silu(h); c)), or without the h where `residual` is False."""

    residual: bool
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(
        self, h: Float[Array, "batch width"], c: Float[Array, "batch features"], train: bool,
        keep: Any = None,
    ) -> Float[Array, "batch width"]:  # fmt: skip
        def dense(features, name):
            return nn.Dense(features, kernel_init=DEFAULT_INIT, dtype=self.dtype, name=name)

        width = h.shape[-1]
        scale, shift = jnp.split(dense(2 * width, "modulation")(nn.silu(c)), 2, axis=-1)
        y = dense(width, "hidden")(nn.silu(h)) * (1 + scale) + shift
        y = nn.Dropout(self.dropout)(nn.silu(y), deterministic=not train)
        y = dense(width, "out")(y)
        return h + scaled(keep, y) if self.residual else y


class MLP(nn.Module):
    """Network for vectors: `apply(variables, x, t, cond, train=False)`, x [batch, dim].

    x -> Dense -> `depth` blocks -> SiLU -> Dense. A block is the fully connected form of ADM's
    residual block (Dhariwal & Nichol, 2021): the embedding of (t, label) scales and shifts its
    hidden layer. The last layer starts at zero, so the output at initialisation is 0.

    Attributes:
      width: hidden units.
      depth: blocks, two layers each.
      residual: whether blocks add to their input.
      num_classes: classes of `cond`, or None for a network without labels; the label num_classes is
        the null one.
      label_dropout: probability that training replaces a label by the null one (rng "label").
      dropout: rate inside the blocks (rng "dropout").
      time_scale: t is multiplied by it before the sinusoids (periods 2 pi to 20000 pi): 1000 for t
        in [0, 1], 1 for integer timesteps.
      dtype: of the computation; parameters, embeddings and the last layer stay float32.
      remat: recompute blocks in the backward pass; same parameters, same values. True ("full") keeps
        nothing of a block, "dots" the results of its matrix products, see `REMATS`.

    t is a scalar or [batch]; cond is None, int labels (scalar or [batch]) or {"label": labels};
    `keep` masks the blocks, see `jaxdiff.models.network.block_factors`. Returns x's shape in
    float32 (float64 for a float64 x). Raises ValueError for wrong shapes, labels out of range, a
    label without classes, missing keys in training, a mask where blocks are not residual.
    """

    width: int = 256
    depth: int = 3
    residual: bool = True
    num_classes: int | None = None
    label_dropout: float = 0.1
    dropout: float = 0.0
    time_scale: float = 1000.0
    dtype: Any = jnp.float32
    remat: bool | str = False

    def __post_init__(self):
        check_rate("dropout", self.dropout)
        check_rate("label_dropout", self.label_dropout)
        check_remat(self.remat)
        super().__post_init__()

    # Megatron's layout (Shoeybi et al., 2019): the columns of a block's first product and the rows of
    # its second.
    tensor_rules = (
        r"block_\d+/hidden/kernel=-,tensor",
        r"block_\d+/hidden/bias=tensor",
        r"block_\d+/out/kernel=tensor,-",
    )

    def check_cond(self, batch: int, cond: Any) -> None:
        """Raise ValueError for a cond that this network does not take; traces nothing."""
        labels = read_cond(cond).get("label")
        check_condition(labels, batch, self.num_classes, self.label_dropout)

    def blocks(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        """The blocks that `keep` masks, in its order, for an x of this shape."""
        return tuple(f"block_{i}" for i in range(self.depth))

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch dim"], t: ArrayLike, cond: Any = None, *, train: bool = False,
        keep: Any = None,
    ) -> Float[Array, "batch dim"]:  # fmt: skip
        if jnp.ndim(x) != 2:
            raise ValueError(f"x must be [batch, dim], got shape {jnp.shape(x)}")
        check_rng(self, "dropout", self.dropout, train)
        cond = read_cond(cond)
        c = ConditionEmbedding(
            self.width, self.width, self.time_scale, self.num_classes, self.label_dropout,
            name="condition",
        )(t, cond.get("label"), x.shape[0], train, rows=cond.get("rows"))  # fmt: skip
        h = nn.Dense(self.width, kernel_init=DEFAULT_INIT, dtype=self.dtype, name="in")(x)
        block = rematerialised(MLPBlock, self.remat, static_argnums=(3,))
        if keep is not None and not self.residual:
            raise ValueError("keep needs residual=True: other blocks cannot be skipped")
        for name, factor in block_factors(keep, self.blocks(x.shape)).items():
            h = block(self.residual, self.dropout, self.dtype, name=name)(h, c, train, factor)
        out_dtype = jnp.promote_types(x.dtype, jnp.float32)
        out = nn.Dense(
            x.shape[-1], kernel_init=nn.initializers.zeros, dtype=out_dtype, name="out"
        )
        return out(nn.silu(h))
