"""DDPM whose network also predicts the variance of each step.

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

from jaxdiff.arrays import namespace
from jaxdiff.denoisers import Denoiser
from jaxdiff.grids import Grid
from jaxdiff.integrator import Carry, Control, RowInfo
from jaxdiff.predictions import check_prediction
from jaxdiff.solvers.clocks import check_choice
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
    return _two_outputs(table), LearnedVariance(small, large, noisy, kind)


def _two_outputs(table: Tableau) -> Tableau:
    """The same sampler for a denoiser whose second output it does not use, nor convert."""
    xp = namespace(table)
    return dataclasses.replace(
        table, B=xp.concatenate([table.B, xp.zeros_like(table.B)], 3),
        u=xp.concatenate([table.u, xp.ones_like(table.u)], 1),
        w=xp.concatenate([table.w, xp.zeros_like(table.w)], 1),
        outputs=2, blind=(*table.blind, ()),
    )  # fmt: skip


def with_variance(
    module: Any, params: Mapping[str, Any], prediction: str = "eps", time: Callable | None = None
) -> Denoiser:
    """Denoiser of a Linen module's method `with_variance`: (x, t[, cond]) -> (prediction, v).

    As the image networks of `jaxdiff.models` with learn_sigma=True. `params` are all the module's
    variables, `prediction` and `time` as in `jaxdiff.models.adapters.from_linen`. For any other
    function that returns the pair: `Denoiser(fn, (prediction, prediction), params, time)`. Raises
    ValueError for a network without a variance.
    """
    check_prediction(prediction)
    if not getattr(module, "learn_sigma", hasattr(module, "with_variance")):
        raise ValueError(f"{type(module).__name__} predicts no variance: it needs learn_sigma=True")
    # The second output is named like the first, for want of a name: it is never converted.
    return Denoiser(_WithVariance(module), (prediction, prediction), params, time)


@dataclasses.dataclass(frozen=True)
class _WithVariance:
    module: Any

    def __call__(self, params, x, t, cond=None):
        args = () if cond is None else (cond,)
        return self.module.apply(params, x, t, *args, method="with_variance")

    def check(self, params, batch, cond, alpha):
        if hasattr(self.module, "check_cond"):
            self.module.check_cond(batch, cond)
