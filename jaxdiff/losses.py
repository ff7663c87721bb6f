"""Training: the denoising score-matching loss, its weightings, and the laws of the training time.

Objectives of diffusion models differ in two things alone: how a squared error is weighted at each
noise level, and how often each level is drawn. A **weighting** here is a function

    (lam, rate) -> log w,      lam = half-log-SNR = log(alpha / sigma),    rate = -d lam / dt,

and log w is the logarithm of the weight on the *noise* error ||eps_hat - eps||^2, whatever the
network predicts. With SNR = exp(2 lam):

    name       on ||eps_hat - eps||^2      on ||x0_hat - x0||^2        paper
    simple     1                           SNR                         Ho et al. 2020
    x0         1 / SNR                     1                           Salimans & Ho 2022
    v          1 + 1 / SNR                 SNR + 1                     Salimans & Ho 2022
    flow       (1 + exp(-lam))^2           (1 + exp(lam))^2            Liu et al. 2022
    edm        1 + 1 / (s^2 SNR)           SNR + 1 / s^2               Karras et al. 2022
    min_snr    min(SNR, gamma) / SNR       min(SNR, gamma)             Hang et al. 2023
    p2         1 / (k + SNR)^gamma         SNR / (k + SNR)^gamma       Choi et al. 2022
    elbo       rate                        rate SNR                    Kingma et al. 2021
    sigmoid    rate sigmoid(b - 2 lam)     rate SNR sigmoid(b - 2 lam) Hoogeboom et al. 2024

A **time law** is a quantile function (u, process) -> t, not decreasing, from t_min at u = 0 to t_max at
u = 1. `WEIGHTINGS` and `TIME_LAWS` map the names to the functions.
"""

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from jaxdiff.arrays import is_concrete, to_batch
from jaxdiff.denoisers import Denoiser
from jaxdiff.names import check_options, unknown
from jaxdiff.noise import is_key_batch, per_sample, sample_keys
from jaxdiff.predictions import target
from jaxdiff.processes.base import Process, check_positive
from jaxdiff.processes.discrete import is_discrete

# --- weightings -----------------------------------------------------------------------------------


def simple(lam: Array, rate: Array) -> Array:
    """w = 1: the mean squared error of the noise (Ho et al., "DDPM", 2020, equation 14)."""
    return jnp.zeros_like(lam)


def x0_error(lam: Array, rate: Array) -> Array:
    """w = 1 / SNR: the mean squared error of x0 (Salimans & Ho 2022, section 4)."""
    return -2.0 * lam


def v_error(lam: Array, rate: Array) -> Array:
    """w = 1 + 1 / SNR: SNR + 1 on the error of x0 (Salimans & Ho 2022, section 4).

    The mean squared error of v = alpha eps - sigma x0 where alpha^2 + sigma^2 = 1. The weight is a
    function of SNR alone, so another process that visits the same SNR has the same objective.
    """
    return jax.nn.softplus(-2.0 * lam)


def flow_error(lam: Array, rate: Array) -> Array:
    """w = (1 + exp(-lam))^2: the mean squared error of the velocity eps - x0, for every process.

    Liu et al., "Flow Straight and Fast" (2022); Lipman et al., "Flow Matching" (2023).
    """
    return 2.0 * jax.nn.softplus(-lam)


def edm(lam: Array, rate: Array, sigma_data: float = 0.5) -> Array:
    """w = 1 + 1 / (sigma_data^2 SNR) (Karras et al., "EDM", 2022, table 1).

    On the error of x0 that is EDM's (s^2 + sigma_data^2) / (s sigma_data)^2 at the noise level
    s = sigma / alpha, so it holds for any alpha. With the preconditioning of the same
    sigma_data (`jaxdiff.precondition`) the raw network's error has weight 1 at every level.
    """
    check_positive(sigma_data=sigma_data)
    return jnp.logaddexp(0.0, -2.0 * (lam + jnp.log(sigma_data)))


def min_snr(lam: Array, rate: Array, gamma: float = 5.0) -> Array:
    """w = min(SNR, gamma) / SNR (Hang et al., "Min-SNR Weighting Strategy", 2023)."""
    check_positive(gamma=gamma)
    return jnp.minimum(0.0, jnp.log(gamma) - 2.0 * lam)


