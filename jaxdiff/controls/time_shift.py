"""Time-Shift Sampler: the time of a state, read off its variance.

Li, Qu, Yao, Sun & Moens, "Alleviating Exposure Bias in Diffusion Models through Sampling with
Shifted Time Steps" (2024): a state that a sampler made for time t has not quite the noise of
x_t. With Var(x) the variance over one sample's components, it is taken for a state of the time

    s = argmin |Var(x) - sigma(s)^2|   over   |s - t| <= window / 2,

which supposes data whose components have mean 0 and little variance beside the noise, or levels of
constant variance; near sigma = 1 of a variance-preserving process the variance tells nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from jaxdiff.arrays import is_concrete, to_batch
from jaxdiff.denoisers import Denoiser, check_single, wrap
from jaxdiff.grids import Grid
from jaxdiff.integrator import Carry, Control, RowInfo
from jaxdiff.predictions import PREDICTIONS, affine, convert, target
from jaxdiff.processes.discrete import is_discrete
from jaxdiff.solvers.clocks import check_choice
from jaxdiff.solvers.tableau import Tableau

MODES = ("paper", "target", "network")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Levels:
    """The levels among which a state's is sought: `t`, `alpha`, `sigma` [levels]; see `coupled`."""

    t: Any
    alpha: Any
    sigma: Any


def coupled(
    x: Any, t: ArrayLike, alpha: ArrayLike, sigma: ArrayLike, levels: Levels, window: ArrayLike
) -> tuple[Float[Array, " batch"], ...]:
    """(t, alpha, sigma) of every sample's coupled time, [batch] each.

    Arguments:
      x: the state, leaves [batch, ...].
      t, alpha, sigma: the nominal level, numbers; it is one of those to choose from, and is chosen
        where none is nearer.
      levels: the others. Those further than window / 2 from t are left out.
    """
    leaves = jax.tree.leaves(x)
    flat = jnp.concatenate([a.reshape(a.shape[0], -1) for a in leaves], 1)
    variance = jnp.var(flat, axis=1, ddof=1)[:, None]
    kind = variance.dtype
    table = jnp.asarray([levels.t, levels.alpha, levels.sigma], kind)
    nominal = jnp.asarray([t, alpha, sigma], kind)[:, None]
    table = jnp.concatenate([nominal, table], 1)
    # A window in the times' own rounding, so that its edges belong to it.
    inside = jnp.abs(table[0] - nominal[0]) <= 0.5 * jnp.asarray(window, kind) * (1.0 + 1e-5)
    distance = jnp.where(inside, jnp.abs(variance - table[2] ** 2), jnp.inf)
    return tuple(table[:, jnp.argmin(distance, 1)])


