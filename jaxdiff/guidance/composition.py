"""Composition: products, powers and negations of what denoisers model.

Liu, Li, Du, Torralba & Tenenbaum, "Compositional Visual Generation with Composable Diffusion Models"
(2022): the score of a product of powers of densities is the sum of their scores times the powers, and a
prediction of noise is a score times -sigma. With one network under several conditions

    AND, NOT    uncond + sum_i w_i (cond_i - uncond),    w_i > 0 to ask for, < 0 to ask against,

the product p(x) prod_i (p(x | c_i) / p(x))^w_i; with several networks sum_i w_i eps_i, the product
prod_i p_i(x)^w_i. At noise that is the score of the product of the noised densities, not of the noised
product: exact at t = 0, and where the conditions are independent given x_t; elsewhere the samples are
of another distribution, which `jaxdiff.steering.corrector` puts right by weights.

OR, a mixture of the densities, is no weighted sum with fixed weights: each score counts by its share of
the density at x. Those densities are followed along the path by `jaxdiff.steering.superposition`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from jaxdiff.arrays import as_arrays
from jaxdiff.denoisers import Denoiser, check_single, level
from jaxdiff.guidance.together import (
    Scale,
    as_scale,
    at_level,
    check_conditional,
    check_scale,
    filled,
    keeping,
    times,
    together,
    wide,
)
from jaxdiff.predictions import convert


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Experts:
    """The `params` of a denoiser made by `compose` or `product`.

    `denoisers`: one a density, or the one network; `weights`: one a condition or a network; `null`: the
    condition that means none, or None for a product without the unconditional density.
    """

    denoisers: tuple[Denoiser, ...]
    weights: tuple[Any, ...]
    null: Any

    def exponents(self, t: Any, alpha: Any, sigma: Any) -> list[Any]:
        """The power of each density at a level, in the order of the parts; the unconditional first."""
        found = [at_level(w, (t, alpha, sigma)) for w in self.weights]
        return found if self.null is None else [1.0 - sum(found), *found]

    @property
    def constant(self) -> bool:
        """Whether no weight is a function of the level."""
        return not any(callable(w) for w in self.weights)


def compose(
    denoiser: Denoiser, weights: Sequence[Scale], null_cond: Any = None, keep_parts: bool = False
) -> Denoiser:  # fmt: skip
    """uncond + sum_i w_i (cond_i - uncond): one condition with w = 1 is conditional, w < 0 negates.

    Composable Diffusion's AND and NOT; see this module. Sample with cond=(c_1, ..., c_N): all N + 1
    conditions run in one evaluation of N + 1 times the batch (cost N + 1). It is linear, so it keeps
    the network's prediction.

    Arguments:
      weights: w_1, ..., w_N; each a number, an array [batch], or a function of the level
        (t, alpha, sigma), for weights in time. Numbers are leaves: new ones compile nothing.
      null_cond: the condition that means none, its leaves broadcast against a condition's. None leaves
        the unconditional density out: sum_i w_i cond_i, a product of conditional densities (cost N),
        in "eps".
      keep_parts: predict (the sum, uncond, cond_1, ..., cond_N), for `jaxdiff.steering`.

    Raises ValueError for no weights, weights that are no numbers or [batch], a denoiser of several
    predictions or without conditions, or, when sampling, another number of conditions.
    """
    check_conditional(denoiser, "compose")
    prediction = "eps" if null_cond is None else denoiser.prediction
    return _experts((denoiser,), weights, null_cond, prediction, keep_parts, joint=True)


def product(
    denoisers: Sequence[Denoiser], weights: Sequence[Scale] | None = None,
    keep_parts: bool = False,
) -> Denoiser:  # fmt: skip
    """sum_i w_i eps_i of several networks, the score of prod_i p_i^w_i times -sigma; predicts "eps".

    See this module. With weights that sum to 1 it is a geometric mean (w = (1 - s, s) is guidance of the
    second model by the first: first + s (second - first)); one denoiser with w = b is annealing, p^b.
    The state of most noise should then have the variance of the prior over the sum of the weights.

    Arguments:
      denoisers: networks of any single prediction, each evaluated once a call.
      weights: as in `compose`; 1 each by default.
      keep_parts: predict (the sum, eps_1, ..., eps_N), for `jaxdiff.steering`.

    To sample with conditions give cond=(c_1, ..., c_N), one a network, None for one without.
    Raises TypeError or ValueError for no denoisers, or another number of weights than of denoisers.
    """
    denoisers = tuple(denoisers)
    for denoiser in denoisers:
        check_single(denoiser, "product")
    weights = [1.0] * len(denoisers) if weights is None else list(weights)
    if len(weights) != len(denoisers):
        raise ValueError(f"got {len(weights)} weights for {len(denoisers)} denoisers")
    return _experts(denoisers, weights, None, "eps", keep_parts, joint=False)


def _experts(denoisers, weights, null, prediction, keep_parts, joint) -> Denoiser:
    weights = list(weights)
    if not weights:
        raise ValueError("a composition needs at least one weight")
    leaves = tuple(as_scale(weight, "composition") for weight in weights)
    parts = len(weights) + (null is not None)
    memories = tuple(denoiser.memory for denoiser in denoisers)
    return Denoiser(
        fn=_Composed(prediction, keep_parts, joint),
        prediction=(prediction,) * (1 + parts) if keep_parts else prediction,
        params=Experts(denoisers, leaves, as_arrays(null)),
        time=level,
        memory=None if all(memory is None for memory in memories) else memories,
        cost=parts * denoisers[0].cost if joint else sum(d.cost for d in denoisers),
    )


@dataclasses.dataclass(frozen=True)
class _Composed:
    prediction: str
    keep_parts: bool
    joint: bool

    def __call__(self, experts, x, levels, cond=None, memory=None):
        memories = (None,) * len(experts.denoisers) if memory is None else memory
        run = self._jointly if self.joint else self._in_turn
        parts, new = run(experts, x, levels, self._conditions(experts, cond), memories)
        scaled = [times(w, part) for w, part in zip(experts.exponents(*levels), parts)]
        out = jax.tree.map(lambda *leaves: sum(leaves), *scaled)
        out = (out, *parts) if self.keep_parts else out
        return out if memory is None else (out, new)

    def _converted(self, out, x, source, levels):
        return convert(wide(out, x), x, source, self.prediction, *levels[1:])

    def _jointly(self, experts, x, levels, conds, memories):
        """Every condition in one evaluation of a larger batch."""
        (denoiser,), null = experts.denoisers, experts.null
        if null is not None:
            conds = (filled(null, conds[0]), *conds)
        evaluate, kept = keeping(denoiser, memories[0])
        outs = together(evaluate, x, levels, conds)
        return [self._converted(o, x, denoiser.prediction, levels) for o in outs], (kept(),)

    def _in_turn(self, experts, x, levels, conds, memories):
        parts, new = [], []
        for denoiser, c, memory in zip(experts.denoisers, conds, memories):
            out, memory = denoiser.evaluate(x, *levels, c, memory)
            parts.append(self._converted(out, x, denoiser.prediction, levels))
            new.append(memory)
        return parts, tuple(new)

    def _conditions(self, experts, cond):
        count = len(experts.weights)
        if cond is None and not self.joint:
            return (None,) * count
        if not isinstance(cond, (tuple, list)) or len(cond) != count:
            got = len(cond) if isinstance(cond, (tuple, list)) else type(cond).__name__
            raise ValueError(
                f"this composition has {count} weights: sample with cond= a tuple of as many "
                f"conditions, got {got}"
            )
        return tuple(cond)

    def check(self, experts, batch, cond, alpha):
        for weight in experts.weights:
            check_scale(weight, batch, "a weight")
        conds = self._conditions(experts, cond)
        denoisers = experts.denoisers * (len(conds) if self.joint else 1)
        if experts.null is not None:
            denoisers, conds = (denoisers[0], *denoisers), (experts.null, *conds)
        for denoiser, c in zip(denoisers, conds):
            denoiser.check(batch, c, alpha)
