"""DDCM: editing by virtual inversion, without any inversion (InfEdit).

Xu, Huang, Pan, Ma & Chai, "Inversion-Free Image Editing with Natural Language" (2024). Two branches
share their noise. The source's, x_s = alpha x_0 + sigma e, is a noising of the known x_0; the target's,
x_t, follows the model from the same start. With D(x, c) the model's denoised x_0 the target's is

    x_0' = x_0 + D(x_t, c_target) - D(x_s, c_source),     eps' = (x_t - alpha x_0') / sigma,

whatever the model gets wrong about x_0 counts on both sides, and both branches go on by

    x_s <- alpha' x_0  + sqrt(sigma'^2 - s^2) eps' + s z,
    x_t <- alpha' x_0' + sqrt(sigma'^2 - s^2) eps' + s z,      s^2 = eta sigma'^2,

with one z. In terms of predicted noise x_0' is x_0 + ((x_t - x_s) - sigma (e_t - e_s)) / alpha and eps'
is e_t - e_s + (x_s - alpha x_0) / sigma, the paper's form. eta = 1, the paper's, renews all noise:
multistep consistency sampling. So the sampler is the library's `ddim(grid, sqrt(eta), outputs=2,
noise_scale="full")`, on a pair of states and a denoiser that knows x_0: `virtual_inversion`.
"""

from __future__ import annotations

import dataclasses
import math
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff.arrays import as_arrays
from jaxdiff.denoisers import Denoiser, check_single, wrap
from jaxdiff.editing.edit_friendly import as_data
from jaxdiff.editing.encoder import FIRST_DRAW
from jaxdiff.grids import Grid
from jaxdiff.noise import normal
from jaxdiff.predictions import convert
from jaxdiff.sampling import sample
from jaxdiff.solvers.first_order import ddim


@dataclasses.dataclass(frozen=True)
class SourceLayout:
    """Attention in which targets look where their sources look: the queries and keys are the source's.

    For the `attention` of a network of `jaxdiff.models`, in a batch of sources and then as many
    targets, as `virtual_inversion` evaluates: the self-attention control of InfEdit's unified attention
    control (its early steps), which keeps the source's layout and the target's values. `groups`: how
    many such batches stand one after the other, 2 inside `classifier_free`.
    """

    groups: int = 1

    def __call__(
        self, q: Float[Array, "n p h d"], k: Float[Array, "n p h d"], v: Float[Array, "n p h d"]
    ) -> Float[Array, "n p h d"]:
        def sources(a):
            if a.shape[0] % (2 * self.groups):
                raise ValueError(
                    f"SourceLayout({self.groups}) takes batches of a multiple of {2 * self.groups}, "
                    f"sources and targets, got {a.shape[0]}"
                )
            split = a.reshape(self.groups, 2, -1, *a.shape[1:])
            return jnp.broadcast_to(split[:, :1], split.shape).reshape(a.shape)

        return jax.nn.dot_product_attention(sources(q), sources(k), v)


def virtual_inversion(
    denoiser: Denoiser, x0: Any, layout: Denoiser | None = None, until: Any = 0.0
) -> Denoiser:
    """The denoiser of a pair of states {"source", "target"}, one of which is known to become x0.

    It predicts ("x0", "eps"): x_0 and x_0' of the module's docstring, and eps' for both. Both states
    are evaluated in one call of twice the batch, sources first (cost 2), under
    cond = {"source": ..., "target": ...}; a guidance scale may then be [2 batch].

    Arguments:
      denoiser: any single prediction.
      x0: the data, leaves [batch, ...].
      layout: the same network with attention=`SourceLayout()`, evaluated instead where t > `until`.
    """
    check_single(denoiser, "virtual_inversion")
    if layout is not None:
        check_single(layout, "virtual_inversion")
        if layout.prediction != denoiser.prediction or layout.memory is not None:
            raise ValueError(
                f"layout must predict {denoiser.prediction!r} as the denoiser, without memory"
            )
        if denoiser.memory is not None:
            raise ValueError("with layout= the denoiser must keep no memory")
    strengths = as_arrays((x0, layout, until))
    fn = _Virtual(denoiser.prediction)
    return wrap(fn, denoiser, strengths, ("x0", "eps"), cost=2 * denoiser.cost)


