"""Several tableaux as one: stacked, for vmap, or run in turn; one for a denoiser of more outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxdiff.arrays import is_concrete, namespace
from jaxdiff.solvers.clocks import check_order
from jaxdiff.solvers.tableau import Tableau


def _pad_axis(xp: Any, a: Any, axis: int, size: int, value: Any = 0.0) -> Any:
    widths = [(0, 0)] * a.ndim
    widths[axis] = (0, size - a.shape[axis])
    return xp.pad(a, widths, constant_values=value)


def _resize(tableau: Tableau, registers: int, history: int, outputs: int, noisy: bool) -> Tableau:
    """The same sampler with more registers, history, outputs, or zero noise coefficients."""
    xp = namespace(tableau)
    a = _pad_axis(xp, _pad_axis(xp, tableau.A, 1, registers), 2, registers)
    b = _pad_axis(xp, _pad_axis(xp, _pad_axis(xp, tableau.B, 1, registers), 2, history), 3, outputs)
    c, start, clock = tableau.C, tableau.start, tableau.clock
    if c is not None:
        c = _pad_axis(xp, c, 1, registers)
    elif noisy:
        c = xp.zeros((tableau.rows, registers))
    start = dataclasses.replace(
        start,
        S=_pad_axis(xp, start.S, 0, registers, 1.0),
        C=None if start.C is None else _pad_axis(xp, start.C, 0, registers),
        d=None if start.d is None else _pad_axis(xp, start.d, 0, registers),
    )
    d = None if tableau.d is None else _pad_axis(xp, tableau.d, 1, registers)
    # A padded output repeats the first: its B is zero, its conversion must only be finite.
    repeat = [0] * (outputs - tableau.outputs)
    u, w = (xp.concatenate([x, x[:, repeat]], 1) for x in (tableau.u, tableau.w))
    return dataclasses.replace(
        tableau, A=a, B=b, C=c, d=d, u=u, w=w, start=start, clock=clock,
        registers=registers, history=history, outputs=outputs,
    )  # fmt: skip


def _common(tableaux: Sequence[Tableau], name: str) -> list[Tableau]:
    tableaux = list(tableaux)
    if not tableaux:
        raise ValueError(f"{name} needs at least one tableau")
    for tableau in tableaux:
        if not isinstance(tableau, Tableau):
            raise TypeError(f"{name} takes tableaux, got {type(tableau).__name__}")
        if np.ndim(tableau.active) != 1:
            raise ValueError(f"{name} takes single tableaux, got one that is stacked already")
        fields = (tableau.A, tableau.B, tableau.t, tableau.alpha, tableau.sigma, tableau.start.S)
        if not all(isinstance(f, (np.ndarray, jax.Array)) for f in fields):
            raise ValueError(
                f"{name} takes tableaux whose coefficients are arrays, got pytree prefixes or a start "
                "that is an operator"
            )
    sizes = [max(getattr(t, f) for t in tableaux) for f in ("registers", "history", "outputs")]
    noisy = any(t.C is not None for t in tableaux)
    paths = {t.brownian for t in tableaux if t.stochastic}
    path = paths.pop() if len(paths) == 1 else None
    blind = tuple(
        tuple(sorted({n for t in tableaux if p < len(t.blind) for n in t.blind[p]}))
        for p in range(sizes[2])
    )
    out = [_resize(t, *sizes, noisy) for t in tableaux]
    # Tables without noise stand on any path, with an empty clock; two paths are no path.
    out = [
        dataclasses.replace(
            t, brownian=path, blind=blind,
            clock=None if path is None else t.clock if t.brownian == path
            else namespace(t).zeros((t.rows, 2)),
        )
        for t in out
    ]  # fmt: skip
    if any(t.d is not None for t in out):
        out = [
            t if t.d is not None
            else dataclasses.replace(t, d=namespace(t).zeros(t.A.shape[:2]))
            for t in out
        ]  # fmt: skip
    return out


def stack(tableaux: Sequence[Tableau]) -> Tableau:
    """Stack samplers on a new leading axis: `jax.vmap` `jaxdiff.sample` over the result.

    Rows, registers, history and outputs are padded to the largest. A padding row keeps the state
    (A = I, all else 0) and evaluates the last row's level again, so every value stays finite;
    `active` and `nfe` leave it out. Tableaux whose noise belongs to different Brownian paths lose
    their clock. Raises ValueError for an empty list, TypeError for anything but tableaux.
    """
    tableaux = _common(tableaux, "stack")
    rows = max(t.rows for t in tableaux)
    nodes = max(t.nodes.shape[0] for t in tableaux)
    starts_noisy = any(t.start.C is not None for t in tableaux)
    starts_shifted = any(t.start.d is not None for t in tableaux)
    padded = []
    for t in tableaux:
        xp = namespace(t)
        extra = rows - t.rows
        last = [t.rows - 1] * extra
        identity = xp.broadcast_to(
            xp.eye(t.registers).reshape((1, t.registers, t.registers) + (1,) * (t.A.ndim - 3)),
            (extra, *t.A.shape[1:]),
        )
        repeated = {
            f: xp.concatenate([getattr(t, f), getattr(t, f)[np.asarray(last, int)]])
            for f in ("u", "w", "t", "alpha", "sigma", "draw")
        }
        zeroed = {
            f: None if getattr(t, f) is None else _pad_axis(xp, getattr(t, f), 0, rows)
            for f in ("B", "C", "d", "active", "clock")
        }
        zero = xp.zeros(t.registers)
        padded.append(dataclasses.replace(
            t, A=xp.concatenate([t.A, identity]), **repeated, **zeroed,
            nodes=xp.concatenate([t.nodes, t.nodes[[-1] * (nodes - t.nodes.shape[0])]]),
            start=dataclasses.replace(
                t.start,
                C=zero if t.start.C is None and starts_noisy else t.start.C,
                d=zero if t.start.d is None and starts_shifted else t.start.d,
            ),
        ))  # fmt: skip

    def join(lead, *leaves):
        return namespace(leaves).stack(_align(namespace(leaves), leaves, [lead] * len(leaves)))

    return jax.tree.map(join, _leads(padded[0]), *padded)


def _leads(tableau: Tableau) -> Tableau:
    """The number of axes of every coefficient that are not a sample's."""
    axes = {"A": 3, "B": 4, "C": 2, "d": 2, "u": 3, "w": 3, "clock": 2, "nodes": 2}
    axes |= dict.fromkeys(("t", "alpha", "sigma", "active", "draw"), 1)
    present = {f: None if getattr(tableau, f) is None else lead for f, lead in axes.items()}
    start = jax.tree.map(lambda _: 1, tableau.start)
    return dataclasses.replace(tableau, **present, start=start)


