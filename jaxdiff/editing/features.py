"""Blocks of a Flax network inside a denoiser: their outputs read, or replaced, by the block's name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from jaxdiff.arrays import as_arrays
from jaxdiff.denoisers import Denoiser, check_single, wrap


def block_outputs(
    denoiser: Denoiser, names: Sequence[str], x: Any, t: ArrayLike, alpha: ArrayLike,
    sigma: ArrayLike, cond: Any = None,
) -> dict[str, Array]:  # fmt: skip
    """{name: output} of the network's blocks `names` in the evaluation of x at (t, alpha, sigma).

    Names are those of Linen submodules: of `jaxdiff.models.UNet`, its `blocks(shape)`, such as
    "middle_block_1", whose output is the bottleneck. Under guidance batches are doubled. The network
    must not be rematerialised. Raises ValueError for a name that is not called.
    """
    found: dict[str, Array] = {}

    def keep(name, out):
        found[name] = out
        return out

    with nn.intercept_methods(_at_blocks(tuple(names), keep)):
        denoiser(x, t, alpha, sigma, cond)
    _check_called(names, found)
    return found


def replace_block(denoiser: Denoiser, name: str, value: Array, t: ArrayLike) -> Denoiser:
    """The denoiser with the output of block `name` replaced by `value` at times from `t` on.

    Later in sampling (at smaller times) the network's own output counts. `value` has the shape of that
    output, and both it and `t` are leaves.
    """
    check_single(denoiser, "replace_block")
    return wrap(_Replacing(name), denoiser, as_arrays((value, t)), denoiser.prediction)


@dataclasses.dataclass(frozen=True)
class _Replacing:
    name: str

    def __call__(self, evaluate, strengths, x, levels, cond):
        (value, since), called = strengths, []

        def replace(name, out):
            called.append(name)
            if out.shape != value.shape:
                raise ValueError(
                    f"block {name!r} has an output of shape {out.shape}, its replacement {value.shape}"
                )
            # A time that came as float32 is not below its own double.
            early = jnp.asarray(levels[0]) >= since * (1 - 1e-6)
            early = early.reshape(-1, *(1,) * (out.ndim - 1)) if jnp.ndim(early) else early
            return jnp.where(early, value.astype(out.dtype), out)

        with nn.intercept_methods(_at_blocks((self.name,), replace)):
            out = evaluate(x, *levels, cond)
        _check_called((self.name,), called)
        return out


def _at_blocks(names: tuple[str, ...], act: Callable[[str, Any], Any]) -> Callable:
    def interceptor(call, args, kwargs, context):
        out = call(*args, **kwargs)
        mine = context.module.name in names and context.method_name == "__call__"
        return act(context.module.name, out) if mine else out

    return interceptor


def _check_called(names: Sequence[str], called: Any) -> None:
    for name in names:
        if name not in called:
            raise ValueError(
                f"the network calls no block {name!r}: of a UNet, take one of network.blocks(shape)"
            )
