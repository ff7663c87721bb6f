"""Classifier-free guidance by several conditions at once, each with a scale of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.denoisers import Denoiser, wrap
from jaxdiff.guidance.together import (
    Scale,
    as_scale,
    at_level,
    check_conditional,
    check_scale,
    filled,
    times,
    together,
)

FORMS = ("each", "nested")


def multi_conditional(
    denoiser: Denoiser, scales: Mapping[str, Scale], null_cond: Mapping[str, Any],
    form: str = "each",
) -> Denoiser:  # fmt: skip
    """uncond + sum_i s_i (cond_i - base_i), for conditions that the network takes together, as a dict.

        each      base_i = uncond, cond_i has c_i alone
        nested    cond_i has c_1, ..., c_i, and base_i = cond_{i-1}, in the order of `scales`

    "each" is the multi-conditional guidance of SpaText (Avrahami et al., "SpaText: Spatio-Textual
    Representation for Controllable Image Generation", 2023), "nested" that of InstructPix2Pix (Brooks,
    Holynski & Efros, 2023), whose order is image, text. With every scale 1 "nested" is the conditional
    network; "each" then is a product of experts. SpaText's faster joint form, uncond + s (cond -
    uncond) under all conditions at once, is `classifier_free` with the same dicts, 2 evaluations in
    place of N + 1. For conditions that the network takes one at a time see `compose`.

    Arguments:
      scales: {name: s}, numbers, [batch] or functions of (t, alpha, sigma); leaves.
      null_cond: {name: what means none}, broadcast against `cond`'s; the same names as `cond`. One
        that is not among the scales is given in every evaluation.

    Sample with cond={name: condition}. All N + 1 conditions run in one evaluation of N + 1 times the
    batch (cost N + 1). Raises ValueError for no scales, a name without null condition, another form,
    and when sampling, for other names.
    """
    check_conditional(denoiser, "multi-conditional guidance")
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    scales, null_cond = dict(scales), dict(null_cond)
    if not scales or not set(scales) <= set(null_cond):
        raise ValueError(
            f"scales must be of some of the conditions {sorted(null_cond)}, got {sorted(scales)}"
        )
    names = tuple(scales)
    strengths = (
        tuple(as_scale(s, f"multi-conditional guidance, {name}") for name, s in scales.items()),
        jax.tree.map(jnp.asarray, null_cond),
    )
    fn = _Several(names, form)
    cost = (len(names) + 1) * denoiser.cost
    return wrap(fn, denoiser, strengths, denoiser.prediction, cost=cost)


@dataclasses.dataclass(frozen=True)
class _Several:
    names: tuple[str, ...]
    form: str

    def _conds(self, cond: Any, null: Any) -> list[dict[str, Any]]:
        """Those of every evaluation, the unconditional one first."""
        without = {**cond, **{name: null[name] for name in self.names}}
        conds = [without]
        for name in self.names:
            base = conds[-1] if self.form == "nested" else without
            conds.append({**base, name: cond[name]})
        return conds

    def _check_names(self, cond: Any, null: Any) -> None:
        if not isinstance(cond, Mapping) or set(cond) != set(null):
            got = sorted(cond) if isinstance(cond, Mapping) else type(cond).__name__
            raise ValueError(f"this guidance takes cond= a dict of {sorted(null)}, got {got}")

    def check_strengths(self, strengths, batch, alpha):
        for scale in strengths[0]:
            check_scale(scale, batch)

    def check(self, check, strengths, cond):
        self._check_names(cond, strengths[1])
        for given in self._conds(cond, strengths[1]):
            check(given)

    def __call__(self, evaluate, strengths, x, levels, cond):
        scales, null = strengths
        self._check_names(cond, null)
        cond = dict(cond)
        outs = together(evaluate, x, levels, self._conds(cond, filled(null, cond)))
        total = outs[0]
        for i, scale in enumerate(scales, 1):
            base = outs[i - 1] if self.form == "nested" else outs[0]
            apart = jax.tree.map(jnp.subtract, outs[i], base)
            total = jax.tree.map(jnp.add, total, times(at_level(scale, levels), apart))
        return total
