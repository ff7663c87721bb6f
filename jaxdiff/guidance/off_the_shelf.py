"""EluCD: guidance by a classifier that has only seen clean data.

Ma, Hu, Wang & Sun, "Elucidating The Design Space of Classifier-Guided Diffusion Generation" (2024).
The classifier f is asked about the denoised x0^ and not about x_t, and its gradient is taken with
respect to x0^, so that nothing is propagated through the network:

    g = grad_{x0^} [a f_y(x0^) - log sum_k exp(b f_k(x0^))]

b = a is ordinary log-softmax; b < a moves from the conditional to the joint probability. Which
design is better is told by how well calibrated f is on x0^ (`calibration`). A classifier of clean
data here is fn(params, x0) -> logits [batch, classes], such as `network.apply` of a Linen module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from jaxdiff.arrays import as_arrays, is_concrete, jit_trees, to_batch
from jaxdiff.denoisers import Denoiser, check_single, wrap
from jaxdiff.grids import Grid
from jaxdiff.guidance.classifier import add_to_score, check_label, check_positive_number, chosen
from jaxdiff.guidance.together import Scale, as_scale, at_level, check_scale
from jaxdiff.integrator import Carry, Control, RowInfo
from jaxdiff.predictions import convert
from jaxdiff.processes.base import Process
from jaxdiff.solvers.clocks import check_choice
from jaxdiff.solvers.first_order import posterior_share

CleanClassifier = Callable[[Any, Array], Array]


@dataclasses.dataclass(frozen=True)
class Softplus:
    """log(1 + exp(beta x)) / beta: ReLU with a smooth gradient, for the same weights.

    A classifier trained with ReLU gives better gradients with this activation in its place (`beta`
    about 5; the published scripts have 3 and 5); beta -> infinity is ReLU. Raises ValueError unless
    beta is positive.
    """

    beta: float = 5.0

    def __post_init__(self):
        check_positive_number("beta", self.beta)

    def __call__(self, x: Array) -> Array:
        return jax.nn.softplus(self.beta * x) / self.beta


def clean_gradient(
    classifier: CleanClassifier, params: Any, x0: Float[Array, "batch ..."], label: Array,
    joint: ArrayLike = 1.0, marginal: ArrayLike = 0.5,
) -> Float[Array, "batch ..."]:  # fmt: skip
    """g = grad_x0 [a f_y - log sum_k exp(b f_k)], a = `joint` and b = `marginal`; EluCD's direction."""

    def objective(y):
        logits = classifier(params, y)
        of_label = jnp.sum(logits * chosen(label, logits), -1)
        return jnp.sum(joint * of_label - jax.nn.logsumexp(marginal * logits, -1))

    return jax.grad(objective)(x0)


def off_the_shelf(
    denoiser: Denoiser, classifier: CleanClassifier, params: Any, label: ArrayLike,
    scale: Scale = 1.0, joint: ArrayLike = 1.0, marginal: ArrayLike = 0.5,
) -> Denoiser:  # fmt: skip
    """score + s g, g the classifier's gradient at x0^: s = 0 is the denoiser itself.

    EluCD (see the module) for any tableau; `elucd` is the published step of DDPM with its schedule.
    g stands for the gradient of log p(y | x_t) with respect to x_t, which would be that of x0^
    times the network's Jacobian: as if the Jacobian were I, where classifier guidance has s = 1.
    One evaluation of the denoiser, none of its Jacobian.

    Arguments:
      classifier, params: fn(params, x0) -> logits, and its pytree.
      label: y, integers, a scalar or [batch].
      scale: s, a number, [batch] or a function of (t, alpha, sigma).
      joint, marginal: a and b, the published 1 and 1/2; b = 0 leaves the logit alone.

    Raises TypeError or ValueError for labels that are no integers from 0, a scale that is not
    finite, temperatures that are not positive (b may be 0), or a denoiser of several predictions.
    """
    check_single(denoiser, "off_the_shelf")
    strengths = _strengths(params, label, scale, joint, marginal)
    guided = _Guided(classifier, denoiser.prediction)
    return wrap(guided, denoiser, strengths, denoiser.prediction)


