"""Active Diffusion Subsampling: choose what to measure next while sampling what was measured.

Nolan, Stevens, van Nierop & van Sloun, "Active Diffusion Subsampling" (2025). N particles of each
problem run one reverse process, guided by DPS towards what has been measured so far. At chosen times
their denoised x_0 are the beliefs about the truth, and what would be measured at them a mixture of
Gaussians of std `bandwidth`: the next measurement is the candidate where its entropy is largest, in the
published form (and sign)

    argmax_l  sum_i log sum_j exp(|y_l^(i) - y_l^(j)|^2 / (2 bandwidth^2)),

over candidates not taken yet. So one reverse process gives the mask and samples of the posterior. The
mask is an array in the denoiser's memory: nothing is compiled anew, and `sample` runs it with any
tableau, under vmap and jit.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from jaxdiff.arrays import is_concrete
from jaxdiff.denoisers import Denoiser, check_single, level
from jaxdiff.grids import Grid
from jaxdiff.inverse.operators import LinearOperator, as_leaf, check_operator
from jaxdiff.inverse.tweedie import linearise, norms
from jaxdiff.sampling import sample
from jaxdiff.solvers.clocks import check_number, check_order
from jaxdiff.solvers.tableau import Tableau

CRITERIA = ("entropy", "variance")


def acquisition_times(
    grid: Grid, count: int, window: tuple[float, float] = (0.0, 0.8)
) -> Float[np.ndarray, " count"]:
    """Times of `count` acquisitions, evenly in a share of a grid's steps (the published 0 to 0.8).

    Raises ValueError for a window outside [0, 1], or with fewer steps than acquisitions.
    """
    check_order(count, None, "count")
    start, stop = window
    if not 0 <= start < stop <= 1:
        raise ValueError(f"the window must lie in [0, 1], got {window!r}")
    first, last = round(start * grid.steps), round(stop * grid.steps)
    if last - first < count:
        raise ValueError(
            f"the window has {last - first} of the grid's {grid.steps} steps for {count} acquisitions"
        )
    return np.asarray(grid.t)[first + (last - first) // count * np.arange(count)]


def active_dps(
    denoiser: Denoiser, operator: LinearOperator, y: Float[ArrayLike, "problems ..."],
    particles: int, times: Float[ArrayLike, " count"], zeta: ArrayLike = 1.0,
    bandwidth: ArrayLike = 10.0, groups: ArrayLike | None = None,
    criterion: str = "entropy", mask: ArrayLike | None = None,
) -> Denoiser:  # fmt: skip
    """`dps_step` with a mask that grows: predicts (x_0hat, the correction), for `corrected(tableau)`.

    The state is [problems particles, ...], the particles of a problem together. Its memory is
    {"mask": [problems, *measured], "order": [problems, count], ...}: see `active_sample`.

    Arguments:
      denoiser: any single prediction.
      operator: what could be measured, all of it: `inpainting` or `fourier` of a mask of ones.
      y: its measurement [problems, *operator.measured]; only what the mask takes is ever looked at.
      particles: N, at least 2.
      times: [count], falling: the first row at or after each acquires one candidate, after its own
        step; `acquisition_times`.
      zeta: DPS's step, as in `dps_step` (the published 1, of 1,000 steps; there the norm is that of
        all particles together).
      bandwidth: std of the particles' Gaussians, positive (the published 10).
      groups: integers of the measured shape, 0, 1, ...: the candidate that an entry belongs to
        (columns, lines of k-space); by default each is its own.
      criterion: "entropy", or "variance" (sum over the candidate of the particles' variance).
      mask: what is measured from the start, of the measured shape; by default nothing.

    Raises ValueError for numbers out of range, shapes that do not fit, or more acquisitions than
    candidates.
    """
    check_single(denoiser, "active_dps")
    check_operator(operator, "active_dps")
    check_order(particles, None, "particles", 2)
    check_number("zeta", zeta)
    check_number("bandwidth", bandwidth)
    if is_concrete(bandwidth) and bandwidth == 0:
        raise ValueError(f"bandwidth must be positive, got {bandwidth!r}")
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {list(CRITERIA)}, got {criterion!r}")
    measured, times = operator.measured, np.asarray(times, np.float64)
    if np.shape(y)[1:] != measured:
        raise ValueError(f"y must be [problems, *{measured}], got shape {np.shape(y)}")
    if times.ndim != 1 or not times.size or np.any(np.diff(times) >= 0):
        raise ValueError(f"times must be a falling vector, got {times}")
    groups = (
        np.arange(np.prod(measured)).reshape(measured) if groups is None else np.asarray(groups)
    )
    if groups.shape != measured or not np.array_equal(
        np.unique(groups), np.arange(groups.max() + 1)
    ):
        raise ValueError(f"groups must be 0, 1, ... in the shape {measured}, got {groups.shape}")
    count = int(groups.max()) + 1
    taken = jnp.zeros(measured) if mask is None else jnp.asarray(mask) * jnp.ones(measured)
    free = count if not is_concrete(taken) else len(np.unique(groups[np.asarray(taken) == 0]))
    if times.size > free:
        raise ValueError(f"{times.size} acquisitions, but {free} candidates to measure")
    problems = np.shape(y)[0]
    memory = {
        "mask": jnp.broadcast_to(taken, (problems, *measured)) * 1.0,
        "order": jnp.full((problems, times.size), -1, jnp.int32),
        "taken": jnp.zeros((), jnp.int32), "inner": denoiser.memory,
    }  # fmt: skip
    strengths = tuple(as_leaf(a, "strength") for a in (zeta, bandwidth, times))
    params = (denoiser, operator, as_leaf(y, "y"), jnp.asarray(groups), strengths)
    fn = _Active(int(particles), count, criterion)
    return Denoiser(fn, ("x0", "x0"), params, level, memory, denoiser.cost)


@dataclasses.dataclass(frozen=True)
class _Active:
    particles: int
    candidates: int
    criterion: str

    def __call__(self, params, x, levels, cond=None, memory=None):
        denoiser, operator, y, groups, (zeta, bandwidth, times) = params
        problems = y.shape[0]
        if x.shape[0] != problems * self.particles:
            raise ValueError(
                f"the state has {x.shape[0]} samples, {problems} problems of {self.particles} "
                f"particles take {problems * self.particles}"
            )
        at = linearise(denoiser, x, levels, cond, memory["inner"])
        expected = operator(at.x0).reshape(problems, self.particles, *operator.measured)
        mask = memory["mask"].astype(x.dtype)
        residual = mask[:, None] * (y.astype(x.dtype)[:, None] - expected)
        residual = residual.reshape(x.shape[0], *operator.measured)
        correction = zeta.astype(x.dtype) * at.pull(operator.adjoint(residual / norms(residual)))
        taken, total = memory["taken"], times.shape[0]
        due = (taken < total) & (jnp.max(levels[0]) <= times[jnp.minimum(taken, total - 1)])
        kept = {k: memory[k] for k in ("mask", "order", "taken")}
        kept = jax.lax.cond(
            due, lambda: self._acquire(expected, groups, bandwidth, kept), lambda: kept
        )  # fmt: skip
        return (at.x0, correction), {**kept, "inner": at.memory}

    def _acquire(self, expected, groups, bandwidth, kept):
        """The mask with one more candidate a problem."""

        def gather(a):
            """Sums over each candidate's entries: [*measured] -> [candidates]."""
            return jax.ops.segment_sum(a.ravel(), groups.ravel(), self.candidates)

        if self.criterion == "variance":
            score = jax.vmap(gather)(jnp.var(expected, axis=1))
        else:
            pair = jax.vmap(jax.vmap(jax.vmap(gather)))
            apart = pair((expected[:, :, None] - expected[:, None]) ** 2)
            scaled = apart / (2.0 * bandwidth.astype(apart.dtype) ** 2)
            score = jnp.sum(jax.nn.logsumexp(scaled, axis=2), axis=1)
        # A candidate of which only some entries are measured can still be taken.
        had = jax.vmap(gather)(jnp.where(kept["mask"] > 0, 0.0, 1.0)) == 0
        chosen = jnp.argmax(jnp.where(had, -jnp.inf, score), axis=1).astype(jnp.int32)
        new = (groups == chosen.reshape(-1, *(1,) * groups.ndim)).astype(kept["mask"].dtype)
        return {
            "mask": jnp.maximum(kept["mask"], new),
            "order": kept["order"].at[:, kept["taken"]].set(chosen),
            "taken": kept["taken"] + 1,
        }

    def check(self, params, batch, cond, alpha):
        params[0].check(batch, cond, alpha)


class Acquired(NamedTuple):
    """What `active_sample` returns: samples [problems, particles, ...], the masks [problems,
    *measured], and the candidates in the order they were taken [problems, count]."""

    x: Any
    mask: Array
    order: Array


def active_sample(
    denoiser: Denoiser, tableau: Tableau, x_T: Any, key: Array | None = None, cond: Any = None
) -> Acquired:
    """Run an `active_dps` denoiser and return its masks too; arguments as of `jaxdiff.sample`.

    Raises TypeError for another denoiser, and what `jaxdiff.sample` raises.
    """
    if not isinstance(getattr(denoiser, "fn", None), _Active):
        raise TypeError("active_sample takes a denoiser of active_dps")
    state = sample(denoiser, tableau, x_T, key, cond=cond, save="state")
    x, memory = state.registers[0], state.memory
    grouped = x.reshape(-1, denoiser.fn.particles, *x.shape[1:])
    return Acquired(grouped, memory["mask"], memory["order"])
