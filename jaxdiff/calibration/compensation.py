"""The ratios of `dynamic_compensation`, found step by step on a few starts."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from jaxdiff.arrays import as_arrays, is_concrete, structure_hash
from jaxdiff.denoisers import Denoiser
from jaxdiff.grids import Grid, from_arrays
from jaxdiff.sampling import check_call, sample
from jaxdiff.solvers.clocks import VARIABLES, check_choice, check_order
from jaxdiff.solvers.combine import stack
from jaxdiff.solvers.dc_solver import HIGHEST_ORDER, dynamic_compensation, node_registers
from jaxdiff.solvers.first_order import ddim
from jaxdiff.solvers.tableau import Tableau


class CompensationFit(NamedTuple):
    """Ratios found, [steps], and each step's mean squared error with the ratio 1 and with it; NaN
    for the first steps, which have no ratio."""

    ratios: Float[np.ndarray, " steps"]
    before: Float[np.ndarray, " steps"]
    after: Float[np.ndarray, " steps"]


def fit_compensation(
    denoiser: Denoiser, tableau: Tableau, grid: Grid, x_T: Any, cond: Any = None,
    reference: Any = None, reference_steps: int = 999, order: int = 2, variable: str = "t",
    iterations: int = 40, learning_rate: float = 0.1, weight_decay: float = 0.01,
    keep: str = "best",
) -> CompensationFit:  # fmt: skip
    """The ratios with which `dynamic_compensation(tableau, grid, ratios)` follows the exact flow.

    Zhao et al., "DC-Solver" (2024): for each step in turn, from the state that the ratios found so
    far lead to, AdamW minimises over rho_i the mean squared distance between the solution at the next
    node, corrected if the method corrects, and the reference there. One program for all steps;
    about 2 iterations steps evaluations, with their derivative in rho_i, on the batch of x_T.

    Arguments:
      denoiser: under the guidance that it will be used with.
      tableau, grid, order, variable: as in `dynamic_compensation`.
      x_T: the starts, [batch, ...]; ten are enough for images.
      cond: passed to the denoiser.
      reference: the solution at the grid's nodes, leaves [steps + 1, batch, ...]; by default
        `ddim_trajectory` of `reference_steps` steps.
      iterations, learning_rate, weight_decay: of AdamW; the defaults are the authors'.
      keep: the ratio of the least error among those that were tried ("best", never worse than the
        ratio 1 on these starts) or, as published, the last one ("last").

    Raises what `dynamic_compensation` and `sample` raise, and ValueError for a reference of another
    shape or numbers that are not positive.
    """
    check_order(order, HIGHEST_ORDER)
    check_choice("variable", variable, VARIABLES)
    check_choice("keep", keep, ("best", "last"))
    check_order(iterations, 10**6, "iterations")
    if not learning_rate > 0 or not weight_decay >= 0:
        raise ValueError(
            f"need learning_rate > 0 and weight_decay >= 0, got {learning_rate}, {weight_decay}"
        )
    if not is_concrete(tableau, grid):
        raise ValueError("fit_compensation takes a tableau and a grid with values")
    corrected = any(node_registers(tableau, grid))
    # Also refuses what the traced calls could no longer see.
    dynamic_compensation(tableau, grid, np.ones(grid.steps), order, variable)
    denoiser, x_T, cond = (as_arrays(tree) for tree in (denoiser, x_T, cond))
    check_call(denoiser, tableau, x_T, None, None, cond, "final", None, None)
    x_T = jax.tree.map(lambda a: a.astype(jnp.promote_types(a.dtype, jnp.float32)), x_T)
    if grid.steps <= order:
        raise ValueError(f"{grid.steps} steps have no ratio of order {order}")
    if reference is None:
        reference = ddim_trajectory(denoiser, grid, x_T, reference_steps, cond)
    for ref, x in zip(jax.tree.leaves(reference), jax.tree.leaves(x_T), strict=True):
        if ref.shape != (len(grid), *x.shape):
            raise ValueError(f"reference must be {(len(grid), *x.shape)}, got {ref.shape}")
    options = _Options(order, variable, iterations, keep == "best", corrected)
    rates = jnp.asarray([learning_rate, weight_decay])
    tables = as_arrays((tableau, grid))
    structure = structure_hash(denoiser, tables, x_T, cond, reference)
    found = _fit(denoiser, *tables, x_T, cond, reference, rates, options, structure)
    return CompensationFit(*(np.asarray(a, np.float64) for a in found))


class _Options(NamedTuple):
    order: int
    variable: str
    iterations: int
    best: bool
    corrected: bool


@eqx.filter_jit
def _fit(denoiser, tableau, grid, x_T, cond, reference, rates, options, structure):
    steps, order = grid.steps, options.order
    nodes = [(i, 0) for i in range(steps + 1)]
    if options.corrected:
        nodes = [(0, 0), *((i + 1, 1) for i in range(1, steps)), (steps, 0)]
    tableau = dataclasses.replace(tableau, nodes=np.asarray(nodes, np.int32))
    # A corrected state is known one row later, and the last state one row of padding later.
    rows = 2 if options.corrected else 1

    def compensated(ratios):
        return _padded(dynamic_compensation(tableau, grid, ratios, order, options.variable))

    def run(table, x, state, save):
        # One parameter at a time: forward mode, whose memory is the state's.
        forward = diffrax.ForwardMode()
        return sample(denoiser, table, x, cond=cond, state=state, save=save, adjoint=forward)

    def loss(rho, ratios, i, state):
        table = _rows(compensated(ratios.at[i].set(rho)), i, rows)
        register = jnp.where(i == steps - 1, 0, int(options.corrected))
        table = dataclasses.replace(table, nodes=jnp.stack([jnp.asarray(rows), register])[None])
        found = jax.tree.map(lambda a: a[0], run(table, None, state, "nodes"))
        errors = jax.tree.map(lambda a, r: jnp.mean((a - r[i + 1]) ** 2), found, reference)
        return sum(jax.tree.leaves(errors)) / len(jax.tree.leaves(errors))

    optimizer = optax.adamw(rates[0], weight_decay=rates[1])

    def fit_step(carry, i):
        ratios, state = carry

        def iterate(carry, _):
            rho, moments, best, least = carry
            at = lambda rho: loss(rho, ratios, i, state)  # noqa: E731
            error, slope = jax.jvp(at, (rho,), (jnp.ones_like(rho),))
            best, least = jnp.where(error < least, rho, best), jnp.minimum(error, least)
            change, moments = optimizer.update(slope, moments, rho)
            return (optax.apply_updates(rho, change), moments, best, least), error

        first = jnp.ones((), ratios.dtype)
        start = first, optimizer.init(first), first, jnp.asarray(jnp.inf, ratios.dtype)
        (rho, _, best, least), errors = jax.lax.scan(iterate, start, length=options.iterations)
        rho, after = (best, least) if options.best else (rho, loss(rho, ratios, i, state))
        ratios = ratios.at[i].set(rho)
        state = run(_rows(compensated(ratios), i, 1), None, state, "state")
        return (ratios, state), (errors[0], after)

    ratios = jnp.ones(steps, jax.tree.leaves(x_T)[0].dtype)
    state = run(_rows(compensated(ratios), 0, order), x_T, None, "state")
    (ratios, _), errors = jax.lax.scan(fit_step, (ratios, state), jnp.arange(order, steps))
    unknown = jnp.full(order, jnp.nan)
    return ratios, *(jnp.concatenate([unknown, e]) for e in errors)


_BY_ROW = ("A", "B", "u", "w", "t", "alpha", "sigma", "active", "draw")


def _padded(table: Tableau) -> Tableau:
    """One row more, which keeps the state."""
    last = {f: jnp.asarray(getattr(table, f))[-1:] for f in _BY_ROW}
    last |= {"A": jnp.eye(table.registers)[None], "B": 0.0 * last["B"], "active": jnp.zeros(1)}
    joined = {f: jnp.concatenate([jnp.asarray(getattr(table, f)), last[f]]) for f in _BY_ROW}
    return dataclasses.replace(table, **joined)


def _rows(table: Tableau, first: Any, count: int) -> Tableau:
    """Rows `first` to first + count."""
    taken = {f: jax.lax.dynamic_slice_in_dim(getattr(table, f), first, count) for f in _BY_ROW}
    return dataclasses.replace(table, **taken)


def ddim_trajectory(
    denoiser: Denoiser, grid: Grid, x_T: Any, steps: int = 999, cond: Any = None
) -> Any:
    """Solution at the grid's nodes by DDIM of about `steps` steps: leaves [n + 1, batch, ...].

    Each of the grid's steps is divided evenly in t, or in half-log-SNR where the grid has no
    process. A last step from the process's t_min to sigma = 0 is one step. Raises ValueError for a
    grid from arrays with alpha = 0 or sigma = 0: nothing is known between such a node and the next.
    """
    check_order(steps, 10**6, "steps")
    if grid.process is None and any(grid.ends):
        raise ValueError("a grid from arrays with alpha = 0 or sigma = 0 cannot be refined")
    parts = -(-steps // grid.steps)
    pieces = stack([ddim(_between(grid, i, parts)) for i in range(grid.steps)])
    x_T = jax.tree.map(jnp.asarray, as_arrays(x_T))
    found = _trajectory(denoiser, pieces, x_T, cond, structure_hash(denoiser, x_T, cond))
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None].astype(b.dtype), b]), x_T, found)


@eqx.filter_jit
def _trajectory(denoiser, pieces, x_T, cond, structure):
    def body(x, table):
        x = sample(denoiser, table, x, cond=cond)
        return x, x

    x_T = jax.tree.map(lambda a: a.astype(jnp.promote_types(a.dtype, jnp.float32)), x_T)
    return jax.lax.scan(body, x_T, as_arrays(pieces))[1]


def _between(grid: Grid, i: int, parts: int) -> Grid:
    """The levels from node i to node i + 1."""
    first, last = grid.node(i), grid.node(i + 1)
    if grid.process is None:
        inner = grid.at(np.linspace(grid.lam[i], grid.lam[i + 1], parts + 1)[1:-1])
    else:
        t = np.linspace(first[0], last[0], parts + 1)[1:]
        # Where the last node is not the process's own (sigma = 0 after t_min), its t is one more.
        own = np.asarray(grid.process.sigma(t[-1])) > last[2] and first[0] != last[0]
        t = t if own else t[: 0 if first[0] == last[0] else -1]
        inner = t, grid.process.alpha(t), grid.process.sigma(t)
    return from_arrays(*(np.concatenate([[a], b, [c]]) for a, b, c in zip(first, inner, last)))
