"""Grids fitted to a network and its data by a bound on the error of a stochastic sampler.

Sabour, Fidler & Kreis, "Align Your Steps: Optimizing Sampling Schedules in Diffusion Models"
(2024). In y = x / alpha, rho = sigma / alpha, a first-order stochastic solver (SDE-DPM-Solver++1,
stochastic DDIM) is the exact reverse SDE with the denoiser D held, from each node, at what it was
there. By Girsanov's theorem the KL divergence from the one to the other, over whole paths and so
also at the data end, is at most the sum over steps rho_i > rho_{i+1} of

    integral over rho in [rho_{i+1}, rho_i] of rho^-3 E |D(y_rho, rho) - D(y_i, rho_i)|^2

with (y_rho, y_i) two states of one forward path: y_rho = x0 + rho e, y_i = y_rho + sqrt(rho_i^2 -
rho^2) e'. It grows without end as the last rho goes to 0, so grids must stop before. `kl_bound`
estimates it, `aligned_grid` moves the nodes to where it is least.

Of Gaussian data with standard deviation c the integrand is known: with v = 1 / rho^2 + 1 / c^2 it
is dim (1 / v_i - 1 / v) dv / 2, a step's bound dim (r - 1 - log r) / 2 with r = v_{i+1} / v_i, and
the best nodes have v in geometric progression. That integrand, for the data's own standard
deviation, is the density from which rho is drawn. Nodes uniform in arctan(rho / c), the paper's
first result, are best for Euler's method on such data's probability flow: `jaxdiff.grids.arctan`.

What to expect: the bound counts errors on every scale alike and is loose, so where the grid's end
is far below the finest detail of the data, most nodes go where nothing is to be gained. Of Gaussian
data, c = 0.7, rho >= 0.05, the divergence of the first-order sampler in 10 steps on the least
bound's nodes is 0.41 of that on Karras's, and on the arctan grid 0.19. What samples gain depends on
the measure: those of a mixture with fine modes become likelier under the data, the paper's measure,
which does not see that modes may get wrong shares.

The authors' optimiser is not public; the details of the search here are this module's.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff.arrays import as_arrays, is_concrete, structure_hash
from jaxdiff.denoisers import Denoiser, check_single
from jaxdiff.grids import Grid
from jaxdiff.grids.grid import make
from jaxdiff.solvers.clocks import check_order


def aligned_grid(
    denoiser: Denoiser, grid: Grid, data: Array, key: Array, *, halvings: int = 0, cond: Any = None,
    std: float | None = None, candidates: int = 11, tolerance: float = 0.01, sweeps: int = 200,
) -> Grid:  # fmt: skip
    """`grid` with its inner nodes moved to where `kl_bound` is least.

    One node at a time, the others held, is put at the best of a few places between its neighbours;
    sweeps over the nodes go on while they gain, then with places closer to the node. All sweeps
    share the draws, so the objective falls from sweep to sweep.

    Arguments:
      grid: the start, whose span and number of steps are kept; from alpha > 0 to sigma > 0.
      data: examples [n, ...]. Each gives one draw of the noise and of rho in every step; to place
        a node once takes 4 `candidates` evaluations of them all, two at a time.
      halvings: how often every step is then halved (in log rho) and all nodes are moved again: the
        paper makes grids of 20 and 40 steps from 10 in this way.
      cond: passed to the denoiser, a row for each example.
      std: of the Gaussian that the draws of rho suppose; by default the data's.
      candidates: places tried for a node, an odd number of at least 3, its own among them.
      tolerance: the search ends when places are closer to the node than this share of the way to
        its neighbours in log rho; or after `sweeps` at one number of steps.

    Raises TypeError or ValueError for a grid that reaches an end, data or options that do not fit.
    """
    for name, value, least in (("halvings", halvings, 0), ("sweeps", sweeps, 1)):
        check_order(value, None, name, least)
    check_order(candidates, None, "candidates", 3)
    if candidates % 2 == 0:
        raise ValueError(f"candidates must be odd, got {candidates!r}")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must lie in (0, 1), got {tolerance!r}")
    bound = _bound(denoiser, grid, data, key, cond, std)
    lam = _search(bound, np.asarray(grid.lam), candidates, tolerance, sweeps)
    for _ in range(halvings):
        middle = 0.5 * (lam[1:] + lam[:-1])
        lam = np.insert(lam, np.arange(1, len(lam)), middle)
        lam = _search(bound, lam, candidates, tolerance, sweeps)
    return _moved(grid, lam)


def kl_bound(
    denoiser: Denoiser, grid: Grid, data: Array, key: Array, *, cond: Any = None,
    std: float | None = None,
) -> Float[np.ndarray, " steps"]:  # fmt: skip
    """The bound of every step of `grid`, in nats; their sum bounds the sampler's KL divergence.

    What the grid's first node and a wrong denoiser add to the divergence is not in it. Arguments
    and errors as of `aligned_grid`.
    """
    bound = _bound(denoiser, grid, data, key, cond, std)
    lam = np.asarray(grid.lam)
    return bound(lam[:-1], lam[1:])


def _moved(grid: Grid, lam: np.ndarray) -> Grid:
    """The grid's ends, and nodes at half-log-SNR `lam` between them."""
    inner = grid.at(lam[1:-1])
    nodes = (np.concatenate([a[:1], b, a[-1:]]) for a, b in zip(grid.node(slice(None)), inner))
    return make(*nodes, grid.process, grid.ends)