@dataclasses.dataclass(frozen=True)
class _Virtual:
    prediction: str

    def check(self, check, strengths, cond):
        _check_cond(cond)
        if cond is not None:
            check(cond["source"])
            check(cond["target"])

    def __call__(self, evaluate, strengths, x, levels, cond):
        x0, layout, until = strengths
        _check_cond(cond)
        source, target = x["source"], x["target"]
        join = lambda a, b: jax.tree.map(lambda u, v: jnp.concatenate([u, v]), a, b)  # noqa: E731
        both, conds = join(source, target), None
        if cond is not None:
            conds = join(cond["source"], cond["target"])
        t, alpha, sigma = (jnp.tile(c, 2) if jnp.ndim(c) == 1 else c for c in levels)
        if layout is None:
            out = evaluate(both, t, alpha, sigma, conds)
        else:
            out = jax.lax.cond(
                jnp.max(t) > until,
                lambda: layout(both, t, alpha, sigma, conds),
                lambda: evaluate(both, t, alpha, sigma, conds),
            )
        out = jax.tree.map(lambda a, y: a.astype(y.dtype), out, both)
        found = convert(out, both, self.prediction, "x0", alpha, sigma)
        half = lambda i: jax.tree.map(lambda a: jnp.split(a, 2)[i], found)  # noqa: E731
        edited = jax.tree.map(lambda a, s, e: a + (e - s), x0, half(0), half(1))
        eps = convert(edited, target, "x0", "eps", *levels[1:])
        return {"source": x0, "target": edited}, {"source": eps, "target": eps}


def _check_cond(cond: Any) -> None:
    if cond is not None and not (isinstance(cond, dict) and set(cond) == {"source", "target"}):
        raise ValueError('virtual inversion takes cond={"source": ..., "target": ...}')


def ddcm(
    denoiser: Denoiser, grid: Grid, x0: Any, key: Array, source_cond: Any = None,
    target_cond: Any = None, eta: float = 1.0, layout: Denoiser | None = None, until: Any = 0.0,
) -> Any:  # fmt: skip
    """Edit data from one condition to another by DDCM; see the module. Two evaluations a step.

    Arguments:
      denoiser: for guidance, `classifier_free(net, scale, null)`; scale may be [2 batch], sources
        first (the published code guides them with 1 and the targets with more).
      grid: from where the edit starts (the paper's strength: t_max of the grid) to sigma = 0, such as
        `half_log_snr(process, 12, t_max=0.9, end="zero")`.
      x0: the data, leaves [batch, ...].
      key: one key, or one per sample.
      source_cond, target_cond: both or neither, for a batch each.
      eta: share of the noise's variance that is renewed, in [0, 1]. 1 is DDCM.
      layout, until: see `virtual_inversion`.

    Where the conditions are equal the result is x0. Raises ValueError for an eta outside [0, 1], a grid
    that does not end at sigma = 0, and an eps or score network on a grid that starts at alpha = 0.
    """
    if isinstance(eta, bool) or not isinstance(eta, Real) or not 0 <= eta <= 1:
        raise ValueError(f"eta must be a number in [0, 1], got {eta!r}")
    if grid.backward or not grid.ends[1]:
        raise ValueError(
            'ddcm takes a grid from noise to sigma = 0: build it with end="zero", as its last x_0 is '
            "the edit"
        )
    check_single(denoiser, "ddcm")
    if grid.ends[0] and denoiser.prediction in ("eps", "score"):
        raise ValueError(
            f"a {denoiser.prediction!r} network says nothing about x_0 at alpha = 0, where this grid "
            "starts: give the grid a smaller t_max, or use a network that predicts v, x0 or flow"
        )
    if (source_cond is None) != (target_cond is None):
        raise ValueError("give both source_cond and target_cond, or neither")
    x0 = jax.tree.map(as_data, x0)
    tableau = ddim(grid, math.sqrt(eta), outputs=2, noise_scale="full")
    virtual = virtual_inversion(denoiser, x0, layout, until)
    _, alpha, sigma = grid.node(0)

    def noised(x, e):
        return jnp.asarray(alpha, x.dtype) * x + jnp.asarray(sigma, x.dtype) * e

    first = jax.tree.map(noised, x0, normal(key, x0, FIRST_DRAW))
    noise = None
    if tableau.draws:
        noise = jax.vmap(lambda r: normal(key, x0, r))(np.arange(tableau.draws))
    cond = None if source_cond is None else {"source": source_cond, "target": target_cond}
    pair = lambda a: None if a is None else {"source": a, "target": a}  # noqa: E731
    return sample(virtual, tableau, pair(first), noise=pair(noise), cond=cond)["target"]
