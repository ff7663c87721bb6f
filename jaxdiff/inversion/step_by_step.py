"""Inversion of one-register samplers by solving every step's equation: DDIM, multistep methods."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.arrays import as_arrays, is_concrete, jit_trees, structure_hash
from jaxdiff.denoisers import Denoiser, check_single
from jaxdiff.inversion.roots import (
    METHODS,
    NotConvergedError,
    check_memoryless,
    rms,
    solve,
    tolerance,
)
from jaxdiff.predictions import PREDICTIONS
from jaxdiff.sampling import check_call
from jaxdiff.solvers.clocks import check_choice, check_order
from jaxdiff.solvers.tableau import Tableau


class Inversion(NamedTuple):
    """What `solve_back` found.

    `x_T` with x's structure; `states`, the network's inputs at every row, leaves [rows, batch, ...]
    (states[0] is the start's result); `residuals` [rows, batch], rms(s_{r+1} - Phi_r(s)) of the whole
    step at the end; `iterations` [rows] of the last sweep; `sweeps`; `converged` [batch].
    """

    x_T: Any
    states: Any
    residuals: Any
    iterations: Any
    sweeps: Any
    converged: Any


def solve_back(
    denoiser: Denoiser, tableau: Tableau, x: Any, cond: Any = None, method: str = "newton",
    splitting: str = "eps", tol: float | None = None, max_iterations: int = 50, sweeps: int = 100,
    guess: Any = None, throw: bool = True,
) -> Inversion:  # fmt: skip
    """The x_T that a deterministic sampler turns into x: each step's equation solved, last to first.

    Step r of a sampler with one register is

        s_{r+1} = A s_r + B_0 m(s_r) + sum_{k >= 1} B_k m_{r-k}:

    implicit in s_r, since the network is evaluated there and not at s_{r+1} (what naive DDIM inversion
    takes for it). For DDIM and other one-step methods that is one equation a step. A multistep method
    also needs older evaluations, which lie further back: they are taken from the sweep before (the
    first sweep is that of the first-order method with the same sums of weights), and sweeps are
    repeated until every step holds within the tolerance.

    Methods, with r = Phi(s) - s_{r+1} (`jaxdiff.inversion.roots.solve`):

      "newton": J d = r by GMRES with jvp.
      "fixed_point": solve for the s that stands alone and evaluate again, with Phi written in the
        prediction `splitting` ("eps", "x0", "v" or "flow"). With "eps", s = (s' - b eps(s)) / a is
        the iteration of AIDI (Pan et al., "Effective Real Image Editing with Accelerated Iterative
        Diffusion Inversion", 2023) and ReNoise (Garibi et al. 2024); it contracts where |b d eps / a|
        < 1: for log-concave data at any step, else for short ones.
      "forward_step", "gradient": s - tau r, s - tau J^T r, of Hong et al., "On Exact Inversion of
        DPM-Solvers" (2024), who hold the older evaluations at a fine naive inversion's (one sweep
        from a `guess`, in these terms); tau is halved where the residual does not fall.

    Arguments:
      x: the sample, an array or a pytree [batch, ...], at the tableau's last node.
      tol: for the rms residual of a sample's step; None: 1e-12 in float64, 1e-6 in float32, times
        sqrt(alpha^2 + sigma^2) of the row's level where that is above 1.
      max_iterations: of each step in each sweep. sweeps: at most so many (one for K = 1).
      guess: network inputs of every row, leaves [rows, batch, ...], instead of the first sweep: a fine
        naive run's nodes, say (the coarse-to-fine start of Hong et al.).
      throw: raise where a sample did not converge; else, and under a trace, see `converged`.

    Raises ValueError for a tableau with noise, several registers or outputs, or a step to sigma = 0,
    and for unknown options; NotConvergedError, with the worst step and its residual.
    """
    check_choice("method", method, METHODS)
    check_choice("splitting", splitting, tuple(p for p in PREDICTIONS if p != "score"))
    check_order(max_iterations, None, "max_iterations")
    check_order(sweeps, None, "sweeps")
    check_single(denoiser, "solve_back")
    check_memoryless(denoiser, "solve_back")
    x, cond, denoiser, guess = (as_arrays(tree) for tree in (x, cond, denoiser, guess))
    _check_tableau(tableau)
    check_call(denoiser, tableau, x, None, None, cond, "final", None, None)
    table = _table(tableau, denoiser.prediction, splitting)
    size = np.maximum(1.0, np.hypot(table["alpha"], table["sigma"])) if tol is None else 1.0
    tol = tolerance(x, tol)
    table["tol"] = np.broadcast_to(tol * size, tableau.rows)
    if guess is not None and jax.tree.structure(guess) != jax.tree.structure(x):
        raise ValueError("guess must have the structure of x")
    for leaf, of in zip(jax.tree.leaves(guess), jax.tree.leaves(x)) if guess is not None else ():
        if leaf.shape != (tableau.rows, *of.shape):
            raise ValueError(
                f"guess must have shape {(tableau.rows, *of.shape)}, got {leaf.shape}"
            )
    structure = structure_hash(denoiser, x, cond, guess)
    multistep = bool(np.any(table["B"][:, 1:]))
    limits = (np.int32(max_iterations), np.int32(sweeps))
    found = _run(denoiser, table, x, cond, guess, method, multistep, limits, structure)
    found = found._replace(
        x_T=jax.tree.map(lambda a: a[0] / float(np.asarray(tableau.start.S)[0]), found.states)
    )
    if throw and is_concrete(found):
        _raise_unless_converged(found, tol)
    return found


@jit_trees
def _run(denoiser, table, x, cond, guess, method, multistep, limits, structure):
    rows, history = table["B"].shape
    wide = jnp.result_type(*jax.tree.leaves(x))
    table = {name: jnp.asarray(value, wide) for name, value in table.items()}
    max_iterations, sweeps = limits
    tol = table["tol"][:, None]

    def integrand(row, s):
        out = denoiser(s, row["t"], row["alpha"], row["sigma"], cond)
        return jax.tree.map(lambda o, a: row["u"] * o.astype(a.dtype) + row["w"] * a, out, s)

    def back(after, step):
        """(s_r, (s_r, m_r, residual, iterations)) from s_{r+1} and what is known of the step."""
        row, weight, known = step

        def phi(s):
            return jax.tree.map(lambda a, m: row["A"] * a + weight * m, s, integrand(row, s))

        y = jax.tree.map(jnp.subtract, after, known)
        root = solve(method, phi, y, after, row["slope"], row["tol"], max_iterations)
        m = integrand(row, root.s) if multistep else ()
        return root.s, (root.s, m, root.residual, root.iterations)

    def older(m):
        """sum_{k >= 1} B_k m_{r-k} for every row; the first rows weigh none that is not there."""

        def leaf(a):
            total = jnp.zeros_like(a)
            for k in range(1, history):
                moved = jnp.concatenate([jnp.zeros_like(a[:k]), a[: rows - k]])[:rows]
                total += table["B"][:, k].reshape(-1, *[1] * (a.ndim - 1)) * moved
            return total

        return jax.tree.map(leaf, m)

    def sweep(m, weight, known):
        return jax.lax.scan(back, x, (table, weight, known), reverse=True)[1]

    own, nothing = table["B"][:, 0], jax.tree.map(lambda a: jnp.zeros((rows, *a.shape), a.dtype), x)
    if not multistep:
        states, _, residuals, iterations = sweep((), own, nothing)
        return Inversion(
            None, states, residuals, iterations, jnp.int32(1), jnp.all(residuals <= tol, 0)
        )

    def again(carry):
        count, m, *_ = carry
        # Without a guess the first sweep is that of the first-order method.
        first = (count == 0) & (guess is None)
        weight = jnp.where(first, table["B"].sum(1), own)
        known = jax.tree.map(lambda a: jnp.where(first, 0.0, a), older(m))
        states, m, solved, iterations = sweep(m, weight, known)
        # What the step as a whole misses: what was taken for the older evaluations, less what they are.
        extra = lambda k, o, a: k - o + (weight - own).reshape(-1, *[1] * (a.ndim - 1)) * a  # noqa: E731
        off = jax.tree.map(extra, known, older(m), m)
        return count + 1, m, states, solved + jax.vmap(rms)(off), iterations

    def going(carry):
        count, _, _, residuals, _ = carry
        return (count < sweeps) & jnp.any(residuals > tol)

    m = nothing
    if guess is not None:
        m = jax.lax.map(lambda step: integrand(*step), (table, guess))
    batch = jax.tree.leaves(x)[0].shape[0]
    carry = (
        jnp.int32(0), m, nothing, jnp.full((rows, batch), jnp.inf, wide), jnp.zeros(rows, jnp.int32)
    )  # fmt: skip
    count, _, states, residuals, iterations = jax.lax.while_loop(going, again, carry)
    return Inversion(None, states, residuals, iterations, count, jnp.all(residuals <= tol, 0))


def _table(tableau: Tableau, prediction: str, splitting: str) -> dict[str, Any]:
    """The coefficients that a row's equation needs, each [rows] (B [rows, K])."""
    own, split = PREDICTIONS.index(prediction), PREDICTIONS.index(splitting)
    a, b = np.asarray(tableau.A)[:, 0, 0], np.asarray(tableau.B)[:, 0, :, 0]
    u, w = np.asarray(tableau.u)[:, 0], np.asarray(tableau.w)[:, 0]
    return dict(
        A=a, B=b, u=u[:, own], w=w[:, own], t=np.asarray(tableau.t), alpha=np.asarray(tableau.alpha),
        sigma=np.asarray(tableau.sigma), slope=a + b.sum(1) * w[:, split],
    )  # fmt: skip


def _check_tableau(tableau: Any) -> None:
    if not isinstance(tableau, Tableau):
        raise TypeError(f"expected a Tableau of jaxdiff.solvers, got {type(tableau).__name__}")
    fields = (tableau.A, tableau.B, tableau.start.S)
    if not is_concrete(fields) or [np.ndim(f) for f in fields] != [3, 4, 1]:
        raise ValueError("solve_back takes a tableau with known coefficients, one number each")
    if tableau.stochastic:
        raise ValueError(
            "solve_back inverts deterministic samplers; the noise of a stochastic one is found by "
            "edit-friendly inversion"
        )
    if tableau.start.d is not None:
        raise ValueError("solve_back takes no tableau whose start adds a constant (start.d)")
    if tableau.registers > 1 or tableau.outputs > 1 or tableau.d is not None:
        raise ValueError(
            f"solve_back takes samplers with one register and one output, got {tableau.registers} and "
            f"{tableau.outputs}: use jaxdiff.inversion.shoot, or invert for those with an inverse"
        )
    # The coefficient of s for a fixed x0 is sigma' / sigma.
    x0 = PREDICTIONS.index("x0")
    w = np.asarray(tableau.w)[:, 0, x0]
    carried = np.asarray(tableau.A)[:, 0, 0] + np.asarray(tableau.B)[:, 0, :, 0].sum(1) * w
    lost = np.flatnonzero(np.abs(carried) < 1e-12)
    if lost.size:
        raise ValueError(
            f"row {lost[0]} steps to sigma = 0, where the sample says nothing about the noise it came "
            "from: end the grid at sigma > 0 (the sample is then taken to lie there), or use a sampler "
            "that keeps the state before (jaxdiff.solvers.bdia, belm, edict with invert)"
        )


def _raise_unless_converged(found: Inversion, tol: float) -> None:
    bad = np.flatnonzero(~np.asarray(found.converged))
    if bad.size:
        residuals = np.nan_to_num(np.asarray(found.residuals), nan=np.inf)
        row, sample = np.unravel_index(residuals.argmax(), residuals.shape)
        raise NotConvergedError(
            f"{bad.size} of {len(found.converged)} samples did not reach tol = {tol:g} in "
            f"{int(found.sweeps)} sweeps: the largest residual is {residuals[row, sample]:.2g}, of "
            f"sample {sample} in row {row} (throw=False returns what was found; more steps, "
            "method='newton', a guess, or jaxdiff.inversion.shoot may help)"
        )
