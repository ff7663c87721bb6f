"""What the methods that differentiate the denoiser share.

With x_0hat = E[x_0 | x_t] the network's denoised x_0 and J its Jacobian at x_t, Tweedie's second-order
formula is Cov[x_0 | x_t] = (sigma^2 / alpha) J, and the posterior's denoiser

    E[x_0 | x_t, y] = x_0hat + (sigma^2 / alpha) grad_x log p(y | x_t).

The methods differ in the likelihood they put there. As functions from denoisers to denoisers they take
any tableau; those whose published step adds a gradient to the sampler's own state instead predict it
beside x_0, for `corrected(tableau)`. One evaluation of the network serves x_0 and every product with
J^T.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff.arrays import as_arrays, is_concrete, to_batch
from jaxdiff.denoisers import Denoiser, check_single, level
from jaxdiff.inverse.measurement import check_measurement, same_shape
from jaxdiff.predictions import PREDICTIONS, convert
from jaxdiff.solvers.tableau import Tableau


class Linearised(NamedTuple):
    """The denoiser at a state, with its pullback.

    `x0` the denoised x_0; `pull` v -> J^T v; `gain` sigma^2 / alpha, ready to multiply a state; `memory`
    the denoiser's new one.
    """

    x0: Float[Array, "batch ..."]
    pull: Callable[[Array], Array]
    gain: Any
    alpha: Any
    sigma: Any
    memory: Any

    def covariance(self, v: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        """Cov[x_0 | x_t] v, by one pullback: the covariance is symmetric, a network's nearly so."""
        return self.gain * self.pull(v)


def linearise(denoiser: Denoiser, x: Array, levels: Any, cond: Any, memory: Any) -> Linearised:
    """x_0 at x_t = x and its pullback, by one evaluation of the denoiser."""
    t, alpha, sigma = levels

    def denoise(x):
        # Memory leaves as auxiliary output: kept any other way it would be a tracer of this call.
        out, new = denoiser.evaluate(x, t, alpha, sigma, cond, memory)
        return convert(out.astype(x.dtype), x, denoiser.prediction, "x0", alpha, sigma), new

    x0, pull, new = jax.vjp(denoise, x, has_aux=True)
    alpha, sigma = (jnp.asarray(to_batch(jnp.asarray(c), x), x.dtype) for c in (alpha, sigma))
    return Linearised(x0, lambda v: pull(v)[0], sigma**2 / alpha, alpha, sigma, new)


def guide(
    denoiser: Any, measurement: Any, weigh: Callable, strengths: Any, what: str, cost: int = 1
) -> Denoiser:
    """The denoiser x_0 + Cov A^T g, g = weigh(measurement, strengths, residual, linearised).

    `weigh` is a module-level function or a hashable object. Raises TypeError or ValueError for anything
    but a denoiser of one prediction and a Measurement.
    """
    return _built(denoiser, measurement, _Weighed(weigh, what), strengths, "x0", cost)


def add(
    denoiser: Any, measurement: Any, weigh: Callable, strengths: Any, what: str
) -> Denoiser:
    """Predicts (x_0, J^T A^T g), for `corrected`; arguments and errors as of `guide`."""
    beside = _Weighed(weigh, what, beside=True)
    return _built(denoiser, measurement, beside, strengths, ("x0", "x0"), 1)


def _built(denoiser, measurement, fn, strengths, prediction, cost) -> Denoiser:
    check_single(denoiser, fn.what)
    check_measurement(measurement, fn.what)
    params = (denoiser, measurement, as_arrays(strengths))
    return Denoiser(fn, prediction, params, level, denoiser.memory, cost * denoiser.cost)


@dataclasses.dataclass(frozen=True)
class _Weighed:
    weigh: Callable
    what: str
    beside: bool = False  # the pulled-back g as a second output, not added to x_0

    def __call__(self, params, x, levels, cond=None, memory=None):
        inner, measurement, strengths = params
        same_shape(measurement, x, self.what)
        at = linearise(inner, x, levels, cond, memory)
        g = self.weigh(measurement, strengths, measurement.residual(at.x0), at)
        g = measurement.operator.adjoint(g)
        out = (at.x0, at.pull(g)) if self.beside else at.x0 + at.covariance(g)
        return out if inner.memory is None else (out, at.memory)

    def check(self, params, batch, cond, alpha):
        if not self.beside:
            check_guidable(alpha, self.what)
        params[0].check(batch, cond, alpha)


def check_guidable(alpha: Any, what: str) -> None:
    """Raise ValueError where a row has alpha = 0: x_t says nothing of x_0 there, nor does J."""
    if is_concrete(alpha) and np.any(np.asarray(alpha) == 0):
        raise ValueError(
            f"{what}: Cov[x_0 | x_t] = (sigma^2 / alpha) J is 0 / 0 at alpha = 0, where this grid "
            "starts: give the grid a smaller t_max"
        )


def norms(a: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
    """The Euclidean norm of every sample, shaped to divide it; 1 where it is 0."""
    square = jnp.sum(a**2, tuple(range(1, a.ndim)), keepdims=True)
    return jnp.sqrt(jnp.where(square > 0, square, 1.0))


def corrected(tableau: Tableau, moves: bool = False) -> Tableau:
    """The tableau plus the denoiser's last output: x' = step(x, x_0) + correction.

    For denoisers of ("x0", "x0"): x_0 and what is added to the state that a row leaves (`dps_step`,
    `pigdm_step`). With `moves`, of ("x0", "x0", "x0"): x_0, how far the state moved before x_0 was
    taken, and the correction, x' = step(x + move, x_0) + correction (`stsl`).

    Raises ValueError for a tableau with several registers or outputs, or, with `moves`, a history: there
    the state that a row leaves is not all that the next one starts from.
    """
    if not isinstance(tableau, Tableau):
        raise TypeError(f"corrected takes a Tableau, got {type(tableau).__name__}")
    if tableau.registers != 1 or tableau.outputs != 1 or (moves and tableau.history != 1):
        raise ValueError(
            f"corrected takes a tableau of one register and one output{' and no history' * moves}, "
            f"got {tableau.registers} registers, {tableau.outputs} outputs and {tableau.history} "
            "integrands"
        )
    xp = np if is_concrete(tableau) else jnp
    A, B, w = (xp.asarray(a) for a in (tableau.A, tableau.B, tableau.w))
    newest = xp.zeros_like(B[:, :, :1]) + 1.0
    rest = xp.zeros_like(B[:, :, 1:])
    column = xp.concatenate([newest, rest], 2)
    columns = [B]
    x0 = PREDICTIONS.index("x0")
    if moves:
        trailing = (1,) * (B.ndim - 4)
        inner = B * w[:, :, x0].reshape(len(w), 1, 1, 1, *trailing)
        columns.append(A[:, :, :, None] + inner)
    columns.append(column)
    extra = len(columns) - 1
    u = xp.concatenate([tableau.u, xp.ones_like(w[:, :1]).repeat(extra, 1)], 1)
    w = xp.concatenate([w, xp.zeros_like(w[:, :1]).repeat(extra, 1)], 1)
    return dataclasses.replace(
        tableau, B=xp.concatenate(columns, 3), u=u, w=w, outputs=1 + extra,
        blind=tableau.blind + ((),) * extra,
    )  # fmt: skip
