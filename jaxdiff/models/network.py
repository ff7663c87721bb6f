"""What the networks share: masks of blocks; and the image networks: the call, the learned variance,
self-attention."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from jaxdiff.arrays import to_batch
from jaxdiff.models.embeddings import DEFAULT_INIT

QK_NORMS = {None: None, "rms": nn.RMSNorm, "layer": nn.LayerNorm}

_policies = jax.checkpoint_policies
# What of a block is kept for the backward pass; the rest is computed again.
REMATS = {
    "full": _policies.nothing_saveable,
    "nothing_saveable": _policies.nothing_saveable,
    "dots": _policies.dots_saveable,
    "dots_saveable": _policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": _policies.dots_with_no_batch_dims_saveable,
}


def check_remat(remat: bool | str) -> None:
    """Raise ValueError unless `remat` is False, True or a name in `REMATS`."""
    if not isinstance(remat, bool) and remat not in REMATS:
        raise ValueError(f"remat must be False, True or one of {list(REMATS)}, got {remat!r}")


def rematerialised(
    block: type[nn.Module], remat: bool | str, static_argnums: tuple[int, ...] = ()
) -> type[nn.Module]:
    """The block's class, whose results are computed again in the backward pass (Chen et al., 2016).

    `static_argnums` count the arguments of its call, self first.
    """
    if remat is False:
        return block
    policy = REMATS["full" if remat is True else remat]
    return nn.remat(block, policy=policy, static_argnums=static_argnums)


class ImageNetwork(nn.Module):
    """Base of networks for images, x [batch, height, width, channels].

    A network whose `learn_sigma` is True has twice the output channels. The call returns the first
    half, the prediction, in x's shape, so such a network samples and trains like any other;
    `apply(..., method="with_variance")` returns both halves.
    """

    learn_sigma: bool = False

    def __call__(
        self, x: Float[Array, "batch height width channels"], t: ArrayLike, cond: Any = None, *,
        train: bool = False, keep: Any = None,
    ) -> Float[Array, "batch height width channels"]:  # fmt: skip
        """The prediction, in x's shape; `keep` masks the blocks, see `block_factors`."""
        return self._forward(x, t, cond, train, keep)[..., : x.shape[-1]]

    def with_variance(
        self, x: Float[Array, "batch height width channels"], t: ArrayLike, cond: Any = None, *,
        train: bool = False, keep: Any = None,
    ) -> tuple[Array, Array]:  # fmt: skip
        """(prediction, variance output), both in x's shape.

        The second is the interpolation v of Nichol & Dhariwal (2021) before it is scaled from
        [-1, 1] to [0, 1]. Raises ValueError unless learn_sigma is True.
        """
        if not self.learn_sigma:
            raise ValueError("no variance output: this network was made with learn_sigma=False")
        prediction, variance = jnp.split(self._forward(x, t, cond, train, keep), 2, axis=-1)
        return prediction, variance


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
    """What a UNet's decoder takes of its encoder: `middle` [batch, h, w, channels] and the `skips`, in
    the encoder's order. Static: `channels` and `dtype` of the image."""

    middle: Array
    skips: tuple[Array, ...]
    channels: int = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})


class TwoHalves(ImageNetwork):
    """Base of UNets: `encode` and `decode` are the way down with the middle, and the way up, on the
    same variables. A subclass has `_run(x, t, cond, train, keep, part)` for "all" and both parts."""

    def encode(
        self, x: Float[Array, "batch height width channels"], t: ArrayLike, cond: Any = None
    ) -> Features:
        """The way down and the middle: `apply(variables, x, t, cond, method="encode")`.

        The network is decode(encode(x, t, cond), t, cond), also where t [batch] differs.
        """
        return self._run(x, t, cond, False, None, "encode")

    def decode(
        self, features: Features, t: ArrayLike, cond: Any = None
    ) -> Float[Array, "batch height width channels"]:
        """The way up, from `encode`'s features: `apply(variables, features, t, cond,
        method="decode")`. `t` may be another than the encoder's."""
        return self._run(features, t, cond, False, None, "decode")[..., : features.channels]

    def _forward(self, x, t, cond, train, keep):
        return self._run(x, t, cond, train, keep, "all")


class SelfAttention(nn.Module):
    """Multi-head self-attention over tokens [batch, tokens, width], biases on every projection.

    Attributes:
      num_heads: heads, a divisor of the width.
      qk_norm: None, "rms" or "layer": a norm with learned parameters on each head's queries and
        keys, so that logits stay bounded (Dehghani et al., ViT-22B, 2023; Esser et al., SD3, 2024).
      attention: (q, k, v), each [batch, tokens, heads, head width], to the same shape.
      out_init, qkv_init: initialisers of the output projection and of the others.
    """

    num_heads: int
    qk_norm: str | None = None
    attention: Callable = jax.nn.dot_product_attention
    out_init: Callable = DEFAULT_INIT
    dtype: Any = jnp.float32
    qkv_init: Callable = DEFAULT_INIT

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        batch, tokens, width = x.shape
        qkv = nn.Dense(3 * width, kernel_init=self.qkv_init, dtype=self.dtype, name="qkv")(x)
        qkv = qkv.reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = (qkv[:, :, i] for i in range(3))
        if self.qk_norm is not None:
            norm = QK_NORMS[self.qk_norm]
            q = norm(epsilon=1e-6, dtype=self.dtype, name="q_norm")(q)
            k = norm(epsilon=1e-6, dtype=self.dtype, name="k_norm")(k)
        out = self.attention(q, k, v).reshape(batch, tokens, width)
        return nn.Dense(width, kernel_init=self.out_init, dtype=self.dtype, name="out")(out)


def block_factors(keep: Any, names: Sequence[str]) -> dict[str, Any]:
    """{block: the factor of its residual}, scalars or [batch]; None for all without a mask.

    `keep` is [blocks] or [batch, blocks], in the order of `names`, which a network's method
    `blocks(shape)` tells: a block is x + keep f(x), so 0 skips it and 1 keeps it. It may be traced,
    and a new mask compiles nothing; nor does it save time, for f(x) is evaluated all the same.
    Raises ValueError for another shape.
    """
    if keep is None:
        return dict.fromkeys(names)
    if jnp.ndim(keep) not in (1, 2) or jnp.shape(keep)[-1] != len(names):
        raise ValueError(
            f"keep must be [{len(names)}] or [batch, {len(names)}], one number for each of "
            f"{', '.join(names)}; got shape {jnp.shape(keep)}"
        )
    keep = jnp.asarray(keep)
    return {name: keep[..., i] for i, name in enumerate(names)}


def scaled(factor: Any, h: Array) -> Array:
    """factor h, the factor a scalar or [batch]; h itself for None."""
    return h if factor is None else to_batch(factor, h).astype(h.dtype) * h


def check_image(x: Array) -> None:
    """Raise ValueError unless x is [batch, height, width, channels]."""
    if jnp.ndim(x) != 4:
        raise ValueError(f"x must be [batch, height, width, channels], got shape {jnp.shape(x)}")