def _search(bound: _Bound, lam: np.ndarray, candidates: int, tolerance: float, sweeps: int) -> Any:
    lam, share = lam.copy(), 0.75
    places = np.linspace(-1.0, 1.0, candidates)
    for _ in range(sweeps):
        moved = False
        for i in range(1, len(lam) - 1):
            low, here, high = lam[i - 1 : i + 2]
            tried = here + share * np.where(places < 0, here - low, high - here) * places
            tried[candidates // 2] = here
            before, after = np.full_like(tried, low), np.full_like(tried, high)
            costs = bound(np.concatenate([before, tried]), np.concatenate([tried, after]))
            total = costs[:candidates] + costs[candidates:]
            best = int(np.argmin(total))
            if total[best] < total[candidates // 2]:
                lam[i], moved = tried[best], True
        if not moved:
            share *= 0.4
            if share < tolerance:
                break
    return lam


@dataclasses.dataclass(frozen=True)
class _Bound:
    """The estimate of steps between any half-log-SNRs: `bound(early [k], late [k])` -> [k]."""

    denoiser: Denoiser
    grid: Grid
    draws: Any
    uniform: np.ndarray
    std: float
    structure: int

    def __call__(self, early: np.ndarray, late: np.ndarray) -> np.ndarray:
        # Levels in float64 on the host: neighbouring ones differ by little.
        v, v_late = (np.exp(2.0 * lam) + self.std**-2 for lam in (early, late))
        log_ratio = np.log(v_late / v)
        area = np.expm1(log_ratio) - log_ratio
        growth = _quantile(self.uniform * area[:, None])
        v_mid = v[:, None] * np.exp(growth)
        lam = 0.5 * np.log(np.maximum(v_mid - self.std**-2, 0.0))
        lam = np.clip(lam, early[:, None], late[:, None])
        added = np.exp(-2.0 * early)[:, None] * -np.expm1(2.0 * (early[:, None] - lam))
        weight = 0.5 * area[:, None] / (-np.expm1(-growth) / v[:, None])
        first, middle = (tuple(np.asarray(a) for a in self._levels(a)) for a in (early, lam))
        kind = self.draws[0].dtype
        columns = jax.tree.map(
            lambda a: np.asarray(a, kind), (first, middle, np.sqrt(added), weight)
        )
        found = _gaps(self.denoiser, self.draws, columns, self.structure)
        return np.asarray(found, np.float64)

    def _levels(self, lam: np.ndarray) -> Any:
        return tuple(np.reshape(a, lam.shape) for a in self.grid.at(lam.ravel()))


def _bound(denoiser: Any, grid: Grid, data: Any, key: Any, cond: Any, std: Any) -> _Bound:
    check_single(denoiser, "the KL bound")
    if not isinstance(grid, Grid):
        raise TypeError(f"the KL bound needs a jaxdiff.grids.Grid, got {grid!r}")
    if not is_concrete(grid) or any(grid.ends) or grid.backward:
        raise ValueError("the KL bound needs a grid from noise to data, alpha and sigma positive")
    x0 = jnp.asarray(data)
    if x0.ndim < 2 or len(x0) < 2 or not jnp.issubdtype(x0.dtype, jnp.floating):
        raise ValueError(f"data must be floating, [n, ...] with n >= 2, got {x0.dtype}{x0.shape}")
    if std is None:
        values = np.asarray(x0, np.float64)
        std = float(np.std(values - values.mean(0)))
    if not 0 < std < np.inf:
        raise ValueError(f"std must be positive, and is {std!r} (by default the data's)")
    keys = jax.random.split(key, 4)
    noise = tuple(jax.random.normal(k, x0.shape, x0.dtype) for k in keys[:2])
    # One draw from each of n equal shares of the density, dealt to the examples at random.
    within = np.asarray(jax.random.uniform(keys[2], (len(x0),)), np.float64)
    uniform = (np.asarray(jax.random.permutation(keys[3], len(x0))) + within) / len(x0)
    denoiser = as_arrays(denoiser)
    uniform = np.maximum(uniform, 1e-4 / len(x0))  # at 0 there is nothing to measure
    structure = structure_hash(denoiser, cond)
    return _Bound(denoiser, grid, (x0, *noise, cond), uniform, float(std), structure)


def _quantile(area: np.ndarray) -> np.ndarray:
    """s >= 0 with exp(s) - 1 - s = area, by Newton's method from above."""
    s = np.log1p(area + np.sqrt(2.0 * area))
    for _ in range(60):
        step = (np.expm1(s) - s - area) / np.expm1(s)
        s = s - step
        if np.all(np.abs(step) <= 1e-12 * s):
            break
    return s


@functools.partial(jax.jit, static_argnums=3)
def _gaps(denoiser: Denoiser, draws: Any, columns: Any, structure: int) -> Any:
    """Mean over the draws of weight |D - D'|^2, for one step after another: [k]."""
    x0, e, more, cond = draws

    def step(column):
        (t, alpha, sigma), (t_mid, alpha_mid, sigma_mid), added, weight = column
        wide = lambda a: a.reshape((-1,) + (1,) * (x0.ndim - 1))  # noqa: E731
        y = x0 + wide(sigma_mid / alpha_mid) * e
        far = alpha * (y + wide(added) * more)
        held = denoiser.predict("x0", far, t, alpha, sigma, cond)
        there = denoiser.predict("x0", wide(alpha_mid) * y, t_mid, alpha_mid, sigma_mid, cond)
        gap = jnp.sum(jnp.square(there - held).reshape(len(x0), -1), 1)
        return jnp.mean(weight * gap)

    return jax.lax.map(step, columns)
