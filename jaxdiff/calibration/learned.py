"""Solvers learned by gradient: nodes, coefficients and times of any table, fitted to a teacher."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxdiff.arrays import as_arrays, jit_trees, structure_hash
from jaxdiff.denoisers import Denoiser
from jaxdiff.grids import Grid
from jaxdiff.grids.grid import make
from jaxdiff.sampling import check_call, sample
from jaxdiff.solvers.clocks import check_choice, check_order
from jaxdiff.solvers.tableau import Tableau

PARTS = ("nodes", "coefficients", "times")
AVERAGES = ("arithmetic", "geometric")
_CHUNK = 25  # steps between two looks at the held-out error


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Freedom:
    """How far a learned solver is from its family: all zero is the family's own table.

    Attributes:
      nodes: [steps], logits of the gaps between the nodes' times.
      coefficients: [rows, registers, history, outputs, ...], how an integrand's weight is spread anew
        over the evaluations; the last axes broadcast against a sample.
      times: [rows], where between its neighbours' times an evaluation's time lies.
    """

    nodes: Float[Array, " steps"]
    coefficients: Float[Array, "rows registers history outputs ..."]
    times: Float[Array, " rows"]


class Learned(NamedTuple):
    """What `learn` found: the table, its freedom, and the errors.

    `train` [looks] and `held_out` [looks] are the average error on the starts that were fitted to and
    on those that were not, every 25 steps, before the first step first; `tableau` has the least of
    `held_out`.
    """

    tableau: Tableau
    freedom: Freedom
    train: np.ndarray
    held_out: np.ndarray


def no_freedom(
    family: Callable[[Grid], Tableau], grid: Grid, history: int | None = None,
    shape: tuple[int, ...] = (),
) -> Freedom:  # fmt: skip
    """The zero `Freedom` of a family on a grid, with at least `history` integrands kept, and
    coefficients of their own for the components of samples of this shape."""
    base = family(grid)
    kept = max(base.history, min(history or 0, base.rows))
    axes = base.rows, base.registers, kept, base.outputs
    return Freedom(np.zeros(grid.steps), np.zeros((*axes, *shape)), np.zeros(base.rows))


def learned_tableau(family: Callable[[Grid], Tableau], grid: Grid, freedom: Freedom) -> Tableau:
    """The table of a family with this freedom; consistent for any values of it.

    - The nodes' times have the gaps softmax(log gap_i + nodes_i) of the whole span: they stay in
      order, and the ends stay.
    - In every row and register, the weight of the integrand of age k becomes

          B_k + W (f_k - mean f),    W = sum_k B_k,    f = coefficients,

      over the ages that exist there. The weights' sum, which is the exact integral of a constant,
      is what it was: an order-1 method stays one. Of a family with one register and one output,
      all integrands kept, these are all linear methods that are exact where x0 and eps stay
      constant: their earlier states are combinations of the present one and the integrands. Where
      an `analytic_first_step` replaced an evaluation, what x_T weighs is not free.
    - The network is evaluated at the time t_r + tanh(times_r) / 2 (t_{r +- 1} - t_r), with the level
      of that time; what it says is converted as if at t_r (Tong et al., "Learning to Discretize
      Denoising Diffusion ODEs" (2024), decouple the two so).

    The grid must have a process, and its nodes be finite times of it. Arrays of `jax.numpy` in
    `freedom` make a traced table: differentiate it, or vmap it over many.
    """
    if grid.process is None:
        raise ValueError("a learned grid needs its process: build it with jaxdiff.grids, not arrays")
    return _freed(_at_nodes(family, grid, freedom.nodes), grid, freedom)


def _at_nodes(family: Callable[[Grid], Tableau], grid: Grid, nodes: Any) -> Tableau:
    """The family's table on the grid whose times' gaps `nodes` move."""
    xp, process = (np if isinstance(nodes, np.ndarray) else jnp), grid.process
    gaps = np.abs(np.diff(np.asarray(grid.t)))
    logits = xp.log(gaps / gaps.sum()) + nodes
    share = xp.exp(logits - logits.max())
    place = xp.cumsum(share / share.sum())[:-1]
    t = xp.concatenate([
        grid.t[:1], grid.t[0] + (grid.t[-1] - grid.t[0]) * place, grid.t[-1:]
    ])  # fmt: skip
    alpha, sigma = (
        xp.concatenate([end[:1], f(t[1:-1]), end[-1:]])
        for end, f in ((grid.alpha, process.alpha), (grid.sigma, process.sigma))
    )
    return family(make(t, alpha, sigma, process, grid.ends, grid.backward))


def _freed(table: Tableau, grid: Grid, freedom: Freedom) -> Tableau:
    """The table with its weights spread anew and the network's times moved."""
    xp = np if all(isinstance(f, np.ndarray) for f in jax.tree.leaves(freedom)) else jnp
    process = grid.process
    rows, kept = table.rows, freedom.coefficients.shape[2]
    axes = max(table.B.ndim, freedom.coefficients.ndim)
    weights, spread = (
        a.reshape(*a.shape[:4], *(1,) * (axes - a.ndim), *a.shape[4:])
        for a in (table.B, freedom.coefficients)
    )
    weights = xp.concatenate([
        weights, xp.zeros((*weights.shape[:2], kept - table.history, *weights.shape[3:]))
    ], 2)  # fmt: skip
    exists = np.arange(kept)[None] <= np.arange(rows)[:, None]
    exists = exists.reshape(rows, 1, kept, *(1,) * (axes - 3))
    free = xp.where(exists, spread, 0.0)
    free = xp.where(exists, free - free.sum(2, keepdims=True) / exists.sum(2, keepdims=True), 0.0)
    weights = weights + weights.sum(2, keepdims=True) * free

    before = xp.concatenate([table.t[:1], table.t[:-1]])
    after = xp.concatenate([table.t[1:], table.t[-1:]])
    shift = 0.5 * xp.tanh(freedom.times)
    fed = table.t + xp.where(shift > 0, shift * (after - table.t), -shift * (before - table.t))
    moved = xp.where(fed == table.t, 0, 1)
    alpha, sigma = (
        xp.where(moved, f(fed), own)
        for f, own in ((process.alpha, table.alpha), (process.sigma, table.sigma))
    )
    return dataclasses.replace(table, B=weights, history=kept, t=fed, alpha=alpha, sigma=sigma)


def _with_forward_gradient(build: Callable[[Any], Tableau], nodes: Any) -> Tableau:
    """build(nodes), differentiated forward, once for every node, and the Jacobian kept.

    A builder is some thousand operations on single numbers. XLA takes minutes to compile their
    reverse derivative, a quarter of that for the forward one; and nodes are few.
    """
    kept = []  # the table's structure and its integers, which are the host's

    def floats(nodes):
        leaves, structure = jax.tree.flatten(build(nodes))
        inexact = [jnp.issubdtype(a.dtype, jnp.inexact) for a in leaves]
        kept[:] = structure, [None if moves else a for a, moves in zip(leaves, inexact)]
        return [a for a, moves in zip(leaves, inexact) if moves]

    def forward(nodes):
        push = jax.vmap(lambda v: jax.jvp(floats, (nodes,), (v,)), out_axes=(None, 0))
        return push(jnp.eye(nodes.size, dtype=nodes.dtype))

    def backward(jacobian, cotangents):
        return (sum(jnp.tensordot(j, c, c.ndim) for j, c in zip(jacobian, cotangents)),)

    call = jax.custom_vjp(floats)
    call.defvjp(forward, backward)
    found = iter(call(nodes))
    structure, fixed = kept
    return jax.tree.unflatten(structure, [next(found) if a is None else a for a in fixed])


def learn(
    denoiser: Denoiser, family: Callable[[Grid], Tableau], grid: Grid, x_T: Any, target: Any,
    held_out: tuple[Any, Any], *, parts: Sequence[str] = PARTS, history: int | None = None,
    shaped: bool = False, average: str = "arithmetic", cond: Any = None, held_out_cond: Any = None,
    steps: int = 500, learning_rate: float = 1e-2, decay: float = 1e-3,
) -> Learned:  # fmt: skip
    """Fit the free parts of a family's table to where a teacher ends.

    Minimises, by Adam with a cosine decay, the average over samples of the error |x - x*| /
    sqrt(size) (its logarithm, for the geometric average) plus decay |freedom|^2, a mean over
    components where they have their own, through the sampler itself; a step whose gradient is not
    finite is left out. What is returned did best on the held-out starts, the family's own table
    included. Kin to LD3 (Tong et al. 2024: nodes and times from a teacher's end points) and Bespoke
    solvers (Shaul et al. 2023); neither's loss nor its parametrisation is repeated.

    Arguments:
      denoiser: under the guidance that it will be used with.
      family: grid -> tableau, deterministic: a builder with its options
        (`functools.partial(jd.solvers.unipc, order=3)`).
      grid: where to begin.
      x_T, target: starts [batch, ...] and where a teacher ends from them (an exact flow, or
        `jaxdiff.sample` with many steps).
      held_out: (x_T, target) of other starts.
      parts: which of "nodes", "coefficients" and "times" may change.
      history: keep at least so many integrands (as many as there are rows, at most), for methods that
        look further back than the family.
      shaped: give every component of a sample, an array, coefficients of its own. They take more
        starts to learn, and the solver then fits samples of this shape only.
      average: "arithmetic"; or "geometric", which the few samples that end in another mode do not
        rule.
      cond, held_out_cond: passed to the denoiser.

    Raises ValueError for unknown parts or averages, numbers out of range, a stochastic family, a
    family's table whose error is not finite, or what `sample` raises.
    """
    for part in parts:
        check_choice("part", part, PARTS)
    check_choice("average", average, AVERAGES)
    check_order(steps, 10**7, "steps")
    check_order(1 if history is None else history, 10**4, "history")
    if not 0 < learning_rate < np.inf or not 0 <= decay < np.inf:
        raise ValueError(
            f"learning_rate must be positive and decay not negative, got {learning_rate!r}, {decay!r}"
        )
    if not parts:
        raise ValueError(f"parts must name what may change, of {list(PARTS)}")
    if not isinstance(held_out, tuple) or len(held_out) != 2:
        raise ValueError("held_out must be a tuple (x_T, target)")
    base = family(grid)
    if base.stochastic:
        raise ValueError("only deterministic samplers can be fitted to end points")
    data = as_arrays(((x_T, target, cond), (*held_out, held_out_cond)))
    for x, ends, c in data:
        check_call(denoiser, base, x, None, None, c, "final", None, None)
        if jax.tree.map(jnp.shape, ends) != jax.tree.map(jnp.shape, x):
            raise ValueError(
                f"target must have the starts' shapes {jax.tree.map(jnp.shape, x)}, got "
                f"{jax.tree.map(jnp.shape, ends)}"
            )
    if shaped and not isinstance(x_T, (jax.Array, np.ndarray)):
        raise ValueError("shaped coefficients need samples that are one array each")
    free = no_freedom(family, grid, history, np.shape(x_T)[1:] if shaped else ())
    learned_tableau(family, grid, free)
    denoiser = as_arrays(denoiser)
    dtype = jnp.result_type(float)
    free = jax.tree.map(lambda a: jnp.asarray(a, dtype), free)
    chunks = -(-steps // _CHUNK)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, chunks * _CHUNK))
    fit = _Fit(family, grid, tuple(parts), optimizer, float(decay), average == "geometric")
    state = optimizer.init(free)
    structure = structure_hash(denoiser, data)
    # Of this call: what they compile goes when it ends.
    errors, advance = jit_trees(fit.errors), jit_trees(fit.advance)
    losses, best = [errors(denoiser, free, data, structure)], free
    if not np.all(np.isfinite(losses[0])):
        raise ValueError(f"the family's own errors must be finite, got {np.asarray(losses[0])}")
    for _ in range(chunks):
        free, state = advance(denoiser, free, state, data, structure)
        losses.append(errors(denoiser, free, data, structure))
        if losses[-1][1] <= np.nanmin([held for _, held in losses]):
            best = free
    freedom = jax.tree.map(lambda a: np.asarray(a, np.float64), best)
    train, held = np.asarray(losses).T
    return Learned(learned_tableau(family, grid, freedom), freedom, train, held)


@dataclasses.dataclass(frozen=True, eq=False)
class _Fit:
    """What is fixed during a fit: one object, so one program."""

    family: Callable[[Grid], Tableau]
    grid: Grid
    parts: tuple[str, ...]
    optimizer: optax.GradientTransformation
    decay: float
    geometric: bool

    def error(self, denoiser, free, data):
        x, target, cond = data
        base = functools.partial(_at_nodes, self.family, self.grid)
        tableau = _freed(_with_forward_gradient(base, free.nodes), self.grid, free)
        found = sample(denoiser, tableau, x, cond=cond)

        def squares(a, b):
            gap = (a - b).reshape(len(a), -1)
            return jnp.sum(gap**2, 1), gap.shape[1]

        parts = jax.tree.leaves(
            jax.tree.map(squares, found, target), is_leaf=lambda p: isinstance(p, tuple)
        )
        mean = sum(total for total, _ in parts) / sum(size for _, size in parts)
        # The root's slope is infinite where a sample is exact.
        error = jnp.sqrt(mean + 1e-20)
        return jnp.exp(jnp.mean(jnp.log(error))) if self.geometric else jnp.mean(error)

    def penalised(self, free, denoiser, data):
        components = np.prod(free.coefficients.shape[4:])
        parts = free.nodes, free.coefficients / components**0.5, free.times
        size = sum(jnp.sum(f**2) for f in parts)
        error = self.error(denoiser, free, data)
        return (jnp.log(error) if self.geometric else error) + self.decay * size

    def errors(self, denoiser, free, data, structure):
        """On the starts to fit and on those held out."""
        return tuple(self.error(denoiser, free, part) for part in data)

    def advance(self, denoiser, free, state, data, structure):
        """`_CHUNK` steps of the optimizer."""

        def step(carry, _):
            free, state = carry
            gradient = jax.grad(self.penalised)(free, denoiser, data[0])
            # One sample on the brink between two modes must not throw the solver away.
            finite = jnp.all(jnp.array([jnp.isfinite(g).all() for g in jax.tree.leaves(gradient)]))
            gradient = Freedom(**{
                n: jnp.where(finite, getattr(gradient, n), 0.0) if n in self.parts
                else jnp.zeros_like(getattr(gradient, n)) for n in PARTS
            })  # fmt: skip
            updates, state = self.optimizer.update(gradient, state, free)
            return (optax.apply_updates(free, updates), state), None

        return jax.lax.scan(step, (free, state), None, _CHUNK)[0]
