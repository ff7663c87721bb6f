"""Denoisers from Flax networks, Linen and NNX.

Any function fn(params, x, t[, cond]) makes a `Denoiser`; these two turn a network into one, so that
a second denoiser of the same network with other parameters compiles nothing.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx
from jaxtyping import ArrayLike, Float

from jaxdiff.denoisers import Denoiser
from jaxdiff.solvers.tableau import Tableau


@dataclasses.dataclass(frozen=True)
class _LinenFn:
    module: nn.Module
    train: bool
    has_rngs: bool
    method: str | None = None

    def __call__(self, params, x, t, cond=None, keep=None):
        variables, rngs = params if self.has_rngs else (params, None)
        args = () if cond is None else (cond,)
        options = {"train": True} if self.train else {}
        options |= {} if keep is None else {"keep": keep}
        options |= {} if self.method is None else {"method": self.method}
        return self.module.apply(variables, x, t, *args, rngs=rngs, **options)

    def check(self, params, batch, cond, alpha):
        if hasattr(self.module, "check_cond"):
            self.module.check_cond(batch, cond)


@dataclasses.dataclass(frozen=True)
class _NNXFn:
    graphdef: nnx.GraphDef

    def __call__(self, state, x, t, cond=None):
        args = () if cond is None else (cond,)
        return nnx.merge(self.graphdef, state)(x, t, *args)


def from_linen(
    module: nn.Module, params: Mapping[str, Any], prediction: str = "eps",
    time: Callable | None = None, train: bool = False, rngs: Mapping[str, Any] | None = None,
) -> Denoiser:  # fmt: skip
    """Denoiser of a Linen module: module.apply(params, x, t[, cond]).

    Arguments:
      module: takes (x, t) and, if `sample` is given one, cond; `train=True` too if train is set.
      params: all its variables, {"params": ...}, as `module.init` returns them.
      prediction: what it predicts, one of `jaxdiff.predictions.PREDICTIONS`.
      time: (t, alpha, sigma) -> the module's t; None passes t.
      train: call it in training mode.
      rngs: keys for that, e.g. {"dropout": key, "label": key}.

    The denoiser's params are the variables, or (variables, rngs) if rngs are given. For EDM's
    preconditioning pass its parts on: `precondition(d.fn, params=d.params)`. Raises TypeError for a
    module that cannot be hashed (an array or a list in a field), and ValueError for variables
    without "params".
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a Linen module, got {type(module).__name__}")
    try:
        hash(module)
    except TypeError as error:
        raise TypeError(
            f"{type(module).__name__} cannot be hashed: its fields must hold no arrays and no lists"
        ) from error
    if not isinstance(params, Mapping) or "params" not in params:
        found = sorted(params) if isinstance(params, Mapping) else type(params).__name__
        raise ValueError(f'params must be the variables {{"params": ...}}, got {found}')
    fn = _LinenFn(module, train, rngs is not None)
    return Denoiser(fn, prediction, params if rngs is None else (params, rngs), time)


def from_nnx(model: nnx.Module, prediction: str = "eps", time: Callable | None = None) -> Denoiser:
    """Denoiser of an NNX module: model(x, t[, cond]).

    The model is split once; the denoiser's params are its whole state. A call leaves that state as
    it is, so random layers would repeat their draw: call `model.eval()` first. `prediction` and
    `time` as in `from_linen`. Raises TypeError for anything but an NNX module.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"expected an NNX module, got {type(model).__name__}")
    graphdef, state = nnx.split(model)
    return Denoiser(_NNXFn(graphdef), prediction, state, time)


def skip_blocks(
    denoiser: Denoiser, keep: Float[ArrayLike, "rows blocks"], tableau: Tableau
) -> Denoiser:
    """The denoiser, without some blocks of its network in each row of a sampler.

    A block is x + keep f(x): row r evaluates with the mask keep[r], 0 to skip and 1 to keep, in the
    order of the network's `blocks(shape)`. A denoiser is told the time and not the row, so it takes
    the mask of the row whose time is nearest, the first of equals: give rows of one time one mask.
    Masks are leaves: new ones compile nothing, and they may be stacked with the tableau under
    `vmap`. The blocks are evaluated all the same: a mask says what a network without them would
    give, not how fast it would be.

    Arguments:
      denoiser: of `from_linen` with a network that takes `keep`, such as those of `jaxdiff.models`,
        or of any fn(params, x, t[, cond], keep=mask); guidance and thresholding come after it.

    Raises TypeError for a denoiser whose function takes no `keep`, ValueError for a mask of another
    number of rows or, when sampling, of blocks.
    """
    if not isinstance(denoiser, Denoiser) or not _takes_keep(denoiser.fn):
        raise TypeError("skip_blocks takes the network's own denoiser, whose fn takes keep=")
    keep = jnp.asarray(keep, jnp.result_type(float))
    if keep.ndim != 2 or len(keep) != tableau.rows:
        raise ValueError(
            f"keep must be [rows, blocks] with {tableau.rows} rows, got shape {keep.shape}"
        )
    level = tableau.t, tableau.alpha, tableau.sigma
    times = level[0] if denoiser.time is None else denoiser.time(*level)
    params = denoiser.params, keep, times
    return dataclasses.replace(denoiser, fn=_Skipping(denoiser.fn), params=params)


def _takes_keep(fn: Callable) -> bool:
    if isinstance(fn, _LinenFn):
        fn = type(fn.module).__call__
    return "keep" in inspect.signature(fn).parameters


@dataclasses.dataclass(frozen=True)
class _Skipping:
    fn: Callable

    def __call__(self, params, x, t, cond=None, **options):
        params, keep, times = params
        nearest = jnp.argmin(jnp.abs(jnp.asarray(t)[..., None] - times), -1)
        args = () if params is None else (params,)
        args += (x, t) if cond is None else (x, t, cond)
        return self.fn(*args, keep=keep[nearest], **options)

    def check(self, params, batch, cond, alpha):
        if hasattr(self.fn, "check"):
            self.fn.check(params[0], batch, cond, alpha)
