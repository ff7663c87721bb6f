"""The tableau: a sampler as data.

A sampler whose step is linear in stored states and network outputs is an explicit exponential
general linear method (Butcher 1966; Ostermann, Thalhammer & Wright, "A class of explicit exponential
general linear methods", BIT 2006): coefficients that depend on the noise schedule alone. One row is
one evaluation of the denoiser. With registers s_0..s_R (the network is evaluated at s_0) and the
last K integrands m_k, newest first, row r is

    o_p  = denoiser(s_0, t_r)_p
    m_p  = u_rp o_p + w_rp s_0                         pushed on the history
    s_i' = sum_j A_ij s_j + sum_kp B_ikp m_kp + C_i z + d_i

and a start, without evaluation, is  s_i = S_i x_T + C_i z + d_i. The result is the last s_0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdiff.arrays import is_concrete, namespace
from jaxdiff.grids import Grid
from jaxdiff.predictions import PREDICTIONS, affine


def _static(default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """s_i = S_i x_T + C_i z + d_i; S [registers], or a lineax operator on one flattened sample
    (then every register starts at S x_T); C and d [registers] or None."""

    S: Any
    C: Any = None
    d: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Tableau:
    """The coefficients of a sampler on a grid. Made by the builders of `jaxdiff.solvers`.

    With r rows, R registers, K integrands kept, P outputs of the denoiser, n + 1 nodes:

      A [r, R, R], B [r, R, K, P], C [r, R] or None (no noise), d [r, R] or None
      u, w [r, P, 5]: integrand = u output + w s_0 for each of `jaxdiff.predictions.PREDICTIONS`
      t, alpha, sigma [r]: the level at which row r evaluates
      active [r]: 1 for rows that count, 0 for padding
      draw [r]: number of the noise draw a row uses (rows without noise repeat the last)
      clock [r, 2] or None: the accumulated variance before and after a row's noise, for `BrownianPath`
      nodes [n + 1, 2]: where the solution at a grid node stands: (rows executed, register)
      start: see `Start`

    Coefficients may carry trailing axes that broadcast against the state, or be pytree prefixes of
    it. Static are `registers`, `history`, `outputs`, the presence of C, d and clock, `brownian` (whose
    clock it is) and `blind` (for each output the predictions that do not determine it, where the grid
    has alpha = 0 or sigma = 0): any two
    tableaux of one shape run in one compiled program. Name, order and paper live in the catalogue.
    """

    A: Any
    B: Any
    C: Any
    d: Any
    u: Any
    w: Any
    t: Any
    alpha: Any
    sigma: Any
    active: Any
    draw: Any
    clock: Any
    nodes: Any
    start: Start
    registers: int = _static()
    history: int = _static()
    outputs: int = _static()
    brownian: str | None = _static(None)
    blind: tuple[tuple[str, ...], ...] = _static(())

    @property
    def rows(self) -> int:
        """Number of rows, padding included."""
        return self.active.shape[-1]

    @property
    def nfe(self) -> Any:
        """Calls of the denoiser that count (padding rows are evaluated, but belong to no sampler)."""
        nfe = np.asarray(self.active).sum(-1) if is_concrete(self.active) else self.active.sum(-1)
        return int(nfe) if isinstance(nfe, np.number) else nfe

    @property
    def stochastic(self) -> bool:
        """Whether any coefficient array for noise exists."""
        return self.C is not None or self.start.C is not None

    @property
    def draws(self) -> int:
        """Number of noise draws that `sample(noise=array)` takes; known on the host only."""
        if not is_concrete(self.draw):
            raise ValueError("the draws of a traced tableau are not known: count them outside")
        noisy = np.zeros(self.rows, bool)
        if self.C is not None:
            seen = np.asarray(self.C) if is_concrete(self.C) else np.ones(self.rows)
            noisy = np.any(seen.reshape(self.rows, -1) != 0, 1)
        first = 0 if self.start.C is None else 1
        return max([first, *(np.asarray(self.draw)[noisy] + 1).tolist()])


class Update(NamedTuple):
    """One register's new value: coefficients of the registers, of the integrands (newest first; each
    a number, or one per output), and of the noise."""

    s: Sequence[Any] = ()
    m: Sequence[Any] = ()
    z: Any = None


class Row(NamedTuple):
    """One evaluation: the level (t, alpha, sigma) and the registers' updates, s_0 first."""

    level: tuple[Any, Any, Any]
    updates: Sequence[Update]
    clock: tuple[Any, Any] | None = None