def time_shift(
    denoiser: Denoiser, tableau: Tableau, grid: Grid, window: ArrayLike, cutoff: ArrayLike = 0.0,
    mode: str = "paper", levels: Grid | None = None,
) -> tuple[Denoiser, Control | None]:  # fmt: skip
    """(denoiser, control) that make `tableau` the Time-Shift sampler:

        shifted, control = time_shift(denoiser, tableau, grid, window, cutoff)
        sample(shifted, tableau, x_T, control=control)

    Arguments:
      tableau: DDIM, DDPM, PNDM or any deterministic tableau of one output, built on `grid`; of the
        stochastic ones `ddpm` and `ddim` with any eta.
      window: w, in the grid's time (of a discrete process: steps); 0 is the tableau itself.
      cutoff: t_c; only states of times above it are shifted.
      mode: "paper": every evaluation but the first is at the state's coupled time, which is also
        that of the row's coefficients: with (x0, eps) the prediction there, a deterministic row
        leaves alpha x0 + sigma eps at its own level (for DDIM exactly the step from the coupled
        time), a stochastic one is `ddim`'s from the coupled time, which is DDPM's.
        "target": as in the authors' `pnm_solver`, the network's time is the nominal one, and the
        time that the step leads to is the one in the window around it that is coupled to the state
        it starts from; the next step takes the result for a state of its nominal time. Rows of
        several to a step (a Runge-Kutta start) are not shifted.
        "network": as in the authors' DEIS, the time is the network's alone.
      levels: a grid of the times to choose from; by default 1000 between t_max and t_min of the
        grid's process, of a discrete one its steps.

    Raises TypeError or ValueError for another tableau, a mode, window or cutoff that is not one, a
    denoiser of several predictions, or a grid without process where `levels` is not given.
    """
    check_single(denoiser, "time_shift")
    check_choice("mode", mode, MODES)
    for name, value in (("window", window), ("cutoff", cutoff)):
        if is_concrete(value) and not (np.ndim(value) == 0 and 0 <= value < np.inf):
            raise ValueError(f"{name} must be a number, at least 0, got {value!r}")
    etas = _etas(tableau, grid)
    choice = _Choice(_levels(grid, levels), window, cutoff, grid.t[0])
    column = PREDICTIONS.index(denoiser.prediction)
    ends, single = _ends(tableau, grid)
    if mode == "target" and not np.any(single):
        raise ValueError("no row of this tableau is a step from s_0: use mode='paper'")
    if is_concrete(window) and window == 0:
        return denoiser, None
    control = TimeShift(
        choice, tableau.A[:, :, 0], tableau.B[:, :, 0, 0], tableau.w[:, 0, column], etas,
        ends, single, denoiser.prediction, mode,
    )  # fmt: skip
    if mode == "target":
        return denoiser, control
    shifted = wrap(_Shifted(denoiser.prediction, mode), denoiser, choice, denoiser.prediction)
    return shifted, control if mode == "paper" else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Choice:
    """Which level a state gets: its nominal one where nothing is to be shifted."""

    levels: Levels
    window: Any
    cutoff: Any
    first: Any

    def __call__(self, x: Any, now: Any, level: Any, allowed: Any = True) -> tuple[Any, Any]:
        """(the levels [batch], whether they are others than `level`); `now` is the state's time."""
        found = coupled(x, *level, self.levels, self.window)
        kind = found[0].dtype
        first, cutoff = (jnp.asarray(a, kind) for a in (self.first, self.cutoff))
        changed = (found[0] != level[0]) & (now < first) & (level[0] > cutoff) & allowed
        return tuple(jnp.where(changed, a, b) for a, b in zip(found, level)), changed


