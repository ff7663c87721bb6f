"""DDPM whose network also predicts the variance of each step: sampling, and the loss for it.

Nichol & Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (2021): beside its prediction
the network returns v, of the state's shape, and with h the half-log-SNR length of a step from sigma
to sigma' the step draws noise of variance

    log var = (1 + v) / 2 log beta + (1 - v) / 2 log beta~,
    beta = sigma^2 (1 - exp(-2 h)),    beta~ = sigma'^2 (1 - exp(-2 h)),

equation 15 with v scaled to [-1, 1] as in the official code. The noise's size is the network's, so
this is no tableau of its own: it is `ddpm`'s, and a control that makes up the noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from jaxdiff.arrays import to_batch
from jaxdiff.denoisers import Denoiser
from jaxdiff.grids import Grid
from jaxdiff.integrator import Carry, Control, RowInfo
from jaxdiff.losses import Weighting, score_matching
from jaxdiff.models.adapters import from_linen
from jaxdiff.predictions import check_prediction, convert
from jaxdiff.processes.base import Process
from jaxdiff.processes.discrete import is_discrete
from jaxdiff.solvers.clocks import check_choice
from jaxdiff.solvers.combine import with_outputs
from jaxdiff.solvers.first_order import ddpm, posterior_share
from jaxdiff.solvers.tableau import Tableau

KINDS = ("range", "log_variance", "variance")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LearnedVariance(Control):
    """Turns the noise of `ddpm(grid)` into that of the network's variance; see `learned_variance`.

    Attributes:
      log_small, log_large: log beta~ and log beta of each row, [rows].
      noisy: 1 for rows that draw noise, [rows].
      kind: static; what the network's second output is.
    """

    log_small: Any
    log_large: Any
    noisy: Any
    kind: str = dataclasses.field(default="range", metadata={"static": True})

    def after(
        self, aux: Any, row: RowInfo, x: Any, out: Any, z: Any, carry: Carry, key: Any
    ) -> tuple[Carry, Any]:
        """Add what the learned noise has over the tableau's."""
        if z is None:
            return carry, aux
        if not isinstance(out, tuple) or len(out) != 2:
            raise ValueError(
                "a learned variance needs a denoiser of two outputs, (prediction, v): see "
                "jaxdiff.learned_variance.with_variance"
            )

        def added(state, noise, v):
            small, large, noisy = (
                jnp.asarray(a)[row.index].astype(state.dtype)
                for a in (self.log_small, self.log_large, self.noisy)
            )
            v = v.astype(state.dtype)
            if self.kind == "range":
                std = jnp.exp(0.5 * small + 0.25 * (1.0 + v) * (large - small))
            else:
                std = jnp.exp(0.5 * v) if self.kind == "log_variance" else jnp.sqrt(v)
            made = noisy * row.active.astype(state.dtype)
            return state + made * (std - jnp.exp(0.5 * small)) * noise

        first = jax.tree.map(added, carry.registers[0], z, out[1])
        return carry._replace(registers=(first, *carry.registers[1:])), aux


def learned_variance(grid: Grid, kind: str = "range") -> tuple[Tableau, LearnedVariance]:
    """(tableau, control) of DDPM with a learned variance, for a denoiser of two outputs:

        tableau, control = learned_variance(grid)
        sample(with_variance(network, params), tableau, x_T, key, control=control)

    The steps are those of `jaxdiff.solvers.ddpm` but for the noise; any grid will do, as one of
    fewer steps than the network was trained with, whose beta and beta~ are the longer steps'. No
    noise in a step to sigma = 0. One evaluation a step; every grid end is supported.

    Arguments:
      kind: what the second output v is: "range", a place between log beta~ (-1) and log beta (1);
        "log_variance" (the official code's "learned"); or "variance" (diffusers' "learned").
    """
    check_choice("kind", kind, KINDS)
    table, xp = ddpm(grid), grid.xp
    noisy = np.ones(grid.steps)
    noisy[-1] = not grid.ends[1]
    shares = xp.stack([posterior_share(grid, i) for i in range(grid.steps)])
    # Where there is no noise any finite logarithm will do.
    before, after = grid.sigma[:-1] ** 2, xp.where(noisy == 1, grid.sigma[1:] ** 2, 1.0)
    small, large = (xp.log(variance * shares) for variance in (after, before))
    return with_outputs(table, 2), LearnedVariance(small, large, noisy, kind)


def with_variance(
    module: Any, params: Mapping[str, Any], prediction: str = "eps", time: Callable | None = None,
    train: bool = False, rngs: Mapping[str, Any] | None = None,
) -> Denoiser:  # fmt: skip
    """Denoiser of a Linen module's method `with_variance`: (x, t[, cond]) -> (prediction, v).

    As the image networks of `jaxdiff.models` with learn_sigma=True. The arguments are those of
    `jaxdiff.models.from_linen`. For any other function that returns the pair:
    `Denoiser(fn, (prediction, prediction), params, time)`. Raises as `from_linen` does, and
    ValueError for a network without a variance.
    """
    check_prediction(prediction)
    if not getattr(module, "learn_sigma", hasattr(module, "with_variance")):
        raise ValueError(f"{type(module).__name__} predicts no variance: it needs learn_sigma=True")
    found = from_linen(module, params, prediction, time, train, rngs)
    fn = dataclasses.replace(found.fn, method="with_variance")
    # The second output is named like the first, for want of a name: it is never converted.
    return dataclasses.replace(found, fn=fn, prediction=(prediction, prediction))


