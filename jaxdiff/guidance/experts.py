"""PPAP: any classifier of clean data guides, through experts for ranges of noise.

Go, Lee, Kim, Lee, Jeong, Lee & Choi, "Towards Practical Plug-and-Play Diffusion Models" (2023). The
times are cut into N equal ranges; in the n-th the classifier is the given one with a LoRA adapter of
its own. Nothing but the diffusion model's own samples x0~ trains them: they are noised to times of the
range, and the expert has to say of x_t what the classifier says of x0~,

    KL(softmax(f(x0~) / temperature) || softmax(f_n(x_t))),

so neither data nor labels are needed. The result guides by `classifier_guidance`:

    fn, params = expert_classifier(f, variables, train_experts(...), process)
    guided = classifier_guidance(denoiser, fn, params, label, scale)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float

from jaxdiff.arrays import as_arrays
from jaxdiff.gradients import Optimized, optimize
from jaxdiff.guidance.classifier import Classifier, check_positive_number
from jaxdiff.models.lora import Adapter, add_lora, lora
from jaxdiff.processes.base import Process
from jaxdiff.solvers.clocks import check_order


def expert_classifier(
    classifier: Callable[[Any, Array], Array], variables: Mapping[str, Any], adapters: Adapter,
    process: Process,
) -> tuple[Classifier, Any]:  # fmt: skip
    """(fn, params): the classifier of noisy data whose expert is chosen by t.

    fn(params, x, (t, alpha, sigma)) is classifier(variables + adapter n, x) with n the range of t,
    of N equal ones of [t_min, t_max]; a time on a border belongs to the lower, as in the published
    code. A scalar t (any sampler's) selects one adapter; t [batch] one a sample.

    Arguments:
      classifier: fn(variables, x) -> logits [batch, classes], `network.apply` of a Linen module.
      variables: {"params": ...}, of the clean classifier.
      adapters: leaves [N, ...], of `train_experts`.

    Raises ValueError for adapters that are not all of one N.
    """
    counts = {leaf.shape[0] for leaf in jax.tree.leaves(adapters)}
    if len(counts) != 1:
        raise ValueError(f"adapters must be stacked on one first axis, got lengths {counts}")
    params = as_arrays((variables, adapters, (process.t_min, process.t_max)))
    return _Experts(classifier), params


@dataclasses.dataclass(frozen=True)
class _Experts:
    classifier: Callable

    def __call__(self, params, x, levels):
        variables, adapters, (low, high) = params
        count = jax.tree.leaves(adapters)[0].shape[0]
        place = jnp.ceil(count * (levels[0] - low) / (high - low)).astype(jnp.int32) - 1
        place = jnp.clip(place, 0, count - 1)

        def at(i, x):
            adapter = jax.tree.map(lambda a: a[i], adapters)
            return self.classifier(add_lora(variables, adapter), x)

        if place.ndim == 0:
            return at(place, x)
        return jax.vmap(lambda i, a: at(i, a[None])[0])(place, x)


def kl_divergence(
    teacher: Float[Array, "batch classes"], student: Float[Array, "batch classes"]
) -> Float[Array, " batch"]:
    """KL(softmax(teacher) || softmax(student)) of logits, in nats."""
    return optax.kl_divergence(jax.nn.log_softmax(student), jax.nn.softmax(teacher))


def train_experts(
    classifier: Callable[[Any, Array], Array], variables: Mapping[str, Any], process: Process,
    samples: Float[ArrayLike, "n ..."], key: Array, optimizer: optax.GradientTransformation, *,
    experts: int = 5, rank: int = 1, match: str = r"kernel$", steps: int = 1000,
    batch_size: int = 64, temperature: ArrayLike = 1.0, divergence: Callable = kl_divergence,
) -> Optimized:  # fmt: skip
    """Adapters of N experts, trained without data or labels; `value` has leaves [N, ...].

    All experts are trained at once, each on its own batch of samples, times (uniform in its range)
    and noise. `losses`: the mean over experts of the mean divergence, before every update.

    Arguments:
      classifier, variables: as in `expert_classifier`.
      samples: x0~, drawn from the diffusion model that is to be guided.
      optimizer: from optax, one that treats every number alone (Adam), or else the experts would
        not be independent.
      experts: N, 5 as published.
      rank, match: of the adapters, see `jaxdiff.models.lora`.
      steps: updates of every expert, so N steps in all.
      batch_size: samples an expert a step.
      temperature: of the teacher, the clean classifier; 1/4 in the published code, positive.
      divergence: (teacher's output, expert's output) -> [batch]; another for other tasks, such as
        the squared error of a depth.

    Raises ValueError for counts below 1 or a temperature that is not positive, and what `lora` does.
    """
    for name, count in (("experts", experts), ("batch_size", batch_size)):
        check_order(count, 10**9, name)
    check_positive_number("temperature", temperature)
    keys = jax.random.split(key, experts + 1)
    start = jax.vmap(lambda k: lora(k, variables, rank, match))(keys[:-1])
    samples = jnp.asarray(samples)
    teacher = _outputs(classifier, variables, samples) / temperature
    args = (classifier, divergence, variables, process, samples, teacher, _Count(batch_size))
    return optimize(_distillation, start, optimizer, steps, args=args, key=keys[-1])


@dataclasses.dataclass(frozen=True)
class _Count:
    """A number that is part of the program."""

    value: int


def _outputs(classifier, variables, samples, size=512):
    parts = [classifier(variables, samples[i : i + size]) for i in range(0, len(samples), size)]
    return jnp.concatenate(parts)


def _distillation(
    adapters, classifier, divergence, variables, process, samples, teacher, batch, key
):
    count = jax.tree.leaves(adapters)[0].shape[0]
    width = (process.t_max - process.t_min) / count

    def loss(adapter, n, key):
        pick, when, noise = jax.random.split(key, 3)
        rows = jax.random.randint(pick, (batch.value,), 0, len(samples))
        t = process.t_min + width * (n + jax.random.uniform(when, (batch.value,)))
        eps = jax.random.normal(noise, (batch.value, *samples.shape[1:]), samples.dtype)
        x = process.perturb(samples[rows], eps, t)
        found = classifier(add_lora(variables, adapter), x)
        return jnp.mean(divergence(teacher[rows], found))

    keys = jax.random.split(key, count)
    return jnp.mean(jax.vmap(loss)(adapters, jnp.arange(count), keys))


def trainable_share(adapters: Adapter, variables: Mapping[str, Any]) -> float:
    """The numbers in `adapters` (of all experts, if stacked) over those of the classifier."""
    sizes = [sum(np.size(a) for a in jax.tree.leaves(tree)) for tree in (adapters, variables)]
    return sizes[0] / sizes[1]
