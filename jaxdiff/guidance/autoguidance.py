"""Autoguidance: a bad version of a model guides the good one."""

from __future__ import annotations

import dataclasses

from jaxdiff.denoisers import Denoiser, check_known, check_single, level
from jaxdiff.guidance.together import Scale, as_scale, at_level, check_scale, extrapolated, wide
from jaxdiff.predictions import convert


def autoguidance(
    denoiser: Denoiser, bad: Denoiser, scale: Scale, each_cond: bool = False
) -> Denoiser:
    """bad + s (good - bad): s = 1 is the good model alone, s = 0 the bad one.

    Karras, Aittala, Kynkaanniemi, Lehtinen, Aila & Laine, "Guiding a Diffusion Model with a Bad Version
    of Itself" (2024). A smaller or less trained network makes the same mistakes, only larger, so the
    way from it to the good one leads on to the data; unlike the way from an unconditional model it
    needs no condition, and costs no variety. With an unconditional network as `bad` it is
    classifier-free guidance by two networks.

    Arguments:
      denoiser: the good model; the result predicts what it does (`bad` is converted). Parameters of
        another training step, `dataclasses.replace(denoiser, params=...)`, make a bad one.
      scale: s, a number, [batch] or a function of (t, alpha, sigma); the paper's are 1.7 to 2.9.
      each_cond: `cond` is a pair, for the good model and for the bad one; else both get the same.

    The networks run one after the other; the cost is the sum of theirs, a memory a pair of theirs. For
    an interval see `jaxdiff.guidance.limited`. Raises TypeError or ValueError for anything but two
    denoisers of one prediction each, or when sampling, for no pair of conditions.
    """
    for model in (denoiser, bad):
        check_single(model, "autoguidance")
    memories = (denoiser.memory, bad.memory)
    return Denoiser(
        _Auto((denoiser.prediction, bad.prediction), bool(each_cond)), denoiser.prediction,
        ((denoiser, bad), as_scale(scale, "autoguidance")), level,
        memory=None if memories == (None, None) else memories, cost=denoiser.cost + bad.cost,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Auto:
    predictions: tuple[str, str]
    each_cond: bool

    def _conds(self, cond):
        if not self.each_cond:
            return cond, cond
        if not isinstance(cond, (tuple, list)) or len(cond) != 2:
            raise ValueError(f"each_cond=True: cond must be a pair of conditions, got {cond!r}")
        return tuple(cond)

    def __call__(self, params, x, levels, cond=None, memory=None):
        models, scale = params
        outs, kept = [], []
        memories = (None, None) if memory is None else memory
        for model, own, given in zip(models, memories, self._conds(cond)):
            out, own = model.evaluate(x, *levels, given, own)
            outs.append(wide(out, x))
            kept.append(own)
        bad = convert(outs[1], x, *reversed(self.predictions), *levels[1:])
        out = extrapolated(bad, outs[0], at_level(scale, levels))
        return out if memory is None else (out, tuple(kept))

    def check(self, params, batch, cond, alpha):
        for model, given in zip(params[0], self._conds(cond)):
            model.check(batch, given, alpha)
        check_scale(params[1], batch)
        good, bad = self.predictions
        check_known(bad, good, alpha, "autoguidance, the bad model")
