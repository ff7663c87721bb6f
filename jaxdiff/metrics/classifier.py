"""A small digit classifier, trained on the spot: features, labels and a floor for digit figures."""

import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float, Int, Key, PyTree

from jaxdiff import data
from jaxdiff.metrics.frechet import frechet_distance

_SIZE = 8


class _Network(nn.Module):
    """[n, 8, 8, 1] -> 256 -> 64 (the features) -> 10 (the logits), SiLU between."""

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "n 8 8 1"]) -> tuple[Array, Array]:
        # Accelerators multiply in less by default; uniform weights compile faster than normal ones.
        init = nn.initializers.lecun_uniform()
        dense = functools.partial(nn.Dense, precision="highest", kernel_init=init)
        hidden = nn.silu(dense(256)(x.reshape(len(x), -1)))
        features = nn.silu(dense(64)(hidden))
        return features, dense(10)(features)


@dataclasses.dataclass(frozen=True, eq=False)
class DigitClassifier:
    """Digits to 64 features, ten logits, a label; get one from `digit_classifier`.

    Every method takes images [n, size, size, 1] in [-1, 1], size a multiple of 8 (averaged down to
    8 x 8), and raises ValueError for another shape, NaN or infinity. Clip samples to [-1, 1] first,
    as when they are saved: what lies outside is not an image, yet it would count.

    Attributes:
      params: the network's variables.
      num_classes: 10.
    """

    params: PyTree
    num_classes: int = 10

    def features(self, x: Float[ArrayLike, "n size size 1"]) -> Float[np.ndarray, "n 64"]:
        """The activations before the last layer, for `frechet_distance` and its like."""
        return self._apply(x)[0]

    def logits(self, x: Float[ArrayLike, "n size size 1"]) -> Float[np.ndarray, "n 10"]:
        """Log-probabilities of the digits, up to a constant an image."""
        return self._apply(x)[1]

    def predict(self, x: Float[ArrayLike, "n size size 1"]) -> Int[np.ndarray, " n"]:
        """The most probable digit."""
        return self._apply(x)[1].argmax(axis=-1).astype(np.int32)

    def _apply(self, x: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        images = np.asarray(x, np.float32)
        size = images.shape[1] if images.ndim == 4 else 0
        if images.size == 0 or size % _SIZE or images.shape[1:] != (size, size, 1):
            raise ValueError(
                f"images must be [n, size, size, 1] with n >= 1 and size a multiple of {_SIZE}, "
                f"got shape {list(images.shape)}"
            )
        bad = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))
        if len(bad):
            raise ValueError(
                f"images must be finite: {len(bad)} of {len(images)} are not, the first is "
                f"number {bad[0]}"
            )
        scale = size // _SIZE
        small = images.reshape(-1, _SIZE, scale, _SIZE, scale, 1).mean(axis=(2, 4))
        features, logits = _Network().apply(self.params, small)
        return np.asarray(features), np.asarray(logits)


@functools.lru_cache(maxsize=4)
def digit_classifier(seed: int = 0) -> DigitClassifier:
    """A classifier of scikit-learn's digits, trained in a few seconds on first use.

    A network with two hidden layers, 1,500 steps of AdamW on batches of 128 from `digits("train")`
    in its nine positions (shifted by up to one pixel each way). About 0.99 of `digits("test")` is
    classified correctly. The same seed gives the same classifier on the same kind of machine (other
    machines round differently); this process keeps it, nothing is written to disk.

    Args:
      seed: at least 0; decides the first weights and the batches.

    Raises:
      ValueError: a negative seed.
    """
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    train = data.digits("train")
    padded = np.pad(train.x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1)
    shifts = [padded[:, i : i + _SIZE, j : j + _SIZE] for i in range(3) for j in range(3)]
    x, label = np.concatenate(shifts), np.tile(train.label, len(shifts))
    batches = np.random.default_rng(seed).integers(0, len(x), (1500, 128))
    with jax.enable_x64(False):  # whatever the caller's: weights are drawn differently with it
        return DigitClassifier(jax.device_get(_train(jax.random.key(seed), x, label, batches)))


def conditional_accuracy(
    classifier: DigitClassifier, x: Float[ArrayLike, "n size size 1"], label: Int[ArrayLike, " n"]
) -> float:
    """The fraction of samples that the classifier gives the label they were asked for, 0 to 1.

    Args:
      classifier: anything with `predict` and `num_classes`.
      x: samples.
      label: the label each was asked for, integers from 0 to num_classes - 1.

    Raises:
      TypeError: labels that are not integers.
      ValueError: a label out of range (an unconditional sample's null label included), or not one
        label a sample; and what `predict` raises.

    It says nothing of diversity. Ravuri and Vinyals, "Classification Accuracy Score for Conditional
    Generative Models" (2019), do the reverse: train a classifier on samples, test it on data.
    """
    asked = np.asarray(label)
    if not np.issubdtype(asked.dtype, np.integer):
        raise TypeError(f"labels must be integers, got dtype {asked.dtype}")
    if asked.shape != (len(x),):
        raise ValueError(f"there must be a label for each of {len(x)} samples, got {asked.shape}")
    bad = asked[(asked < 0) | (asked >= classifier.num_classes)]
    if len(bad):
        raise ValueError(
            f"labels must be from 0 to {classifier.num_classes - 1}, got {bad[0]} "
            f"({len(bad)} out of range)"
        )
    return float(np.mean(classifier.predict(x) == asked))


def real_floor(
    classifier: DigitClassifier,
    n: int = 898,
    m: int = 899,
    splits: int = 20,
    seed: int = 0,
) -> float:
    """The Frechet distance of real digits from real digits, for samples of n and m.

    All 1,797 digits are split at random into halves of 898 and 899, `splits` times; the mean
    distance between the halves' features is the floor for n = 898, m = 899. As both halves have one
    distribution, that is all bias, which goes as 1 / n + 1 / m; so other n and m scale it by
    (1 / n + 1 / m) / (1 / 898 + 1 / 899). Print it beside every figure: 5,000 generated digits
    against all 1,797 compare with `real_floor(classifier, 5000, 1797)`, what 5,000 new real digits
    would get. Below it, samples are closer to these 1,797 than new digits would be (a network that
    only repeats them goes down to the part of 1 / 5000).

    Raises:
      ValueError: n or m below 2, or splits below 1.
    """
    if min(n, m) < 2 or splits < 1:
        raise ValueError(f"n and m must be at least 2, splits 1, got {n}, {m} and {splits}")
    features = classifier.features(data.digits("all").x)
    half = len(features) // 2
    rng = np.random.default_rng(seed)
    distances = []
    for _ in range(splits):
        order = rng.permutation(len(features))
        distances.append(frechet_distance(features[order[:half]], features[order[half:]]))
    return float(np.mean(distances)) * (1 / n + 1 / m) / (1 / half + 1 / (len(features) - half))


@jax.jit
def _train(
    key: Key[Array, ""],
    x: Float[Array, "n 8 8 1"],
    label: Int[Array, " n"],
    batches: Int[Array, "steps batch"],
) -> PyTree:
    network = _Network()
    targets = optax.smooth_labels(jax.nn.one_hot(label, 10), 0.05)
    optimizer = optax.adamw(
        optax.cosine_decay_schedule(3e-3, decay_steps=len(batches)), weight_decay=1e-3
    )

    def loss(params, index):
        logits = network.apply(params, x[index])[1]
        return optax.softmax_cross_entropy(logits, targets[index]).mean()

    def step(carry, index):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, index), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = network.init(key, x[:1])
    return jax.lax.scan(step, (params, optimizer.init(params)), batches)[0][0]
