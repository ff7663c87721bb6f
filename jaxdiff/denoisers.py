"""Denoisers: what a sampler evaluates.

A denoiser is a pytree around any function of (x, t): parameters and strengths are leaves, the
function and the kind of its prediction are static, so new parameters never recompile. Everything
that changes what is sampled (thresholding, guidance) is a function from denoisers to denoisers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from jaxdiff.arrays import is_concrete, to_batch
from jaxdiff.predictions import check_prediction, convert


def _static(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A function and what it predicts.

    Attributes:
      fn: `fn([params,] x, t[, cond])`: params is passed if it is not None, cond if one is given to
        `sample`. x is the state, leaves [batch, ...]; t is what `time` returns, by default the
        scalar t of the row. Returns the prediction, with x's structure and shapes. Use one
        module-level function (or a hashable object): a fresh closure recompiles. An object may
        have a method `check(params, batch, cond, alpha)`, which `sample` calls before anything is
        traced, alpha being that of every row: raise there what the call could only turn to NaN. Or
        `check_at(params, batch, cond, alpha, t)`, if it matters at which t; t may be None.
      prediction: one of `jaxdiff.predictions.PREDICTIONS`; or a tuple of them, and then fn returns
        a tuple of predictions (for samplers that use, say, a clipped x0 and the unclipped eps).
      params: pytree passed first to fn.
      time: `(t, alpha, sigma) -> what the network wants`; None passes t.
      memory: pytree kept from one evaluation to the next (cached features, counters); if given, fn
        is called with `memory=...` and returns (prediction, new memory).
      cost: network evaluations a call, for reports (2 under classifier-free guidance).
    """

    fn: Callable = _static(dataclasses.MISSING)
    prediction: str | tuple[str, ...] = _static("eps")
    params: Any = None
    time: Callable | None = _static(None)
    memory: Any = None
    cost: int = _static(1)

    def __post_init__(self):
        if not callable(self.fn):
            raise TypeError(f"fn must be callable, got {self.fn!r}")
        if not isinstance(self.prediction, (str, tuple)) or not self.prediction:
            raise ValueError(f"prediction must be a name or a tuple, got {self.prediction!r}")
        for name in self.predictions:
            check_prediction(name)

    @property
    def predictions(self) -> tuple[str, ...]:
        """The predictions as a tuple, also where there is one."""
        return (self.prediction,) if isinstance(self.prediction, str) else tuple(self.prediction)

    def evaluate(
        self, x: Any, t: ArrayLike, alpha: ArrayLike, sigma: ArrayLike, cond: Any, memory: Any
    ) -> tuple[Any, Any]:
        """(prediction, new memory) at x_t = x; `t`, `alpha`, `sigma` scalars or [batch]."""
        args = () if self.params is None else (self.params,)
        args += (x, t if self.time is None else self.time(t, alpha, sigma))
        args += () if cond is None else (cond,)
        if self.memory is None:
            return self.fn(*args), memory
        return self.fn(*args, memory=memory)

    def check(self, batch: int, cond: Any, alpha: ArrayLike, t: ArrayLike | None = None) -> None:
        """Raise what `fn.check_at` or `fn.check` raises for this call, if it has one."""
        if hasattr(self.fn, "check_at"):
            self.fn.check_at(self.params, batch, cond, alpha, t)
        elif hasattr(self.fn, "check"):
            self.fn.check(self.params, batch, cond, alpha)

    def __call__(
        self, x: Any, t: ArrayLike, alpha: ArrayLike, sigma: ArrayLike, cond: Any = None
    ) -> Any:
        """The prediction at x_t = x, from the initial memory if there is one."""
        return self.evaluate(x, t, alpha, sigma, cond, self.memory)[0]

    def predict(
        self, target: str, x: Any, t: ArrayLike, alpha: ArrayLike, sigma: ArrayLike,
        cond: Any = None,
    ) -> Any:  # fmt: skip
        """The prediction converted to `target`; a tuple prediction converts its first."""
        out = self(x, t, alpha, sigma, cond)
        if not isinstance(self.prediction, str):
            out = out[0]
        return convert(out, x, self.predictions[0], target, alpha, sigma)


def level(t: ArrayLike, alpha: ArrayLike, sigma: ArrayLike) -> tuple[Any, Any, Any]:
    """`Denoiser.time` for functions that want all of (t, alpha, sigma)."""
    return t, alpha, sigma


def check_single(denoiser: Any, what: str) -> None:
    """Raise TypeError unless `denoiser` is a Denoiser, ValueError if it predicts several things."""
    if not isinstance(denoiser, Denoiser):
        raise TypeError(f"{what} takes a jaxdiff.Denoiser, got {type(denoiser).__name__}")
    if not isinstance(denoiser.prediction, str):
        raise ValueError(f"{what} takes one prediction, got {denoiser.prediction}")


