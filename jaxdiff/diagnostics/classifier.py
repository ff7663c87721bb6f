"""The diffusion classifier: a class-conditional denoiser says which class an example is of.

With the noise's error of class c at time t,  e_c(t) = E_eps |eps - eps_hat(x_t, t, c)|^2, and weights
w on the times,

    E_c = sum_j w_j e_c(t_j),    class = argmin_c E_c,    p(c | x) = softmax_c(log p(c) - E_c).

Under the weights of the variational bound ("elbo") E_c is -log p(x | c) in nats, up to a number that
is the same for all classes, if the denoiser is exact. Li, Prabhudesai, Duggal, Brown & Pathak, "Your
Diffusion Model is Secretly a Zero-Shot Classifier" (2023), find that one noise for all classes matters
most, that equal weights ("simple") often do better than the bound's, and that most classes can be
dropped after few evaluations. Weights fitted to a few labelled examples: Jeong, Uselis, Oh & Rohrbach,
"Diffusion Classifiers Understand Compositionality, but Conditions Apply" (2025).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from jaxdiff.arrays import as_arrays, is_concrete
from jaxdiff.denoisers import Denoiser
from jaxdiff.diagnostics.errors import draws_at, noise_errors
from jaxdiff.losses import WEIGHTINGS, Weighting
from jaxdiff.names import check_options, unknown
from jaxdiff.processes import Process


def even_times(process: Process, count: int) -> Float[np.ndarray, " times"]:
    """`count` times in the middle of equal parts of [t_min, t_max]."""
    count = operator.index(count)
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    return process.t_min + (process.t_max - process.t_min) * (np.arange(count) + 0.5) / count


def time_weights(
    process: Process, t: ArrayLike, weighting: str | Weighting = "simple", **options: Any
) -> Float[np.ndarray, " times"]:
    """The weights w_j of times t_j from a training weighting: w(t_j) (t_max - t_min) / times.

    `weighting` is a name of `jaxdiff.losses.WEIGHTINGS` or a function (lam, rate) -> log w of that
    kind, `options` are its own. "simple" weighs all times alike; with "elbo", at `even_times`,
    E_c is in nats. Raises ValueError for an unknown weighting or option.
    """
    if not callable(weighting):
        if weighting not in WEIGHTINGS:
            raise ValueError(unknown("unknown weighting", weighting, WEIGHTINGS))
        check_options(f"weighting {weighting!r}", WEIGHTINGS[weighting], options, 2)
        weighting = WEIGHTINGS[weighting]
    t = np.asarray(t, np.float64)
    draws_at(process, t)
    rate = process.rates(t)[1] / (2.0 * process.sigma(t) ** 2)  # g^2 = -2 sigma^2 dlam/dt
    log_w = np.asarray(weighting(process.half_log_snr(t), rate, **options), np.float64)
    return np.exp(log_w) * (process.t_max - process.t_min) / len(t)


def class_errors(
    denoiser: Denoiser, process: Process, x0: Float[ArrayLike, "batch ..."], classes: Any,
    t: Float[ArrayLike, " times"], key: Array, *, each: bool = False, paired: bool = True,
    batch_size: int = 1024,
) -> Float[Array, "batch classes times"]:  # fmt: skip
    """|eps - eps_hat(x_t, t, c)|^2, the sum over elements, for every class and time.

    Arguments:
      denoiser: of any prediction, conditional.
      classes: what the denoiser takes as cond, leaves [classes, ...]: for labels 0 to 9,
        `np.arange(10)`; or, with `each`, every example's own candidates, leaves [batch, classes,
        ...] (captions of an image, say).
      t: times, say `even_times(process, 64)`; one draw of noise each.
      key: one key, or one per example (`jaxdiff.sample_keys`).
      paired: one noise for all classes of an example, which is what makes few draws enough; False
        draws them apart, for comparison.
      batch_size: inputs that the network sees at once, at most (but at least one of every class).

    Raises ValueError or TypeError for x0 that is not finite, classes without a common length, t at an
    end of the process, a denoiser of several predictions or with memory.
    """
    x0, classes, _ = _checked(x0, classes, each)
    return noise_errors(
        denoiser, x0, classes, draws_at(process, t), key, paired=paired, batch_size=batch_size
    )


def log_posterior(
    errors: Float[ArrayLike, "batch classes times"], weights: Float[ArrayLike, " times"],
    log_prior: Float[ArrayLike, " classes"] | None = None,
) -> Float[np.ndarray, "batch classes"]:  # fmt: skip
    """log softmax_c(log p(c) - sum_j w_j e_cj), in nats, float64; the prior is uniform by default."""
    energies = np.asarray(errors, np.float64) @ _weights(weights, np.shape(errors)[-1])
    return _log_softmax(
        -energies + (0.0 if log_prior is None else np.asarray(log_prior, np.float64))
    )


def _log_softmax(logits):
    top = logits - logits.max(axis=1, keepdims=True)
    return top - np.log(np.sum(np.exp(top), axis=1, keepdims=True))


class Classified(NamedTuple):
    """What `classify` returns.

    index: [batch], the class, as an index into `classes`.
    energies: [batch, classes], the weighted mean of the errors; infinite for the classes that were
      dropped before the last stage.
    evaluations: of the network, an example.
    """

    index: Int[np.ndarray, " batch"]
    energies: Float[np.ndarray, "batch classes"]
    evaluations: int


def classify(
    denoiser: Denoiser, process: Process, x0: Float[ArrayLike, "batch ..."], classes: Any,
    key: Array, *, stages: Sequence[tuple[int, int]] = ((64, 1),),
    weighting: str | Weighting | ArrayLike = "simple", each: bool = False, paired: bool = True,
    batch_size: int = 1024,
) -> Classified:  # fmt: skip
    """Classify in stages: after n_k times an example the m_k best classes are kept.

    The times of the last stage, n of them, are `even_times(process, n)`; those of a stage are every
    (n_{k+1} / n_k)-th of the next one's, and it evaluates what it adds to the stage before, for the
    classes that are left. Li et al. (2023), section 3.3, who keep 5 of 37 classes after 25 of 250.

    Arguments:
      stages: pairs (n_k, m_k), n_k rising, each a divisor of the next, and m_k falling to 1;
        ((64, 1),) drops none early.
      weighting: as in `time_weights`, or an array [n] of weights for the last stage's times.
      classes, key, each, paired, batch_size: as in `class_errors`.

    Raises ValueError for stages out of order or that do not divide each other, more classes kept than
    there are, x0 that is not finite, and weights of another number, negative, not finite, or all 0 in
    a stage.
    """
    x0, classes, count = _checked(x0, classes, each)
    stages = _stages(stages, count)
    last = stages[-1][0]
    t = even_times(process, last)
    if isinstance(weighting, str) or callable(weighting):
        weighting = time_weights(process, t, weighting)
    weights = _weights(weighting, last)
    places = _places([number for number, _ in stages])
    for at in places:
        if not weights[at].sum() > 0:
            raise ValueError(f"the weights are 0 at all {len(at)} times of a stage")
    batch = len(x0)
    alive = np.broadcast_to(np.arange(count), (batch, count))
    energy, mass, evaluations = np.zeros((batch, count)), 0.0, 0
    for before, at, (_, keep) in zip([[], *places], places, stages):
        new = np.setdiff1d(at, before)
        conds = jax.tree.map(lambda a: a[np.arange(batch)[:, None], alive], classes)  # noqa: B023
        draws = draws_at(process, t[new], number=new)
        errors = noise_errors(denoiser, x0, conds, draws, key, paired=paired, batch_size=batch_size)
        evaluations += len(new) * alive.shape[1] * denoiser.cost
        energy = energy + np.asarray(errors, np.float64) @ weights[new]
        mass += weights[new].sum()
        energies = np.full((batch, count), np.inf)
        np.put_along_axis(energies, alive, energy / mass, axis=1)
        best = np.argsort(energy, axis=1, kind="stable")[:, :keep]
        alive, energy = (np.take_along_axis(a, best, axis=1) for a in (alive, energy))
    return Classified(alive[:, 0], energies, evaluations)


def fit_weights(
    errors: Float[ArrayLike, "batch classes times"], index: Int[ArrayLike, " batch"],
    penalty: float = 0.01, iterations: int = 3000,
) -> Float[np.ndarray, " times"]:  # fmt: skip
    """Non-negative weights of the times that classify some labelled examples best.

        min over w >= 0 of  mean_i -log softmax_c(-sum_j w_j e_icj)[index_i] + penalty |v - mean v|^2

    with v_j = w_j s_j, s_j the root mean square over examples and classes of the errors at t_j less
    their mean over classes. It is convex: multinomial logistic regression with one coefficient a
    time, found by accelerated projected gradients on the host (Beck & Teboulle 2009). A large
    `penalty` makes the times count alike; the size of w then is a fitted temperature.

    Arguments:
      errors: of `class_errors` for the labelled examples.
      index: their classes, as indices.

    Raises ValueError for indices that do not fit, a negative penalty, no iterations.
    """
    e = np.asarray(errors, np.float64)
    index = np.asarray(index)
    if e.ndim != 3 or index.shape != e.shape[:1] or not np.issubdtype(index.dtype, np.integer):
        raise ValueError(
            f"errors must be [batch, classes, times] and index [batch] integers, got {e.shape} and "
            f"{index.dtype} {index.shape}"
        )
    if not (np.all(index >= 0) and np.all(index < e.shape[1])):
        raise ValueError(f"indices must be from 0 to {e.shape[1] - 1}, got {index}")
    if not penalty >= 0 or iterations < 1:
        raise ValueError(f"need penalty >= 0 and iterations >= 1, got {penalty} and {iterations}")
    e = e - e.mean(axis=1, keepdims=True)
    size = np.sqrt(np.mean(e**2, axis=(0, 1)))
    size = np.where(size > 0, size, 1.0)
    e = e / size
    batch, _, times = e.shape
    centre = np.eye(times) - 1.0 / times
    target = e[np.arange(batch), index].mean(axis=0)
    # The softmax's Hessian is below half the identity.
    bound = 0.5 * np.linalg.norm(e.reshape(-1, times), 2) ** 2 / batch + 2.0 * penalty
    v = momentum = np.full(times, 1.0 / times)
    rate = 1.0
    for _ in range(iterations):
        p = np.exp(_log_softmax(-(e @ momentum)))  # which may be negative on its way
        gradient = target - np.einsum("bc,bct->t", p, e) / batch + 2.0 * penalty * centre @ momentum
        new = np.maximum(momentum - gradient / bound, 0.0)
        faster = 0.5 * (1.0 + np.sqrt(1.0 + 4.0 * rate**2))
        momentum = new + (rate - 1.0) / faster * (new - v)
        v, rate = new, faster
    return v / size


def _checked(x0: Any, classes: Any, each: bool) -> tuple[Array, Any, int]:
    """x0, the classes of every example, leaves [batch, classes, ...], and their number."""
    x0, classes = jnp.asarray(x0), as_arrays(classes)
    if is_concrete(x0) and not np.all(np.isfinite(x0)):
        raise ValueError("x0 must be finite: no class has the least error of NaN or inf")
    if not each:
        classes = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(x0), *a.shape)), classes)
    shapes = {np.shape(leaf)[:2] for leaf in jax.tree.leaves(classes)}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2 or next(iter(shapes))[0] != len(x0):
        raise ValueError(
            "classes must have leaves [classes, ...] of one length, or, with each=True, [batch, "
            f"classes, ...] for {len(x0)} examples, got {classes}"
        )
    return x0, classes, shapes.pop()[1]


def _weights(weights: Any, times: int) -> Float[np.ndarray, " times"]:
    weights = np.asarray(weights, np.float64)
    if weights.shape != (times,):
        raise ValueError(f"weights must be [{times}], one a time, got shape {weights.shape}")
    if not np.all((weights >= 0) & np.isfinite(weights)):
        raise ValueError(f"weights must be finite and not negative, got {weights}")
    return weights


def _stages(stages: Any, classes: int) -> list[tuple[int, int]]:
    stages = [(operator.index(n), operator.index(m)) for n, m in stages]
    times, kept = [n for n, _ in stages], [classes, *(m for _, m in stages)]
    rising = all(a < b for a, b in zip([0, *times], times))
    falling = all(a >= b for a, b in zip(kept, kept[1:]))
    if not stages or not rising or not falling or kept[-1] != 1:
        raise ValueError(
            "stages are pairs (times, classes kept), times rising and classes falling from at most "
            f"{classes} to 1, got {stages}"
        )
    if any(b % a for a, b in zip(times, times[1:])):
        raise ValueError(f"the times of each stage must divide the next one's, got {times}")
    return stages


def _places(numbers: list[int]) -> list[Int[np.ndarray, " times"]]:
    """For every stage, which of the last one's times: evenly spaced, about centred, and nested."""
    places = [np.arange(numbers[-1])]
    for number in reversed(numbers[:-1]):
        stride = len(places[0]) // number
        first = np.argmin(np.abs(places[0][:stride] - 0.5 * numbers[-1] / number))
        places.insert(0, places[0][first::stride])
    return places
