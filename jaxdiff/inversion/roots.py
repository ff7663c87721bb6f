"""Solvers of G(s) = y, a batch of states at once: every sample has its own equation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np

from jaxdiff.arrays import to_batch

METHODS = ("newton", "fixed_point", "forward_step", "gradient")

_KRYLOV = lx.GMRES(rtol=1e-3, atol=0.0, max_steps=80, restart=20)


class NotConvergedError(RuntimeError):
    """An inversion that did not reach its tolerance; the message says where and by how much."""


class Root(NamedTuple):
    """s, the residual rms(G(s) - y) of every sample, [batch], and the iterations: evaluations of G."""

    s: Any
    residual: Any
    iterations: Any


def solve(
    method: str, G: Callable, y: Any, guess: Any, slope: Any, tol: Any, max_iterations: Any
) -> Root:
    """Solve G(s) = y until rms(G(s) - y) <= tol for every sample, from `guess`, traceable.

    With r = G(s) - y, an iteration is s - d, where d is

        newton        J d = r, J = dG/ds by jvp, with GMRES to 1e-3 of |r| (inexact Newton)
        fixed_point   r / slope
        forward_step  r
        gradient      tau J^T r, tau = |J^T r|^2 / |J J^T r|^2: steepest descent on |r|^2 / 2

    Samples within the tolerance stop moving. All but fixed_point take a sample's step back, and try
    half of it, whenever its residual did not fall.
    """

    def value(s):
        """G(s) and its linear part there, from one trace."""
        return jax.linearize(G, s) if method in ("newton", "gradient") else (G(s), None)

    def direction(r, linear):
        if method == "fixed_point":
            return jax.tree.map(lambda a: a / jnp.asarray(slope, a.dtype), r)
        if method == "forward_step":
            return r
        if method == "newton":
            J = lx.FunctionLinearOperator(linear, jax.eval_shape(lambda: r))
            return lx.linear_solve(J, r, _KRYLOV, throw=False).value
        (down,) = jax.linear_transpose(linear, r)(r)
        along = linear(down)
        above, below = rms(down) ** 2, rms(along) ** 2
        tau = above / jnp.where(below > 0, below, 1.0)
        return jax.tree.map(lambda a: to_batch(tau, a) * a, down)

    def iterate(carry):
        k, s, candidate, d, size, step = carry
        there, linear = value(candidate)
        r = jax.tree.map(jnp.subtract, there, y)
        found = rms(r)
        moving = size > tol
        take = moving & ((found < size) | (method == "fixed_point"))
        step = jnp.where(take, jnp.minimum(1.0, 2.0 * step), jnp.where(moving, 0.5 * step, step))
        size = jnp.where(take, found, size)
        pick = lambda a, b: jnp.where(to_batch(take, a), a, b)  # noqa: E731
        s = jax.tree.map(pick, candidate, s)
        again = (k + 1 < max_iterations) & jnp.any(size > tol)
        new = jax.lax.cond(again, lambda: direction(r, linear), lambda: d)
        d = jax.tree.map(pick, new, d)
        candidate = jax.tree.map(lambda a, b: a - to_batch(step, a) * b, s, d)
        return k + 1, s, candidate, d, size, step

    def going(carry):
        k, *_, size, _ = carry
        return (k < max_iterations) & jnp.any(size > tol)

    still = jax.tree.map(jnp.zeros_like, guess)
    size = jnp.full_like(rms(guess), jnp.inf)
    first = (jnp.int32(0), guess, guess, still, size, jnp.ones_like(size))
    k, s, _, _, size, _ = jax.lax.while_loop(going, iterate, first)
    return Root(s, size, k)


def rms(tree: Any) -> jax.Array:
    """Root mean square of every sample, [batch], over all leaves."""
    leaves = [a.reshape(a.shape[0], -1) for a in jax.tree.leaves(tree)]
    count = sum(a.shape[1] for a in leaves)
    return jnp.sqrt(sum(jnp.sum(a**2, 1) for a in leaves) / count)


def tolerance(x: Any, tol: float | None) -> float:
    """`tol`, or 1e-12 for float64 and 1e-6 for float32."""
    if tol is not None:
        if not isinstance(tol, (int, float)) or isinstance(tol, bool) or not tol > 0:
            raise ValueError(f"tol must be a positive number or None, got {tol!r}")
        return float(tol)
    wide = np.result_type(*(a.dtype for a in jax.tree.leaves(x)))
    return 1e-12 if wide == np.float64 else 1e-6


def check_memoryless(denoiser: Any, what: str) -> None:
    """Raise ValueError for a denoiser with memory: backward, rows would find that of other rows."""
    if getattr(denoiser, "memory", None) is not None:
        raise ValueError(
            f"{what} evaluates rows out of order: it takes no denoiser with memory; "
            "jaxdiff.inversion.shoot does, which repeats whole runs"
        )
