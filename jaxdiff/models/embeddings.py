"""Embeddings of what a network is conditioned on: the time, a class label, an augmentation, a
position.

`cond` is None, integer labels, or a dict {"label": ..., "image": ..., "augment": ...}. Labels are 0
to num_classes - 1, and num_classes itself is the null label of classifier-free guidance; "augment"
holds the labels [batch, augment_dim] of `jaxdiff.data.Augmentation`, absent for none.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from jaxdiff.arrays import is_concrete

DEFAULT_INIT = nn.initializers.xavier_uniform()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Which examples of a whole batch of `total` a network sees: cond["rows"], in training.

    Label dropout then draws for each example what it would draw in the whole batch, so a step does
    not depend on how its batch is cut up.
    """

    index: Int[ArrayLike, " batch"]
    total: int = dataclasses.field(metadata={"static": True})


def sinusoidal(
    t: Float[Array, " batch"], features: int, max_period: float = 10_000.0, endpoint: bool = False
) -> Float[Array, "batch features"]:
    """Sinusoidal features of a time (Vaswani et al., 2017; Ho et al., "DDPM", 2020).

        [cos(w_0 t), ..., cos(w_{n-1} t), sin(w_0 t), ..., sin(w_{n-1} t)],
        w_i = max_period^(-i / n),  n = features // 2

    `endpoint` divides by n - 1, so that the last frequency is 1 / max_period, as in DDPM++. An odd
    `features` is filled up with one zero.
    """
    half = features // 2
    frequencies = np.exp(-np.log(max_period) * np.arange(half) / max(1, half - endpoint))
    angles = t[:, None] * frequencies.astype(t.dtype)
    waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return jnp.pad(waves, ((0, 0), (0, features % 2)))


def sincos_2d(height: int, width: int, features: int) -> Float[Array, "height width features"]:
    """Fixed positions on a grid, as in DiT and MAE (He et al., 2022), float32.

    The first half of the features encodes the column w, the second half the row h, each as
    [sin(w f_i), cos(w f_i)] with f_i = 10000^(-i / n), n = features // 4. Raises ValueError if
    `features` is not a multiple of 4.
    """
    if features % 4:
        raise ValueError(f"2-D positions need a multiple of 4 features, got {features}")
    n = features // 4

    def encode(count):
        angles = np.arange(count)[:, None] * 10_000.0 ** (-np.arange(n) / n)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)

    # Broadcast on the device: the program holds two short tables, not the whole grid.
    shape = (height, width, 2 * n)
    columns = jnp.broadcast_to(encode(width)[None, :], shape)
    rows = jnp.broadcast_to(encode(height)[:, None], shape)
    return jnp.concatenate([columns, rows], axis=-1)


def read_cond(cond: Any, accepted: tuple[str, ...] = ("label",)) -> dict[str, Any]:
    """`cond` as a dict without absent entries; bare labels become {"label": cond}.

    Raises ValueError for a key that the network does not take.
    """
    if not isinstance(cond, Mapping):
        cond = {"label": cond}
    unknown = sorted(set(cond) - {*accepted, "rows"})
    if unknown:
        raise ValueError(f"cond has the keys {unknown}; this network takes {list(accepted)}")
    return {key: value for key, value in cond.items() if value is not None}


def check_labels(labels: ArrayLike, batch: int, num_classes: int, null: bool) -> None:
    """Raise ValueError unless `labels` are integers, [batch] or scalar, of existing classes.

    The range is 0 to num_classes - 1, and num_classes too if there is a `null` label. It is checked
    where the values are known; tracers pass (and an embedding out of range is NaN).
    """
    shape, dtype = np.shape(labels), jnp.result_type(labels)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"labels must be integers, got {dtype}")
    if shape not in ((), (batch,)):
        raise ValueError(f"labels must be a scalar or have shape ({batch},), got {shape}")
    if is_concrete(labels) and getattr(labels, "is_fully_addressable", True):
        values = np.asarray(labels)
        wrong = values[(values < 0) | (values >= num_classes + null)]
        if wrong.size:
            also = f" ({num_classes} is the null label)" if null else ""
            raise ValueError(
                f"labels must lie in 0 to {num_classes + null - 1}{also}, got {wrong.ravel()[0]}"
            )


def check_condition(
    labels: ArrayLike | None, batch: int, num_classes: int | None, label_dropout: float
) -> None:
    """Raise ValueError for labels that a network of these attributes does not take.

    With `num_classes` None it takes none; without labels there must be a null one, which
    label_dropout > 0 makes. Values are checked as in `check_labels`.
    """
    if num_classes is None:
        if labels is not None:
            raise ValueError("a label was given to a network made with num_classes=None")
    elif labels is not None:
        check_labels(labels, batch, num_classes, label_dropout > 0)
    elif not label_dropout > 0:
        raise ValueError(
            f"labels are needed: this network has {num_classes} classes and, with "
            "label_dropout=0, no null label"
        )


def check_rng(module: nn.Module, name: str, rate: float, train: bool) -> None:
    """Raise ValueError if training drops at `rate` > 0 and no key was given for it."""
    if train and rate > 0 and not module.has_rng(name):
        raise ValueError(
            f"train=True with a rate of {rate} needs a key: apply(..., rngs={{{name!r}: key}})"
        )


def check_rate(name: str, rate: float) -> None:
    """Raise ValueError unless the dropout rate lies in [0, 1)."""
    if not 0 <= rate < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {rate!r}")


