"""The exact inverse of a tableau, where algebra allows one.

Row r of a tableau takes registers s to

    s' = A s + sum_p B_p m_p + C z + d,        m_p = u_p o_p + w_p s_0,   o = denoiser(s_0, t_r).

Given s', z and the coefficients, s is found without solving for anything if and only if

    1. the row uses its own evaluation alone: B_kp = 0 for every older one, k >= 1;
    2. A is invertible;
    3. l B_p = 0 for every output p, with l = e_0 A^-1 (e_0 picks register 0).

For l is the one row vector with l A = e_0, so l (s' - C z - d) = s_0 + l B m: the old s_0, where the
network was evaluated, is a linear function of what is known exactly when l B = 0 (2 and 3 also follow
if s_0 is to be such a function for every network). Then m is evaluated again at that s_0, and

    s = A^-1 (s' - sum_p B_p m_p - C z - d)

is again linear in registers and outputs: the inverse is a row. It evaluates at l s' - l d, so that
the registers of the inverse are q = T s' - e_0 l d, with T invertible and l its first row, and

    q' = T_{r-1} A_r^-1 (T_r^-1 (q + e_0 l_r d_r) - B_r m - C_r z - d_r) - e_0 l_{r-1} d_{r-1},

rows running from the last to the first, with T_{-1} = I. A row that draws noise needs l C = 0 on top,
since the noise of a row is drawn after its evaluation.

A single register has l B = B / A: no sampler with one is invertible. Among those with two: momentum
(s_0' = s_0 + h v', so l = (1, -h)); a two-step method whose older state has a coefficient that is not
0 (BDIA, BELM); coupled pairs (EDICT). The first row may also rest on the start, s = S x_T: there it
is enough that some l has l A S = S_0 and l B = 0.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jaxdiff.arrays import is_concrete
from jaxdiff.solvers.tableau import Start, Tableau

_ALTERNATIVES = (
    "samplers made for it are jaxdiff.solvers.bdia, belm and edict; jaxdiff.inversion.solve_back "
    "inverts others step by step (fixed point, Newton)"
)
_SINGULAR = 1e12  # condition number of A from which what the registers held counts as lost
_ROUNDING = 1e-10  # of l B, relative to |l| |B|


class Recovery(NamedTuple):
    """What undoes each row: s_0 = l (s' - C z - d), then s = A_inv (s' - sum_p B_p m_p - C z - d).

    `l` [rows, registers], `A_inv` [rows, registers, registers]. m_p is evaluated at s_0, at the row's
    level; only B of the row's own evaluation (k = 0) is not zero.
    """

    l: Float[np.ndarray, "rows registers"]  # noqa: E741
    A_inv: Float[np.ndarray, "rows registers registers"]


def recovery(tableau: Tableau, started: bool = True) -> Recovery:
    """The arrays that undo every row of a tableau, in float64; see the module for the condition.

    If row 0 is not invertible in general but is from registers s = S x_T, as after the tableau's
    start (BDIA's first step), its A_inv has rank one and its formulas hold all the same;
    `started=False` is for runs that skip the start (`sample(state=)`). A register that a row neither
    reads nor writes (padding) is left as it is.

    Raises ValueError for a row without an exact inverse, saying which and why, and for a tableau
    whose coefficients are traced, stacked, or not one number each.
    """
    A, B, *_ = _coefficients(tableau)
    found = [_undo(A[r], B[r]) for r in range(tableau.rows)]
    if started and isinstance(found[0], str):
        rest = _undo_first(A[0], B[0], tableau.start)
        found[0] = found[0] if rest is None else rest
    for r, row in enumerate(found):
        if isinstance(row, str):
            raise ValueError(f"row {r} of this tableau has no exact inverse: {row}; {_ALTERNATIVES}")
    return Recovery(*(np.stack(part) for part in zip(*found)))


def inverse(tableau: Tableau) -> Tableau:
    """The sampler that runs a tableau backward: from the registers after its last row to those before
    its first, exactly (to rounding). Also `tableau.inverse()`.

    Run it by `jaxdiff.inversion.invert`, or by hand from a `State`: its register 0 is where the last
    row was evaluated, and `entry` gives the change of basis that leads there. Entered with an array
    instead, every register of the forward end is a copy of it, which is how EDICT encodes an image.
    Noise (a key or an array) is the forward run's, in the same order. Evaluations are as many, one
    less if row 0 needs the start (`recovery`): the result's registers are then S_i x_T.

    Raises ValueError as `recovery` does, and for a row whose noise moves the point to evaluate at.
    """
    place, A_inv = recovery(tableau)
    A, B, C, d = _coefficients(tableau)
    for r in range(tableau.rows if C is not None else 0):
        if _meet(place[r], C[r]):
            raise ValueError(
                f"row {r} of this tableau has no inverse that is a row: where it was evaluated depends "
                f"on the noise that it draws afterwards; {_ALTERNATIVES}"
            )
    rows, registers = place.shape
    # Row 0 through the start needs no evaluation, so it joins row 1's inverse.
    bare = rows > 1 and np.linalg.matrix_rank(A_inv[0]) < registers
    T = [_basis(place[r], _wanted(tableau, r + 1)) for r in range(rows)]
    shift = np.zeros((rows, registers))
    if d is not None:
        shift[:, 0] = np.einsum("ri,ri->r", place, d)
    out = []
    for r in range(rows - 1, -1, -1):
        leave, after = (np.eye(registers), 0.0) if r == 0 else (T[r - 1], -shift[r - 1])
        if bare and r == 1:
            leave, after = A_inv[0], 0.0 if d is None else -A_inv[0] @ d[0]
        if bare and r == 0:
            break
        back, enter = leave @ A_inv[r], np.linalg.inv(T[r])
        out.append((
            back @ enter, -np.einsum("ij,jkp->ikp", back, B[r][:, :1]),
            None if C is None else -back @ C[r],
            None if d is None else back @ (enter @ shift[r] - d[r]) + after,
        ))  # fmt: skip
    new_A, new_B, new_C, new_d = (None if p[0] is None else np.stack(p) for p in zip(*out))
    keep = slice(rows - 1, 0 if bare else None, -1)
    flip = {f: np.asarray(getattr(tableau, f))[keep]
            for f in ("u", "w", "t", "alpha", "sigma", "active", "draw")}  # fmt: skip
    matrix, offset = entry(tableau)
    return dataclasses.replace(
        tableau, A=new_A, B=new_B, C=new_C, d=new_d, **flip,
        clock=None if tableau.clock is None else np.asarray(tableau.clock)[keep],
        nodes=_nodes(tableau, T, bare), history=1,
        start=Start(matrix.sum(1), None, None if d is None else offset),
    )  # fmt: skip


def entry(tableau: Tableau) -> tuple[np.ndarray, np.ndarray]:
    """(T [registers, registers], shift [registers]): the inverse's first registers are T s + shift,

    s being the registers after the last row of `tableau`. Raises as `inverse`.
    """
    place, _ = recovery(tableau)
    *_, d = _coefficients(tableau)
    shift = np.zeros(tableau.registers)
    shift[0] = 0.0 if d is None else -place[-1] @ d[-1]
    return _basis(place[-1], _wanted(tableau, tableau.rows)), shift


def _undo(A: Any, B: Any) -> tuple[Any, Any] | str:
    """(l, A_inv) of one row, or why there is none; A [R, R], B [R, K, P]."""
    idle = ~(np.any(A, 0) | np.any(A, 1) | np.any(B, (1, 2)))
    idle[0] = False
    A = A + np.diag(idle.astype(float))
    if np.any(B[:, 1:]):
        return "it uses evaluations of earlier rows, which the registers do not hold"
    if not np.linalg.cond(A) < _SINGULAR:
        return "its matrix of registers is singular, so that what a register held is lost"
    A_inv = np.linalg.inv(A)
    place = A_inv[0]
    if _meet(place, B[:, 0]):
        return (
            "the point where it was evaluated is not a linear function of the registers it leaves "
            "(the network's output is in all of them)"
        )
    return place, A_inv


def _meet(place: Any, columns: Any) -> bool:
    """Whether l times these columns differs from 0 by more than rounding."""
    size = np.abs(place).max() * np.abs(columns).max()
    return bool(np.abs(place @ columns).max() > _ROUNDING * size)


def _undo_first(A: Any, B: Any, start: Start) -> tuple[Any, Any] | None:
    """(l, A_inv) of row 0 on registers S x_T + C z + d, or None."""
    S = start.S
    if not isinstance(S, (np.ndarray, jax.Array)) or np.ndim(S) != 1 or np.any(B[:, 1:]):
        return None
    if start.C is not None or start.d is not None:
        return None  # the registers are then no multiples of one state
    S = np.asarray(S, np.float64)
    given = np.concatenate([(A @ S)[:, None], B[:, 0]], 1)
    wanted = np.concatenate([S[:1], np.zeros(B.shape[2])])
    place = np.linalg.lstsq(given.T, wanted, rcond=None)[0]
    off = np.abs(place @ given - wanted).max()
    if S[0] == 0 or off > _ROUNDING * np.abs(place).max() * np.abs(given).max():
        return None
    place = np.where(np.abs(place) < 1e-14 * np.abs(place).max(), 0.0, place)
    return place, np.outer(S / S[0], place)


def _basis(place: Any, wanted: set[int]) -> Any:
    """An invertible matrix with first row l; its other rows pick registers, `wanted` among them.

    The register that is left out is the one with the largest share of l: nothing is amplified. It is
    not a wanted one unless the others' shares are next to nothing.
    """
    share = np.abs(place)
    others = np.where([i in wanted for i in range(len(place))], 0.0, share)
    share = others if others.max() > 1e-3 * share.max() else share
    return np.concatenate([place[None], np.delete(np.eye(len(place)), share.argmax(), 0)])


def _wanted(tableau: Tableau, executed: int) -> set[int]:
    """Registers that hold the solution at a node after `executed` rows, and nowhere later."""
    nodes = np.asarray(tableau.nodes)
    held = {int(i) for n, i in nodes if n == executed}
    # Register 0 is where the next row evaluates: register 0 of the inverse, one row later.
    return held if executed == tableau.rows else held - {0}


def _nodes(tableau: Tableau, T: list[Any], bare: bool) -> Any:
    """Where the inverse has the solution at the nodes, from the last to the first."""
    rows, places = tableau.rows, []
    for executed, register in np.asarray(tableau.nodes)[::-1].tolist():
        if executed == 0:
            places.append((rows - bare, register))
        elif register == 0 and executed < rows:
            places.append((rows - executed - 1, 0))
        else:
            unit = np.eye(tableau.registers)[register]
            held = np.flatnonzero((T[executed - 1] == unit).all(1))
            # Left out only where l picks that register alone.
            places.append((rows - executed, int(held[0]) if held.size else 0))
    return np.asarray(places, np.int32)


def _coefficients(tableau: Tableau) -> tuple[Any, Any, Any, Any]:
    """A, B, C, d in float64 on the host; ValueError if they are not plain numbers per row."""
    if not isinstance(tableau, Tableau):
        raise TypeError(f"expected a Tableau of jaxdiff.solvers, got {type(tableau).__name__}")
    if np.ndim(tableau.active) != 1:
        raise ValueError("a stacked tableau has no inverse of its own: invert, then stack")
    fields = (tableau.A, tableau.B, tableau.C, tableau.d)
    if not is_concrete(fields):
        raise ValueError(
            "the inverse of a traced tableau is not known: make it outside jit, grad and vmap"
        )
    for value, axes in zip(fields, (3, 4, 2, 2)):
        if value is not None and (not hasattr(value, "ndim") or value.ndim != axes):
            raise ValueError(
                "a tableau is inverted whose coefficients are one number each, got coefficients with "
                "a sample's axes, or a pytree of them"
            )
    return tuple(None if f is None else np.asarray(f, np.float64) for f in fields)
