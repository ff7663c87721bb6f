"""Diffusion with forward models: a generative model of what is never observed.

Tewari, Yin, Cazenavette, Rezchikov, Tenenbaum, Durand, Freeman & Sitzmann, "Diffusion with Forward
Models: Solving Stochastic Inverse Problems Without Direct Supervision" (2023). Of signals S there are
only observations O = render(S, view) through a known, differentiable forward model, a few of each. A
network sees a context observation O_c and a noised target observation, and predicts the signal; the
forward model makes it a denoiser of target observations,

    S_hat = signal(O_t, t, context, target view),    O_hat = render(S_hat, target view),

which is trained as any x_0-denoiser, on observations alone. Sampling a target observation at any view
then samples a signal, which is returned: p(S | O_c) without ever having seen an S.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from jaxdiff.denoisers import Denoiser, check_single, level
from jaxdiff.integrator import Control
from jaxdiff.losses import Weighting, score_matching
from jaxdiff.processes import Process
from jaxdiff.sampling import sample
from jaxdiff.solvers.tableau import Tableau

_CONDITIONS = ("context", "view")


def observation_denoiser(
    signal: Callable, render: Callable, params: Any = None, time: Callable | None = None
) -> Denoiser:
    """x_0 of an observation through its signal: O_hat = render(S_hat, view).

    Under cond = {"context": what is known (observations, their views, any pytree), "view": the view of
    the state, leaves [batch, ...]}; entries of more names are allowed, and passed to `signal` too.

    Arguments:
      signal: fn([params,] O_t, time, cond) -> S_hat, leaves [batch, ...]: the network.
      render: fn(S, view) -> O, the known forward model, differentiable in S.
      time: (t, alpha, sigma) -> what the network wants; None passes t.

    Predicts x0, so it takes any tableau, and any guidance: without context by cond's "context" alone.
    """
    return Denoiser(_Rendered(signal, render, time, params is not None), "x0", (params,), level)


@dataclasses.dataclass(frozen=True)
class _Rendered:
    signal: Callable
    render: Callable
    time: Callable | None
    has_params: bool

    def predict(self, params, x, levels, cond):
        when = levels[0] if self.time is None else self.time(*levels)
        return self.signal(*params[: self.has_params], x, when, cond)

    def __call__(self, params, x, levels, cond=None):
        return self.render(self.predict(params, x, levels, cond), cond["view"])

    def check(self, params, batch, cond, alpha):
        _check_cond(cond)


def _check_cond(cond: Any) -> None:
    if not isinstance(cond, dict) or not set(_CONDITIONS) <= set(cond):
        got = sorted(cond) if isinstance(cond, dict) else type(cond).__name__
        raise ValueError(f'cond must be {{"context": ..., "view": ...}}, got {got}')


def _rendered(denoiser: Any, what: str) -> _Rendered:
    check_single(denoiser, what)
    if not isinstance(denoiser.fn, _Rendered):
        raise TypeError(f"{what} takes an observation_denoiser, not one around it")
    return denoiser.fn


def forward_model_loss(
    denoiser: Denoiser, process: Process, observed: Float[ArrayLike, "batch ..."], t: ArrayLike,
    eps: Float[ArrayLike, "batch ..."], cond: dict[str, Any],
    others: tuple[tuple[Any, Float[ArrayLike, "batch ..."]], ...] = (),
    other_weight: ArrayLike = 1.0, weighting: str | Weighting = "x0", **options: Any,
) -> Float[Array, " batch"]:  # fmt: skip
    """The training loss, one per sample; no signal is needed.

        w(t) mean |render(S_hat, view) - O|^2 + other_weight sum_j mean |render(S_hat, view_j) - O_j|^2

    Arguments:
      observed: O, target observations under cond["view"].
      t, eps: as of `jaxdiff.losses.score_matching`, which gives the first term; eps standard normal.
      others: (view, observation) pairs of the same signals, for the second term: the context itself, so
        that a signal is kept to what is known of it, or novel views.
      weighting, options: as there; "x0" weighs all levels alike, the published code takes "min_snr".

    Raises TypeError for another denoiser, ValueError for a cond without context and view, and as
    `score_matching` does.
    """
    fn = _rendered(denoiser, "forward_model_loss")
    _check_cond(cond)
    t = jnp.asarray(t) * 1.0
    levels = t, process.alpha(t), process.sigma(t)
    # The network is evaluated here, once for all terms.
    found = fn.predict(denoiser.params, process.perturb(observed, eps, t), levels, cond)
    known = Denoiser(_known, "x0", (fn.render(found, cond["view"]),))
    loss = score_matching(known, process, observed, t, eps, None, weighting, **options)
    for view, other in others:
        apart = (fn.render(found, view) - other) ** 2
        loss += other_weight * jnp.mean(apart, axis=tuple(range(1, apart.ndim)))
    return loss


def _known(params, x, t):
    return params[0]


def sample_signal(
    denoiser: Denoiser, tableau: Tableau, x_T: Any, key: Array | None = None,
    cond: dict[str, Any] | None = None, guided: Denoiser | None = None,
) -> Any:  # fmt: skip
    """S ~ p(S | context): sample an observation at cond["view"] and return its last signal S_hat.

    The arguments are those of `jaxdiff.sample`; x_T is the noise of the observation. Any view's
    observation is then `render(S, view)`.

    Arguments:
      denoiser: of `observation_denoiser`.
      guided: what is sampled instead, a denoiser made of it: the published guidance is
        `classifier_free(denoiser, scale, {"context": none, "view": cond["view"]})`, for networks
        trained with contexts left out. The signal is the conditional network's.

    One evaluation more than the tableau's, at the last row's input. Raises as `forward_model_loss` and
    `jaxdiff.sample` do.
    """
    fn = _rendered(denoiser, "sample_signal")
    _check_cond(cond)
    sampled = denoiser if guided is None else guided
    state = sample(sampled, tableau, x_T, key, cond=cond, save="state", control=_LastInput())
    last = tuple(jnp.asarray(c)[-1] for c in (tableau.t, tableau.alpha, tableau.sigma))
    dtype = jax.tree.leaves(state.aux)[0].dtype
    return fn.predict(denoiser.params, state.aux, tuple(c.astype(dtype) for c in last), cond)


class _LastInput(Control):
    """Keeps what the network was last evaluated at."""

    def init(self, x):
        return x

    def before(self, aux, row, x, key):
        return x, x
