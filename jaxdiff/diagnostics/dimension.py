"""Local intrinsic dimension: in how many directions the data around an example vary.

Three estimators, from a denoiser alone, for data near a k-dimensional manifold in d dimensions:

    flipd          k from how the density of noised data grows as the noise shrinks (one evaluation of
                   the score's divergence)
    normal_bundle  d - k as the rank of scores at points noised a little: they point to the manifold
    flow_singular_values, flow_dimension
                   k as the number of directions that the probability flow does not contract away
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from jaxdiff.arrays import as_arrays
from jaxdiff.denoisers import Denoiser
from jaxdiff.diagnostics.conservativity import ScoreField, gauge_residual
from jaxdiff.diagnostics.errors import check_evaluated, draws_at
from jaxdiff.noise import normal, per_sample
from jaxdiff.processes import Process
from jaxdiff.sampling import sample
from jaxdiff.solvers.tableau import Tableau


def flipd(
    denoiser: Denoiser, process: Process, x0: Float[ArrayLike, "batch ..."], t: float,
    cond: Any = None, probes: int | None = None, key: Array | None = None,
) -> Float[Array, " batch"]:  # fmt: skip
    """d + sigma^2 (tr J + |s|^2) at x = alpha x0, s the score and J its Jacobian: FLIPD.

    The density of x0 + r eps, r = sigma / alpha, goes as r^(k - d) on a k-dimensional manifold, and by
    the heat equation d log density / d log r is the rest of the formula; so it tends to k as t goes to
    0, until a network's errors win: look at it over several t. Kamkari, Ross, Hosseinzadeh, Cresswell &
    Loaiza-Ganem, "A Geometric View of Data Complexity: Efficient Local Intrinsic Dimension Estimation
    with Diffusion Models" (2024).

    Arguments:
      x0: examples [batch, ...], d elements each.
      t: the time, where alpha > 0 and sigma > 0.
      probes: the trace from that many random signs instead of d products; needs `key`.

    Raises ValueError for t at an end, probes without a key.
    """
    draws_at(process, [t])
    field = ScoreField(as_arrays(denoiser), process, t, as_arrays(cond))
    x0 = jnp.asarray(x0)
    alpha, sigma = (float(f(t)) for f in (process.alpha, process.sigma))
    change = gauge_residual(field, field, jnp.asarray(alpha, x0.dtype) * x0, probes, key)
    return x0[0].size + sigma**2 * change


class NormalBundle(NamedTuple):
    """dimension: [batch]; singular_values: [batch, d], those of the scores, falling."""

    dimension: Int[np.ndarray, " batch"]
    singular_values: Float[np.ndarray, "batch d"]


def normal_bundle(
    denoiser: Denoiser, process: Process, x0: Float[ArrayLike, "batch ..."], t: float, key: Array,
    cond: Any = None, count: int | None = None,
) -> NormalBundle:  # fmt: skip
    """d minus the number of large singular values of scores around each example.

    `count` scores at alpha x0 + sigma eps, t small, span the directions normal to the manifold, in
    which they are of size 1 / sigma; within it they stay bounded. The number of large ones is where
    two consecutive singular values differ most (Stanczuk, Batzolis, Deveney & Schoenlieb, "Your
    diffusion model secretly knows the dimension of the data manifold", 2022, algorithm 1). So the
    dimension is from 0 to d - 1: where the data fill the space look at the singular values.

    Arguments:
      x0: examples [batch, ...].
      t: the time, where alpha > 0 and sigma > 0.
      key: one key, or one per example.
      cond: leaves [batch, ...], or None.
      count: of scores an example, default 4 d and at least 64.

    Raises ValueError for t at an end, or a count below d, the elements of an example.
    """
    draws_at(process, [t])
    x0, cond = jnp.asarray(x0), as_arrays(cond)
    dim = x0[0].size
    count = max(4 * dim, 64) if count is None else operator.index(count)
    if dim < 2 or count < dim:
        raise ValueError(f"need at least 2 elements and count >= {dim}, got {dim} and {count}")
    keys = per_sample(key, len(x0))
    field = ScoreField(as_arrays(denoiser), process, t, None)
    scores = _scores_around(field, x0, keys, cond, count)
    values = np.linalg.svd(np.asarray(scores, np.float64), compute_uv=False)
    normal_dimensions = np.argmax(values[:, :-1] - values[:, 1:], axis=1) + 1
    return NormalBundle(dim - normal_dimensions, values)


@eqx.filter_jit
def _scores_around(field, x0, keys, cond, count):
    alpha, sigma = (
        jnp.asarray(f(field.t), x0.dtype) for f in (field.process.alpha, field.process.sigma)
    )

    def one(number):
        x = alpha * x0 + sigma * normal(keys, x0, number)
        here = ScoreField(field.denoiser, field.process, field.t, cond)
        return here(x).reshape(len(x0), -1)

    return jnp.moveaxis(jax.lax.map(one, jnp.arange(count)), 0, 1)


def flow_singular_values(
    denoiser: Denoiser, tableau: Tableau, x_T: Float[ArrayLike, "batch ..."], cond: Any = None
) -> tuple[Array, Float[Array, "nodes batch d"]]:
    """The states at the grid's nodes, and how the flow to there stretches each example's surroundings.

    The singular values, falling, of Y(t) = d x_t / d x_T, which obeys dY/dt = J Y along the probability
    flow, J the Jacobian of its velocity, Y = I at the start (Horvat & Pfister 2024, section 5). In the
    directions of a manifold they settle, in the others they go to 0 with sigma. Y is the derivative of
    the sampler itself, d products with its Jacobian, for any deterministic tableau.

    Arguments:
      tableau: deterministic; of many steps, for what a sampler does to a neighbourhood converges later
        than its samples.
      x_T: [batch, ...] at the grid's first node.

    Returns (x [nodes, batch, ...], singular values [nodes, batch, d]). Raises ValueError for a
    stochastic tableau, and what `sample` raises.
    """
    check_evaluated(denoiser)
    if isinstance(tableau, Tableau) and tableau.stochastic:
        raise ValueError(
            "the flow has no noise: pass a deterministic tableau, such as ddim or heun"
        )
    x_T = jnp.asarray(x_T)
    dim = x_T[0].size

    def run(x):
        return sample(denoiser, tableau, x, cond=cond, save="nodes", adjoint=diffrax.ForwardMode())

    def column(i):
        basis = (jnp.arange(dim) == i).astype(x_T.dtype).reshape(x_T.shape[1:])
        return jax.jvp(run, (x_T,), (jnp.broadcast_to(basis, x_T.shape),))

    x, moved = jax.vmap(column, out_axes=(None, -1))(jnp.arange(dim))
    moved = moved.reshape(*moved.shape[:2], dim, dim)
    return x, jnp.linalg.svd(moved, compute_uv=False)


def flow_dimension(
    singular_values: Float[ArrayLike, "nodes batch d"], sigma: Float[ArrayLike, " nodes"],
    last: int | None = None, threshold: float = 0.5,
) -> Int[np.ndarray, " batch"]:  # fmt: skip
    """How many singular values of `flow_singular_values` have settled at the end of the flow.

    A value that goes to 0 with the noise has d log s / d log sigma = 1, one that has settled 0; those
    below `threshold` are counted. The slope is between the last node with sigma > 0 (or the node
    `last`) and the nearest one before it with three times its sigma. This criterion is this library's
    own; the paper reads the number off a picture.

    Arguments:
      sigma: of the nodes, falling: `grid.sigma`.

    Raises ValueError for sigma of another length, or nodes that reach over less than a factor of 3.
    """
    values, sigma = np.asarray(singular_values, np.float64), np.asarray(sigma, np.float64)
    if values.ndim != 3 or sigma.shape != values.shape[:1]:
        raise ValueError(
            f"need singular values [nodes, batch, d] and sigma [nodes], got {values.shape} and "
            f"{sigma.shape}"
        )
    end = int(np.flatnonzero(sigma > 0)[-1]) if last is None else operator.index(last)
    before = np.flatnonzero(sigma[:end] >= 3.0 * sigma[end])
    if not len(before):
        raise ValueError(f"no node before {end} has 3 times its sigma, {sigma[end]:g}")
    start = before[-1]
    tiny = np.finfo(np.float64).tiny
    rise = np.log(np.maximum(values[start], tiny)) - np.log(np.maximum(values[end], tiny))
    slope = rise / np.log(sigma[start] / sigma[end])
    return np.sum(slope < threshold, axis=1)