def p2(lam: Array, rate: Array, k: float = 1.0, gamma: float = 1.0) -> Array:
    """w = 1 / (k + SNR)^gamma (Choi et al., "Perception Prioritized Training", 2022).

    The paper uses k = 1 with gamma = 1 or 0.5; gamma = 0 is `simple`.
    """
    check_positive(k=k)
    return -gamma * jnp.logaddexp(jnp.log(k), 2.0 * lam)


def elbo(lam: Array, rate: Array) -> Array:
    """w = -d lam / dt: the variational bound (Kingma et al., "Variational Diffusion Models", 2021).

    With t uniform, (t_max - t_min) times the mean loss is the bound's diffusion term in nats a
    dimension: the integral of the noise error over lam, whatever the process.
    """
    return jnp.log(rate)


def sigmoid(lam: Array, rate: Array, bias: float = 0.0) -> Array:
    """w = -d lam / dt sigmoid(bias - 2 lam): the bound, with the fine levels weighted down.

    Kingma & Gao, "Understanding Diffusion Objectives as the ELBO" (2023); `bias` and the factor
    1/2 of -d log SNR / dt are those of Hoogeboom et al., "Simpler Diffusion (SiD2)" (2024).
    Meant for the uniform time law, like `elbo`.
    """
    return jnp.log(rate) + jax.nn.log_sigmoid(bias - 2.0 * lam)


Weighting = Callable[..., Array]

WEIGHTINGS: Mapping[str, Weighting] = {
    "simple": simple,
    "x0": x0_error,
    "v": v_error,
    "flow": flow_error,
    "edm": edm,
    "min_snr": min_snr,
    "p2": p2,
    "elbo": elbo,
    "sigmoid": sigmoid,
}

# --- the loss -------------------------------------------------------------------------------------

# At a given x_t all errors are proportional: prediction -> log of (noise error / its error)^2. A
# score is compared as the noise -sigma score, so nothing divides by sigma.
_LOG_FACTOR = {
    "x0": lambda lam, alpha, sigma: 2.0 * lam,
    "eps": lambda lam, alpha, sigma: 0.0,
    "score": lambda lam, alpha, sigma: 0.0,
    "v": lambda lam, alpha, sigma: -jax.nn.softplus(-2.0 * lam) - jnp.log(alpha**2 + sigma**2),
    "flow": lambda lam, alpha, sigma: -2.0 * jax.nn.softplus(-lam),
}

# Where alpha or sigma is 0, lam is infinite: the weight and its factor are taken at this lam, where
# both are finite and their sum is the limit (SNR = e^80 is beyond what float32 data can tell).
_MAX_LAM = 40.0
_MAX_LOG_WEIGHT = 80.0


