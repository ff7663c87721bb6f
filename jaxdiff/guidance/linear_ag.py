"""LinearAG: unconditional predictions replaced by combinations of those before.

Castillo et al., "Adaptive Guidance" (2023), see `jaxdiff.guidance.adaptive`. Along the paths of a
sampler the unconditional noise of a row is nearly

    eps_uncond(x_t) = sum_{i <= t} a_i eps_cond(x_i) + sum_{j < t} b_j eps_uncond(x_j)

over the rows i so far and those j so far that were evaluated without condition. The numbers a and b
are the least-squares ones on a few paths with full guidance, one system a row, all samples and elements
together; then some rows go on without the unconditional half. (A row that was replaced itself is such a
combination, so leaving it out of the second sum leaves nothing out.)

    paths = record_guidance(denoiser, 3.0, null, tableau, x_T, labels)
    fit = fit_linear_ag(paths)
    fast = linear_guidance(denoiser, 3.0, null, fit, other_x_T)
    jd.sample(fast, tableau, other_x_T, cond=other_labels)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdiff.arrays import as_arrays
from jaxdiff.denoisers import Denoiser, level
from jaxdiff.guidance.together import (
    Scale,
    as_scale,
    at_level,
    check_conditional,
    check_scale,
    extrapolated,
    filled,
    keeping,
    need_cond,
    together,
    wide,
)
from jaxdiff.predictions import convert
from jaxdiff.sampling import sample
from jaxdiff.solvers.tableau import Tableau


class Predictions(NamedTuple):
    """Noise predicted in every row of a sampler under full guidance: leaves [rows, batch, ...]."""

    cond: Any
    uncond: Any


class Replaced(NamedTuple):
    """The memory of `linear_guidance`: the network's own, `row` and `evaluations` so far, and the
    predictions of noise so far (those without condition 0 where they were replaced)."""

    inner: Any
    row: Int[Array, ""]
    evaluations: Int[Array, ""]
    past: Predictions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearAG:
    """What `fit_linear_ag` finds.

    `coefficients` [rows, 2, rows]: a, then b, of each replaced row, others 0; `replaced` [rows];
    `residuals` [rows]: |eps - its replacement| / |eps| on the paths of the fit, others 0.
    """

    coefficients: Float[Array, "rows 2 rows"]
    replaced: Array
    residuals: Array


def record_guidance(
    denoiser: Denoiser, scale: Scale, null_cond: Any, tableau: Tableau, x_T: Any, cond: Any,
    key: Any = None,
) -> Predictions:  # fmt: skip
    """The conditional and unconditional noise in every row of a guided sampler.

    Arguments as for `classifier_free` and `jaxdiff.sample`; two evaluations a row, and memory for the
    predictions of all rows. Raises what those raise.
    """
    guided = _guided(denoiser, scale, null_cond, None, tableau.rows, x_T)
    return sample(guided, tableau, x_T, key, cond=cond, save="state").memory.past


def fit_linear_ag(paths: Predictions, replaced: Iterable[int] | None = None) -> LinearAG:
    """The least-squares replacement of the unconditional prediction in some rows.

    Arguments:
      paths: of `record_guidance`, for tens of samples.
      replaced: the rows to replace, not the first one; None for every second, 1, 3, 5, ...

    In float64 on the host. Raises ValueError for rows that there are not, row 0, or too few paths: less
    numbers a row than unknowns.
    """
    target, with_cond = (_flat(tree) for tree in (paths.uncond, paths.cond))
    rows = len(target)
    chosen = sorted(set(range(1, rows, 2) if replaced is None else map(int, replaced)))
    if not chosen or chosen[0] < 1 or chosen[-1] >= rows:
        raise ValueError(f"replaced must be some of the rows 1 to {rows - 1}, got {chosen}")
    if target.shape[1] < 2 * rows:
        raise ValueError(
            f"the paths have {target.shape[1]} numbers a row for up to {2 * rows} unknowns: record more"
        )
    coefficients, residuals = np.zeros((rows, 2, rows)), np.zeros(rows)
    for r in chosen:
        kept = [j for j in range(r) if j not in chosen]
        columns = np.concatenate([with_cond[: r + 1], target[kept]])
        # Neighbours are nearly equal: singular values in the rounding of float32 say nothing.
        found = np.linalg.lstsq(columns.T, target[r], rcond=1e-6)[0]
        coefficients[r, 0, : r + 1] = found[: r + 1]
        coefficients[r, 1, kept] = found[r + 1 :]
        left = target[r] - found @ columns
        residuals[r] = np.linalg.norm(left) / np.linalg.norm(target[r])
    return LinearAG(coefficients, np.isin(np.arange(rows), chosen), residuals)


def linear_residuals(fit: LinearAG, paths: Predictions) -> Float[np.ndarray, " rows"]:
    """|eps_uncond - its replacement| / |eps_uncond| of each replaced row on other paths, others 0."""
    target, with_cond = (_flat(tree) for tree in (paths.uncond, paths.cond))
    a, b = np.asarray(fit.coefficients, np.float64).swapaxes(0, 1)
    left = np.linalg.norm(target - a @ with_cond - b @ target, axis=1)
    return np.where(fit.replaced, left / np.linalg.norm(target, axis=1), 0.0)


def linear_guidance(
    denoiser: Denoiser, scale: Scale, null_cond: Any, fit: LinearAG, like: Any
) -> Denoiser:
    """uncond + s (cond - uncond), with uncond of some rows from a `fit_linear_ag`; see this module.

    It counts its own calls, so it is for the tableau of the fit, from its first row on, and keeps the
    predictions of all rows. In a replaced row the network runs once, under cond (`lax.cond`).

    Arguments:
      scale, null_cond: as for `classifier_free`; another scale than the fit's leaves its paths.
      like: x_T, or a `jax.ShapeDtypeStruct` of it.

    Its `cost` is 2, that of a row that is not replaced; the memory (`Replaced`) counts. Raises TypeError
    for anything but a `LinearAG`, ValueError, when sampling, for a tableau of another number of rows.
    """
    if not isinstance(fit, LinearAG):
        raise TypeError(f"fit must be a LinearAG of fit_linear_ag, got {type(fit).__name__}")
    return _guided(denoiser, scale, null_cond, fit, len(fit.replaced), like)


def _guided(denoiser, scale, null_cond, fit, rows, like) -> Denoiser:
    check_conditional(denoiser, "LinearAG")

    def zeros(a):
        return jnp.zeros((rows, *a.shape), jnp.promote_types(a.dtype, jnp.float32))

    zero, empty = jnp.zeros((), jnp.int32), jax.tree.map(zeros, as_arrays(like))
    memory = Replaced(denoiser.memory, zero, zero, Predictions(empty, empty))
    numbers = None
    if fit is not None:
        coefficients = jnp.asarray(fit.coefficients, jnp.result_type(float))
        numbers = (coefficients, jnp.asarray(fit.replaced))
    null = jax.tree.map(jnp.asarray, null_cond)
    params = (denoiser, (as_scale(scale, "guidance"), null, numbers))
    fn = _Linear(denoiser.prediction, rows)
    return Denoiser(fn, denoiser.prediction, params, level, memory, 2 * denoiser.cost)


@dataclasses.dataclass(frozen=True)
class _Linear:
    prediction: str
    rows: int

    def __call__(self, params, x, levels, cond=None, memory=None):
        need_cond(cond, "LinearAG")
        denoiser, (scale, null, numbers) = params
        row, levels_ = memory.row, levels[1:]

        def kept(past, out):
            eps = convert(out, x, self.prediction, "eps", *levels_)
            put = lambda p, e: p.at[row].set(e.astype(p.dtype))  # noqa: E731
            return jax.tree.map(put, past, eps)

        def both(memory):
            evaluate, inner = keeping(denoiser, memory.inner)
            target, without = together(evaluate, x, levels, [cond, filled(null, cond)])
            past = Predictions(kept(memory.past.cond, target), kept(memory.past.uncond, without))
            return target, without, inner(), past

        def replaced(memory):
            evaluate, inner = keeping(denoiser, memory.inner)
            target = wide(evaluate(x, *levels, cond), x)
            past = Predictions(kept(memory.past.cond, target), memory.past.uncond)
            a, b = numbers[0][row]

            def combined(c, u, y):
                total = jnp.tensordot(a.astype(c.dtype), c, 1) + jnp.tensordot(
                    b.astype(u.dtype), u, 1
                )
                return total.astype(y.dtype)

            eps = jax.tree.map(combined, *past, target)
            return target, convert(eps, x, "eps", self.prediction, *levels_), inner(), past

        if numbers is None:
            skip, found = jnp.asarray(False), both(memory)
        else:
            skip = numbers[1][row]
            found = jax.lax.cond(skip, replaced, both, memory)
        target, without, inner, past = found
        ran = (jnp.where(skip, 1, 2) * denoiser.cost).astype(jnp.int32)
        out = extrapolated(without, target, at_level(scale, levels))
        return out, Replaced(inner, row + 1, memory.evaluations + ran, past)

    def check(self, params, batch, cond, alpha):
        need_cond(cond, "LinearAG")
        if len(alpha) != self.rows:
            raise ValueError(
                f"LinearAG was fitted for {self.rows} rows, this sampler has {len(alpha)}"
            )
        denoiser, (scale, null, _) = params
        check_scale(scale, batch)
        denoiser.check(batch, cond, alpha)
        denoiser.check(batch, null, alpha)


def _flat(tree: Any) -> Float[np.ndarray, "rows numbers"]:
    """The predictions of all samples and leaves, a line a row."""
    leaves = [np.asarray(a, np.float64) for a in jax.tree.leaves(tree)]
    return np.concatenate([a.reshape(len(a), -1) for a in leaves], axis=1)
