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

from jaxdiff.arrays import is_concrete
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

    def inverse(self) -> Tableau:
        """The exact inverse as a sampler, where algebra allows: `jaxdiff.solvers.inverse`."""
        from jaxdiff.solvers.inverse import inverse

        return inverse(self)


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
    # A coefficient that is 0 draws nothing: its row repeats a draw that exists.
    has_noise = [any(_draws(update.z) for update in row) for row in updates]
    draw = np.maximum(np.cumsum(has_noise) - 1 + first, 0).astype(np.int32)
    start_scale, start_noise = [1.0] * registers, None
    if start is not None:
        start_scale[0] = start.s[0]
        if start.z is not None:
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


def _draws(z: Any) -> bool:
    return z is not None and not (is_concrete(z) and not np.any(np.asarray(z)))


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