def score_matching(
    denoiser: Denoiser, process: Process, x0: Any, t: ArrayLike, eps: Any, cond: Any = None,
    weighting: str | Weighting = "simple", **options: Any,
) -> Float[Array, " batch"]:  # fmt: skip
    """Denoising score matching, one loss per sample, for every prediction and weighting.

    loss_i = w(t_i) mean |eps_hat - eps_i|^2,    x_t = alpha x0 + sigma eps,

    the mean over all elements of the sample (of all leaves of a pytree). eps_hat is never formed:
    the error is measured in what the network predicts, and w converted to that space in logarithms,
    without a division by alpha or sigma. The same objective through another prediction therefore
    has the same value and gradient, and both ends (alpha = 0, sigma = 0) are exact. Weights that
    diverge there (say "simple" on an x0 network at sigma = 0) are cut off at e^80, finite in
    float32. Vincent, "A Connection Between Score Matching and Denoising Autoencoders" (2011).

    Arguments:
      denoiser: predicts one of `jaxdiff.predictions.PREDICTIONS`.
      process: gives alpha, sigma and lam at t.
      x0, eps: data and standard normal noise, of one structure, leaves [batch, ...].
      t: times of `process`, a scalar or [batch]; see `sample_times`.
      cond: passed to the denoiser.
      weighting: a name in `WEIGHTINGS`, or a function (lam, rate) -> log w of that kind; `options`
        are its own (`gamma=5.0`).

    Raises ValueError for an unknown weighting or option (with the nearest names), for shapes of t,
    eps or the denoiser's output that do not fit x0, and for a denoiser with several predictions;
    TypeError for data that are not floating point.
    """
    prediction = denoiser.prediction
    if not isinstance(prediction, str):
        raise ValueError(f"a loss needs one prediction, the denoiser has {prediction}")
    log_weight = _find("weighting", weighting, WEIGHTINGS, options)
    _check_shapes(eps, x0, "eps", "x0")
    for leaf in jax.tree.leaves(x0):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"x0 must be floating point (scaled data), got {leaf.dtype}")
    t = jnp.asarray(t) * 1.0
    batch = jax.tree.leaves(x0)[0].shape[0]
    if t.shape not in ((), (batch,)):
        raise ValueError(f"t must be a scalar or of shape ({batch},), got {t.shape}")

    alpha, sigma = process.alpha(t), process.sigma(t)
    x = process.perturb(x0, eps, t)
    out = denoiser(x, t, alpha, sigma, cond)
    _check_shapes(out, x, "the denoiser's output", "x_t")
    if prediction == "score":
        out = jax.tree.map(lambda a: -to_batch(sigma, a) * a, out)
    y = target("eps" if prediction == "score" else prediction, x0, eps, alpha, sigma)
    size = sum(a.size // batch for a in jax.tree.leaves(x))
    error = sum(jax.tree.leaves(jax.tree.map(_square_error, out, y))) / size

    lam, slope = jax.jvp(process.half_log_snr, (t,), (jnp.ones_like(t),))
    lam = jnp.clip(lam, -_MAX_LAM, _MAX_LAM)
    rate = jnp.clip(-slope, np.exp(-_MAX_LAM), np.exp(_MAX_LAM))
    log_w = log_weight(lam, rate) + _LOG_FACTOR[prediction](lam, alpha, sigma)
    return jnp.exp(jnp.minimum(log_w, _MAX_LOG_WEIGHT)) * error


def _square_error(out: Array, y: Array) -> Array:
    wide = jnp.promote_types(out.dtype, jnp.float32)
    return jnp.sum((out.astype(wide) - y) ** 2, axis=tuple(range(1, out.ndim)))


def _check_shapes(tree: Any, like: Any, what: str, of: str) -> None:
    if jax.tree.structure(tree) != jax.tree.structure(like):
        raise ValueError(
            f"{what} has structure {jax.tree.structure(tree)}, {of} {jax.tree.structure(like)}"
        )
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(like)):
        if jnp.shape(a) != jnp.shape(b):
            raise ValueError(f"{what} has shape {jnp.shape(a)}, {of} {jnp.shape(b)}")


def _find(
    kind: str, choice: Any, table: Mapping[str, Callable], options: dict, *more: str
) -> Callable:
    """The function `choice` names, or is, with `options` bound; `more` are the caller's options."""
    if not callable(choice):
        if choice not in list(table):
            raise ValueError(unknown(f"unknown {kind}", choice, table))
        check_options(f"{kind} {choice!r}", table[choice], options, 2, more)
        choice = table[choice]
    return functools.partial(choice, **options)


# --- time laws ------------------------------------------------------------------------------------


def uniform(u: Array, process: Process) -> Array:
    """t uniform in [t_min, t_max]: u in (0, 1) is stretched to the span."""
    return process.t_min + (process.t_max - process.t_min) * u


def integers(u: Array, process: Process) -> Array:
    """t uniform among the steps 0, 1, ... of a `ddpm` process (Ho et al. 2020, algorithm 1).

    Raises ValueError for a process in continuous time.
    """
    if not is_discrete(process):
        raise ValueError(
            f"the time law 'integers' is for a ddpm process, got {type(process).__name__}"
        )
    return jnp.floor(u * (process.t_max + 1.0))


def logit_normal(u: Array, process: Process, mean: float = 0.0, std: float = 1.0) -> Array:
    """log(t / (1 - t)) ~ N(mean, std^2) (Esser et al., "SD3", 2024, section 3.1)."""
    check_positive(std=std)
    return uniform(jax.nn.sigmoid(mean + std * jax.scipy.special.ndtri(u)), process)


def mode(u: Array, process: Process, scale: float = 1.29) -> Array:
    """t = 1 - u' - scale (cos^2(pi u' / 2) - 1 + u') with u' = 1 - u (Esser et al. 2024, "mode").

    Positive density everywhere, more of the middle for scale > 0, of the ends for scale < 0, and
    uniform at 0. Raises ValueError unless -1 <= scale <= 2 / (pi - 2) = 1.75, where it is monotone.
    """
    if is_concrete(scale) and not -1.0 <= scale <= 2.0 / (np.pi - 2.0):
        raise ValueError(f"scale must lie in [-1, 2 / (pi - 2)], got {scale!r}")
    return uniform(u + scale * (u - jnp.sin(0.5 * np.pi * u) ** 2), process)


