"""FlowChef: steering the state by the error of x_0hat, without the network's Jacobian.

Patel, Wen, Metaxas & Yang, "Steering Rectified Flow Models in the Vector Field for Controlled Image
Generation" (2024). Where paths are straight the vector field hardly changes across the step, and the
Jacobian of x_0hat with respect to x_t may be taken for a multiple of the identity:

    x_t <- x_t - scale grad_{x_0hat} L(x_0hat),

a few times, then the sampler's step from there with the network's field as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from jaxdiff.arrays import as_arrays
from jaxdiff.denoisers import Denoiser, check_single, wrap
from jaxdiff.inverse.measurement import Measurement, same_shape
from jaxdiff.predictions import check_prediction, convert
from jaxdiff.solvers.clocks import check_number, check_order


def flowchef(
    denoiser: Denoiser, target: Measurement | Callable[[Array], Array], scale: ArrayLike = 1.0,
    repeats: int = 1, hold: str = "flow", until: ArrayLike = 0.0,
) -> Denoiser:  # fmt: skip
    """FlowChef's steered state as a denoiser of ("x0", "eps"): sample it with `ddim(grid, outputs=2)`.

    With the held prediction h (by default the velocity) fixed, the state x moves by
    -scale grad L(x_0(x, h)), `repeats` times; x_0 and eps are those of the last x with h. For rectified
    flow DDIM's step is Euler's, x' = x_moved + (t' - t) v: the published algorithm. Any other process
    works through its x_0hat; for DDIM hold="eps" is natural.

    Arguments:
      denoiser: any single prediction.
      target: a Measurement, L = |y - A x_0|^2 / 2; or a function x_0 [batch, ...] -> losses [batch], a
        classifier's or that of an edit, and then gradients of it are taken, never of the network.
      scale: the step on x, at least 0. A x_0 = y is reached at once by 1 if A's singular values are 0
        and 1 and h is the velocity of a rectified flow. (The published loss is the mean over the
        measurement's m entries: their scale is m / 2 times this one.)
      repeats: inner steps, which cost no evaluation.
      hold: which prediction stays as the network gave it while x moves: any but x0.
      until: no steering where t <= until (the published code leaves out the last step).

    One evaluation and no Jacobian a call. Raises ValueError for hold="x0", which nothing would move, and
    numbers out of range; TypeError for another target.
    """
    check_single(denoiser, "flowchef")
    check_prediction(hold)
    if hold == "x0":
        raise ValueError("hold='x0' would keep the x_0 that is to be steered: hold another one")
    check_number("scale", scale)
    check_order(repeats, None, "repeats")
    fn = _FlowChef(denoiser.prediction, hold, int(repeats), None)
    strengths = (scale, until)
    if isinstance(target, Measurement):
        return wrap(fn, denoiser, as_arrays((target, *strengths)), ("x0", "eps"))
    if not callable(target):
        raise TypeError(
            f"flowchef takes a Measurement or a function of x_0, got {type(target).__name__}"
        )
    fn = dataclasses.replace(fn, loss=target)
    return wrap(fn, denoiser, as_arrays((None, *strengths)), ("x0", "eps"))


@dataclasses.dataclass(frozen=True)
class _FlowChef:
    prediction: str
    hold: str
    repeats: int
    loss: Callable | None

    def _gradient(self, measurement: Any, x0: Array) -> Float[Array, "batch ..."]:
        if self.loss is None:
            return -measurement.operator.adjoint(measurement.residual(x0))
        return jax.grad(lambda a: jnp.sum(self.loss(a)))(x0)

    def __call__(self, evaluate, strengths, x, levels, cond):
        measurement, scale, until = strengths
        t, alpha, sigma = levels
        if measurement is not None:
            same_shape(measurement, x, "flowchef")
        out = evaluate(x, t, alpha, sigma, cond).astype(x.dtype)
        held = convert(out, x, self.prediction, self.hold, alpha, sigma)
        active = jnp.reshape(t > until, (-1,) + (1,) * (x.ndim - 1))
        for _ in range(self.repeats):
            x0 = convert(held, x, self.hold, "x0", alpha, sigma)
            step = jnp.asarray(scale, x.dtype) * self._gradient(measurement, x0)
            x = x - jnp.where(active, step, 0.0)
        x0, eps = (convert(held, x, self.hold, kind, alpha, sigma) for kind in ("x0", "eps"))
        return x0, eps
