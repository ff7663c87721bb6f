"""One x_T for all images: optimal boundary conditions of diffusion ODEs.

Ma, Yang, Yang, Fu & Liu, "Solving Diffusion ODEs with Optimal Boundary Conditions for Better Image
Super-Resolution" (2024). A deterministic conditional sampler is a function x0 = h(x_T, y), and how good
an x_T is depends little on the condition y: so the best of some candidates on a few reference pairs
serves all new y, with few steps and no training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.arrays import as_arrays, jit_trees
from jaxdiff.denoisers import Denoiser
from jaxdiff.sampling import check_call, sample
from jaxdiff.solvers.tableau import Tableau


class BoundaryCondition(NamedTuple):
    """`x_T` [...]: the candidate of least mean distance, `index` its number; `distances` [candidates,
    pairs] of all of them."""

    x_T: Array
    index: int
    distances: Float[Array, "candidates pairs"]


def squared_distance(x: Float[Array, "batch ..."], y: Float[Array, "batch ..."]) -> Array:
    """Mean squared difference of every pair, [batch]."""
    return jnp.mean(jnp.square(x - y).reshape(x.shape[0], -1), -1)


def optimal_boundary_condition(
    denoiser: Denoiser, tableau: Tableau, candidates: Float[Array, "candidates ..."], cond: Any,
    targets: Float[Array, "pairs ..."], distance: Callable = squared_distance, at_once: int = 16,
) -> BoundaryCondition:  # fmt: skip
    """argmin over x_T of the mean over reference pairs (y, z) of distance(h(x_T, y), z).

        found = optimal_boundary_condition(denoiser, tableau, process.prior(key, (200, *shape)), y, z)
        x0 = sample(denoiser, tableau, repeated(found.x_T), cond=new_y)

    Arguments:
      denoiser, tableau: of the sampler h; a deterministic tableau.
      candidates: x_T to choose from, draws of the prior (the paper takes 200 to 1,000).
      cond: y, leaves [pairs, ...]: for super-resolution, the images of low resolution.
      targets: z, the images themselves.
      distance: (x, z) [pairs, ...] -> [pairs]; the paper's is LPIPS. It need not be differentiable.
        A module-level function, as a fresh one compiles again.
      at_once: candidates in one batch (of as many times pairs samples).

    Costs candidates x pairs samples. A candidate whose mean distance is not finite is not chosen.
    Raises ValueError for a stochastic tableau, for candidates of another shape than targets, distances
    of another shape than [pairs], or of no finite mean, and what `jaxdiff.sample` raises.
    """
    candidates, cond, targets, denoiser = (
        as_arrays(a) for a in (candidates, cond, targets, denoiser)
    )
    if candidates.shape[1:] != targets.shape[1:]:
        raise ValueError(
            f"candidates {candidates.shape} must be of the targets' shape {targets.shape[1:]}"
        )
    if at_once < 1:
        raise ValueError(f"at_once must be at least 1, got {at_once}")
    if isinstance(tableau, Tableau) and tableau.stochastic:
        raise ValueError("a stochastic tableau is no function of x_T: use a deterministic one")
    check_call(denoiser, tableau, targets, None, None, cond, "final", None, None)
    distances = _distances(denoiser, tableau, candidates, cond, targets, distance, at_once)
    if distances.shape != (len(candidates), len(targets)):
        raise ValueError(
            f"distance must return one number a pair, [{len(targets)}], got {distances.shape[1:]}"
        )
    means = jnp.mean(distances, -1)
    finite = jnp.isfinite(means)
    if not jnp.any(finite):
        raise ValueError(f"no candidate of {len(candidates)} has a finite mean distance")
    index = int(jnp.argmin(jnp.where(finite, means, jnp.inf)))
    return BoundaryCondition(candidates[index], index, distances)


@jit_trees
def _distances(denoiser, tableau, candidates, cond, targets, distance, at_once):
    def one(x_T):
        x_T = jnp.broadcast_to(x_T, targets.shape)
        return distance(sample(denoiser, tableau, x_T, cond=cond), targets)

    return jax.lax.map(one, candidates, batch_size=at_once)