def assemble(
    rows: Sequence[Row], integrand: str | tuple[str, ...], xp: Any, *,
    nodes: Sequence[tuple[int, int]] | None = None, start: Update | None = None,
    brownian: str | None = None,
) -> Tableau:  # fmt: skip
    """Build a tableau from rows written one by one; missing coefficients are zero.

    Arguments:
      integrand: what each output is converted to before it enters the history.
      nodes: (rows executed, register) of the solution at each grid node; by default every row ends
        at a node.
      start: the start's update of register 0, for churn before the first call; others copy x_T.
      brownian: the form of `jaxdiff.BrownianPath` whose clock the rows carry, if any.
    """
    integrands = (integrand,) if isinstance(integrand, str) else tuple(integrand)
    registers = max(len(row.updates) for row in rows)
    history = max([len(update.m) for row in rows for update in row.updates] + [1])
    outputs = len(integrands)
    noisy = any(update.z is not None for row in rows for update in row.updates)

    def pad(values, width):
        return list(values) + [0.0] * (width - len(values))

    def per_output(value):
        return pad(value, outputs) if isinstance(value, (tuple, list)) else [value] * outputs

    def stack(tree):
        """Nested lists of numbers or arrays to one array, broadcasting state-shaped entries."""
        leaves, treedef = jax.tree.flatten(tree)
        shape = np.broadcast_shapes(*(np.shape(leaf) for leaf in leaves))
        if all(np.shape(leaf) == () for leaf in leaves) and xp is np:
            return np.asarray(tree, np.float64)
        whole = xp.stack([xp.broadcast_to(xp.asarray(leaf) * 1.0, shape) for leaf in leaves])
        # The nested lists are regular, so their lengths are the leading axes.
        lengths, node = [], tree
        while isinstance(node, list):
            lengths.append(len(node))
            node = node[0]
        return whole.reshape(*lengths, *shape)

    blank = [Update()] * registers
    updates = [[*row.updates, *blank[len(row.updates) :]] for row in rows]
    a = [[pad(update.s, registers) for update in row] for row in updates]
    b = [[[per_output(m) for m in pad(update.m, history)] for update in row] for row in updates]
    c = [[0.0 if update.z is None else update.z for update in row] for row in updates]
    t, alpha, sigma = (stack([row.level[i] for row in rows]) for i in range(3))
    u, w = (
        xp.stack([
            xp.stack([affine(source, target, alpha, sigma)[i] for source in PREDICTIONS], -1)
            for target in integrands
        ], -2)
        for i in (0, 1)
    )  # fmt: skip
    first = 0 if start is None or start.z is None else 1
    has_noise = [any(update.z is not None for update in row) for row in updates]
    draw = np.maximum(np.cumsum(has_noise) - 1 + first, 0).astype(np.int32)
    start_scale, start_noise = [1.0] * registers, None
    if start is not None:
        start_scale[0] = start.s[0]
        start_noise = stack([start.z, *[0.0] * (registers - 1)])
    clock = None
    if brownian is not None:
        clock = stack([[*(row.clock or (0.0, 0.0))] for row in rows])
    return Tableau(
        A=stack(a), B=stack(b), C=stack(c) if noisy else None, d=None, u=u, w=w,
        t=t, alpha=alpha, sigma=sigma,
        active=np.ones(len(rows)), draw=draw, clock=clock,
        nodes=np.asarray(
            [(i, 0) for i in range(len(rows) + 1)] if nodes is None else nodes, np.int32
        ),
        start=Start(stack(start_scale), start_noise),
        registers=registers, history=history, outputs=outputs, brownian=brownian,
        blind=_blind(u, w),
    )  # fmt: skip