def concatenate(tableaux: Sequence[Tableau]) -> Tableau:
    """One sampler that runs the pieces in turn: restarts, time travel, a change of solver.

    The first state of a piece is its start applied to the last s_0 of the piece before. Where both
    the last row and the start add noise the two independent normals are drawn as one of the summed
    variance, and the result has no Brownian clock. Coefficients with a sample's axes broadcast.
    Raises ValueError where a start is an operator, or these axes do not fit.
    """
    tableaux = _common(tableaux, "concatenate")
    xp = namespace(tableaux)
    out = tableaux[0]
    for piece in tableaux[1:]:
        scale = piece.start.S

        a, b = _enter(xp, out.A, scale, 3), _enter(xp, out.B, scale, 4)
        none = xp.zeros((out.rows, out.registers))
        c = out.C if out.C is None else _enter(xp, out.C, scale, 2)
        if piece.start.C is not None:
            c = _with_start(xp, none if c is None else c, piece.start.C, xp.hypot)
        d = out.d if out.d is None else _enter(xp, out.d, scale, 2)
        if piece.start.d is not None:
            d = _with_start(xp, none if d is None else d, piece.start.d, xp.add)
        clocked = piece.start.C is None and out.clock is not None and piece.clock is not None
        # Nodes after the entry: the piece's first node is the state it starts from.
        shift = np.asarray([out.rows, 0], np.int32)
        joined = {
            f: xp.concatenate([getattr(out, f), getattr(piece, f)])
            for f in ("u", "w", "t", "alpha", "sigma", "active")
        }
        c_next = piece.C
        if c is not None and c_next is None:
            c_next = xp.zeros((piece.rows, piece.registers))
        elif c is None and c_next is not None:
            c = none
        if d is not None or piece.d is not None:
            d = none if d is None else d
            d_next = xp.zeros((piece.rows, piece.registers)) if piece.d is None else piece.d
            d = _join_rows(xp, [d, d_next], 2)
        # Draws are renumbered so that the pieces share none but the one merged above.
        merged = piece.start.C is not None
        last_noisy = out.C is not None and is_concrete(out.C) and bool(np.any(out.C[-1] != 0))
        offset = out.draws - (1 if merged and last_noisy else 0)
        draw = np.append(out.draw, piece.draw + offset)
        if merged:
            draw[out.rows - 1] = offset
        # Rows without noise repeat a draw that exists.
        draw = np.minimum(draw, max(offset + piece.draws - 1, 0))
        # The solution at the joint is the state before the piece's start, where a register keeps it.
        joint = np.array(out.nodes)
        if merged and is_concrete(scale, piece.start.C):
            kept = np.flatnonzero((np.asarray(scale) == 1) & (np.asarray(piece.start.C) == 0))
            joint[-1, 1] = kept[0] if kept.size else 0
        out = dataclasses.replace(
            out, A=_join_rows(xp, [a, piece.A], 3), B=_join_rows(xp, [b, piece.B], 4),
            C=None if c is None else _join_rows(xp, [c, c_next], 2), d=d,
            draw=draw.astype(np.int32),
            clock=xp.concatenate([out.clock, piece.clock]) if clocked else None,
            brownian=out.brownian if clocked else None,
            nodes=np.concatenate([joint, piece.nodes[1:] + shift]), **joined,
        )  # fmt: skip
    return out


