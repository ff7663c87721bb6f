"""The reversible adjoint: exact gradients through an invertible tableau, walking its rows back.

Row r of a tableau with an exact inverse is s' = A s + B m(s_0) + C z + d with

    s_0 = l (s' - C z - d),   m = u denoiser(s_0, t) + w s_0,   s = A^-1 (s' - B m - C z - d)

(`jaxdiff.solvers.inverse` gives the condition). So the backward pass keeps the last registers alone:
it recovers s_0, evaluates the denoiser there once, for m and for the pullback of m, recovers the other
registers and applies the transposed row to the cotangents. McCallum & Foster, "Efficient, Accurate and
Stable Gradients for Neural ODEs" (2024), do so with reversible pairs of Runge-Kutta steps.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.arrays import is_concrete
from jaxdiff.noise import BrownianPath
from jaxdiff.rows import combine, denoised, evaluate, integrands, update
from jaxdiff.solvers.inverse import recovery

_INSTEAD = "take diffrax.RecursiveCheckpointAdjoint(), which differentiates any sampler"
_LOOP = functools.partial(eqxi.while_loop, kind="lax")


class ReversibleAdjoint(diffrax.AbstractAdjoint):
    """Exact gradients of `jaxdiff.sample` with memory constant in the number of rows.

    For tableaux with an exact inverse (`tableau.inverse()`: `bdia` with gamma > 0, `edict`, `belm`);
    the first row needs none, because the registers before it are kept. Differentiates with respect to
    x_T (or `state`), every float leaf of the denoiser (parameters, guidance strengths), cond, arrays
    of noise and the coefficients, for every `save`. One evaluation and one pullback of the denoiser a
    row, on top of the sampler's own.

    The gradient is that of the discrete sampler, at states that carry the rounding errors of the way
    back, which grow as when the sampler is inverted: nothing with `bdia` at gamma = 1 and `belm`,
    1 / p^2 a step with `edict`, and 1 / gamma with `bdia` below 1, whose gradient after 50 steps in
    float32 is rounding alone, without a warning. The table in docs/gradients.md has figures.

    `sample` raises ValueError before tracing for a tableau without inverse, a control, a denoiser with
    memory, and inside shard_map and pmap. A tableau that is traced (vmapped, differentiated) is
    checked when the program runs. Forward mode (jvp) is jax's error.
    """

    inverse: Any = None

    def prepare(self, tableau: Any, denoiser: Any, control: Any) -> ReversibleAdjoint:
        """This adjoint with what undoes the rows of `tableau`; raises what the class says."""
        if jax.sharding.get_abstract_mesh().manual_axes:
            raise ValueError(
                "ReversibleAdjoint does not run inside shard_map and pmap: take "
                "diffrax.DirectAdjoint()"
            )
        if control is not None:
            raise ValueError(
                f"ReversibleAdjoint cannot undo a control, got {control!r}: {_INSTEAD}"
            )
        if denoiser.memory is not None:
            raise ValueError(f"ReversibleAdjoint cannot undo a denoiser's memory: {_INSTEAD}")
        if tableau.history > 1:
            raise ValueError(
                f"ReversibleAdjoint takes tableaux that keep one integrand, got {tableau.history}: "
                f"{_INSTEAD}"
            )
        if not is_concrete(tableau.A, tableau.B):
            return ReversibleAdjoint()
        try:
            return ReversibleAdjoint(recovery(_first_row_free(tableau)).A_inv)
        except ValueError as error:
            raise ValueError(f"ReversibleAdjoint: {error}; or {_INSTEAD}") from None

    def loop(
        self, *, args, init_state, saveat, passed_solver_state, passed_controller_state, throw,
        **kwargs,
    ):  # fmt: skip
        del passed_solver_state, passed_controller_state, throw
        y, inverse = init_state.y, self.inverse
        if inverse is None:
            inverse, bad = _inverse(args.coefficients, jax.tree.leaves(y)[0].dtype)
            y = eqx.error_if(
                y, bad, f"ReversibleAdjoint: this tableau has no exact inverse: {_INSTEAD}"
            )
        # diffrax's wrapper of the function closes over a traced direction of time.
        pick = eqx.filter_closure_convert(saveat.subs.fn, init_state.tprev, y, args)
        return _run(
            (y, args), inverse=jax.lax.stop_gradient(inverse), solve=self._loop,
            saveat=eqx.tree_at(lambda saveat: saveat.subs.fn, saveat, pick),
            init_state=eqx.tree_at(lambda state: state.y, init_state, None), **kwargs,
        )  # fmt: skip


def _first_row_free(tableau: Any) -> Any:
    """The tableau with a first row that changes nothing; coefficients that are no numbers stay."""
    A, B = tableau.A, tableau.B
    if getattr(A, "ndim", 0) == 3 and getattr(B, "ndim", 0) == 4:
        A, B = np.array(A), np.array(B)
        A[0], B[0] = np.eye(tableau.registers), 0.0
    return dataclasses.replace(tableau, A=A, B=B, C=None, d=None)


def _inverse(coefficients: Any, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """A^-1 of every row but the first of a traced table, and whether any row has no inverse."""
    A, B = coefficients.A, coefficients.B
    if getattr(A, "ndim", 0) != 3 or getattr(B, "ndim", 0) != 4:
        raise ValueError(
            f"ReversibleAdjoint takes coefficients that are one number each: {_INSTEAD}"
        )
    # A register that is neither read nor written (of a stack) is left as it is.
    idle = ~((A != 0).any(1) | (A != 0).any(2) | (B != 0).any((2, 3)))
    eye = jnp.eye(A.shape[1], dtype=dtype)
    A = A + eye * idle[:, None, :]
    inverse = jnp.linalg.inv(A.at[0].set(eye))
    left, B = inverse[1:, 0], B[1:]
    pushed = jnp.abs(jnp.einsum("ri,rikp->rkp", left, B))
    size = jnp.abs(left).max(-1) * jnp.abs(B).max((1, 2, 3))
    tolerance = 100 * jnp.finfo(dtype).eps
    bad = ~jnp.isfinite(inverse).all() | (pushed.max((1, 2)) > tolerance * size).any()
    return inverse, bad


@eqx.filter_custom_vjp
def _run(y__args, *, inverse, solve, init_state, **kwargs):
    del inverse
    y, args = y__args
    init_state = eqx.tree_at(
        lambda state: state.y, init_state, y, is_leaf=lambda node: node is None
    )
    return solve(
        args=args, init_state=init_state, inner_while_loop=_LOOP, outer_while_loop=_LOOP, **kwargs
    )


@_run.def_fwd
def _run_forward(perturbed, y__args, **kwargs):
    del perturbed
    final_state, stats = _run(y__args, **kwargs)
    return (final_state, stats), (final_state.y, final_state.save_state.ys)


@_run.def_bwd
def _run_backward(residuals, grads, perturbed, y__args, *, inverse, saveat, t0, **kwargs):
    del kwargs
    last, ys = residuals
    first, args = y__args
    wanted = perturbed[1]
    noise = eqx.filter(args.noise, wanted.noise)
    if isinstance(args.noise, BrownianPath):
        if jax.tree.leaves(noise):
            raise ValueError(
                f"ReversibleAdjoint does not differentiate the process of a BrownianPath: {_INSTEAD}"
            )
        noise = None
    given = jax.tree.map(
        lambda y, g: jnp.zeros_like(y) if g is None else g, ys, grads[0].save_state.ys
    )
    # What is saved is a linear function of the state.
    _, spread = jax.vjp(lambda y: saveat.subs.fn(t0, y, args), last)

    def of_saved(i):
        return spread(jax.tree.map(lambda g: g[i], given))[0]

    steps, offset = saveat.subs.steps, int(saveat.subs.t0)
    total = jax.tree.map(jnp.zeros_like, last) if steps else of_saved(0)
    learned, fixed = eqx.partition((args.denoiser, args.cond), (wanted.denoiser, wanted.cond))
    zeros = jax.tree.map(jnp.zeros_like, (learned, noise))

    def back(carry, row):
        registers, total, (d_learned, d_noise) = carry
        r, coefficients, inverse = row
        if steps:
            total = jax.tree.map(jnp.add, total, of_saved(r + offset))
        varied, constant = eqx.partition(coefficients, wanted.coefficients)
        z = None
        if coefficients.C is not None:
            z = args.draw(r, args.table.draw[r], registers[0])
        free = _without(coefficients, registers, (), z)  # s' - C z - d
        x = _choose(r == 0, first.registers[0], _times(inverse[:1], free)[0])

        def network(learned, varied, x):
            denoiser, cond = eqx.combine(learned, fixed)
            row = eqx.combine(varied, constant)
            outs, _, _ = evaluate(denoiser, cond, row.times, x)
            x0 = None if last.x0 is None else denoised(denoiser, row.times, outs, x)
            return integrands(row, outs, x, args.table.outputs), x0

        (m, _), pull_network = jax.vjp(network, learned, varied, x)
        pushed = coefficients._replace(C=None, d=None)
        before = _times(inverse, _without(pushed, free, [m], None))
        before = _choose(r == 0, first.registers, (x, *before[1:]))

        def linear(varied, registers, m, z):
            return update(eqx.combine(varied, constant), registers, [m], z)

        _, pull_linear = jax.vjp(linear, varied, before, m, z)
        d_varied, d_before, d_m, d_z = pull_linear(total.registers)
        grad_learned, grad_varied, d_x = pull_network((d_m, total.x0))
        d_before = (jax.tree.map(jnp.add, d_before[0], d_x), *d_before[1:])
        total = total._replace(
            registers=d_before, x0=None if last.x0 is None else jax.tree.map(jnp.zeros_like, x)
        )
        d_learned = jax.tree.map(jnp.add, d_learned, grad_learned)
        if z is not None:
            d_noise = _add_at(d_noise, args.table.draw[r], d_z)
        d_varied = jax.tree.map(jnp.add, d_varied, grad_varied)
        return (before, total, (d_learned, d_noise)), d_varied

    rows = (jnp.arange(args.table.rows), args.coefficients, inverse)
    (_, total, (learned, noise)), varied = jax.lax.scan(
        back, (last.registers, total, zeros), rows, reverse=True
    )
    if offset:
        total = jax.tree.map(jnp.add, total, of_saved(0))
    gradient = jax.tree.map(lambda _: None, args)
    gradient = gradient._replace(denoiser=learned[0], cond=learned[1], coefficients=varied)
    return total, gradient if noise is None else gradient._replace(noise=noise)


def _times(matrix: Any, registers: Any) -> tuple[Any, ...]:
    """matrix @ registers."""
    return tuple(
        combine([(matrix[i, j], s) for j, s in enumerate(registers)])
        for i in range(matrix.shape[0])
    )


def _without(row: Any, registers: Any, kept: Any, z: Any) -> tuple[Any, ...]:
    """registers - B m - C z - d."""
    eye = jnp.eye(len(registers), dtype=row.A.dtype)
    minus = row._replace(**jax.tree.map(jnp.negative, dict(B=row.B, C=row.C, d=row.d)), A=eye)
    return update(minus, registers, kept, z)


def _add_at(total: Any, number: Any, gradient: Any) -> Any:
    """The gradient added to entry `number` of each leaf that is wanted (not None)."""

    def add(whole, part):
        return (
            None if whole is None else whole.at[number].add(part.astype(whole.dtype), mode="drop")
        )

    return jax.tree.map(add, total, gradient, is_leaf=lambda node: node is None)


def _choose(first: Any, kept: Any, recovered: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(first, a, b), kept, recovered)
