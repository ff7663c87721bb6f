"""LoRA: a network's change kept as products of narrow matrices, to train, store and hand on."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, ArrayLike

Adapter = dict[str, dict[str, Array]]


def lora(
    key: Array, variables: Mapping[str, Any], rank: int = 4, match: str = r"kernel$"
) -> Adapter:
    """A new adapter for a network's variables: no change yet.

        W + strength D U,    D [inputs, rank] ~ N(0, 1 / inputs),    U [rank, outputs] = 0

    for every kernel W [..., outputs], read as the matrix [inputs, outputs] (a convolution's inputs are
    all values of its window). Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2022),
    with their alpha / rank in `strength`.

    Arguments:
      variables: {"params": ...} of a Linen module.
      rank: at least 1; no more than a kernel has inputs or outputs is used of it.
      match: regular expression searched in "block/layer/kernel"; the kernels that it finds (arrays of
        two axes or more) are adapted.

    Returns {path: {"down": D, "up": U}}, a pytree to differentiate: `add_lora` applies it. Raises
    ValueError for variables without "params", a rank below 1, or a pattern that finds no kernel.
    """
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise ValueError('variables must be {"params": ...}')
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or rank < 1:
        raise ValueError(f"rank must be a positive integer, got {rank!r}")
    flat = flatten_dict(variables["params"], sep="/")
    found = [path for path in sorted(flat) if re.search(match, path) and flat[path].ndim > 1]
    if not found:
        raise ValueError(f"no kernel matches {match!r}; there are {sorted(flat)}")
    adapter = {}
    for path, one in zip(found, jax.random.split(key, len(found))):
        outputs = flat[path].shape[-1]
        inputs = flat[path].size // outputs
        width = min(rank, inputs, outputs)
        down = jax.random.normal(one, (inputs, width)) / np.sqrt(inputs)
        adapter[path] = {"down": down, "up": jnp.zeros((width, outputs))}
    return adapter


def add_lora(
    variables: Mapping[str, Any], adapter: Adapter, strength: ArrayLike = 1.0
) -> dict[str, Any]:
    """The variables with `strength` times an adapter's change added; 0 is the network itself.

    Strengths may be negative, above 1, or traced, and adapters of one network fit any other of its
    shapes, such as the one distilled from it. Raises ValueError for a path or a shape that the
    variables do not have.
    """
    flat = flatten_dict(variables["params"], sep="/")
    for path, pair in adapter.items():
        if path not in flat:
            raise ValueError(f"the adapter changes {path!r}; the variables have {sorted(flat)}")
        kernel, change = flat[path], pair["down"] @ pair["up"]
        if change.size != kernel.size or change.shape[1] != kernel.shape[-1]:
            raise ValueError(
                f"the adapter changes a kernel {path!r} of {change.shape[0]} x {change.shape[1]}, the "
                f"variables' has shape {kernel.shape}"
            )
        flat[path] = kernel + (strength * change).reshape(kernel.shape).astype(kernel.dtype)
    return {**variables, "params": unflatten_dict(flat, sep="/")}