def check_known(
    sources: str | tuple[str, ...], targets: str | tuple[str, ...], alpha: ArrayLike, what: str
) -> None:
    """Raise ValueError where `sources` say nothing of `targets`: eps or score where alpha = 0.

    Names of predictions; `alpha` that of the rows. Nothing is said of a traced one.
    """
    sources, targets = ((p,) if isinstance(p, str) else p for p in (sources, targets))
    blind = [p for p in sources if p in ("eps", "score")]
    unknown = [p for p in targets if p not in ("eps", "score")]
    if len(blind) < len(sources) or not unknown or not is_concrete(alpha):
        return
    if np.any(np.asarray(alpha) == 0):
        raise ValueError(
            f"{what}: the grid evaluates where alpha = 0, and there a {blind[0]!r} network does not "
            f"determine {unknown[0]!r}: use a network that predicts v, x0 or flow, or start the grid "
            "at less noise"
        )


def wrap(
    fn: Callable, denoiser: Denoiser, strengths: Any, prediction: str | tuple[str, ...],
    cost: int | None = None,
) -> Denoiser:  # fmt: skip
    """A denoiser over a denoiser: fn(evaluate, strengths, x, (t, alpha, sigma), cond).

    `evaluate(x, t, alpha, sigma, cond)` calls the inner denoiser and keeps its memory. `strengths`
    are traced leaves. For guidance, thresholding and the like; `fn` must be a module-level
    function, or an object; one that changes cond has a method `check(check, strengths, cond)` that
    calls `check` with every cond it evaluates (see `Denoiser`), and one whose strengths may not
    fit `check_strengths(strengths, batch, alpha)`. Sampling raises ValueError where the inner denoiser
    leaves `prediction` unknown (`check_known`).
    """
    return Denoiser(
        fn=_Wrapped(fn, (prediction,) if isinstance(prediction, str) else tuple(prediction)),
        prediction=prediction,
        params=(denoiser, strengths),
        time=level,
        memory=denoiser.memory,
        cost=denoiser.cost if cost is None else cost,
    )


@dataclasses.dataclass(frozen=True)
class _Wrapped:
    fn: Callable
    targets: tuple[str, ...]

    def __call__(self, params, x, levels, cond=None, memory=None):
        inner, strengths = params
        cell = [memory]

        def evaluate(x, t, alpha, sigma, cond):
            out, cell[0] = inner.evaluate(x, t, alpha, sigma, cond, cell[0])
            return out

        out = self.fn(evaluate, strengths, x, levels, cond)
        return out if inner.memory is None else (out, cell[0])

    def check_at(self, params, batch, cond, alpha, t):
        inner, strengths = params
        check_known(inner.prediction, self.targets, alpha, "a denoiser around another")

        def check(cond):
            inner.check(batch, cond, alpha, t)

        if hasattr(self.fn, "check_strengths"):
            self.fn.check_strengths(strengths, batch, alpha)
        if hasattr(self.fn, "check"):
            self.fn.check(check, strengths, cond)
        else:
            check(cond)


# --- thresholding ---------------------------------------------------------------------------------


def clip_x0(
    denoiser: Denoiser, low: ArrayLike = -1.0, high: ArrayLike = 1.0, keep_eps: bool = False
) -> Denoiser:
    """Static thresholding: the denoised x0 clipped to [low, high].

    `keep_eps=True` predicts ("x0", "eps") with x0 clipped and eps not, as DDPM's reference code and
    diffusers' DDIM default do; use it with `ddim(grid, outputs=2)`.
    """
    if is_concrete(low, high) and not np.all(np.asarray(low) < np.asarray(high)):
        raise ValueError(f"need low < high, got {low!r} and {high!r}")
    return _threshold(_clip, denoiser, (low, high), keep_eps)


def dynamic_threshold(
    denoiser: Denoiser, quantile: ArrayLike = 0.995, max_value: ArrayLike | None = None,
    keep_eps: bool = False,
) -> Denoiser:  # fmt: skip
    """Dynamic thresholding of the denoised x0 (Saharia et al., "Imagen", 2022, section 2.3).

    Per sample, s = the `quantile` of |x0| (in [0, 1]), at least 1; x0 is clipped to [-s, s] and
    divided by s. `max_value` caps s from above (diffusers' `sample_max_value`). `keep_eps` as in
    `clip_x0`.
    """
    if is_concrete(quantile) and not 0 < quantile <= 1:
        raise ValueError(f"quantile must lie in (0, 1], got {quantile!r}")
    if max_value is not None and is_concrete(max_value) and not max_value >= 1:
        raise ValueError(f"max_value must be at least 1, got {max_value!r}")
    cap = jnp.inf if max_value is None else max_value
    return _threshold(_dynamic, denoiser, (quantile, cap), keep_eps)