def cosmap(u: Array, process: Process) -> Array:
    """t = 1 - 1 / (tan(pi u / 2) + 1) (Esser et al. 2024, "CosMap").

    With rectified flow its log-SNR is distributed as that of the cosine schedule.
    """
    sin, cos = jnp.sin(0.5 * np.pi * u), jnp.cos(0.5 * np.pi * u)
    return uniform(sin / (sin + cos), process)


def log_normal_sigma(u: Array, process: Process, mean: float = -1.2, std: float = 1.2) -> Array:
    """log(sigma / alpha) ~ N(mean, std^2): EDM's P_mean and P_std (Karras et al. 2022, table 1).

    For any process: t = process.time(lam), lam = -log(sigma / alpha) clipped to [lam(t_max),
    lam(t_min)]; the probability beyond either end of the span sits on that end.
    """
    check_positive(std=std)
    lam = -(mean + std * jax.scipy.special.ndtri(u))
    low, high = (process.half_log_snr(t) for t in (process.t_max, process.t_min))
    return process.time(jnp.clip(lam, low, high))


TimeLaw = Callable[..., Array]

TIME_LAWS: Mapping[str, TimeLaw] = {
    "uniform": uniform,
    "integers": integers,
    "logit_normal": logit_normal,
    "mode": mode,
    "cosmap": cosmap,
    "log_normal_sigma": log_normal_sigma,
}


def sample_times(
    law: str | TimeLaw, key: Array, batch: int, process: Process, *, stratified: bool = False,
    ids: Int[ArrayLike, " batch"] | None = None, total: int | None = None, **options: Any,
) -> Float[Array, " batch"]:  # fmt: skip
    """Training times t [batch] of `process`, in [t_min, t_max]: t_i = law's quantile at u_i.

    u_i is uniform on (0, 1), drawn with sample i's own key; or, `stratified`, the low-discrepancy
    batch u_i = (u + i / total) mod 1 with one u for all: each u_i is uniform, and every 1 / total
    of the law's probability holds exactly one sample, so the batch mean of a loss varies less
    (Kingma et al., "VDM", 2021).

    Arguments:
      law: a name in `TIME_LAWS`, or a function (u, process) -> t; `options` are its own.
      key: one key; without `stratified` also one per sample (`jaxdiff.sample_keys`). Not the key of
        the noise.
      batch: the number of times drawn here.
      ids, total: the global indices of these samples, and the size of the whole batch (needed with
        `stratified`). Pieces of a batch that share the key draw what the whole batch would; the
        default is the whole batch, ids 0 to batch - 1.

    Raises ValueError for an unknown law or option (with the nearest names), for ids that do not
    fit, and for a single key without ids inside shard_map or pmap.
    """
    quantile = _find("time law", law, TIME_LAWS, options, "stratified")
    batch = operator.index(batch)
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if ids is not None:
        ids = jnp.asarray(ids) if not is_concrete(ids) else np.asarray(ids)
        if ids.shape != (batch,) or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"ids must be {batch} integers, got {ids.dtype} of shape {ids.shape}")
    u = _stratified(key, batch, ids, total) if stratified else _independent(key, batch, ids)
    # The open interval: u = 0 is possible in float32 and an infinite quantile of a normal.
    edge = 0.5 * jnp.finfo(u.dtype).eps
    return jnp.clip(quantile(jnp.clip(u, edge, 1.0 - edge), process), process.t_min, process.t_max)


def _independent(key: Array, batch: int, ids: Any) -> Array:
    keys = per_sample(key, batch) if ids is None else sample_keys(key, ids)
    return jax.vmap(jax.random.uniform)(keys)


def _stratified(key: Array, batch: int, ids: Any, total: int | None) -> Array:
    if is_key_batch(key):
        raise ValueError("stratified times take one key for the whole batch, got one per sample")
    if ids is None:
        manual = jax.sharding.get_abstract_mesh().manual_axes
        if manual or total not in (None, batch):
            where = f"under the manual mesh axes {tuple(manual)}" if manual else f"of {total}"
            raise ValueError(f"stratified times for a part of a batch ({where}) need ids and total")
        ids, total = np.arange(batch), batch
    if total is None:
        raise ValueError("stratified times with ids need total, the size of the whole batch")
    if is_concrete(ids) and not (0 <= ids.min() and ids.max() < total):
        raise ValueError(f"ids must lie in 0 to {total - 1}, got {ids.min()} to {ids.max()}")
    u = jax.random.uniform(key)
    return (u + ids / jnp.asarray(total, u.dtype)) % 1.0