def _strengths(params, label, scale, joint, marginal):
    check_label(label)
    check_positive_number("joint", joint)
    if is_concrete(marginal) and not (np.all(np.isfinite(marginal)) and np.all(marginal >= 0)):
        raise ValueError(f"marginal must be finite and at least 0, got {marginal!r}")
    scale = as_scale(scale, "EluCD's guidance")
    return as_arrays((params, jnp.asarray(label), scale, joint, marginal))


@dataclasses.dataclass(frozen=True)
class _Guided:
    classifier: CleanClassifier
    prediction: str

    def check_strengths(self, strengths, batch, alpha):
        _, label, scale, *_ = strengths
        check_scale(label, batch, "labels")
        check_scale(scale, batch)

    def __call__(self, evaluate, strengths, x, levels, cond):
        params, label, scale, joint, marginal = strengths
        out = evaluate(x, *levels, cond)
        x0 = convert(out.astype(x.dtype), x, self.prediction, "x0", *levels[1:])
        g = clean_gradient(self.classifier, params, x0, label, joint, marginal)
        return add_to_score(out, g, at_level(scale, levels), self.prediction, *levels[1:])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class EluCD(Control):
    """The control of `elucd`, which see; `weights` [rows] or [rows, batch]: what multiplies g after
    each row."""

    params: Any
    label: Any
    weights: Any
    joint: Any
    marginal: Any
    classifier: CleanClassifier = dataclasses.field(metadata={"static": True})
    prediction: str = dataclasses.field(metadata={"static": True})

    def after(
        self, aux: Any, row: RowInfo, x: Any, out: Any, z: Any, carry: Carry, key: Any
    ) -> tuple[Carry, Any]:
        """Move the new state along the gradient at the row's x0^."""
        x0 = convert(out.astype(x.dtype), x, self.prediction, "x0", row.alpha, row.sigma)
        g = clean_gradient(self.classifier, self.params, x0, self.label, self.joint, self.marginal)
        weight = self.weights[row.index] * (row.active != 0)
        first = carry.registers[0] + to_batch(weight.astype(x.dtype), g) * g
        return carry._replace(registers=(first, *carry.registers[1:])), aux


def elucd(
    grid: Grid, denoiser: Denoiser, classifier: CleanClassifier, params: Any, label: ArrayLike,
    scale: Scale = 1.0, joint: ArrayLike = 1.0, marginal: ArrayLike = 0.5,
    gamma: ArrayLike = 0.3, variance: str = "fixed_small", span: float | None = None,
) -> EluCD:  # fmt: skip
    """The control that makes `ddpm(grid, variance)` the published sampler of EluCD:

        x' <- x' + s (var + gamma max_var sin(pi t / T)) g

    with var the variance of the step's noise, and max_var the largest so far:

        sample(denoiser, ddpm(grid), x_T, key=key, control=elucd(grid, denoiser, f, params, label))

    Arguments:
      denoiser: what is sampled; `clip_x0` of it, as published, clips x0^ for the classifier too.
      classifier, params, label, scale, joint, marginal: as in `off_the_shelf`.
      gamma: of the sine, 0.3 as published, at least 0; 0 leaves var alone.
      variance: "fixed_small" or "fixed_large", that of the tableau. The published code has a learned
        variance between them.
      span: T; None takes the grid's first t.

    Raises what `off_the_shelf` raises, and ValueError for a gamma or a span out of range, an unknown
    variance, or a grid from data to noise.
    """
    check_single(denoiser, "elucd")
    check_choice("variance", variance, ("fixed_small", "fixed_large"))
    params, label, scale, joint, marginal = _strengths(params, label, scale, joint, marginal)
    if is_concrete(gamma) and not 0 <= gamma < np.inf:
        raise ValueError(f"gamma must be finite and at least 0, got {gamma!r}")
    if grid.backward:
        raise ValueError("elucd runs from noise to data only")
    check_positive_number("span", grid.t[0] if span is None else span)
    xp = grid.xp
    size = grid.sigma[1:] if variance == "fixed_small" else grid.sigma[:-1]
    var = xp.stack([size[i] ** 2 * posterior_share(grid, i) for i in range(grid.steps)])
    wave = xp.sin(np.pi * grid.t[:-1] / (grid.t[0] if span is None else span))
    largest = xp.maximum.accumulate(var) if xp is np else jax.lax.cummax(var)
    extra = jnp.asarray(largest * xp.maximum(wave, 0.0)) * gamma
    levels = zip(grid.t[:-1], grid.alpha[:-1], grid.sigma[:-1])
    scales = jnp.stack([jnp.asarray(at_level(scale, level)) for level in levels])
    weights = to_batch(jnp.asarray(var) + extra, scales) * scales
    return EluCD(params, label, weights, joint, marginal, classifier, denoiser.prediction)


