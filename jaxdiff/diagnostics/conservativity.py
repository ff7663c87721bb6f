"""Is a denoiser's score a gradient, and does it matter?

The true score is grad log p_t: its Jacobian J is symmetric, its integral around a loop is 0 and that
between two points does not depend on the way. A network's need not. Write s = grad log p + r: the
flow of the marginals is untouched if and only if

    div r + <r, grad log p> = div(p r) / p = 0        (the gauge condition)

so a score may be far from a gradient and sample exactly, or a gradient and be wrong: Horvat & Pfister,
"On gauge freedom, conservativity and intrinsic dimensionality estimation in diffusion models" (2024).
The same is seen from the probability flow, whose velocity v = f x - (g^2 / 2) s is that of a
Wasserstein gradient flow and what flow matching regresses: Vuong, McCann, Santos & Lin, "Are We Really
Learning the Score Function? Reinterpreting Diffusion Models Through Wasserstein Gradient Flow Matching"
(2025).

The diagnostics take any field: a function [batch, dim] -> [batch, dim]. `ScoreField` and
`VelocityField` make one of a denoiser; being pytrees, they compile once.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from jaxdiff.arrays import is_concrete, to_batch
from jaxdiff.denoisers import Denoiser, check_single, wrap
from jaxdiff.diagnostics.errors import check_evaluated
from jaxdiff.predictions import convert
from jaxdiff.processes import Process
from jaxdiff.solvers.clocks import check_choice

Field = Callable[[Float[Array, "batch dim"]], Float[Array, "batch dim"]]
POTENTIALS = ("dot", "square")


class ScoreField(eqx.Module):
    """x -> the denoiser's score at time t of a process, [batch, ...] each."""

    denoiser: Denoiser
    process: Process
    t: ArrayLike
    cond: Any = None

    def __check_init__(self):
        check_evaluated(self.denoiser)
        if not isinstance(self.process, Process):
            raise TypeError(f"expected a process, got {type(self.process).__name__}")

    def __call__(self, x: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        level = (jnp.asarray(a, x.dtype) for a in _level(self.process, self.t))
        return self.denoiser.predict("score", x, *level, self.cond)


class VelocityField(ScoreField):
    """x -> the velocity f x - (g^2 / 2) score of the probability flow at time t, by time.

    It equals E[dalpha/dt x_0 + dsigma/dt eps | x_t = x], the target of flow matching, and minus the
    gradient of the first variation of the free energy whose Wasserstein gradient flow the process is.
    """

    def __call__(self, x: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        f, g2 = (jnp.asarray(a, x.dtype) for a in self.process.rates(self.t))
        return to_batch(f, x) * x - to_batch(0.5 * g2, x) * super().__call__(x)


def _level(process, t):
    return t, process.alpha(t), process.sigma(t)


# --- what is measured -----------------------------------------------------------------------------


def jacobian(field: Field, x: Float[ArrayLike, "batch ..."]) -> Float[Array, "batch dim dim"]:
    """The Jacobian of a field at every example, d field_i / d x_j, elements in order."""
    return _jacobian(field, jnp.asarray(x))


def asymmetry(
    field: Field, x: Float[ArrayLike, "batch ..."], probes: int | None = None,
    key: Array | None = None,
) -> Float[Array, " batch"]:  # fmt: skip
    """|J - J^T| / |J| (Frobenius) at every example: 0 for a gradient, at most 2.

    By default from the whole Jacobian; with `probes` (and a `key`) estimated by Hutchinson's

        |J - J^T|^2 = E |J v - J^T v|^2,    |J|^2 = E |J v|^2,    v random signs,

    two products with the Jacobian a probe. Raises ValueError for probes without a key or below 1.
    """
    signs = _probes(x, probes, key)
    x = jnp.asarray(x)
    return _exact_asymmetry(field, x) if signs is None else _asymmetry(field, x, signs)


def line_integral(
    field: Field, vertices: Float[ArrayLike, "points batch dim"], nodes: int = 16
) -> Float[Array, " batch"]:
    """int field . dl along the straight lines between consecutive `vertices`.

    By `nodes` Gauss-Legendre points a line, exact for polynomials of degree 2 nodes - 1. Back at the
    first vertex it is a loop's circulation, see `loop_integral`. Integer vertices count as floating
    point. Raises ValueError for fewer than two vertices.
    """
    vertices = jnp.asarray(vertices)
    # The nodes on the lines are no integers.
    vertices = vertices.astype(jnp.result_type(vertices.dtype, 1.0))
    if vertices.ndim != 3 or len(vertices) < 2:
        raise ValueError(
            f"vertices must be [points, batch, dim], at least 2 points, got {vertices.shape}"
        )
    u, weight = np.polynomial.legendre.leggauss(operator.index(nodes))
    return _line_integral(field, vertices, 0.5 * (u + 1.0), 0.5 * weight)


def loop_integral(
    field: Field, vertices: Float[ArrayLike, "points batch dim"], nodes: int = 16
) -> Float[Array, " batch"]:
    """`line_integral` around the closed polygon of `vertices`: 0 for a gradient."""
    vertices = jnp.asarray(vertices)
    return line_integral(field, jnp.concatenate([vertices, vertices[:1]]), nodes)


def path_dependence(
    field: Field, start: Float[ArrayLike, "batch dim"], end: Float[ArrayLike, "batch dim"],
    via: Float[ArrayLike, "batch dim"], nodes: int = 16,
) -> Float[Array, " batch"]:  # fmt: skip
    """How much longer or shorter the way from start to end is through `via`, relative to both.

    |A - B| / (|A| + |B|) of the line integrals A straight and B through `via`, from 0 to 1. For a
    score both are log p(end) - log p(start) as this network has it: 0 says that it has one.
    """
    straight, around = (
        line_integral(field, jnp.stack(points), nodes)
        for points in ((start, end), (start, via, end))
    )
    return jnp.abs(straight - around) / (jnp.abs(straight) + jnp.abs(around))


def gauge_residual(
    remainder: Field, score: Field, x: Float[ArrayLike, "batch ..."], probes: int | None = None,
    key: Array | None = None,
) -> Float[Array, " batch"]:  # fmt: skip
    """div r + <r, score> at every example: 0 where r moves no probability (the gauge condition).

    `remainder` and `score` are fields. The divergence is exact, or Hutchinson's mean of v . (J v) over
    `probes` random signs. Raises ValueError for probes without a key or below 1.
    """
    return _gauge_residual(remainder, score, jnp.asarray(x), _probes(x, probes, key))


def _probes(x, probes, key):
    if (probes is None) != (key is None):
        raise ValueError(
            "probes and key go together: both for an estimate, none for the exact value"
        )
    if probes is None:
        return None
    if operator.index(probes) < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    x = jnp.asarray(x)
    return jax.random.rademacher(key, (probes, *x.shape), x.dtype)


@eqx.filter_jit
def _jacobian(field, x):
    dim = x[0].size

    def column(i):
        # An example's output depends on that example alone: one basis vector serves the batch.
        basis = (jnp.arange(dim) == i).astype(x.dtype).reshape(x.shape[1:])
        moved = jax.jvp(field, (x,), (jnp.broadcast_to(basis, x.shape),))[1]
        return moved.reshape(len(x), dim)

    return jnp.moveaxis(jax.vmap(column)(jnp.arange(dim)), 0, 2)


def _norms(a):
    return jnp.sqrt(jnp.sum(a**2, axis=tuple(range(1, a.ndim))))


@eqx.filter_jit
def _exact_asymmetry(field, x):
    matrix = _jacobian(field, x)
    return _norms(matrix - jnp.swapaxes(matrix, 1, 2)) / _norms(matrix)


@eqx.filter_jit
def _asymmetry(field, x, signs):
    back = jax.vjp(field, x)[1]

    def one(v):
        forward = jax.jvp(field, (x,), (v,))[1]
        return _norms(forward - back(v)[0]) ** 2, _norms(forward) ** 2

    gap, size = (jnp.mean(a, axis=0) for a in jax.vmap(one)(signs))
    return jnp.sqrt(gap / size)


@eqx.filter_jit
def _line_integral(field, vertices, u, weight):
    u, weight = (jnp.asarray(a, vertices.dtype) for a in (u, weight))
    start, step = vertices[:-1], vertices[1:] - vertices[:-1]
    points = start[:, None] + u[:, None, None] * step[:, None]  # [lines, nodes, batch, dim]
    along = jax.lax.map(field, points.reshape(-1, *vertices.shape[1:])).reshape(points.shape)
    return jnp.einsum("pnbd,pbd,n->b", along, step, weight)


@eqx.filter_jit
def _gauge_residual(remainder, score, x, signs):
    if signs is None:
        divergence = jnp.trace(_jacobian(remainder, x), axis1=1, axis2=2)
    else:
        pushed = jax.vmap(lambda v: v * jax.jvp(remainder, (x,), (v,))[1])(signs)
        divergence = jnp.mean(jnp.sum(pushed.reshape(*pushed.shape[:2], -1), -1), 0)
    return divergence + jnp.sum((remainder(x) * score(x)).reshape(len(x), -1), -1)


# --- what is made ---------------------------------------------------------------------------------


def rotated(denoiser: Denoiser, matrix: Float[ArrayLike, "dim dim"]) -> Denoiser:
    """The denoiser with score s + A s, A antisymmetric: another field, the same marginals.

    For s = grad log p the added r = A s obeys the gauge condition for every density, since div(p r) =
    tr(A Hessian(p)) = 0; for a Gaussian it is -A Sigma^-1 (x - mu), the example of Horvat & Pfister
    (2024). Predicts eps. x is [batch, dim] (other shapes: elements in order).

    Raises ValueError unless A is square and antisymmetric.
    """
    check_single(denoiser, "rotated")
    if np.ndim(matrix) != 2 or np.shape(matrix)[0] != np.shape(matrix)[1]:
        raise ValueError(f"the matrix must be [dim, dim], got shape {np.shape(matrix)}")
    if is_concrete(matrix) and not np.allclose(matrix, -np.asarray(matrix).T):
        raise ValueError("the matrix must be antisymmetric: A^T = -A")
    return wrap(_Rotated(denoiser.prediction), denoiser, jnp.asarray(matrix), "eps")


@dataclasses.dataclass(frozen=True)
class _Rotated:
    prediction: str

    def __call__(self, evaluate, matrix, x, levels, cond):
        t, alpha, sigma = levels
        eps = convert(evaluate(x, t, alpha, sigma, cond), x, self.prediction, "eps", alpha, sigma)
        turned = eps.reshape(len(eps), -1) @ matrix.T.astype(eps.dtype)
        return eps + turned.reshape(eps.shape)


def conservative(denoiser: Denoiser, potential: str = "dot") -> Denoiser:
    """A denoiser whose eps is a gradient, eps = sigma grad E, made of one that predicts vectors F.

        "dot"     sigma E = <x, F(x, t)>
        "square"  sigma E = |x - F(x, t)|^2 / 2

    so that the score -grad E is conservative, whatever the parameters, which are the denoiser's: train
    it with the losses of `jaxdiff.losses` and sample it as any other. Sampling costs one backward
    pass more, training another. Energies of the second kind are those of Salimans & Ho, "Should EBMs
    model the energy or the score?" (2021), up to the factor; "dot" is among those that Du et al.,
    "Reduce, Reuse, Recycle" (2023) compare. The denoiser's own prediction is not read: F is what its
    function returns.

    Raises ValueError for another potential, or a denoiser with memory.
    """
    check_evaluated(denoiser, "conservative")
    check_choice("potential", potential, POTENTIALS)
    return wrap(_Gradient(potential), denoiser, (), "eps", cost=2 * denoiser.cost)


@dataclasses.dataclass(frozen=True)
class _Gradient:
    potential: str

    def __call__(self, evaluate, strengths, x, levels, cond):
        def energy(x):
            out = evaluate(x, *levels, cond)
            return jnp.sum(x * out) if self.potential == "dot" else 0.5 * jnp.sum((x - out) ** 2)

        return jax.grad(energy)(x)
