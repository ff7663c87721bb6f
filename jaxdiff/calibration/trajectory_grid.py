"""Grids fitted to a network's trajectories by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxdiff.denoisers import Denoiser, check_single
from jaxdiff.grids import Grid
from jaxdiff.grids.grid import make
from jaxdiff.predictions import affine
from jaxdiff.sampling import sample
from jaxdiff.solvers.catalogue import build
from jaxdiff.solvers.clocks import check_choice

METRICS = ("deviation", "l2", "l1")


def trajectory_grid(
    denoiser: Denoiser, grid: Grid, x_T: Any, steps: int, *, cond: Any = None,
    teacher: str = "ipndm_4", metric: str = "deviation", factor: float = 1.15,
) -> Grid:  # fmt: skip
    """`steps` steps between nodes of a fine grid, where the trajectories bend least between them.

    Chen et al., "On the Trajectory Regularity of ODE-based Diffusion Sampling" (2024), GITS: the
    trajectories of all starts have nearly one shape, so a few of them tell where steps are long
    enough. `trajectory_costs` of every pair of nodes, then `cheapest_path`.

    Arguments:
      grid: the fine grid (60 steps of `jaxdiff.grids.karras` in the paper), from alpha > 0.
      x_T: a few starts at its first node, an array [batch, ...].
      cond: passed to the denoiser.
      teacher: a deterministic sampler by name, run on the fine grid.
      metric, factor: see there.

    Raises ValueError for steps that are not 1 to the fine grid's, a grid from alpha = 0 or a
    stochastic teacher.
    """
    costs = trajectory_costs(denoiser, grid, x_T, cond=cond, teacher=teacher, metric=metric)
    chosen = np.asarray(cheapest_path(costs, steps, factor))
    nodes = (a[chosen] for a in (grid.t, grid.alpha, grid.sigma))
    return make(*nodes, grid.process, grid.ends)


def trajectory_costs(
    denoiser: Denoiser, grid: Grid, x_T: Any, *, cond: Any = None, teacher: str = "ipndm_4",
    metric: str = "deviation",
) -> Float[np.ndarray, "nodes nodes"]:  # fmt: skip
    """Cost [i, j] of one step from node i to node j > i, a mean over the starts; elsewhere inf.

    In y = x / alpha, rho = sigma / alpha, a step along the slope at node i lands on
    y_i + (rho_j - rho_i) eps_i. "l2" and "l1" are its distance to the trajectory's y_j, and
    "deviation" how much farther than y_j it is from the line through the trajectory's ends. Raises
    as `trajectory_grid` does.
    """
    check_choice("metric", metric, METRICS)
    check_single(denoiser, "a grid from trajectories")
    if grid.ends[0] or grid.backward:
        raise ValueError("trajectories need a grid from noise to data that begins at alpha > 0")
    tableau = build(teacher, grid)
    if tableau.stochastic:
        raise ValueError(f"the teacher must be deterministic, got {teacher!r}")
    x = sample(denoiser, tableau, x_T, cond=cond, save="nodes")
    return np.asarray(_costs(denoiser, x, _levels(grid, x.dtype), cond, metric), np.float64)


def _levels(grid: Grid, dtype: Any) -> tuple:
    return tuple(jnp.asarray(a, dtype) for a in (grid.t, grid.alpha, grid.sigma))


def _costs(denoiser: Denoiser, x: Any, levels: tuple, cond: Any, metric: str) -> Any:
    def slope(node):
        x, t, alpha, sigma = node
        u, w = affine(denoiser.prediction, "eps", alpha, sigma)
        return u * denoiser(x, t, alpha, sigma, cond) + w * x

    # The last node's slope is never used, and sigma may be 0 there.
    eps = jax.lax.map(slope, jax.tree.map(lambda a: a[:-1], (x, *levels)))
    alpha, sigma = (a.reshape(-1, 1, 1) for a in levels[1:])
    flat = x.reshape(*x.shape[:2], -1)
    y, rho = flat / alpha, sigma / alpha
    eps = eps.reshape(*eps.shape[:2], -1)

    def row(i):
        landed = y[i] + (rho - rho[i]) * eps[i]
        if metric == "l2":
            cost = jnp.linalg.norm(landed - y, axis=-1)
        elif metric == "l1":
            cost = jnp.abs(landed - y).sum(-1)
        else:
            cost = _from_line(landed, y) - _from_line(y, y)
        return jnp.where(jnp.arange(len(y)) > i, cost.mean(1), jnp.inf)

    costs = jax.lax.map(row, jnp.arange(len(y) - 1))
    return jnp.concatenate([costs, jnp.full((1, len(y)), jnp.inf)])


def _from_line(points: Any, trajectory: Any) -> Any:
    """Distances [nodes, batch] of points to the line through the trajectory's two ends."""
    line = trajectory[-1] - trajectory[0]
    line = line / jnp.linalg.norm(line, axis=-1, keepdims=True)
    to_end = trajectory[-1] - points
    along = jnp.sum(to_end * line, -1, keepdims=True)
    return jnp.linalg.norm(to_end - along * line, axis=-1)


def cheapest_path(
    costs: Float[np.ndarray, "nodes nodes"], steps: int, factor: float = 1.0
) -> Sequence[int]:
    """The nodes of the cheapest path of `steps` steps from the first node to the last.

    Minimises c_1 + factor (c_2 + factor (c_3 + ...)), c_k the cost of step k, by dynamic programming
    over (node, steps left): factor > 1 makes late steps dearer. Raises ValueError unless steps is 1
    to the number of nodes less one.
    """
    last = len(costs) - 1
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= last:
        raise ValueError(f"steps must be an integer from 1 to {last}, got {steps!r}")
    if not factor > 0:
        raise ValueError(f"factor must be positive, got {factor!r}")
    best, following = costs[:, last], []
    for _ in range(steps - 1):
        through = costs + factor * best[None]
        following.insert(0, np.argmin(through, 1))
        best = np.min(through, 1)
    path = [0]
    for choice in following:
        path.append(int(choice[path[-1]]))
    return [*path, last]