def _threshold(rule, denoiser: Denoiser, strengths: Any, keep_eps: bool) -> Denoiser:
    check_single(denoiser, "thresholding")
    prediction = ("x0", "eps") if keep_eps else "x0"
    return wrap(_Threshold(rule, denoiser.prediction, keep_eps), denoiser, strengths, prediction)


@dataclasses.dataclass(frozen=True)
class _Threshold:
    rule: Callable
    source: str
    keep_eps: bool

    def __call__(self, evaluate, strengths, x, levels, cond):
        t, alpha, sigma = levels
        out = evaluate(x, t, alpha, sigma, cond)
        x0 = convert(out, x, self.source, "x0", alpha, sigma)
        x0 = jax.tree.map(lambda a: self.rule(a, *strengths), x0)
        if not self.keep_eps:
            return x0
        return x0, convert(out, x, self.source, "eps", alpha, sigma)


def _clip(x0, low, high):
    return jnp.clip(x0, low, high)


def _dynamic(x0, quantile, cap):
    size = jnp.quantile(jnp.abs(x0.reshape(x0.shape[0], -1)), quantile, axis=1)
    size = to_batch(jnp.clip(size, 1.0, cap).astype(x0.dtype), x0)
    return jnp.clip(x0, -size, size) / size


# --- preconditioning ------------------------------------------------------------------------------


def precondition(
    fn: Callable, sigma_data: ArrayLike = 0.5, params: Any = None, time: Callable | None = None
) -> Denoiser:
    """EDM's preconditioning for any (alpha, sigma): an x0 denoiser from a raw network F.

    x0 = c_skip x + c_out F(c_in x, c_noise) with s = sigma_data and S = alpha^2 s^2 + sigma^2,

        c_in = 1 / sqrt(S),  c_skip = alpha s^2 / S,  c_out = sigma s / sqrt(S),
        c_noise = -lambda / 4 = log(sigma / alpha) / 4,

    the choice that gives F unit-variance inputs and targets and the least error amplification;
    alpha = 1 is Karras et al. (2022), table 1 and appendix B.6. `time(t, alpha, sigma)` replaces
    c_noise, which is infinite at alpha = 0 and at sigma = 0: most networks return NaN there, so a
    grid from alpha = 0 needs a `time` that is finite (`t` itself, say). fn is called as
    `fn([params,] c_in x, c_noise[, cond])`. Raises ValueError unless sigma_data > 0.
    """
    if is_concrete(sigma_data) and not np.all(np.asarray(sigma_data) > 0):
        raise ValueError(f"sigma_data must be positive, got {sigma_data!r}")
    return Denoiser(_Preconditioned(fn, time or _c_noise, params is not None),
                    "x0", (params, sigma_data), level)  # fmt: skip


def _c_noise(t, alpha, sigma):
    return 0.25 * (jnp.log(sigma) - jnp.log(alpha))


@dataclasses.dataclass(frozen=True)
class _Preconditioned:
    fn: Callable
    time: Callable
    has_params: bool

    def __call__(self, params, x, levels, cond=None):
        (net_params, sigma_data), (t, alpha, sigma) = params, levels
        size = jnp.sqrt((alpha * sigma_data) ** 2 + sigma**2)
        args = (net_params,) if self.has_params else ()

        def scaled(coefficient, tree):
            return jax.tree.map(lambda a: to_batch(coefficient, a).astype(a.dtype) * a, tree)

        args += (scaled(1.0 / size, x), self.time(t, alpha, sigma))
        out = self.fn(*args, *(() if cond is None else (cond,)))
        skip, gain = alpha * sigma_data**2 / size**2, sigma * sigma_data / size
        out = jax.tree.map(lambda a, y: a.astype(jnp.promote_types(a.dtype, y.dtype)), out, x)
        return jax.tree.map(jnp.add, scaled(skip, x), scaled(gain, out))

    def check(self, params, batch, cond, alpha):
        if self.time is _c_noise and is_concrete(alpha) and np.any(np.asarray(alpha) == 0):
            raise ValueError(
                "precondition: its c_noise = log(sigma / alpha) / 4 is infinite at alpha = 0, where "
                "this grid starts: give the grid a smaller t_max, or precondition another time="
            )
        if hasattr(self.fn, "check"):
            self.fn.check(params[0], batch, cond, alpha)
