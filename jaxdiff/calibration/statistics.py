"""DPM-Solver-v3's empirical model statistics, estimated from a denoiser and its states.

With rho = sigma / alpha, y = x / alpha and ' the derivative by the half-log-SNR along the probability
flow, x' = (alpha' / alpha) x - sigma eps and y' = -rho eps. Per dimension (Zheng et al.,
"DPM-Solver-v3", 2023):

    l = E[diag(sigma d eps / d x)]             what is linear in x leaves the integrand
    f = rho eps - l y,   f' = rho eps' - (1 - l) rho eps - l' y
    s = Cov(f, f') / Var f,   b = E[f'] - s E[f]       least squares of f' on f

eps' is one Jacobian-vector product. l' is the second-order difference of l over the grid's nodes. Where
sigma > alpha the same is written in x0 = y - rho eps, with 1 - l = E[diag(alpha d x0 / d x)], so that
nothing of the size of rho cancels. The authors have published the statistics of their networks, not the
code that estimates them.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdiff.arrays import as_arrays, structure_hash
from jaxdiff.denoisers import Denoiser, check_single
from jaxdiff.grids import Grid
from jaxdiff.predictions import convert
from jaxdiff.solvers.clocks import check_choice
from jaxdiff.solvers.statistics import ModelStatistics, check


def noised_states(grid: Grid, x0: Array, key: Array) -> Array:
    """alpha x0 + sigma eps at every node of a grid, each example with one eps for all of them.

    x0 is [batch, ...], the result [nodes, batch, ...].

    One eps an example makes the statistics smooth from node to node, which l' needs.
    """
    x0 = jnp.asarray(x0)
    eps = jax.random.normal(key, x0.shape, x0.dtype)
    alpha, sigma = (
        jnp.asarray(np.asarray(a), x0.dtype).reshape((-1,) + (1,) * x0.ndim)
        for a in (grid.alpha, grid.sigma)
    )
    return alpha * x0 + sigma * eps


def estimate_statistics(
    denoiser: Denoiser, grid: Grid, batches: Iterable[Any], diagonal: str = "exact",
    probes: int = 1, chunk: int = 64, key: Array | None = None,
) -> ModelStatistics:  # fmt: skip
    """The statistics of a denoiser on the nodes of `grid`, which become their bins.

    Arguments:
      denoiser: of one prediction, whatever is sampled later: guidance included.
      grid: the bins, from noise to data, with alpha and sigma positive throughout; evenly in
        half-log-SNR for the authors' code: `grids.half_log_snr(process, 120)`. The files that the
        authors name have 120 to 1200 bins, from 1024 or 4096 states.
      batches: of states at its nodes, [nodes, batch, *shape], or pairs of these and the denoiser's
        cond. Either the noised data, `noised_states(grid, x0, key)`, or, where the two differ (under
        guidance), the network's own trajectories:
        `sample(denoiser, tableau, x_T, save="nodes")` for a tableau on this grid. Gone through twice,
        one batch in memory at a time.
      diagonal: of the Jacobian: "exact", one Jacobian-vector product a dimension, `chunk` of them at
        once; or "rademacher", the mean of v * (J v) over `probes` random signs v a state, which
        needs `key`.

    Moments are merged on the host in float64. A dimension where f does not vary beyond rounding has
    s = 0. Raises TypeError or ValueError for a grid that reaches an end, batches of another shape,
    that can be gone through but once, or that are none, and unknown options.
    """
    check_single(denoiser, "estimate_statistics")
    check_choice("diagonal", diagonal, ("exact", "rademacher"))
    if any(grid.ends) or grid.backward:
        raise ValueError("the bins run from noise to data, with alpha and sigma positive throughout")
    if (diagonal == "rademacher") != (key is not None):
        raise ValueError("key goes with diagonal='rademacher', and with that alone")
    if iter(batches) is batches:
        raise TypeError("batches are gone through twice: give a list, or an object that starts anew")
    denoiser = as_arrays(denoiser)
    levels = tuple(np.asarray(a, np.float64) for a in (grid.lam, grid.t, grid.alpha, grid.sigma))
    structure = structure_hash(denoiser, grid)
    total, diagonals = 0, 0.0
    for index, (states, cond) in enumerate(_pairs(batches, len(grid))):
        draw = None if key is None else jax.random.fold_in(key, index)
        found = _diagonal(
            denoiser, levels[1:], states, cond, draw, diagonal, probes, chunk, structure
        )
        count = states.shape[1]
        diagonals = diagonals + count * np.stack([np.asarray(a, np.float64) for a in found])
        total += count
    if total == 0:
        raise ValueError("estimate_statistics needs at least one batch")
    of_eps, of_x0 = diagonals / total
    noisy = (levels[2] < levels[3]).reshape((-1,) + (1,) * (of_eps.ndim - 1))
    rest = np.where(noisy, of_x0, 1.0 - of_eps)  # 1 - l
    pull = np.where(noisy, 1.0 - of_x0, of_eps)
    slope = np.gradient(pull, levels[0], axis=0, edge_order=2 if len(grid) > 2 else 1)
    merged, noise = None, 0.0
    for states, cond in _pairs(batches, len(grid)):
        found = _moments(denoiser, grid, levels, states, cond, (pull, rest, slope), structure)
        mean_f, mean_g, f_f, f_g, square = (np.asarray(a, np.float64) for a in found)
        merged = _merge(merged, (states.shape[1], mean_f, mean_g, f_f, f_g))
        # What rounding alone moves f by, squared (rho eps of an x0 network is y - x0).
        noise = noise + (8 * np.finfo(states.dtype).eps) ** 2 * states.shape[1] * square
    _, mean_f, mean_g, f_f, f_g = merged
    varies = f_f > noise
    s = np.where(varies, f_g / np.where(varies, f_f, 1.0), 0.0)
    found = ModelStatistics(levels[0], pull, s, mean_g - s * mean_f)
    check(found)
    return found


def _pairs(batches: Iterable[Any], nodes: int) -> Iterable[tuple[Array, Any]]:
    for batch in batches:
        states, cond = batch if isinstance(batch, tuple) else (batch, None)
        if np.ndim(states) < 2 or np.shape(states)[0] != nodes or np.shape(states)[1] == 0:
            raise ValueError(
                f"a batch holds the states at the grid's {nodes} nodes, [{nodes}, batch, ...], got "
                f"shape {np.shape(states)}"
            )
        states = jnp.asarray(states)
        states = states.astype(jnp.promote_types(states.dtype, jnp.float32))
        yield states, as_arrays(cond)


def _merge(old: Any, new: Any) -> Any:
    """Counts, means and sums of centred products of two samples as one (Chan et al. 1979)."""
    if old is None:
        return new
    (n, f, g, f_f, f_g), (m, f_new, g_new, f_f_new, f_g_new) = old, new
    df, dg, share = f_new - f, g_new - g, m / (n + m)
    return (
        n + m, f + share * df, g + share * dg,
        f_f + f_f_new + n * share * df**2, f_g + f_g_new + n * share * df * dg,
    )  # fmt: skip


def _both(denoiser, x, t, alpha, sigma, cond):
    """(eps, x0) of one evaluation."""
    out = denoiser(x, t, alpha, sigma, cond)
    return tuple(
        convert(out, x, denoiser.prediction, target, alpha, sigma) for target in ("eps", "x0")
    )


@functools.partial(jax.jit, static_argnames=("diagonal", "probes", "chunk", "structure"))
def _diagonal(denoiser, levels, states, cond, key, diagonal, probes, chunk, structure):
    """The batch's means of diag(sigma d eps / d x) and of diag(alpha d x0 / d x), [nodes, *shape]."""
    shape = states.shape[2:]

    def at_node(row):
        index, (t, alpha, sigma), x = row
        _, push = jax.linearize(lambda x: _both(denoiser, x, t, alpha, sigma, cond), x)

        def column(i):
            # A sample's output depends on that sample alone: one basis vector serves the batch.
            basis = (jnp.arange(x[0].size) == i).astype(x.dtype).reshape(shape)
            moved = push(jnp.broadcast_to(basis, x.shape))
            return [jnp.mean(a.reshape(len(x), -1)[:, i]) for a in moved]

        def probe(i):
            signs = jax.random.rademacher(
                jax.random.fold_in(jax.random.fold_in(key, index), i), x.shape, x.dtype
            )
            return [jnp.mean(signs * a, 0) for a in push(signs)]

        if diagonal == "exact":
            found = jax.lax.map(column, jnp.arange(x[0].size), batch_size=chunk)
            of_eps, of_x0 = (a.reshape(shape) for a in found)
        else:
            found = jax.lax.map(probe, jnp.arange(probes), batch_size=chunk)
            of_eps, of_x0 = (jnp.mean(a, 0) for a in found)
        return sigma * of_eps, alpha * of_x0

    levels = tuple(jnp.asarray(a, states.dtype) for a in levels)
    return jax.lax.map(at_node, (jnp.arange(len(states)), levels, states))