@dataclasses.dataclass(frozen=True)
class _Shifted:
    """The network at the coupled time: what it then says of x0 and eps, as of the nominal level."""

    prediction: str
    mode: str

    def __call__(self, evaluate, choice, x, levels, cond):
        found, changed = choice(x, levels[0], tuple(jnp.asarray(a) for a in levels))
        out = evaluate(x, *found, cond)
        eps = convert(out, x, self.prediction, "eps", *found[1:])
        # Alone in the network, the time changes eps, and the state stays where it was.
        level = found[1:] if self.mode == "paper" else levels[1:]
        x0 = convert(eps, x, "eps", "x0", *level)
        moved = target(self.prediction, x0, eps, *levels[1:])
        return jax.tree.map(lambda a, b: jnp.where(to_batch(changed, a), a, b), moved, out)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TimeShift(Control):
    """The control of `time_shift`, which see.

    Attributes: the choice of a level; of each row the coefficients of s_0 and of the new integrand
    in every register, [rows, registers], and of s_0 in that integrand, [rows]; eta of each row, or
    None for a deterministic tableau; the level that a row leads to, [rows, 3], and whether it makes a
    step of its own from s_0.
    """

    choice: _Choice
    of_state: Any
    of_new: Any
    in_new: Any
    etas: Any
    ends: Any
    single: Any
    prediction: str = dataclasses.field(metadata={"static": True})
    mode: str = dataclasses.field(metadata={"static": True})

    def after(
        self, aux: Any, row: RowInfo, x: Any, out: Any, z: Any, carry: Carry, key: Any
    ) -> tuple[Carry, Any]:
        """Make the row start from, or lead to, the level that the state's variance says."""
        level, r = row[1:4], row.index
        end = tuple(jnp.asarray(self.ends, level[0].dtype)[r])
        if self.mode == "target":
            single = jnp.asarray(self.single)[r]
            end, changed = self.choice(x, level[0], end, single)
            return self._lead(r, x, out, z, carry, level, end, changed), aux
        source, changed = self.choice(x, level[0], level)
        # x = a x0 + s eps at the coupled level, with the prediction as of the nominal one.
        (u0, w0), (u1, w1) = (affine(self.prediction, name, *level[1:]) for name in ("x0", "eps"))
        _, a, s = source

        def nominal(x, p):
            over = to_batch(a * w0 + s * w1, x).astype(x.dtype)
            return (x - to_batch(a * u0 + s * u1, x).astype(x.dtype) * p) / over

        moved = jax.tree.map(nominal, x, out)
        if self.etas is not None:
            pair = (
                jax.tree.map(lambda p, n, u=u, w=w: u * p + w * n, out, moved)
                for u, w in ((u0, w0), (u1, w1))
            )
            return self._renewed(r, *pair, z, carry, source, end, changed), aux
        moved = jax.tree.map(
            lambda n, x: jnp.where(to_batch(changed, x), n - x, jnp.zeros_like(x)), moved, x
        )
        return self._corrected(r, moved, carry), aux

    def _corrected(self, r: Any, change: Any, carry: Carry) -> Carry:
        """What the row would have made of s_0 + change: it is linear."""
        w = jnp.asarray(self.in_new)[r]
        registers = tuple(
            jax.tree.map(
                lambda a, d, i=i: a
                + (jnp.asarray(self.of_state)[r, i] + w * jnp.asarray(self.of_new)[r, i]).astype(
                    a.dtype
                ) * d,
                register, change,
            )
            for i, register in enumerate(carry.registers)
        )  # fmt: skip
        history = jax.tree.map(
            lambda h, d: h.at[r % h.shape[0]].add(w.astype(h.dtype) * d), carry.history, (change,)
        ) if carry.history else ()  # fmt: skip
        return Carry(registers, history)

    def _lead(self, r, x, out, z, carry, level, end, changed):
        """The row's s_0 at another level: alpha X + sigma E with the X and E that it stands for."""
        _, a, s = level
        if self.etas is not None:
            x0, eps = (convert(out, x, self.prediction, name, a, s) for name in ("x0", "eps"))
            return self._renewed(r, x0, eps, z, carry, level, end, changed)
        _, a1, s1 = jnp.asarray(self.ends, a.dtype)[r]

        def leaf(new, x):
            eps = (new - a1 / a * x) / (s1 - s * a1 / a)
            x0 = (x - s * eps) / a
            found = to_batch(end[1], x) * x0 + to_batch(end[2], x) * eps
            return jnp.where(to_batch(changed, x), found, new)

        first = jax.tree.map(leaf, carry.registers[0], x)
        return carry._replace(registers=(first, *carry.registers[1:]))

    def _renewed(self, r, x0, eps, z, carry, source, end, changed):
        """`ddim` with the row's eta between two levels."""
        (_, a, s), (_, a1, s1) = source, end
        share = jnp.maximum(1.0 - (a * s1 / (s * a1)) ** 2, 0.0)
        noise = jnp.asarray(self.etas)[r].astype(s.dtype) * s1 * jnp.sqrt(share)
        kept = jnp.sqrt(jnp.maximum(s1**2 - noise**2, 0.0))

        def leaf(new, x0, eps, z):
            parts = zip((a1, kept, noise), (x0, eps, z))
            found = sum(to_batch(c, new).astype(new.dtype) * p for c, p in parts)
            return jnp.where(to_batch(changed, new), found, new)

        return carry._replace(registers=(jax.tree.map(leaf, carry.registers[0], x0, eps, z),))