# --- training -------------------------------------------------------------------------------------

_PER_STEPS = 1000.0  # of the bound's steps, the weight of one


def hybrid_loss(
    denoiser: Denoiser, process: Process, x0: Any, t: ArrayLike, eps: Any, cond: Any = None,
    weighting: str | Weighting = "simple", **options: Any,
) -> Float[Array, " batch"]:  # fmt: skip
    """`jaxdiff.losses.score_matching` of the prediction, and the variational bound for v alone:

        loss_i = w(t_i) mean |eps_hat - eps_i|^2 + steps / 1000 L_i,
        L_i = KL(q(x_s | x_t, x0) || p(x_s | x_t)) / log 2,    s = t_i - 1;
              -log p(x0 | x_t) / log 2                         where t_i < 1,

    L_hybrid of Nichol & Dhariwal (2021), section 3.1 and equation 16, as in its code, guided
    diffusion's and DiT's: L in bits, the mean over the elements of a sample; p with v (kind "range")
    for its variance and, for its mean, a prediction that takes no gradient from L; p(x0 | x_t) the
    probability of one of 256 levels from -1 to 1, which is at least 1e-12 an element (they
    approximate the normal distribution function there, this does not). beta~ of the last step, which
    is 0, is taken as that of the step before.

    Arguments:
      denoiser: of two outputs, (prediction, v): see `with_variance`.
      process: `jaxdiff.processes.ddpm`, its steps being the bound's.
      the others: as in `score_matching`; for the sum over t to be the bound, the time law is
        "integers", or "uniform" between them.

    Raises ValueError for another process or denoiser, and as `score_matching`.
    """
    if not is_discrete(process):
        raise ValueError(f"the bound is for a ddpm process, got {type(process).__name__}")
    if len(denoiser.predictions) != 2:
        raise ValueError(
            "a learned variance needs a denoiser of two outputs, (prediction, v), this one predicts "
            f"{denoiser.prediction!r}: see jaxdiff.learned_variance.with_variance"
        )
    t = jnp.asarray(t) * 1.0
    alpha, sigma = process.alpha(t), process.sigma(t)
    x = process.perturb(x0, eps, t)
    prediction, v = denoiser(x, t, alpha, sigma, cond)
    name = denoiser.predictions[0]
    given = Denoiser(_given, name, prediction)
    loss = score_matching(given, process, x0, t, eps, None, weighting, **options)
    x0_hat = convert(jax.lax.stop_gradient(prediction), x, name, "x0", alpha, sigma)
    terms = _bound(process, t)
    bits = jax.tree.leaves(jax.tree.map(lambda *leaves: _bits(terms, *leaves), x0, x0_hat, v))
    size = sum(leaf.size for leaf in jax.tree.leaves(x0)) // loss.shape[0]
    return loss + (process.t_max + 1.0) / _PER_STEPS * sum(bits) / size


def _given(params: Any, x: Any, t: Any, cond: Any = None) -> Any:
    return params


def _bound(process: Process, t: Array) -> tuple[Array, Array, Array, Array]:
    """(is the last step, the factor of x0 in q's mean, log beta~, log beta), like t."""
    here = jnp.maximum(t, 1.0)
    before = here - 1.0
    share = -jnp.expm1(2.0 * (process.half_log_snr(here) - process.half_log_snr(before)))
    small = jnp.log(process.sigma(before) ** 2 * share)
    last = t < 1.0
    large = jnp.log(process.sigma(t) ** 2 * jnp.where(last, 1.0, share))
    return last, process.alpha(before) * share, small, large


def _bits(terms: tuple[Array, ...], x0: Array, x0_hat: Array, v: Array) -> Array:
    """The bound's term, the sum over all elements, [batch]."""
    wide = jnp.promote_types(x0.dtype, jnp.float32)
    x0, x0_hat, v = (a.astype(wide) for a in (x0, x0_hat, v))
    last, factor, small, large = (to_batch(a, x0) for a in terms)
    log_variance = small + 0.5 * (1.0 + v) * (large - small)
    gap = small - log_variance
    kl = 0.5 * (jnp.exp(gap) - 1.0 - gap + (factor * (x0_hat - x0)) ** 2 * jnp.exp(-log_variance))
    nats = jnp.where(last, -_log_level(x0, x0_hat, jnp.exp(-0.5 * log_variance)), kl)
    return jnp.sum(nats, axis=tuple(range(1, x0.ndim))) / np.log(2.0)


def _log_level(x: Array, mean: Array, inverse_std: Array) -> Array:
    """log of the normal's probability of x's level, 2 / 255 wide; the ends' reach to infinity."""
    cdf = jax.scipy.stats.norm.cdf
    below, above = (cdf(inverse_std * (x - mean + edge)) for edge in (-1.0 / 255, 1.0 / 255))
    found = jnp.where(x > 0.999, 1.0 - below, jnp.where(x < -0.999, above, above - below))
    return jnp.log(jnp.maximum(found, 1e-12))
