"""InvDiff: a frozen model is rid of a bias that nobody has labelled.

Hou, Wu, Xu, Huang, Bai, Wu & Bian, "InvDiff: Invariant Guidance for Bias Mitigation in Diffusion
Models" (2024). What the biased model fits badly is what the bias leaves out: from the denoising losses
l_i of its training data soft groups are inferred, rows of w on the simplex, that differ the most,

    max_w std_g L_g,    L_g = sum_i w_ig l_i / sum_i w_ig,

and a small module, zero at first, is trained until the groups are fitted alike,

    min_module mean_g L_g + penalty var_g L_g,

with the losses of the combined prediction of `with_module`, which then samples without the bias.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float

from jaxdiff.arrays import as_arrays, to_batch
from jaxdiff.denoisers import Denoiser, check_known, check_single, wrap
from jaxdiff.gradients import Optimized, optimize
from jaxdiff.losses import score_matching
from jaxdiff.predictions import convert
from jaxdiff.processes.base import Process
from jaxdiff.solvers.clocks import check_choice, check_order

FORMS = ("mix", "add")


def infer_groups(
    losses: Float[ArrayLike, " n"], groups: int, key: Array, steps: int = 500,
    learning_rate: float = 0.01, non_empty: ArrayLike = 3.0,
) -> Float[Array, "n groups"]:  # fmt: skip
    """Soft groups w [n, groups], rows on the simplex, whose mean losses differ the most.

    Adam on std_g L_g + non_empty min_ig (l_i w_ig) from uniform random weights; after each update,
    negative weights become 0 and rows are divided by their sum: the published code. (Its standard
    deviation is the unbiased one.)

    Arguments:
      losses: l_i >= 0 of the biased model, one a sample, such as means of
        `jaxdiff.losses.score_matching` over times and noises.
      groups: G, at least 2; published with 8 and 16 for two to eight true groups.
      non_empty: weight of the last term, against groups that lose samples.

    Raises ValueError for losses that are not [n], n >= 2, finite and not negative, or groups or steps
    out of range.
    """
    check_order(groups, 10**6, "groups", 2)
    known = np.asarray(losses, np.float64)
    if known.ndim != 1 or len(known) < 2 or not np.all(np.isfinite(known) & (known >= 0)):
        raise ValueError(
            f"losses must be two or more finite numbers of at least 0, got shape {known.shape}"
        )
    losses = jnp.asarray(losses, jnp.result_type(float))
    start = jax.random.uniform(key, (len(known), groups), losses.dtype)
    args = as_arrays((losses, non_empty))
    optimizer = optax.adam(learning_rate)
    return optimize(_apart, start, optimizer, steps, args=args, project=_on_simplex).value


def _apart(weights, losses, non_empty):
    spread = jnp.std(group_losses(losses, weights), ddof=1)
    return -spread - non_empty * jnp.min(losses[:, None] * weights)


def _on_simplex(weights):
    positive = jnp.maximum(weights, 0.0)
    return positive / jnp.sum(positive, 1, keepdims=True)


def group_losses(
    losses: Float[Array, " n"], weights: Float[Array, "n groups"]
) -> Float[Array, " groups"]:
    """L_g = sum_i w_ig l_i / sum_i w_ig; 0 for a group without weight."""
    return losses @ weights / (jnp.sum(weights, 0) + 1e-9)


def invariant_loss(
    losses: Float[Array, " n"], weights: Float[Array, "n groups"], penalty: ArrayLike = 1.0
) -> Float[Array, ""]:
    """mean_g L_g + penalty var_g L_g, over the groups that have weight in this batch.

    The variance is the unbiased one, 0 for a single group, as published.
    """
    each = group_losses(losses, weights)
    present = each > 1e-9
    count = jnp.maximum(jnp.sum(present), 1)
    mean = jnp.sum(jnp.where(present, each, 0.0)) / count
    squares = jnp.sum(jnp.where(present, (each - mean) ** 2, 0.0))
    return mean + penalty * squares / jnp.maximum(count - 1, 1)


def with_module(
    denoiser: Denoiser, module: Denoiser, k: ArrayLike = 0.5, form: str = "mix"
) -> Denoiser:
    """eps = (1 - k) eps_0 + k eps_module: k = 0 is the base model, k = 1 the module.

    form="add" is eps_0 + k eps_module instead, under which a module that is zero changes nothing; the
    published code has both. In terms of the base's prediction, which is the result's, and to which the
    module's is converted in "mix"; in "add" the module's output is read as that prediction. Two
    evaluations a call, the base's and the module's (cost their sum). "mix" is what
    `autoguidance(module, denoiser, k)` is, but for that it predicts what the module does.

    Arguments:
      denoiser: the frozen model, a single prediction, without memory or with.
      module: a denoiser without memory; its parameters are leaves.
      k: a scalar or [batch]; a leaf.

    Raises TypeError or ValueError for what are no denoisers of one prediction, a module with memory,
    or an unknown form.
    """
    check_single(denoiser, "with_module")
    check_single(module, "with_module")
    check_choice("form", form, FORMS)
    if module.memory is not None:
        raise ValueError("with_module takes a module without memory")
    combined = _Combined(denoiser.prediction, form)
    cost = denoiser.cost + module.cost
    return wrap(combined, denoiser, (module, as_arrays(k)), denoiser.prediction, cost=cost)


@dataclasses.dataclass(frozen=True)
class _Combined:
    prediction: str
    form: str

    def check_strengths(self, strengths, batch, alpha):
        if self.form == "mix":
            check_known(strengths[0].prediction, self.prediction, alpha, "with_module")

    def __call__(self, evaluate, strengths, x, levels, cond):
        module, k = strengths
        base, change = evaluate(x, *levels, cond), module(x, *levels, cond)
        if self.form == "mix":
            change = convert(change, x, module.prediction, self.prediction, *levels[1:])

        def leaf(a, b):
            share = to_batch(jnp.asarray(k, b.dtype), b)
            kept = 1.0 - share if self.form == "mix" else 1.0
            return kept * a + share * b

        return jax.tree.map(leaf, base, change)


def train_module(
    denoiser: Denoiser, module: Denoiser, process: Process, x0: Float[ArrayLike, "n ..."],
    weights: Float[ArrayLike, "n groups"], key: Array, optimizer: optax.GradientTransformation, *,
    steps: int = 1000, batch_size: int = 64, penalty: ArrayLike = 1.0, k: ArrayLike = 0.5,
    form: str = "mix", cond: Any = None, weighting: str = "simple",
) -> Optimized:  # fmt: skip
    """The module's denoiser, trained to be invariant; the base stays as it is.

    Each step draws a batch, times uniform in the process's span and noise, and descends
    `invariant_loss` of the combined prediction's denoising losses; `value` is the trained module,
    `losses` the loss before every update.

    Arguments:
      denoiser, module, k, form: as in `with_module`; the networks of `jaxdiff.models` begin at zero.
      x0, cond: the (biased) data of the base model, and its conditions, leaves [n, ...].
      weights: of `infer_groups`.
      penalty: of the variance.
      weighting: of the denoising loss, see `jaxdiff.losses`.

    Raises ValueError for weights that are not [n, groups], and what `with_module` and `optimize` do.
    """
    with_module(denoiser, module, k, form)
    check_order(batch_size, 10**9, "batch_size")
    if np.ndim(weights) != 2 or len(weights) != len(x0):
        raise ValueError(f"weights must be [{len(x0)}, groups], got shape {np.shape(weights)}")
    data = jax.tree.map(jnp.asarray, (x0, weights, cond))
    args = (denoiser, process, data, penalty, k, _Options(form, weighting, batch_size))
    return optimize(_module_loss, module, optimizer, steps, args=args, key=key)


@dataclasses.dataclass(frozen=True)
class _Options:
    """What is part of the program."""

    form: str
    weighting: str
    batch_size: int


def _module_loss(module, denoiser, process, data, penalty, k, options, key):
    pick, when, noise = jax.random.split(key, 3)
    n = options.batch_size
    rows = jax.random.randint(pick, (n,), 0, len(data[0]))
    x0, weights, cond = jax.tree.map(lambda a: a[rows], data)
    t = process.t_min + (process.t_max - process.t_min) * jax.random.uniform(when, (n,))
    eps = jax.random.normal(noise, x0.shape, x0.dtype)
    combined = with_module(denoiser, module, k, options.form)
    losses = score_matching(combined, process, x0, t, eps, cond, options.weighting)
    return invariant_loss(losses, weights, penalty)