@functools.partial(jax.jit, static_argnames=("structure",))
def _moments(denoiser, grid, levels, states, cond, linear, structure):
    """Means of f and f', their sums of centred products, and the mean of y^2."""

    def at_node(row):
        (lam, t, alpha, sigma), x, (pull, rest, slope) = row
        _, (t_rate, alpha_rate, sigma_rate) = jax.jvp(grid.at, (lam,), (jnp.ones_like(lam),))

        def both_at(x, t, alpha, sigma):
            return _both(denoiser, x, t, alpha, sigma, cond)

        (eps, x0), rho, y = both_at(x, t, alpha, sigma), sigma / alpha, x / alpha
        flow = (alpha_rate / alpha) * x - sigma * eps
        _, (eps_rate, x0_rate) = jax.jvp(
            both_at, (x, t, alpha, sigma), (flow, t_rate, alpha_rate, sigma_rate)
        )
        noisy = alpha < sigma
        f = jnp.where(noisy, rest * y - x0, rho * eps - pull * y)
        g = jnp.where(noisy, -x0_rate, rho * eps_rate) - rest * rho * eps - slope * y
        mean_f, mean_g = jnp.mean(f, 0), jnp.mean(g, 0)
        centred = f - mean_f
        products = jnp.sum(centred**2, 0), jnp.sum(centred * (g - mean_g), 0)
        return mean_f, mean_g, *products, jnp.mean(y**2, 0)

    cast = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, states.dtype), tree)  # noqa: E731
    return jax.lax.map(at_node, (cast(levels), states, cast(linear)))
