"""The variational bound of a diffusion model, over the steps of a grid and in continuous time.

With z_i = alpha_i x + sigma_i eps_i at the nodes i = 0 (noise) .. n (data), SNR = alpha^2 / sigma^2,
lambda = log(SNR) / 2 and P the variance of the start,

    -log p(x) <= prior + diffusion + reconstruction
    prior            KL(N(alpha_0 x, sigma_0^2 I) || N(0, P I))
    diffusion        sum_i KL(q(z_{i+1} | z_i, x) || p(z_{i+1} | z_i))
                     = sum_i (SNR_{i+1} - SNR_i) / 2 |x - x0_hat(z_i)|^2        variance "small"
    reconstruction   -E log p(x | z_n), p(x | z_n) the decoder

(Ho et al., "Denoising Diffusion Probabilistic Models", 2020; Kingma et al., "Variational Diffusion
Models", 2021, equations 11 to 14 and 17). With infinitely many steps

    diffusion = int |eps - eps_hat|^2 dlambda,

whatever the schedule: an expectation over a random level, with whatever law of it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from jaxdiff.arrays import as_arrays, is_concrete, jit_trees
from jaxdiff.denoisers import Denoiser, check_single
from jaxdiff.grids import Grid
from jaxdiff.losses import TIME_LAWS, TimeLaw, score_matching
from jaxdiff.names import unknown
from jaxdiff.noise import normal, per_sample
from jaxdiff.ode.dequantisation import bin_width, discretised_normal, from_levels
from jaxdiff.ode.likelihood import check_continuous, prior_variance
from jaxdiff.ode.solve import check_forward, check_inside, check_process
from jaxdiff.ode.traces import flatten
from jaxdiff.processes import Process
from jaxdiff.solvers.clocks import check_choice, check_order

DECODERS = ("normal", "discretised_normal", "categorical")
VARIANCES = ("small", "large")


class Bound(NamedTuple):
    """A lower bound on log p(x) in nats, and its parts (log_prob is minus their sum), all [batch].

    log_prob: estimated without bias; a bound in expectation.
    prior, diffusion, reconstruction: as in `jaxdiff.ode.bound`.
    standard_error: of log_prob over `samples` draws, None for one; with stratified times too large.
    nfe: calls of the denoiser.
    """

    log_prob: Float[Array, " batch"]
    prior: Float[Array, " batch"]
    diffusion: Float[Array, " batch"]
    reconstruction: Float[Array, " batch"]
    standard_error: Float[Array, " batch"] | None
    nfe: int


@dataclasses.dataclass(frozen=True)
class _Decoder:
    kind: str
    levels: int | None
    scaling: str

    def data(self, x):
        """x on the scale of the process."""
        return x if self.levels is None else from_levels(x, self.levels, self.scaling)

    def loss(self, denoiser, x, y, z, level, std, cond):
        """-log p(x | z), [batch]; y is x on the scale of the process."""
        t, alpha, sigma = level
        if self.kind == "categorical":
            centres = from_levels(jnp.arange(self.levels), self.levels, self.scaling)
            gap = (z[..., None] / alpha - centres.astype(z.dtype)) * (alpha / sigma)
            log_p = jax.nn.log_softmax(-0.5 * gap**2)
            log_p = jnp.take_along_axis(log_p, x[..., None], -1)
            return -jnp.sum(log_p.reshape(len(x), -1), 1)
        mean = denoiser.predict("x0", z, t, alpha, sigma, cond)
        std = sigma / alpha if std is None else std
        if self.kind == "discretised_normal":
            mean = mean.astype(z.dtype)
            return -discretised_normal(x, mean, std, self.levels, self.scaling)
        gap = _squares(jax.tree.map(lambda a, m: a - m.astype(a.dtype), y, mean))
        size = flatten(y)[0].shape[1]
        return 0.5 * (gap / std**2 + size * jnp.log(2.0 * jnp.pi * std**2))


def discrete_bound(
    denoiser: Denoiser, grid: Grid, x: Any, key: jax.Array, *, variance: str = "small",
    decoder: str = "normal", decoder_std: ArrayLike | None = None, levels: int | None = None,
    scaling: str = "centres", data_std: float = 1.0, samples: int = 1, cond: Any = None,
    data_range: tuple[float, float] | None = None,
) -> Bound:  # fmt: skip
    """The bound of ancestral sampling on this grid: the sampler that `jaxdiff.solvers.ddpm` is.

    Every step is evaluated, so one draw costs as many calls as the sampler (one more to decode).

    Arguments:
      grid: from noise to data. Where its last node has sigma = 0, that step is the decoder's, as in
        Ho et al. (2020), and the decoder reads the node before.
      x: what the decoder gives the probability of: with decoder "normal" continuous data, an array
        or a pytree of leaves [batch, ...]; else integer levels, an array [batch, ...]. Half
        precision is promoted to float32.
      key: one key, or one per sample.
      variance: of a reverse step: "small", that of q(z' | z, x), or "large", that of q(z | z') (Ho et
        al.'s beta~ and beta; "fixed_small" and "fixed_large" of `ddpm`).
      decoder: "normal": x ~ N(x0_hat(z_n), decoder_std^2), a density; "discretised_normal": the same,
        rounded to `levels` (Ho et al. 2020, equation 13); "categorical": each number's level with
        probability proportional to N(z_n / alpha; level, sigma^2 / alpha^2) (Kingma et al. 2021),
        which makes no call.
      decoder_std: by default sigma / alpha at the decoder's node.
      levels, scaling: of integer data, as in `jaxdiff.ode.from_levels`.
      data_std: s in the variance of the start, sigma_0^2 + s^2 alpha_0^2.
      samples: draws of all the noise, averaged.
      data_range: of continuous data, as in `jaxdiff.ode.log_likelihood`.

    Raises ValueError or TypeError for a grid from data to noise, a network that predicts nothing
    where the grid starts (eps, score at alpha = 0), integers or levels where they do not fit, x
    outside `data_range`, a decoder_std that is not positive.
    """
    check_single(denoiser, "the bound")
    check_choice("variance", variance, VARIANCES)
    check_order(samples, 10**6, "samples")
    if not isinstance(grid, Grid):
        raise TypeError(f"expected a grid of jaxdiff.grids, got {type(grid).__name__}")
    if grid.backward:
        raise ValueError("the bound takes a grid from noise to data, got a reversed one")
    last = grid.steps - 1 if grid.ends[1] else grid.steps
    if grid.ends[0] and denoiser.prediction in ("eps", "score"):
        raise ValueError(
            f"the grid starts at alpha = 0, where a {denoiser.prediction!r} network has no bound: use "
            "v, x0 or flow, or a smaller t_max"
        )
    decode = _make_decoder(decoder, decoder_std, levels, scaling, x, data_range)
    levels_of = jax.tree.map(lambda a: a[: last + 1], (grid.t, grid.alpha, grid.sigma))
    parts = _discrete(
        *as_arrays((denoiser, levels_of, x, key, cond, data_std, decoder_std)), decode, variance,
        samples,
    )  # fmt: skip
    return _bound(*parts, samples * (last + (decoder != "categorical")))


@jit_trees
def _discrete(denoiser, levels, x, key, cond, data_std, decoder_std, decode, variance, samples):
    y, wide = _widened(decode.data(x))
    levels = jax.tree.map(lambda a: jnp.asarray(a, wide), levels)
    snr = (levels[1] / levels[2]) ** 2
    start = levels[2][0] ** 2 + (data_std * levels[1][0]) ** 2
    prior = _prior_loss(y, levels[1][0], levels[2][0], start)
    size = flatten(y)[0].shape[1]
    keys = per_sample(key, len(jax.tree.leaves(y)[0]))

    def draw(number):
        keys_ = jax.vmap(jax.random.fold_in, (0, None))(keys, number)

        def noisy(i):
            level = tuple(a[i] for a in levels)
            eps = normal(keys_, y, draw=i)
            return level, jax.tree.map(lambda a, e: level[1] * a + level[2] * e, y, eps)

        def step(i):
            level, z = noisy(i)
            x0 = denoiser.predict("x0", z, *level, cond)
            gap = _squares(jax.tree.map(lambda a, b: a - b.astype(a.dtype), y, x0))
            loss = 0.5 * (snr[i + 1] - snr[i]) * gap
            if variance == "small":
                return loss
            ratio = (levels[2][i] / levels[2][i + 1]) ** 2
            return loss / ratio + 0.5 * size * (jnp.log(ratio) + 1.0 / ratio - 1.0)

        steps = len(snr) - 1
        diffusion = jnp.sum(jax.lax.map(step, jnp.arange(steps)), 0)
        level, z = noisy(steps)
        return diffusion, decode.loss(denoiser, x, y, z, level, decoder_std, cond)

    return prior, *jax.lax.map(draw, jnp.arange(samples))


def continuous_bound(
    denoiser: Denoiser, process: Process, x: Any, key: jax.Array, *, samples: int = 64,
    law: str | TimeLaw | None = None, stratified: bool = True, t_min: float | None = None,
    t_max: float | None = None, decoder: str = "normal", decoder_std: ArrayLike | None = None,
    levels: int | None = None, scaling: str = "centres", data_std: float | None = None,
    cond: Any = None, data_range: tuple[float, float] | None = None,
) -> Bound:  # fmt: skip
    """The bound with infinitely many steps: what sampling the reverse SDE without error has.

        diffusion = E_u [ |d lambda / du| |eps - eps_hat|^2 ],    t = law(u), u uniform on (0, 1)

    unbiased for every law; the nearer |d lambda / du| is to 1 / |eps - eps_hat|, the less it varies.
    For the exact denoiser of the data the bound is log p(x) itself, but for prior and decoder.

    Arguments:
      samples: times (and noises) drawn for each sample of x, one after the other: a call each, and
        one more for the decoder unless it is "categorical".
      law: quantile of the times: a name in `jaxdiff.losses.TIME_LAWS`, a function (u, process) -> t
        such as `importance_law`; None is uniform in lambda.
      stratified: each sample's times are u, u + 1/samples, ... (mod 1) with one random u, as in
        Kingma et al. (2021); else independent.
      t_min, t_max: the span, by default the process's; t_min < t_max, lambda finite at both.
      data_std: as `prior` of `jaxdiff.ode.log_likelihood`, where it is a number or None.
    Others, and errors, as `discrete_bound`; ValueError for an unknown law, an infinite lambda, a span
    that is reversed or leaves the process's.
    """
    check_single(denoiser, "the bound")
    check_order(samples, 10**6, "samples")
    process = _on_span(process, t_min, t_max)
    if law is not None and not callable(law):
        if law not in TIME_LAWS:
            raise ValueError(unknown("unknown time law", law, TIME_LAWS))
        law = TIME_LAWS[law]
    law = uniform_half_log_snr if law is None else law
    decode = _make_decoder(decoder, decoder_std, levels, scaling, x, data_range)
    variance = prior_variance(process, process.t_max, data_std)
    parts = _continuous(
        *as_arrays((denoiser, process, x, key, cond, law, variance, decoder_std)), decode, samples,
        bool(stratified),
    )  # fmt: skip
    return _bound(*parts, samples * (1 + (decoder != "categorical")))


@jit_trees
def _continuous(
    denoiser, process, x, key, cond, law, variance, decoder_std, decode, samples, stratified
):
    y, wide = _widened(decode.data(x))

    def level_at(t):
        return tuple(jnp.asarray(a, wide) for a in (t, process.alpha(t), process.sigma(t)))

    noise, data = level_at(process.t_max), level_at(process.t_min)
    prior = _prior_loss(y, *noise[1:], variance)
    size = flatten(y)[0].shape[1]
    keys = per_sample(key, len(jax.tree.leaves(y)[0]))
    fold = jax.vmap(jax.random.fold_in, (0, None))
    first = jax.vmap(lambda k: jax.random.uniform(k, (), wide))(fold(keys, 2 * samples))

    def draw(number):
        fresh = jax.vmap(lambda k: jax.random.uniform(k, (), wide))(fold(keys, number + samples))
        u = (first + number / samples) % 1.0 if stratified else fresh
        edge = 0.5 * jnp.finfo(wide).eps
        loss = _level_loss(
            denoiser, process, y, normal(keys, y, draw=number), cond, law,
            jnp.clip(u, edge, 1.0 - edge),
        )  # fmt: skip
        eps = normal(keys, y, draw=number + 3 * samples)
        z = jax.tree.map(lambda a, e: data[1] * a + data[2] * e, y, eps)
        return size * loss, decode.loss(denoiser, x, y, z, data, decoder_std, cond)

    return prior, *jax.lax.map(draw, jnp.arange(samples))


def _level_loss(denoiser, process, y, eps, cond, law, u):
    """|d lambda / du| times the mean over a sample of (eps - eps_hat)^2 at t = law(u), [batch]."""

    def lam(u):
        t = jnp.clip(law(u, process), process.t_min, process.t_max)
        return process.half_log_snr(t), t

    (_, t), (slope, _) = jax.jvp(lam, (u,), (jnp.ones_like(u),))
    return jnp.abs(slope) * score_matching(denoiser, process, y, t, eps, cond)


def uniform_half_log_snr(u: Array, process: Process) -> Array:
    """The time law uniform in lambda, from t_min at u = 0 to t_max at u = 1; both must be finite."""
    low, high = (process.half_log_snr(t) for t in (process.t_max, process.t_min))
    return process.time(high + (low - high) * u)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ImportanceLaw:
    """See `importance_law`. `lam`: edges of the bins, falling; `cumulative`: from 0 to 1, [bins+1]."""

    lam: Any
    cumulative: Any

    def __call__(self, u: Array, process: Process) -> Array:
        return process.time(jnp.interp(u, self.cumulative, self.lam))


def importance_law(
    denoiser: Denoiser, process: Process, x: Any, key: jax.Array, *, bins: int = 32,
    samples: int = 16, t_min: float | None = None, t_max: float | None = None, cond: Any = None,
    data_range: tuple[float, float] | None = None,
) -> ImportanceLaw:  # fmt: skip
    """The time law for `continuous_bound` whose density in lambda is that of the error's size.

    The density of least variance is proportional to sqrt(E |eps - eps_hat|^4); it is estimated in
    `bins` of equal length in lambda from a pilot of `samples` draws of the whole batch x in each
    (Nichol & Dhariwal, "Improved DDPM", 2021, section 3.3, who keep averages while training). A tenth
    is spread evenly, so that no bin is missed. Use other data, or another key, than for the bound.
    """
    check_single(denoiser, "the bound")
    check_order(bins, 10**4, "bins", 2)
    check_order(samples, 10**6, "samples")
    check_continuous(x, data_range)
    process = _on_span(process, t_min, t_max)
    sizes = _pilot(*as_arrays((denoiser, process, x, key, cond)), bins, samples)
    share = np.sqrt(np.asarray(sizes, np.float64))
    share = 0.9 * share / share.sum() + 0.1 / bins
    high, low = (float(process.half_log_snr(t)) for t in (process.t_min, process.t_max))
    cumulative = np.concatenate([[0.0], np.cumsum(share)])
    return ImportanceLaw(
        *as_arrays((np.linspace(high, low, bins + 1), cumulative / cumulative[-1]))
    )


@jit_trees
def _pilot(denoiser, process, x, key, cond, bins, samples):
    x, _ = _widened(x)
    batch = len(jax.tree.leaves(x)[0])
    keys = per_sample(key, batch)

    def one(number):
        place = jax.vmap(jax.random.uniform)(jax.vmap(jax.random.fold_in, (0, None))(keys, number))
        u = jnp.clip((number // samples + place) / bins, 1e-6, 1.0 - 1e-6)
        eps = normal(keys, x, draw=bins * samples + number)
        loss = _level_loss(denoiser, process, x, eps, cond, uniform_half_log_snr, u)
        return jnp.mean(loss**2)

    return jnp.mean(jax.lax.map(one, jnp.arange(bins * samples)).reshape(bins, samples), 1)


# --- parts ----------------------------------------------------------------------------------------


def _widened(tree: Any) -> tuple[Any, Any]:
    """The tree with leaves of one dtype, at least float32, and that dtype."""
    wide = jnp.promote_types(jnp.result_type(float, *jax.tree.leaves(tree)), jnp.float32)
    return jax.tree.map(lambda a: a.astype(wide), tree), wide


def _squares(tree: Any) -> Any:
    return jnp.sum(flatten(tree)[0] ** 2, 1)


def _prior_loss(y, alpha, sigma, variance):
    size = flatten(y)[0].shape[1]
    share = sigma**2 / variance
    return 0.5 * (alpha**2 * _squares(y) / variance + size * (share - 1.0 - jnp.log(share)))


def _bound(prior, diffusion, reconstruction, nfe) -> Bound:
    each = diffusion + reconstruction
    count = len(each)
    error = None if count == 1 else jnp.std(each, 0, ddof=1) / math.sqrt(count)
    diffusion, reconstruction = jnp.mean(diffusion, 0), jnp.mean(reconstruction, 0)
    total = prior + diffusion + reconstruction
    return Bound(-total, prior, diffusion, reconstruction, error, nfe)


def _on_span(process, t_min, t_max):
    check_process(process)
    t_min = process.t_min if t_min is None else t_min
    t_max = process.t_max if t_max is None else t_max
    check_inside(process, (t_min, t_max))
    check_forward(t_min, t_max)
    process = dataclasses.replace(process, t_min=float(t_min), t_max=float(t_max))
    for t, fix in ((process.t_min, "larger t_min"), (process.t_max, "smaller t_max")):
        if not np.isfinite(process.half_log_snr(t)):
            raise ValueError(f"lambda is infinite at t = {t:g}: pass a {fix}")
    return process


def _make_decoder(
    kind: str, std: Any, levels: Any, scaling: str, x: Any, data_range: Any
) -> _Decoder:
    check_choice("decoder", kind, DECODERS)
    if std is not None and is_concrete(std) and not np.all(np.asarray(std) > 0):
        raise ValueError(f"decoder_std must be positive, got {std!r}")
    if kind == "normal":
        if levels is not None:
            raise ValueError(
                "decoder 'normal' is for continuous data: pass no levels, or decoder= "
                "'discretised_normal' or 'categorical' with the integer levels themselves"
            )
        check_continuous(x, data_range)
    else:
        if data_range is not None:
            raise ValueError(f"data_range is of continuous data, not of decoder {kind!r}'s levels")
        if levels is None:
            raise ValueError(f"decoder {kind!r} needs levels=, and integer x")
        bin_width(levels, scaling)
        from_levels(x, levels, scaling)  # raises unless x are levels
    return _Decoder(kind, levels, scaling)