def _etas(tableau: Any, grid: Grid) -> Any:
    """eta of each row, None without noise; raises for a tableau that `time_shift` does not take."""
    if not isinstance(tableau, Tableau) or np.ndim(tableau.A) != 3:
        raise ValueError("time_shift takes one tableau whose coefficients are numbers")
    if not is_concrete(tableau, grid):
        raise ValueError("time_shift takes a tableau and a grid with values")
    if tableau.outputs != 1 or tableau.d is not None:
        raise ValueError("time_shift takes a tableau of one output, without a shift")
    if grid.backward:
        raise ValueError("time_shift takes a grid from noise to data")
    if not tableau.stochastic:
        return None
    one_row = tableau.rows == grid.steps and tableau.registers == tableau.history == 1
    if one_row and tableau.start.C is None:
        _, alpha, sigma = (np.asarray(a, np.float64) for a in grid.node(slice(None)))
        with np.errstate(divide="ignore", invalid="ignore"):
            share = 1.0 - (alpha[:-1] * sigma[1:] / (sigma[:-1] * alpha[1:])) ** 2
            made = np.asarray(tableau.C, np.float64)[:, 0]
            etas = np.where(sigma[1:] > 0, made / (sigma[1:] * np.sqrt(share)), 0.0)
        of_x0, of_eps = _in_pair(tableau)
        square = sigma[1:] ** 2 - made**2
        if np.allclose(of_x0, alpha[1:], atol=1e-5) and np.allclose(of_eps**2, square, atol=1e-5):
            return etas
    raise ValueError("of the stochastic tableaux time_shift takes ddpm(grid) and ddim(grid, eta)")


def _in_pair(tableau: Tableau) -> tuple[Any, Any]:
    """What a row makes of (x0, eps) = (1, 0), and of (0, 1)."""
    v = PREDICTIONS.index("v")
    a, b = np.asarray(tableau.A)[:, 0, 0], np.asarray(tableau.B)[:, 0, 0, 0]
    u, w = np.asarray(tableau.u)[:, 0, v], np.asarray(tableau.w)[:, 0, v]
    alpha, sigma = np.asarray(tableau.alpha), np.asarray(tableau.sigma)
    return tuple(a * x + b * (u * o + w * x) for x, o in ((alpha, -sigma), (sigma, alpha)))


def _ends(tableau: Tableau, grid: Grid) -> tuple[Any, Any]:
    """The level that each row leads to, [rows, 3], and whether the row is the step to it."""
    nodes = np.asarray(tableau.nodes)
    ends = np.zeros((tableau.rows, 3))
    ends[:] = np.asarray(grid.node(grid.steps))
    single = np.zeros(tableau.rows, bool)
    for i in range(grid.steps):
        row, register = nodes[i]
        if register == 0 and row < tableau.rows:
            ends[row] = grid.node(i + 1)
            single[row] = tuple(nodes[i + 1]) == (row + 1, 0) and not np.any(
                np.asarray(tableau.A)[row, 0, 1:]
            )
    return ends, single


def _levels(grid: Grid, levels: Grid | None) -> Levels:
    if levels is not None and not isinstance(levels, Grid):
        raise TypeError(f"levels must be a grid, got {type(levels).__name__}")
    if levels is None:
        process = grid.process
        if process is None:
            raise ValueError(
                "this grid has no process: give levels=, a grid of times to choose from"
            )
        span = process.t_max - process.t_min
        count = int(span) + 1 if is_discrete(process) else 1000
        t = np.linspace(process.t_max, process.t_min, count)
        found = t, np.asarray(process.alpha(t)), np.asarray(process.sigma(t))
    else:
        found = tuple(np.asarray(a) for a in levels.node(slice(None)))
    keep = (found[1] > 0) & (found[2] > 0)
    return Levels(*(a[keep] for a in found))
