"""PiGDM: x_0 given x_t as a Gaussian of one variance.

Song, Vahdat, Mardani & Kautz, "Pseudoinverse-Guided Diffusion Models for Inverse Problems" (2023). With
p(x_0 | x_t) taken for N(x_0hat, r^2 I),

    p(y | x_t) = N(y; A x_0hat, r^2 A A^T + noise_std^2 I),
    r^2 = sigma^2 s^2 / (alpha^2 s^2 + sigma^2),

r^2 being the variance for data N(m, s^2 I). (The paper has r_t^2 = sigma^2 / (sigma^2 + 1) for s = 1 and
alpha = 1; this is it for every alpha, as x_t / alpha and sigma / alpha there.)
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from jaxdiff.arrays import is_concrete
from jaxdiff.denoisers import Denoiser
from jaxdiff.inverse.measurement import Measurement
from jaxdiff.inverse.tweedie import Linearised, add, guide
from jaxdiff.solvers.clocks import check_number


def pigdm(
    denoiser: Denoiser, measurement: Measurement, data_std: ArrayLike = 1.0, scale: ArrayLike = 1.0
) -> Denoiser:
    """x_0 = x_0hat + scale (sigma^2 / alpha) J^T A^T (r^2 A A^T + noise_std^2 I)^{-1} (y - A x_0hat).

    Predicts x0, for any tableau. scale = 1 is the score of the module's p(y | x_t), which is exact for
    data N(m, data_std^2 I). One evaluation, one pullback and one `solve` of the operator a call.

    Arguments:
      data_std: s, positive: the data's standard deviation; 1 in the paper.

    Raises ValueError for numbers out of range.
    """
    _check(data_std)
    check_number("scale", scale)
    return guide(denoiser, measurement, _score, (data_std, scale), "pigdm")


def pigdm_step(
    denoiser: Denoiser, measurement: Measurement, data_std: ArrayLike = 1.0
) -> Denoiser:
    """The step that PiGDM publishes, x' = ddim(x, x_0hat, eta = 1) + alpha g, for `corrected`.

        g = J^T A^T (A A^T + (noise_std / r)^2 I)^{-1} (y - A x_0hat)

    (algorithm 1): the score's gradient, weighted by r^2 against overshooting at large sigma; without
    noise g = J^T (A^+ y - A^+ A x_0hat). Predicts (x_0hat, alpha g); sample it with
    `corrected(ddim(grid, eta=1.0))`. One evaluation and one pullback a call.
    """
    _check(data_std)
    return add(denoiser, measurement, _published, (data_std,), "pigdm_step")


def _check(data_std: Any) -> None:
    check_number("data_std", data_std)
    if is_concrete(data_std) and not np.asarray(data_std) > 0:
        raise ValueError(f"data_std must be positive, got {data_std!r}")


def _variance(at: Linearised, data_std: Any) -> Array:
    """r^2, scalar or [batch]."""
    alpha, sigma = (c.reshape(-1) if c.ndim else c for c in (at.alpha, at.sigma))
    return (sigma * data_std) ** 2 / ((alpha * data_std) ** 2 + sigma**2)


def _solved(measurement, residual, at, data_std):
    variance = _variance(at, data_std)
    ridge = measurement.noise_std.astype(residual.dtype) ** 2 / variance
    return measurement.operator.solve(residual, ridge), variance


def _score(measurement, strengths, residual, at):
    data_std, scale = strengths
    solved, variance = _solved(measurement, residual, at, data_std)
    per_sample = jnp.reshape(variance, (-1,) + (1,) * (solved.ndim - 1))
    return scale * solved / per_sample


def _published(measurement, strengths, residual, at):
    solved, _ = _solved(measurement, residual, at, strengths[0])
    return jnp.reshape(at.alpha, (-1,) + (1,) * (solved.ndim - 1)) * solved
