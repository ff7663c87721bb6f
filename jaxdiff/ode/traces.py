"""The trace of a Jacobian, exactly or from random probes.

All need products J v alone (forward mode, which shares the evaluation between them). With d the size
of one sample, P the number of products of one trace, and E[g g^T] = I:

    exact        sum_i e_i^T J e_i                                                    P = d
    hutchinson   mean_j g_j^T J g_j                                                   P = probes
    hutch_pp     tr(Q^T J Q) + mean_j g_j^T R J R g_j,   R = I - Q Q^T,               P = products
                 Q an orthonormal basis of the range of J S, S a third of the products

Hutchinson, "A stochastic estimator of the trace of the influence matrix" (1989); Meyer, Musco, Musco
& Woodruff, "Hutch++: Optimal Stochastic Trace Estimation" (2021). For a fixed S each term of Hutch++
with its own g_j is unbiased, as each of Hutchinson's is; their spread gives the standard error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.noise import normal
from jaxdiff.solvers.clocks import check_choice, check_order

LAWS = ("rademacher", "gaussian")
_LARGEST, _MOST = 256, 10**9


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Exact:
    """See `exact`."""

    max_dim: int = _LARGEST
    chunk: int | None = None

    def products(self, dim: int) -> int:
        return dim

    def probes(self, key: Any, x: Any) -> None:
        return None

    def check(self, dim: int, key: Any) -> None:
        if dim > self.max_dim:
            raise ValueError(
                f"the exact trace makes {dim} products with the Jacobian an evaluation, more than "
                f"max_dim = {self.max_dim}: pass trace=hutchinson(probes) or hutch_pp(products), or "
                f"exact(max_dim={dim}) to pay for it"
            )

    def estimate(self, push: Callable, probes: None, like: Array) -> Array:
        def one(i):
            direction = jax.nn.one_hot(i, like.shape[1], dtype=like.dtype)
            return push(jnp.broadcast_to(direction, like.shape))[:, i]

        dims = jnp.arange(like.shape[1])
        chunk = like.shape[1] if self.chunk is None else self.chunk
        return jnp.sum(jax.lax.map(one, dims, batch_size=chunk), 0)[:, None]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Hutchinson:
    """See `hutchinson`."""

    count: int = 1
    law: str = "rademacher"

    def products(self, dim: int) -> int:
        return self.count

    def probes(self, key: Any, x: Any) -> Array:
        return _draw(key, x, self.count, self.law)

    def check(self, dim: int, key: Any) -> None:
        _check_key(key)

    def estimate(self, push: Callable, probes: Array, like: Array) -> Array:
        return jnp.sum(probes * jax.vmap(push)(probes), -1).T


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class HutchPP:
    """See `hutch_pp`."""

    count: int
    law: str = "rademacher"

    @property
    def sketch(self) -> int:
        """Directions of the low-rank part: two products each."""
        return self.count // 3

    def products(self, dim: int) -> int:
        return self.count

    def probes(self, key: Any, x: Any) -> Array:
        return _draw(key, x, self.count - self.sketch, self.law)

    def check(self, dim: int, key: Any) -> None:
        _check_key(key)
        if self.count >= dim:
            raise ValueError(
                f"hutch_pp({self.count}) makes no fewer products than the exact trace of a sample of "
                f"size {dim}: pass trace=exact()"
            )

    def estimate(self, push: Callable, probes: Array, like: Array) -> Array:
        push = jax.vmap(push)
        first, rest = probes[: self.sketch], probes[self.sketch :]
        # [directions, batch, d] <-> matrices [batch, d, directions]
        basis, _ = jnp.linalg.qr(jnp.moveaxis(push(first), 0, -1))
        columns = jnp.moveaxis(basis, -1, 0)
        low_rank = jnp.sum(columns * push(columns), (0, -1))
        inside = jnp.einsum("bdk,jbd->jbk", basis, rest)
        rest = rest - jnp.einsum("bdk,jbk->jbd", basis, inside)
        return (low_rank + jnp.sum(rest * push(rest), -1)).T


Trace = Exact | Hutchinson | HutchPP


def exact(max_dim: int = _LARGEST, chunk: int | None = None) -> Exact:
    """The trace itself, from d products with the d basis vectors: it costs d times an evaluation.

    Arguments:
      max_dim: the largest sample that is accepted, so that nobody pays for it unknowingly.
      chunk: products made at once (all by default): less memory, and the same number of products.
    """
    check_order(max_dim, _MOST, "max_dim")
    if chunk is not None:
        check_order(chunk, _MOST, "chunk")
    return Exact(int(max_dim), None if chunk is None else int(chunk))


def hutchinson(probes: int = 1, law: str = "rademacher") -> Hutchinson:
    """Hutchinson's estimator with `probes` products.

    law: "rademacher" (signs; of variance 2 sum_{i != j} of J's symmetric part squared, for each
    probe) or "gaussian" (the diagonal contributes too). Two probes or more give a standard error.
    """
    check_order(probes, _MOST, "probes")
    check_choice("law", law, LAWS)
    return Hutchinson(int(probes), law)


def hutch_pp(products: int, law: str = "rademacher") -> HutchPP:
    """Hutch++ with `products` products: a third for a sketch S, as many for tr(Q^T J Q), the rest
    for the probes of the complement (at least 3, and fewer than a sample has numbers).

    Better than Hutchinson's estimator where few directions carry most of J, as of the denoised x_0
    where the data lie near a surface of few dimensions. Its QR factorisation has no derivative where
    J S has not full rank: for gradients of a likelihood take `hutchinson`.
    """
    check_order(products, _MOST, "products", 3)
    check_choice("law", law, LAWS)
    return HutchPP(int(products), law)


def flatten(x: Any) -> tuple[Float[Array, "batch dim"], Callable]:
    """(one row a sample, its inverse) of a pytree with leaves [batch, ...]."""
    leaves, treedef = jax.tree.flatten(x)
    shapes = [leaf.shape for leaf in leaves]
    sizes = [leaf[0].size for leaf in leaves]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]

    def unflatten(rows):
        parts = jnp.split(rows, ends, axis=1)
        return treedef.unflatten([part.reshape(shape) for part, shape in zip(parts, shapes)])

    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], 1), unflatten


def value_and_trace(
    method: Trace, fn: Callable, x: Any, probes: Any
) -> tuple[Any, Any, Float[Array, "batch estimates"]]:
    """(value, aux, estimates of the trace of the value's Jacobian at every sample).

    `fn` maps a pytree x, leaves [batch, ...], to (value, aux), the value of x's shapes and sample by
    sample; `probes` are `method.probes(key, x)`. There is one estimate for each probe, each unbiased.
    """
    rows, unflatten = flatten(x)

    def flat(rows):
        value, aux = fn(unflatten(rows))
        return flatten(value)[0], aux

    value, push, aux = jax.linearize(flat, rows, has_aux=True)
    return unflatten(value), aux, method.estimate(push, probes, rows)


def check_trace(method: Any, x: Any, key: Any) -> int:
    """The size d of one sample of x; raises TypeError or ValueError where `method` does not fit."""
    if not isinstance(method, Trace):
        raise TypeError(
            f"trace must be exact(), hutchinson() or hutch_pp() of jaxdiff.ode, got {method!r}"
        )
    dim = sum(leaf[0].size for leaf in jax.tree.leaves(x))
    method.check(dim, key)
    return dim


def _draw(key, x, count, law):
    rows, _ = flatten(x)
    g = jnp.stack([normal(key, rows, draw=j) for j in range(count)])
    return g if law == "gaussian" else jnp.where(g < 0, -1.0, 1.0).astype(g.dtype)


def _check_key(key: Any) -> None:
    if key is None:
        raise ValueError("a random trace estimator needs key=")