def _blind(u: Any, w: Any) -> tuple[tuple[str, ...], ...]:
    if not is_concrete(u, w):
        return ((),) * u.shape[1]
    bad = ~np.all(np.isfinite(np.asarray(u)) & np.isfinite(np.asarray(w)), axis=0)
    return tuple(tuple(name for name, b in zip(PREDICTIONS, row) if b) for row in bad)


def check_ends(grid: Grid, name: str, *, noise: bool, data: bool) -> None:
    """Raise ValueError where the grid reaches an end that the method does not support."""
    for present, allowed, text in (
        (grid.ends[0], noise, "alpha = 0 at the noise end"),
        (grid.ends[1], data, "sigma = 0 at the data end"),
    ):
        if present and not allowed:
            raise ValueError(f"{name} does not support a grid with {text}")
    if grid.backward and any(grid.ends):
        raise ValueError(f"{name} cannot run backward from or to an end with alpha = 0 or sigma = 0")


# --- several tableaux -----------------------------------------------------------------------------


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

    def join(*leaves):
        xp = namespace(leaves)
        ndim = max(x.ndim for x in leaves)
        # State-shaped coefficients beside plain ones: give the plain ones axes of size 1.
        grown = [x.reshape(x.shape + (1,) * (ndim - x.ndim)) for x in leaves]
        shape = np.broadcast_shapes(*(x.shape for x in grown))
        return xp.stack([xp.broadcast_to(x, shape) for x in grown])

    return jax.tree.map(join, *padded)


def concatenate(tableaux: Sequence[Tableau]) -> Tableau:
    """One sampler that runs the pieces in turn: restarts, time travel, a change of solver.

    The first state of a piece is its start applied to the last s_0 of the piece before. Where both
    the last row and the start add noise the two independent normals are drawn as one of the summed
    variance, and the result has no Brownian clock. Raises ValueError where a start is an operator.
    """
    tableaux = _common(tableaux, "concatenate")
    xp = namespace(tableaux)
    out = tableaux[0]
    for piece in tableaux[1:]:
        scale = piece.start.S

        def enter(a, scale=scale):
            """Replace the last row's outcome for s_0 by scale_i times it, for every register i."""
            shaped = scale.reshape(scale.shape + (1,) * (a.ndim - 2))
            return xp.concatenate([a[:-1], (shaped * a[-1][:1])[None]])

        a, b = enter(out.A), enter(out.B)
        c = out.C if out.C is None else enter(out.C)
        if piece.start.C is not None:
            c = xp.zeros((out.rows, out.registers)) if c is None else c
            c = xp.concatenate([c[:-1], xp.hypot(c[-1], piece.start.C)[None]])
        d = out.d if out.d is None else enter(out.d)
        if piece.start.d is not None:
            d = xp.zeros((out.rows, out.registers)) if d is None else d
            d = xp.concatenate([d[:-1], (d[-1] + piece.start.d)[None]])
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
            c = xp.zeros((out.rows, out.registers))
        if d is not None or piece.d is not None:
            d = xp.zeros((out.rows, out.registers)) if d is None else d
            d = xp.concatenate([
                d, xp.zeros((piece.rows, piece.registers)) if piece.d is None else piece.d
            ])  # fmt: skip
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
            out, A=xp.concatenate([a, piece.A]), B=xp.concatenate([b, piece.B]),
            C=None if c is None else xp.concatenate([c, c_next]), d=d,
            draw=draw.astype(np.int32),
            clock=xp.concatenate([out.clock, piece.clock]) if clocked else None,
            brownian=out.brownian if clocked else None,
            nodes=np.concatenate([joint, piece.nodes[1:] + shift]), **joined,
        )  # fmt: skip
    return out
