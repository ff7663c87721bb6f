"""STSL: DPS with the trace of the prior's Hessian, by one more evaluation.

Rout, Chen, Kumar, Caramanis, Shakkottai & Chu, "Beyond First-Order Tweedie: Solving Inverse Problems
using Latent Diffusion" (2024). DPS's surrogate forgets that x_0 is uncertain given x_t. Its
uncertainty has the trace sum Cov[x_0 | x_t] = (sigma^2 / alpha)^2 (tr H + n / sigma^2), H the Hessian
of log p_t: so the state is refined, a few times at every level, by

    x <- x - zeta grad_x |y - A x_0hat| - eta grad_x tr H,
    tr H = E_z[z^T (s(x + d z) - s(x))] / d,   z standard normal, d small,

s the score: towards where x_0 is known better. In place of ever more levels, a few refinements of each.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from jaxdiff.arrays import as_arrays, is_concrete, to_batch
from jaxdiff.denoisers import Denoiser, check_single, level
from jaxdiff.inverse.measurement import Measurement, check_measurement, same_shape
from jaxdiff.inverse.tweedie import check_guidable, linearise, norms
from jaxdiff.noise import is_key_batch, normal
from jaxdiff.solvers.clocks import check_number, check_order


def stsl(
    denoiser: Denoiser, measurement: Measurement, key: Array, zeta: ArrayLike = 1.0,
    eta: ArrayLike = 0.02, refinements: int = 5, probe: ArrayLike = 0.05,
    weighting: str = "constant",
) -> Denoiser:  # fmt: skip
    """STSL's refined state: predicts (x_0hat, how far x moved, the last correction).

    Sample it with `corrected(tableau, moves=True)`: x' = step(x_K, x_0hat(x_K)) + the K-th correction,
    x_K after K - 1 refinements. refinements = 1 with eta = 0 is `dps_step`. (How often the paper
    refines at which level could not be checked against code; every level is refined alike here.)

    Arguments:
      key: of the probes z: one key, or one per sample. zeta, eta: strengths, at least 0. refinements:
      K, at least 1. probe: d / sigma, positive. weighting: "constant" (eta grad tr H, the paper's);
      "covariance" multiplies it by sigma^4 / alpha^2,
        eta grad tr Cov[x_0 | x_t], which stays finite at small sigma.

    K evaluations of twice the batch a call (cost 2 K), and K pullbacks. Raises ValueError for numbers
    out of range or another weighting, and sampling with "covariance" one for a grid from alpha = 0.
    """
    check_single(denoiser, "stsl")
    check_measurement(measurement, "stsl")
    is_key_batch(key)
    for name, value in (("zeta", zeta), ("eta", eta)):
        check_number(name, value)
    check_probe(probe)
    if weighting not in ("constant", "covariance"):
        raise ValueError(f"weighting must be 'constant' or 'covariance', got {weighting!r}")
    check_order(refinements, None, "refinements")
    count = int(refinements)
    params = (denoiser, measurement, key, as_arrays((zeta, eta, probe)))
    # The draws of the probes made so far, so that every evaluation has new ones.
    memory = (denoiser.memory, jnp.zeros((), jnp.int32))
    fn = _STSL(count, weighting == "covariance")
    return Denoiser(fn, ("x0",) * 3, params, level, memory, 2 * count * denoiser.cost)


@dataclasses.dataclass(frozen=True)
class _STSL:
    refinements: int
    weighted: bool

    def __call__(self, params, x, levels, cond=None, memory=None):
        inner, measurement, key, strengths = params
        same_shape(measurement, x, "stsl")
        kept, draw = memory
        start = x
        for k in range(self.refinements):
            z = normal(key, x, draw)
            x0, correction, kept = self._correct(
                inner, measurement, strengths, x, z, levels, cond, kept
            )
            draw = draw + 1
            if k + 1 < self.refinements:
                x = x + correction
        return (x0, x - start, correction), (kept, draw)

    def _correct(self, inner, measurement, strengths, x, z, levels, cond, memory):
        zeta, eta, probe = (jnp.asarray(c, x.dtype) for c in strengths)
        sigma = jnp.asarray(to_batch(jnp.asarray(levels[2]), x), x.dtype)
        step = probe * sigma
        at = _at_both(inner, x, step * z, levels, cond, memory)
        x0, _ = jnp.split(at.x0, 2)
        alpha = at.alpha[: len(x)] if at.alpha.ndim else at.alpha
        residual = measurement.residual(x0)
        error = zeta * measurement.operator.adjoint(residual / norms(residual))
        # d tr H / d x_0hat, at x + d z and with the other sign at x: s = (alpha x_0hat - x) / sigma^2.
        slope = eta * alpha * z / (step * sigma**2)
        if self.weighted:
            slope = slope * sigma**4 / alpha**2
        pulled = at.pull(jnp.concatenate([error + slope, -slope]))
        return x0, sum(jnp.split(pulled, 2)), at.memory

    def check(self, params, batch, cond, alpha):
        if self.weighted:
            check_guidable(alpha, "stsl of weighting 'covariance'")
        params[0].check(batch, cond, alpha)


def _at_both(inner, x, shift, levels, cond, memory):
    """`linearise` at x and x + shift, in one call of twice the batch."""
    double = lambda a: jnp.concatenate([a, a]) if jnp.ndim(a) else a  # noqa: E731
    both = jnp.concatenate([x, x + shift])
    return linearise(
        inner, both, tuple(double(c) for c in levels), jax.tree.map(double, cond), memory
    )


def check_probe(probe: Any) -> None:
    """Raise ValueError unless `probe` is a positive number."""
    check_number("probe", probe)
    if is_concrete(probe) and probe == 0:
        raise ValueError("probe must be positive, got 0")


def hessian_trace(
    denoiser: Denoiser, x: Float[Array, "batch ..."], level: tuple[Any, Any, Any], key: Array,
    probe: ArrayLike = 0.05, cond: Any = None, draw: ArrayLike = 0,
) -> Float[Array, " batch"]:  # fmt: skip
    """One probe's estimate of tr grad^2 log p_t(x), z^T (s(x + d z) - s(x)) / d with d = probe sigma.

    STSL's: an evaluation more, no Jacobian, unbiased up to terms in d (as the mean over z of odd ones is
    0, in d^2). `level` is (t, alpha, sigma); `draw` numbers the probe. Raises as `stsl` does.
    """
    check_single(denoiser, "hessian_trace")
    check_probe(probe)
    z = normal(key, x, draw)
    t, alpha, sigma = level
    step = to_batch(jnp.asarray(probe * jnp.asarray(sigma), x.dtype), x)

    def score(y):
        return denoiser.predict("score", y, t, alpha, sigma, cond)

    return jnp.sum(z * (score(x + step * z) - score(x)) / step, tuple(range(1, x.ndim)))
