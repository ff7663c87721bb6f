"""Classifier guidance: the score of a denoiser, and the gradient of a classifier of noisy data.

By Bayes' rule the score of p(x_t | y) is that of p(x_t) plus the gradient of log p(y | x_t). A
classifier here is a function

    fn(params, x, (t, alpha, sigma)) -> logits [batch, classes]

of x_t = x, differentiable in x: log p(y | x_t) up to a number a sample. `mixture_classifier` is the
exact one of a Gaussian mixture; `noisy_cross_entropy` trains a network to be one. Classifiers of
clean data are for `jaxdiff.guidance.off_the_shelf` and `jaxdiff.guidance.train_experts`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float, Int

from jaxdiff.arrays import as_arrays, is_concrete, to_batch
from jaxdiff.denoisers import Denoiser, check_single, wrap
from jaxdiff.guidance.together import Scale, as_scale, at_level, check_scale
from jaxdiff.mixtures import GaussianMixture
from jaxdiff.predictions import affine
from jaxdiff.processes.base import Process

Classifier = Callable[[Any, Array, tuple[Any, Any, Any]], Array]


def classifier_guidance(
    denoiser: Denoiser, classifier: Classifier, params: Any, label: ArrayLike,
    scale: Scale = 1.0, temperature: ArrayLike = 1.0,
) -> Denoiser:  # fmt: skip
    """score + s grad_x log p(y | x_t): s = 1 is the conditional denoiser, s = 0 the denoiser itself.

    That is uncond + s (cond - uncond) where the classifier is exact. s samples p(x_t) p(y | x_t)^s,
    to the extent that a sum of scores can. Dhariwal & Nichol, "Diffusion Models Beat GANs on Image
    Synthesis" (2021), whose DDIM form (algorithm 2) is eps - s sigma grad; their form for DDPM
    (algorithm 1), mean + s variance grad, is that of small steps. It holds for every prediction and
    every tableau. One evaluation of the denoiser, without its Jacobian, and of the classifier with
    its gradient. At alpha = 0, where x_t says nothing of y, there is no guidance.

    Arguments:
      denoiser: any single prediction, conditional or not; `sample`'s cond is passed to it alone.
      classifier: see the module; a module-level function or a hashable object. One with an attribute
        `num_classes` has its labels checked.
      params: its pytree.
      label: y, integers, a scalar or [batch].
      scale: s, a number, [batch] or a function of (t, alpha, sigma).
      temperature: the logits are divided by it, positive. Above 1 it makes p(y | x_t) less certain.

    Parameters, labels, scales and temperatures are leaves: new ones compile nothing. Raises TypeError
    for labels that are not integers, ValueError for labels out of range, for a scale that is not
    finite, a temperature that is not positive, or a denoiser of several predictions; and, when run,
    what `equinox.error_if` raises for a label beyond the classes of the logits.
    """
    check_single(denoiser, "classifier_guidance")
    check_label(label, getattr(classifier, "num_classes", None))
    check_positive_number("temperature", temperature)
    scale = as_scale(scale, "classifier_guidance")
    strengths = as_arrays((params, jnp.asarray(label), scale, temperature))
    return wrap(_Guided(classifier, denoiser.prediction), denoiser, strengths, denoiser.prediction)


@dataclasses.dataclass(frozen=True)
class _Guided:
    classifier: Classifier
    prediction: str

    def check_strengths(self, strengths, batch, alpha):
        _, label, scale, *_ = strengths
        check_scale(label, batch, "labels")
        check_scale(scale, batch)

    def __call__(self, evaluate, strengths, x, levels, cond):
        params, label, scale, temperature = strengths
        out = evaluate(x, *levels, cond)

        def log_p(y):
            logits = self.classifier(params, y, levels) / temperature
            return jnp.sum(jax.nn.log_softmax(logits) * chosen(label, logits))

        gradient = jax.grad(log_p)(x)
        return add_to_score(out, gradient, at_level(scale, levels), self.prediction, *levels[1:])


def chosen(label: Array, logits: Float[Array, "batch classes"]) -> Array:
    """One-hot rows of the labels, a scalar or [batch]; a run-time error where there is no such class."""
    classes = logits.shape[-1]
    unknown = (label < 0) | (label >= classes)
    label = eqx.error_if(label, unknown, f"labels must be from 0 to {classes - 1}")
    label = jnp.broadcast_to(label, logits.shape[:1])
    return jax.nn.one_hot(label, classes, dtype=logits.dtype)


def add_to_score(
    out: Any, gradient: Any, scale: ArrayLike, prediction: str, alpha: ArrayLike, sigma: ArrayLike
) -> Any:
    """The prediction `out` whose score is larger by `scale` times `gradient`; `out` at alpha = 0.

    A score g more is -sigma g of eps, and sigma^2 / alpha g of x0. Arrays or pytrees, leaves
    [batch, ...], in the precision of the gradient; scale, alpha and sigma scalars or [batch].
    """
    u = jnp.asarray(affine("score", prediction, alpha, sigma)[0])
    u = jnp.where(jnp.isfinite(u), u, 0.0) * scale
    return jax.tree.map(lambda a, g: a.astype(g.dtype) + _times(u, g), out, gradient)


def _times(coefficient: Any, g: Array) -> Array:
    return to_batch(coefficient, g).astype(g.dtype) * g


def check_label(label: Any, classes: int | None = None) -> None:
    """Raise TypeError unless labels are integers, ValueError unless they are from 0 to classes - 1."""
    dtype = label.dtype if hasattr(label, "dtype") else np.asarray(label).dtype
    if not np.issubdtype(dtype, np.integer):
        raise TypeError(f"labels must be integers, got dtype {dtype}")
    if np.ndim(label) > 1:
        raise ValueError(f"labels must be a scalar or [batch], got shape {np.shape(label)}")
    if is_concrete(label):
        low, high = int(np.min(label)), int(np.max(label))
        if low < 0 or (classes is not None and high >= classes):
            most = "" if classes is None else f" to {classes - 1}"
            raise ValueError(f"labels must be from 0{most}, got {low if low < 0 else high}")


def check_positive_number(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is positive and finite, where the host knows it."""
    if is_concrete(value) and not np.all((np.asarray(value) > 0) & np.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")


def mixture_classifier(
    mixture: GaussianMixture, labels: Int[ArrayLike, " components"]
) -> tuple[Classifier, Any]:
    """(fn, params): the exact classifier of a mixture whose components have labels.

    logits_c = log sum_{k of label c} w_k N(x; alpha m_k, alpha^2 V_k + sigma^2 I), the joint
    log-density of x_t and c. Classes are 0 to the largest label. Raises TypeError or ValueError for
    labels that are no integers from 0, not one a component, or that leave a class out.
    """
    check_label(labels)
    labels = np.asarray(labels)
    count = len(mixture.log_weights)
    if labels.shape != (count,) or set(labels) != set(range(labels.max() + 1)):
        raise ValueError(
            f"need a label for each of {count} components, and a component for each label from 0 "
            f"to the largest; got {labels}"
        )
    own = jnp.asarray(labels) == jnp.arange(labels.max() + 1)[:, None]
    table = jnp.where(own, mixture.log_weights, -jnp.inf)
    return _MixtureClassifier(len(table)), (mixture, table)


@dataclasses.dataclass(frozen=True)
class _MixtureClassifier:
    num_classes: int

    def __call__(self, params, x, levels):
        mixture, table = params
        _, alpha, sigma = levels

        def joint(log_weights):
            only = dataclasses.replace(mixture, log_weights=log_weights)
            return only.log_density(x, alpha, sigma)

        return jax.vmap(joint, out_axes=-1)(table)


def noisy_cross_entropy(
    classifier: Classifier, params: Any, process: Process, x0: Float[Array, "batch ..."],
    label: Int[ArrayLike, " batch"], t: ArrayLike, eps: Float[Array, "batch ..."],
) -> Float[Array, " batch"]:  # fmt: skip
    """-log p(y | x_t) of the classifier at x_t = alpha x0 + sigma eps, in nats, [batch].

    Its mean over data, noise and times is least for the true p(y | x_t): the loss of Dhariwal &
    Nichol's noisy classifiers (2021, section 4). t a scalar or [batch]; see
    `jaxdiff.losses.sample_times`. Raises ValueError for labels that are not one a sample.
    """
    check_label(label, getattr(classifier, "num_classes", None))
    if np.shape(label) != x0.shape[:1]:
        raise ValueError(f"need a label for each of {len(x0)} samples, got {np.shape(label)}")
    t = jnp.asarray(t) * 1.0
    levels = t, process.alpha(t), process.sigma(t)
    logits = classifier(params, process.perturb(x0, eps, t), levels)
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(label))