def _enter(xp: Any, a: Any, scale: Any, lead: int) -> Any:
    """Replace the last row's outcome for s_0 by scale_i times it, for every register i."""
    last, shaped = _align(xp, [a[-1][:1], scale], [lead - 1, 1])
    shaped = shaped.reshape(shaped.shape[:1] + (1,) * (lead - 2) + shaped.shape[1:])
    return _join_rows(xp, [a[:-1], (shaped * last)[None]], lead)


def _with_start(xp: Any, a: Any, start: Any, rule: Any) -> Any:
    """The last row's noise or shift and the next piece's start as one."""
    last = rule(*_align(xp, [a[-1], start], [1, 1]))
    return _join_rows(xp, [a[:-1], last[None]], 2)


def _align(xp: Any, arrays: Sequence[Any], leads: Sequence[int]) -> list[Any]:
    """Arrays whose axes after the first `lead`, a sample's, are broadcast to one shape."""
    width = max(a.ndim - lead for a, lead in zip(arrays, leads))
    arrays = [
        a.reshape(a.shape[:lead] + (1,) * (width - a.ndim + lead) + a.shape[lead:])
        for a, lead in zip(arrays, leads)
    ]
    shapes = [a.shape[lead:] for a, lead in zip(arrays, leads)]
    try:
        sample = np.broadcast_shapes(*shapes)
    except ValueError:
        raise ValueError(
            "tableaux are joined for one shape of sample, got coefficients for "
            f"{' and '.join(map(str, shapes))}"
        ) from None
    return [xp.broadcast_to(a, a.shape[:lead] + sample) for a, lead in zip(arrays, leads)]


def _join_rows(xp: Any, arrays: Sequence[Any], lead: int) -> Any:
    """Concatenated rows of coefficients with `lead` axes, a sample's axes after them."""
    return xp.concatenate(_align(xp, arrays, [lead] * len(arrays)))


def with_outputs(tableau: Tableau, outputs: int) -> Tableau:
    """The same sampler for a denoiser of more outputs: all but the tableau's own enter no update.

    The others are neither used nor converted; a control finds them in `out`. Raises ValueError for
    fewer outputs than the tableau has.
    """
    check_order(outputs, 10**6, "outputs", tableau.outputs)
    more = outputs - tableau.outputs
    xp = namespace(tableau)

    def padded(a: Any, axis: int, value: float) -> Any:
        widths = [(0, 0)] * a.ndim
        widths[axis] = (0, more)
        return xp.pad(a, widths, constant_values=value)

    return dataclasses.replace(
        tableau, B=padded(tableau.B, 3, 0.0), u=padded(tableau.u, 1, 1.0),
        w=padded(tableau.w, 1, 0.0), outputs=outputs, blind=(*tableau.blind, *((),) * more),
    )  # fmt: skip
