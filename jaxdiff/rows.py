"""One row of a tableau, in the pieces that running forward and walking back share.

A row evaluates the denoiser at s_0 (`evaluate`), turns its outputs into integrands (`integrands`) and
updates the registers (`update`); the formula is in `jaxdiff.solvers.tableau`. Coefficients are those
of one row, without the rows' axis.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.noise import BrownianPath, normal
from jaxdiff.predictions import affine


class Coefficients(NamedTuple):
    """What a run takes from its tableau, in the state's dtype; u and w for the denoiser's outputs.

    `times` is (t, alpha, sigma). With leading axis rows; `at(coefficients, r)` is one row's.
    """

    A: Any  # [R, R]
    B: Any  # [R, K, P]
    C: Any  # [R], or None
    d: Any  # [R], or None
    u: Any  # [P]
    w: Any  # [P]
    times: tuple[Any, Any, Any]


def at(coefficient: Any, *index: Any) -> Any:
    """Entry `index` of a coefficient: arrays, or a pytree prefix of them."""

    def take(a):
        for i in index:
            a = a[i]
        return a

    return jax.tree.map(take, coefficient)


def evaluate(
    denoiser: Any, cond: Any, times: Any, x: Any, memory: Any = None
) -> tuple[tuple[Any, ...], Any, Any]:
    """(outputs in the state's dtype, the denoiser's own output, new memory)."""
    out, memory = denoiser.evaluate(x, *times, cond, memory)
    outs = (out,) if isinstance(denoiser.prediction, str) else tuple(out)
    return tuple(like(x, o) for o in outs), out, memory


def integrands(row: Coefficients, outs: tuple[Any, ...], x: Any, outputs: int) -> tuple[Any, ...]:
    """m_p = u_p o_p + w_p x; one output feeds every slot."""
    return tuple(
        jax.tree.map(
            jnp.add,
            scale(at(row.u, p), outs[min(p, len(outs) - 1)]),
            scale(at(row.w, p), x),
        )
        for p in range(outputs)
    )


def update(row: Coefficients, registers: Any, kept: Any, z: Any) -> tuple[Any, ...]:
    """s_i' = sum_j A_ij s_j + sum_kp B_ikp m_kp + C_i z + d_i; `kept`: [K][P] trees, z None without
    noise."""
    return tuple(_updated(row, i, registers, kept, z) for i in range(len(registers)))


def _updated(row, i, registers, kept, z):
    terms = [(at(row.A, i, j), s) for j, s in enumerate(registers)]
    terms += [(at(row.B, i, k, p), m) for k, ms in enumerate(kept) for p, m in enumerate(ms)]
    if z is not None:
        terms.append((at(row.C, i), z))
    new = combine(terms)
    return new if row.d is None else shift(new, at(row.d, i))


def denoised(denoiser: Any, times: Any, outs: tuple[Any, ...], x: Any) -> Any:
    """The x_0 that the outputs predict; an output that is x_0 itself is preferred."""
    _, alpha, sigma = times
    predictions = denoiser.predictions
    p = predictions.index("x0") if "x0" in predictions else 0
    u, w = affine(predictions[p], "x0", alpha, sigma)
    return jax.tree.map(jnp.add, scale(u, outs[p]), scale(w, x))


def draw_noise(noise: Any, keys: Any, draw: Any, clock: Any, x: Any) -> Any:
    """Draw number `draw`, of an array [draws, batch, ...], of a path over `clock`, or of the keys."""
    if isinstance(noise, BrownianPath):
        return noise.draw(clock, x)
    if noise is not None:
        # A draw that is not there is NaN, not the last one again.
        take = lambda n: n.at[draw].get(mode="fill", fill_value=jnp.nan)  # noqa: E731
        return jax.tree.map(lambda n, a: take(n).astype(a.dtype), noise, x)
    return normal(keys, x, draw)


def scale(coefficient: Any, tree: Any) -> Any:
    """coefficient * tree; the coefficient may be a prefix of the tree."""
    return jax.tree.map(
        lambda c, sub: jax.tree.map(lambda a: c.astype(a.dtype) * a, sub), coefficient, tree
    )


def combine(terms: list[tuple[Any, Any]]) -> Any:
    """The sum of coefficient * tree."""
    scaled = [scale(c, tree) for c, tree in terms]
    return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *scaled)


def shift(tree: Any, d: Any) -> Any:
    """tree + d; d may be a prefix of the tree."""
    return jax.tree.map(lambda c, sub: jax.tree.map(lambda a: a + c.astype(a.dtype), sub), d, tree)


def like(x: Any, out: Any, what: str = "the denoiser's output") -> Any:
    """`out` in x's dtypes; ValueError unless structure and shapes are x's."""
    if jax.tree.structure(out) != jax.tree.structure(x):
        raise ValueError(
            f"{what} has structure {jax.tree.structure(out)}, the state {jax.tree.structure(x)}"
        )

    def leaf(a, b):
        if jnp.shape(b) != a.shape:
            raise ValueError(f"{what} has shape {jnp.shape(b)}, the state {a.shape}")
        return jnp.asarray(b, a.dtype)

    return jax.tree.map(leaf, x, out)
