"""What a condition tells about an example, in nats, from denoising errors alone.

With a = log(alpha^2 / sigma^2) the log-SNR and x_a = alpha x + sigma eps, the I-MMSE relation (Guo,
Shamai & Verdu 2005), pointwise (Kong, Brekelmans & Ver Steeg, "Information-Theoretic Diffusion", 2023;
Kong, Liu, Li, Yogatama & Ver Steeg, "Interpretable Diffusion via Information Decomposition", 2024):

    i(x; y) = log p(x | y) - log p(x)
            = 1/2 int E_eps[ |eps - eps_hat(x_a)|^2 - |eps - eps_hat(x_a | y)|^2 ] da.

Without the sum over elements it is a map of x. The "orthogonal" form 1/2 int E |eps_hat(x_a) -
eps_hat(x_a | y)|^2 da has the same mean over p(x | y), is never negative and varies less.

The partial information decomposition splits i(x; y1, y2) into what both conditions tell, what each
tells alone and what only both together tell. Dewan, Zawar, Saxena, Chang, Luo & Bisk, "Diffusion PID:
Interpreting Diffusion via Partial Information Decomposition" (2024) do so for words of a prompt and
draw the maps. That paper is known to this library from its abstract; the redundancies here are those
of the literature on pointwise decompositions, see `decompose`.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from jaxdiff.arrays import as_arrays
from jaxdiff.denoisers import Denoiser
from jaxdiff.diagnostics.errors import Draws, draws_at, noise_errors
from jaxdiff.processes import Process

FORMS = ("pointwise", "orthogonal")


class LogSNRNodes(NamedTuple):
    """Nodes of an integral over the log-SNR: int f da ~ sum_i weight_i f(a_i), a_i at time t_i."""

    t: Float[np.ndarray, " nodes"]
    weight: Float[np.ndarray, " nodes"]


def uniform_nodes(
    process: Process, count: int, low: float | None = None, high: float | None = None
) -> LogSNRNodes:
    """The midpoint rule in the log-SNR between `low` and `high`, by default the process's span."""
    low, high = _span(process, count, low, high)
    a = low + (high - low) * (np.arange(count) + 0.5) / count
    return LogSNRNodes(process.time(0.5 * a), np.full(count, (high - low) / count))


def logistic_nodes(
    process: Process, count: int, loc: float = 0.0, scale: float = 2.0, low: float | None = None,
    high: float | None = None, key: Array | None = None,
) -> LogSNRNodes:  # fmt: skip
    """Importance sampling by a logistic law of the log-SNR, cut to [low, high] (Kong et al. 2023).

    a has density q = s(z) (1 - s(z)) / (scale (S_high - S_low)), z = (a - loc) / scale, s the
    logistic function; the weights are 1 / (count q). Most nodes lie near `loc`, where a mean squared
    error changes fastest: minus the mean of the log-variances of the data's principal components.
    The quantiles are in the middle of `count` equal parts, or drawn at random with a `key`.

    Raises ValueError unless scale > 0.
    """
    low, high = _span(process, count, low, high)
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale!r}")
    bottom, top = (_logistic((end - loc) / scale) for end in (low, high))
    u = (np.arange(count) + 0.5) / count
    if key is not None:
        u = np.asarray(jax.random.uniform(key, (count,)), np.float64)
    p = bottom + (top - bottom) * u
    a = np.clip(loc + scale * (np.log(p) - np.log1p(-p)), low, high)
    return LogSNRNodes(process.time(0.5 * a), scale * (top - bottom) / (count * p * (1.0 - p)))


def pointwise_information(
    denoiser: Denoiser, process: Process, x0: Float[ArrayLike, "batch ..."], cond: Any, null: Any,
    nodes: LogSNRNodes, key: Array, *, draws: int = 2, by_element: bool = False,
    form: str = "pointwise", batch_size: int = 1024,
) -> Float[np.ndarray, "batch ..."]:  # fmt: skip
    """i(x; cond) of every example in nats, [batch]; or its map, x0's shape, if `by_element`.

    Arguments:
      denoiser: of any prediction.
      cond: leaves [batch, ...]; a number stands for all examples.
      null: the condition that means none, of the same structure; any other gives the information
        beyond it: i(x; y1 | y2) is cond = (y1, y2), null = y2.
      nodes: of `uniform_nodes` or `logistic_nodes`.
      key: one key, or one per example.
      draws: of noise at a node, in pairs eps, -eps (a last odd one is alone). Both conditions see
        the same noise.
      form: "pointwise", which the integral above equals, or "orthogonal".
      batch_size: inputs that the network sees at once, about.

    Raises ValueError for an unknown form, draws below 1, conditions that do not fit x0.
    """
    conds = _stacked(x0, cond, null)
    squares = _integrals(
        denoiser, process, x0, conds, nodes, key, draws, by_element, form, batch_size
    )
    if form == "orthogonal":
        return squares[:, 0]
    return squares[:, 1] - squares[:, 0]


class Decomposition(NamedTuple):
    """A split of i(x; y1, y2) = redundancy + unique_1 + unique_2 + synergy, in nats."""

    redundancy: Any
    unique_1: Any
    unique_2: Any
    synergy: Any


