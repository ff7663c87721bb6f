"""DiffIER: the state is moved, before every evaluation, to where the guided prediction errs less.

After the idea of Chen, Ding & Xue, "DiffIER: Optimizing Diffusion Models with Iterative Error
Reduction" (2025), known to this library from its abstract; the error measure and the iteration are
this library's own and may differ from theirs. In training a network sees x_t = alpha x0 + sigma eps
and predicts that eps; a guided sampler brings it states where its prediction is another than the
noise that the state was made with, the more so the stronger the guidance.

The x0 that the last evaluation predicted, m, and the state x of the row make a pair of a forward
sample: x = alpha m + sigma e, e = (x - alpha m) / sigma (for DDIM, e is the last predicted noise).
With eps(x) the guided prediction, the error, and K steps of gradient descent on it with m and e
held, are

    L(x) = |eps(x) - e|^2,    x <- x - min(step sigma^2, |g|^2 / |J g|^2) g,    g = J^T (eps(x) - e)

with J the Jacobian of eps: g is half L's gradient, and the second length the one that would be best
if eps were linear, without which strong guidance makes the iteration diverge. As eps depends on
x / sigma, `step` has no unit. The sum of L over a trajectory, the accumulated
error, grows with the guidance scale as the distance to the conditional distribution does.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from jaxdiff.arrays import as_arrays, is_concrete, to_batch
from jaxdiff.denoisers import Denoiser, check_single
from jaxdiff.integrator import Carry, Control, RowInfo
from jaxdiff.predictions import convert
from jaxdiff.solvers.clocks import check_order


class DiffIERState(NamedTuple):
    """What the control carries; `sample(..., save="state").aux` is the last.

    `x0`: the last evaluation's; `eps`: the noise e of the row; both with the state's structure.
    `error`: the accumulated error, the sum over the rows so far of L where the row was evaluated,
    [batch]. `ready`: whether there has been an evaluation, in this run or one that it continues.
    """

    x0: Any
    eps: Any
    error: Float[Array, " batch"]
    ready: Bool[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DiffIER(Control):
    """The control of `diff_ier`, which see."""

    denoiser: Denoiser
    cond: Any
    step: Any
    iterations: int = dataclasses.field(metadata={"static": True})

    def init(self, x: Any) -> DiffIERState:
        """No evaluation yet, no error."""
        zeros = jax.tree.map(jnp.zeros_like, x)
        return DiffIERState(zeros, zeros, _squares(zeros), jnp.zeros((), bool))

    def before(
        self, aux: DiffIERState, row: RowInfo, x: Any, key: Any
    ) -> tuple[Any, DiffIERState]:
        """Move the state; before the first evaluation it has no pair, and stays."""
        _, t, alpha, sigma, _ = row
        eps = convert(aux.x0, x, "x0", "eps", alpha, sigma)
        aux = aux._replace(eps=eps)
        if not self.iterations:
            return x, aux

        def gap(x):
            found = self.denoiser.predict("eps", x, t, alpha, sigma, self.cond)
            return jax.tree.map(lambda a, b: a.astype(b.dtype) - b, found, eps)

        def iterate(x, _):
            r, pull = jax.vjp(gap, x)
            (slope,) = pull(r)
            along = jax.jvp(gap, (x,), (slope,))[1]
            # Beyond this the linear model of the gap would grow again.
            most = _squares(slope) / jnp.maximum(_squares(along), jnp.finfo(sigma.dtype).tiny)
            length = jnp.where(_paired(aux, row), jnp.minimum(self.step * sigma**2, most), 0.0)

            def leaf(a, g):
                length_ = to_batch(length, a).astype(a.dtype)
                # Where nothing moves, not even an infinite gradient does it.
                return jnp.where(length_ > 0, a - length_ * g, a)

            return jax.tree.map(leaf, x, slope), None

        return jax.lax.scan(iterate, x, None, length=self.iterations)[0], aux

    def after(
        self, aux: DiffIERState, row: RowInfo, x: Any, out: Any, z: Any, carry: Carry, key: Any
    ) -> tuple[Carry, DiffIERState]:
        """Keep what the row's evaluation says; the error costs no evaluation."""
        x0, eps = (
            convert(out, x, self.denoiser.prediction, name, row.alpha, row.sigma)
            for name in ("x0", "eps")
        )
        more = _squares(jax.tree.map(jnp.subtract, eps, aux.eps))
        total = aux.error + jnp.where(_paired(aux, row), more, 0.0).astype(aux.error.dtype)
        real = row.active != 0
        x0 = jax.tree.map(lambda a, b: jnp.where(real, a.astype(b.dtype), b), x0, aux.x0)
        return carry, aux._replace(x0=x0, error=total, ready=aux.ready | real)


def _paired(aux: DiffIERState, row: RowInfo) -> Any:
    return aux.ready & (row.active != 0)


def _squares(tree: Any) -> Any:
    """|x|^2 of every sample, [batch]."""
    return sum(jnp.sum(jnp.square(a).reshape(a.shape[0], -1), 1) for a in jax.tree.leaves(tree))


def diff_ier(
    denoiser: Denoiser, iterations: int = 5, step: ArrayLike = 0.1, cond: Any = None
) -> DiffIER:
    """The control that makes any tableau's sampler DiffIER:

        guided = classifier_free(denoiser, scale, null_cond)
        sample(guided, tableau, x_T, cond=cond, control=diff_ier(guided, cond=cond))

    Arguments:
      denoiser: what is sampled; its prediction is also that of the error.
      iterations: K, of the gradient descent before each row but the first, each of an evaluation,
        its gradient and one product with its Jacobian. 0 is the sampler itself, and still records
        the error.
      step: of an iteration, without unit; a leaf, so that a new one compiles nothing.
      cond: that which `sample` gets.

    Raises TypeError or ValueError for a denoiser of several predictions, iterations that are not a
    number of them, or a step that is negative or not finite.
    """
    check_single(denoiser, "diff_ier")
    check_order(iterations, 10**6, "iterations", 0)
    if is_concrete(step) and not (jnp.ndim(step) == 0 and 0 <= step < jnp.inf):
        raise ValueError(f"step must be a finite number of at least 0, got {step!r}")
    return DiffIER(*as_arrays((denoiser, cond, step)), int(iterations))
