"""The one integrator: a `diffrax.AbstractSolver` that executes any tableau.

It runs in row-index time 0, 1, ..., rows: never in t or lambda, because diffrax negates decreasing
time and lambda is infinite at sigma = 0. The denoiser and the table travel through diffrax's `args`,
so new parameters, new coefficients and a second solver of the same shape compile nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxdiff.arrays import jit_trees
from jaxdiff.denoisers import Denoiser
from jaxdiff.noise import is_key_batch, per_sample
from jaxdiff.predictions import PREDICTIONS
from jaxdiff.rows import (
    Coefficients,
    at,
    denoised,
    draw_noise,
    evaluate,
    integrands,
    like,
    scale,
    shift,
    update,
)
from jaxdiff.solvers.tableau import Tableau

SAVES = ("final", "trajectory", "nodes", "x0", "state")


class RowInfo(NamedTuple):
    """What a control is told of the row: its index, level, and whether it is real (not padding)."""

    index: Any
    t: Any
    alpha: Any
    sigma: Any
    active: Any


class Carry(NamedTuple):
    """The integrator's state between rows, as a control sees it.

    `registers`: s_0..s_R, trees with leaves [batch, ...]; `history`: one tree an output, leaves
    [K, batch, ...], a ring (slot r mod K holds row r's integrand); empty if K = 1.
    """

    registers: tuple[Any, ...]
    history: tuple[Any, ...]

    def gather(self, indices: jax.Array) -> Carry:
        """Samples `indices` of the batch, registers and history together (resampling)."""
        return Carry(
            jax.tree.map(lambda a: a[indices], self.registers),
            jax.tree.map(lambda a: a[:, indices], self.history),
        )


class State(NamedTuple):
    """A whole carry, out of `sample(save="state")` and into `sample(state=...)`.

    `registers` as in `Carry`; `history`: one tree an output, leaves [K, batch, ...], newest first;
    `memory` of the denoiser; `aux` of the control; `draws` made so far, so that a continued run with
    the same key goes on with fresh noise.
    """

    registers: tuple[Any, ...]
    history: tuple[Any, ...]
    memory: Any = None
    aux: Any = None
    draws: Any = 0


class Control:
    """Base for what happens between rows; override any of the three, all are optional.

    A control is passed as `sample(control=...)`; make it a pytree (say, a registered dataclass) if it
    holds arrays. Two without arrays are equal, and share a program, if they are of one class and
    have equal attributes. Keys are None if `sample` got no key.
    """

    def __eq__(self, other: Any) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def init(self, x: Any) -> Any:
        """The control's own carried state, from the first s_0."""
        return None

    def before(self, aux: Any, row: RowInfo, x: Any, key: Any) -> tuple[Any, Any]:
        """(new s_0, aux) before the denoiser is evaluated."""
        return x, aux

    def after(
        self, aux: Any, row: RowInfo, x: Any, out: Any, z: Any, carry: Carry, key: Any
    ) -> tuple[Carry, Any]:
        """(carry, aux) after the row's update; `out` is the denoiser's output at x, z the noise."""
        return carry, aux


class Args(NamedTuple):
    """What travels through diffrax's `args`: data, none of it recompiled."""

    denoiser: Denoiser
    table: Tableau
    coefficients: Coefficients
    cond: Any
    keys: Any  # per sample, or None
    noise: Any  # array of draws, BrownianPath, or None
    control_key: Any
    control: Any
    structure: int  # see `integrate`

    def draw(self, r: Any, number: Any, x: Any) -> Any:
        """Noise number `number`, on row r's interval of the Brownian clock."""
        clock = None if self.table.clock is None else self.table.clock[r]
        return draw_noise(self.noise, self.keys, number, clock, x)


class Y(NamedTuple):
    """What diffrax differentiates: floating-point state only."""

    registers: tuple[Any, ...]
    history: tuple[Any, ...]
    extra: Any  # float leaves of (memory, aux)
    x0: Any  # the last denoised x0, if it is saved


class _RowTerm(diffrax.AbstractTerm):
    """The term of row-index time. diffrax asks it only for types (and would trace the network a
    second time to get them), so it has no field of its own: the solver evaluates the row."""

    def vf(self, t, y, args):
        return None

    def contr(self, t0, t1, **kwargs):
        return t1 - t0

    def prod(self, vf, control):
        return vf


class _TableauSolver(diffrax.AbstractSolver):
    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar = diffrax.LocalLinearInterpolation

    def order(self, terms):
        return None

    def init(self, terms, t0, t1, y0, args):
        return None

    def func(self, terms, t0, y0, args):
        raise TypeError("a tableau has no single vector field; use its rows")

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        table, control = args.table, args.control
        r = jnp.round(t0).astype(jnp.int32)
        memory, aux = eqx.combine(y0.extra, solver_state)
        registers = y0.registers
        row = at(args.coefficients, r)
        info = RowInfo(r, *row.times, table.active[r])
        if control is not None:
            x, aux = control.before(aux, info, registers[0], _control_key(args, r, 0))
            registers = (like(registers[0], x, "control.before"), *registers[1:])
        x = registers[0]
        outs, out, memory = evaluate(args.denoiser, args.cond, row.times, x, memory)
        new = integrands(row, outs, x, table.outputs)
        history = y0.history
        if table.history > 1:
            slot = r % table.history
            history = tuple(
                jax.tree.map(lambda h, m: jax.lax.dynamic_update_index_in_dim(h, m, slot, 0), h, m)
                for h, m in zip(history, new)
            )
            kept = [
                [jax.tree.map(lambda h, k=k: h[k], h) for h in history]
                for k in range(table.history)
            ]
        else:
            kept = [new]
        z = None if row.C is None else args.draw(r, table.draw[r], x)
        carry = Carry(update(row, registers, kept, z), history)
        if control is not None:
            key = _control_key(args, r, 1)
            carry, aux = control.after(aux, info, x, out, z, carry, key)
        x0 = None if y0.x0 is None else denoised(args.denoiser, row.times, outs, x)
        extra, rest = _split((memory, aux))
        y1 = Y(carry.registers, carry.history, extra, x0)
        return y1, None, dict(y0=y0, y1=y1), rest, diffrax.RESULTS.successful


def _is_wide(leaf: Any) -> bool:
    return eqx.is_array(leaf) and leaf.dtype in (jnp.float32, jnp.float64)


def _split(tree: Any) -> tuple[Any, Any]:
    """Leaves that diffrax may carry (and differentiate) as y, and all the others."""
    return eqx.partition(tree, _is_wide)


def _control_key(args: Args, r: Any, moment: int) -> Any:
    key = args.control_key
    if key is None:
        return None
    fold = lambda k: jax.random.fold_in(k, 2 * r + moment)  # noqa: E731
    return jax.vmap(fold)(key) if is_key_batch(key) else fold(key)


def _save_at(save: str) -> diffrax.SaveAt:
    functions = {
        "final": lambda t, y, args: y.registers[0],
        "trajectory": lambda t, y, args: y.registers[0],
        "nodes": lambda t, y, args: y.registers,
        "x0": lambda t, y, args: y.x0,
        # Leaves only: equinox's loop takes an empty history, (), for a buffer.
        "state": lambda t, y, args: tuple(jax.tree.leaves(y)),
    }
    if save in ("final", "state"):
        return diffrax.SaveAt(t1=True, fn=functions[save], solver_state=save == "state")
    return diffrax.SaveAt(t0=save != "x0", steps=True, fn=functions[save])


# One object a save, for the life of the process: diffrax's own jit compares the functions.
_SAVE_AT = {save: _save_at(save) for save in SAVES}


@jit_trees
def integrate(
    denoiser, table, x, key, noise, cond, save, adjoint, control, state, meter, structure
):
    """Run a table; arguments as `jaxdiff.sample` checks and prepares them.

    `structure` is their `jaxdiff.arrays.structure_hash`; it also goes to diffrax's own jit.
    """
    batch = jax.tree.leaves(x if state is None else state.registers)[0].shape[0]
    wide = jnp.result_type(*jax.tree.leaves(x if state is None else state.registers[0]))
    columns = [PREDICTIONS.index(p) for p in denoiser.predictions]
    columns += columns[-1:] * (table.outputs - len(columns))

    def pick(a):
        return jnp.stack([a[:, p, columns[p]] for p in range(table.outputs)], axis=1)

    rows, history = table.rows, table.history
    # Slot s of the ring holds, at row r, the integrand of (r - s) mod K rows ago.
    age = (np.arange(rows)[:, None] - np.arange(history)) % history

    def ring(b):
        index = age.reshape(rows, 1, history, *(1,) * (b.ndim - 3))
        return jnp.take_along_axis(b, index, axis=2)

    cast = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, wide), tree)  # noqa: E731
    keys = None if key is None or noise is not None else per_sample(key, batch)
    control_key = None
    if key is not None and control is not None:
        fold = lambda k: jax.random.fold_in(k, np.uint32(2**32 - 1))  # noqa: E731
        control_key = jax.vmap(fold)(key) if is_key_batch(key) else fold(key)
    draw = jnp.asarray(table.draw)
    if state is not None and noise is None:
        draw = draw - draw[0] + state.draws
    coefficients = Coefficients(
        cast(table.A), jax.tree.map(ring, cast(table.B)), cast(table.C), cast(table.d),
        pick(cast(table.u)), pick(cast(table.w)), cast((table.t, table.alpha, table.sigma)),
    )  # fmt: skip
    none = dict.fromkeys(("A", "B", "C", "d", "u", "w", "t", "alpha", "sigma"))
    run = dataclasses.replace(
        table, **none, active=cast(table.active), draw=draw, clock=cast(table.clock),
        start=cast(table.start),
    )  # fmt: skip
    args = Args(denoiser, run, coefficients, cond, keys, noise, control_key, control, structure)
    if state is None:
        registers = _start(args, x)
        history_0 = ()
        if history > 1:
            zeros = jax.tree.map(lambda a: jnp.zeros((history, *a.shape), a.dtype), registers[0])
            history_0 = (zeros,) * table.outputs
        memory = denoiser.memory
        aux = None if control is None else control.init(registers[0])
    else:
        registers, memory, aux = state.registers, state.memory, state.aux
        newest_first = (-1 - np.arange(history)) % history
        history_0 = jax.tree.map(lambda h: h[newest_first], state.history)
    extra, rest = _split(jax.tree.map(jnp.asarray, (memory, aux)))
    x0 = registers[0] if save == "x0" else None
    y0 = Y(registers, history_0, extra, x0)
    solution = diffrax.diffeqsolve(
        _RowTerm(), _TableauSolver(), 0.0, float(rows), 1.0, y0, args,
        saveat=_SAVE_AT[save], adjoint=adjoint, max_steps=rows, throw=False,
        progress_meter=meter, solver_state=rest,
    )  # fmt: skip
    ys = solution.ys
    if save == "final":
        return jax.tree.map(lambda a: a[0], ys)
    if save == "nodes":
        stacked = jax.tree.map(lambda *a: jnp.stack(a, 1), *ys)
        return jax.tree.map(lambda a: a[table.nodes[:, 0], table.nodes[:, 1]], stacked)
    if save == "state":
        y = jax.tree.unflatten(jax.tree.structure(y0), [a[0] for a in ys])
        memory, aux = eqx.combine(y.extra, solution.solver_state)
        newest_first = (rows - 1 - np.arange(history)) % history
        made = 0 if state is None else state.draws
        if table.C is not None:
            made = draw[-1] + 1
        elif state is None and table.start.C is not None:
            made = 1
        past = jax.tree.map(lambda h: h[newest_first], y.history)
        return State(y.registers, past, memory, aux, jnp.asarray(made, jnp.int32))
    return ys


def _start(args: Args, x: Any) -> tuple[Any, ...]:
    table = args.table
    start = table.start
    if isinstance(start.S, lx.AbstractLinearOperator):
        flat = jax.vmap(lambda a: ravel_pytree(a)[0])(x)
        _, unravel = ravel_pytree(jax.tree.map(lambda a: a[0], x))
        moved = jax.vmap(unravel)(jax.vmap(start.S.mv)(flat))
        registers = [moved] * table.registers
    else:
        registers = [scale(at(start.S, i), x) for i in range(table.registers)]
    if start.C is not None:
        z = args.draw(0, 0, x)
        registers = [
            jax.tree.map(jnp.add, s, scale(at(start.C, i), z)) for i, s in enumerate(registers)
        ]
    if start.d is not None:
        registers = [shift(s, at(start.d, i)) for i, s in enumerate(registers)]
    return tuple(registers)