def decompose(
    first: ArrayLike, second: ArrayLike, both: ArrayLike,
    surprisals: tuple[ArrayLike, ArrayLike] | None = None,
) -> Decomposition:  # fmt: skip
    """Partial information decomposition of i_12 = i(x; y1, y2), given i_1 and i_2, element by element.

        U_1 = i_1 - R,   U_2 = i_2 - R,   S = i_12 - U_1 - U_2 - R

    with the redundancy R either

        R = min(i_1, i_2), what the less informative condition tells (the default), or
        R = min(h_1, h_2) - min(h_1 - i_1, h_2 - i_2), given the `surprisals` h_k = -log p(y_k):
        the least specificity less the least ambiguity, h_k - i_k = -log p(y_k | x).

    The first is the pointwise form of the minimum of Williams & Beer, "Nonnegative Decomposition of
    Multivariate Information" (2010), and of Barrett (2015); the second is that of Finn & Lizier,
    "Pointwise Partial Information Decomposition Using the Specificity and Ambiguity Lattices" (2018),
    whose unique parts may be negative (misinformation). Where h_1 = h_2 it is max(i_1, i_2). In
    both, two conditions that say the same have U_1 = U_2 = S = 0.
    """
    if surprisals is None:
        redundancy = np.minimum(first, second)
    else:
        h_1, h_2 = (np.asarray(h, np.float64) for h in surprisals)
        redundancy = np.minimum(h_1, h_2) - np.minimum(h_1 - first, h_2 - second)
    unique_1, unique_2 = first - redundancy, second - redundancy
    return Decomposition(redundancy, unique_1, unique_2, both - unique_1 - unique_2 - redundancy)


def partial_information(
    denoiser: Denoiser, process: Process, x0: Float[ArrayLike, "batch ..."], first: Any, second: Any,
    both: Any, null: Any, nodes: LogSNRNodes, key: Array, *,
    surprisals: tuple[ArrayLike, ArrayLike] | None = None, draws: int = 2,
    by_element: bool = False, form: str = "pointwise", batch_size: int = 1024,
) -> Decomposition:  # fmt: skip
    """`decompose` of what the conditions `first`, `second` and `both` tell about each example.

    All four conditions see the same noise. With `by_element` every part is a map of x0's shape. The
    rest of a prompt is held fixed by having it in all four conditions, `null` included. Arguments as
    in `pointwise_information` and `decompose`.

    Raises ValueError for `surprisals` with `by_element`: they are of the whole example, and an element
    has no share in them.
    """
    if by_element and surprisals is not None:
        raise ValueError("surprisals are of whole examples, not of elements: leave out by_element")
    conds = _stacked(x0, first, second, both, null)
    squares = _integrals(
        denoiser, process, x0, conds, nodes, key, draws, by_element, form, batch_size
    )
    if form == "pointwise":
        squares = squares[:, 3:] - squares
    return decompose(squares[:, 0], squares[:, 1], squares[:, 2], surprisals)


def _integrals(denoiser, process, x0, conds, nodes, key, draws, by_element, form, batch_size):
    """1/2 int E |...|^2 da for every condition, [batch, conds] or [batch, conds, *shape]."""
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    draws = operator.index(draws)
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    each = draws_at(process, nodes.t)
    number = each.number[:, None] * draws + np.arange(draws) // 2
    sign = np.where(np.arange(draws) % 2, -1.0, 1.0)
    levels = Draws(
        *(np.repeat(a, draws) for a in each[:3]), number.ravel(), np.tile(sign, len(nodes.t))
    )
    squares = noise_errors(
        denoiser, x0, conds, levels, key, by_element=by_element,
        orthogonal=form == "orthogonal", batch_size=batch_size,
    )  # fmt: skip
    weight = np.repeat(np.asarray(nodes.weight, np.float64), draws) / (2.0 * draws)
    return np.einsum("bcd...,d->bc...", np.asarray(squares, np.float64), weight)


def _stacked(x0, *conds):
    """The conditions side by side, leaves [batch, conds, ...]."""
    batch = len(x0)
    structures = {jax.tree.structure(cond) for cond in conds}
    if len(structures) != 1:
        raise ValueError(f"the conditions must have one structure, got {structures}")

    def stack(*leaves):
        shape = np.broadcast_shapes(*(np.shape(a) for a in leaves)) or (batch,)
        if shape[0] != batch:
            raise ValueError(
                f"conditions must be numbers or [{batch}, ...], one for each example, got shapes "
                f"{[np.shape(a) for a in leaves]}"
            )
        return jnp.stack([jnp.broadcast_to(a, shape) for a in leaves], axis=1)

    return jax.tree.map(stack, *(as_arrays(cond) for cond in conds))


def _span(process, count, low, high):
    if operator.index(count) < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    ends = [2.0 * float(process.half_log_snr(t)) for t in (process.t_max, process.t_min)]
    low, high = (end if given is None else float(given) for given, end in zip((low, high), ends))
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise ValueError(
            f"the log-SNR must run from a finite low to a larger finite high, got {low:g} and "
            f"{high:g}: pass low= and high= for a process that reaches an end"
        )
    return low, high


def _logistic(z):
    return 1.0 / (1.0 + np.exp(-z))