def read_times(t: ArrayLike, batch: int) -> Float[Array, " batch"]:
    """t, a scalar or [batch], as [batch] in float32 or wider. Raises ValueError for other shapes."""
    t = jnp.asarray(t)
    if t.shape not in ((), (batch,)):
        raise ValueError(f"t must be a scalar or have shape ({batch},), got {t.shape}")
    return jnp.broadcast_to(t.astype(jnp.promote_types(t.dtype, jnp.float32)), (batch,))


class AugmentEmbedding(nn.Module):
    """A linear layer without bias of an augmentation's labels: [batch, features], 0 without labels.

    Karras et al. (2022), appendix F.2: in training the network is told how its data were deformed,
    and it is sampled with zeros, which ask for data that were not. Raises ValueError for labels of
    another shape than [batch, augment_dim].
    """

    augment_dim: int
    features: int
    kernel_init: Callable = nn.initializers.zeros

    @nn.compact
    def __call__(self, augment: ArrayLike | None, batch: int) -> Float[Array, "batch features"]:
        expected = (batch, self.augment_dim)
        augment = jnp.zeros(expected) if augment is None else jnp.asarray(augment)
        if augment.shape != expected:
            raise ValueError(f'cond["augment"] must have shape {expected}, got {augment.shape}')
        layer = nn.Dense(self.features, False, kernel_init=self.kernel_init, name="linear")
        return layer(augment)


def check_no_augment(augment: Any) -> None:
    """Raise ValueError for augmentation labels, of a network that takes none."""
    if augment is not None:
        raise ValueError("augmentation labels were given to a network with augment_dim=0")


class TimeEmbedding(nn.Module):
    """Sinusoidal features of time_scale * t through Dense, SiLU, Dense: [batch, features].

    With `augment_dim` > 0 an `AugmentEmbedding`, which starts at zero, is added to the sinusoids.
    """

    features: int
    frequencies: int = 256
    time_scale: float = 1000.0
    kernel_init: Callable = DEFAULT_INIT
    augment_dim: int = 0

    @nn.compact
    def __call__(
        self, t: ArrayLike, batch: int, augment: ArrayLike | None = None
    ) -> Float[Array, "batch features"]:
        h = sinusoidal(self.time_scale * read_times(t, batch), self.frequencies)
        if self.augment_dim:
            layer = AugmentEmbedding(self.augment_dim, self.frequencies, name="augment")
            h = h + layer(augment, batch)
        else:
            check_no_augment(augment)
        h = nn.Dense(self.features, kernel_init=self.kernel_init, name="hidden")(h)
        return nn.Dense(self.features, kernel_init=self.kernel_init, name="out")(nn.silu(h))


def drop_labels(
    key: Array, labels: Int[Array, " batch"], null: int, rate: float, rows: Rows | None = None
) -> Int[Array, " batch"]:
    """Each label replaced by the null one with probability `rate`."""
    batch = len(labels)
    rows = Rows(np.arange(batch), batch) if rows is None else rows
    drop = jax.random.bernoulli(key, rate, (rows.total,))
    return jnp.where(drop if rows.total == batch else drop[rows.index], null, labels)


class LabelEmbedding(nn.Module):
    """A learned vector for each class: [batch, features] (Ho & Salimans, 2022, for the null one).

    With `label_dropout` > 0 there is one more row, for the null label num_classes: labels None mean
    it, and in training each label becomes it with that probability (rng "label").
    """

    num_classes: int
    features: int
    label_dropout: float = 0.1
    embedding_init: Callable = nn.initializers.normal(1.0)

    @nn.compact
    def __call__(
        self, labels: ArrayLike | None, batch: int, train: bool, rows: Rows | None = None
    ) -> Float[Array, "batch features"]:
        null = self.label_dropout > 0
        check_condition(labels, batch, self.num_classes, self.label_dropout)
        labels = self.num_classes if labels is None else labels
        check_rng(self, "label", self.label_dropout, train)
        labels = jnp.broadcast_to(jnp.asarray(labels), (batch,))
        if train and null:
            key = self.make_rng("label")
            labels = drop_labels(key, labels, self.num_classes, self.label_dropout, rows)
        count = self.num_classes + null
        # A traced negative label would count from the end; out of range it is NaN.
        labels = jnp.where(labels < 0, count, labels)
        table = nn.Embed(count, self.features, embedding_init=self.embedding_init, name="table")
        return table(labels)


class ConditionEmbedding(nn.Module):
    """Embedding of the time plus, if there are classes, of the label: [batch, features].

    The time's takes the labels of an augmentation, see `TimeEmbedding`. Always computed in float32:
    in bfloat16 neighbouring times would coincide. Raises ValueError for a label where num_classes
    is None.
    """

    features: int
    frequencies: int = 256
    time_scale: float = 1000.0
    num_classes: int | None = None
    label_dropout: float = 0.1
    kernel_init: Callable = DEFAULT_INIT
    embedding_init: Callable = nn.initializers.normal(1.0)
    augment_dim: int = 0

    @nn.compact
    def __call__(
        self, t: ArrayLike, labels: ArrayLike | None, batch: int, train: bool,
        augment: ArrayLike | None = None, rows: Rows | None = None,
    ) -> Float[Array, "batch features"]:  # fmt: skip
        c = TimeEmbedding(
            self.features, self.frequencies, self.time_scale, self.kernel_init, self.augment_dim,
            name="time",
        )(t, batch, augment)  # fmt: skip
        if self.num_classes is None:
            check_condition(labels, batch, None, self.label_dropout)
            return c
        return c + LabelEmbedding(
            self.num_classes, self.features, self.label_dropout, self.embedding_init, name="label"
        )(labels, batch, train, rows)