# --- calibration ----------------------------------------------------------------------------------


def expected_calibration_error(
    probabilities: Float[ArrayLike, "n classes"], label: Int[ArrayLike, " n"], bins: int = 15
) -> float:
    """ECE = sum_b |B_b| / n |accuracy(B_b) - confidence(B_b)|, 0 to 1; 0 is calibrated.

    Samples are put into `bins` equal intervals (low, high] of their confidence, the largest
    probability. Guo, Pleiss, Sun & Weinberger, "On Calibration of Modern Neural Networks" (2017).
    Float64 on the host. Raises ValueError for shapes that do not fit, rows that are no
    probabilities, or bins below 1; TypeError or ValueError for labels that are none.
    """
    p = np.asarray(probabilities, np.float64)
    if p.ndim != 2 or not len(p) or np.shape(label) != p.shape[:1]:
        raise ValueError(
            f"need probabilities [n, classes] and n labels, got shapes {p.shape} and {np.shape(label)}"
        )
    check_label(label, p.shape[1])
    if not (np.all(p >= 0) and np.allclose(p.sum(1), 1.0, atol=1e-4)):
        raise ValueError("rows must be probabilities: not negative, with sum 1")
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    confidence, right = p.max(1), p.argmax(1) == np.asarray(label)
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(place, right - confidence, bins)
    return float(np.abs(gap).sum() / len(p))


def calibration(
    denoiser: Denoiser, process: Process, classifier: CleanClassifier, params: Any,
    x0: Float[ArrayLike, "n ..."], label: Int[ArrayLike, " n"], times: Float[ArrayLike, " times"],
    key: Array, bins: int = 15, cond: Any = None,
) -> Float[np.ndarray, " times"]:  # fmt: skip
    """ECE of the classifier on the denoised x0^ of noised data, at each time, [times].

    By this EluCD ranks designs of the classifier and choices of temperature: the lower over the
    times, the better it guides. Arguments: labelled data, and times of `process`; every time draws
    its own noise from `key`. Raises what `expected_calibration_error` raises.
    """
    check_single(denoiser, "calibration")
    times = np.asarray(times, np.float64)
    if times.ndim != 1 or not len(times):
        raise ValueError(f"times must be a list of at least one, got shape {times.shape}")
    levels = times, process.alpha(times), process.sigma(times)
    p = _probabilities(denoiser, classifier, params, jnp.asarray(x0), levels, key, cond)
    return np.array([expected_calibration_error(row, label, bins) for row in np.asarray(p)])


@jit_trees
def _probabilities(denoiser, classifier, params, x0, levels, key, cond):
    def at(inputs):
        number, (t, alpha, sigma) = inputs
        eps = jax.random.normal(jax.random.fold_in(key, number), x0.shape, x0.dtype)
        x = alpha.astype(x0.dtype) * x0 + sigma.astype(x0.dtype) * eps
        found = denoiser.predict("x0", x, t, alpha, sigma, cond)
        return jax.nn.softmax(classifier(params, found.astype(x0.dtype)))

    return jax.lax.map(at, (jnp.arange(len(levels[0])), levels))
