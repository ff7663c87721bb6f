"""Which array namespace a formula runs in.

Schedules, grids and tableaux are written once and run twice: in float64 NumPy on the host by
default, in JAX when a value is traced (someone differentiates or vmaps over a schedule or a grid).
"""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def namespace(*values: Any) -> ModuleType:
    """`jax.numpy` if any leaf of `values` is a JAX array or tracer, else `numpy`."""
    leaves = jax.tree.leaves(values)
    return jnp if any(isinstance(leaf, jax.Array) for leaf in leaves) else np


def is_concrete(*values: Any) -> bool:
    """Whether every leaf has a value that the host may look at (no tracer among them)."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def to_batch(coefficient: Any, x: Any) -> Any:
    """Reshape a `[batch]` coefficient so that it multiplies `x` of shape `[batch, ...]`.

    Scalars, and arrays that already have several axes, pass unchanged.
    """
    shape = np.shape(coefficient)
    if len(shape) != 1:
        return coefficient
    return coefficient.reshape(shape + (1,) * (np.ndim(x) - 1))


def structure_hash(*trees: Any) -> int:
    """A hash of the structure of pytrees, to pass along as a static argument.

    jaxlib 0.10 calls the structures of two registered dataclasses with the same fields equal, so a
    jitted function would run the program of one class for the other. Their hashes differ.
    """
    return hash(jax.tree.structure(trees))


def as_array(leaf: Any) -> Any:
    """Numbers and NumPy arrays as JAX arrays; anything else, flags included, unchanged.

    A Python number would be part of the program: as an array, a new guidance scale is new data.
    """
    if isinstance(leaf, (np.ndarray, np.generic)):
        # Named, because jax 0.10.2 may keep float64 with x64 off once it was on in the process.
        return jnp.asarray(leaf, jax.dtypes.canonicalize_dtype(leaf.dtype))
    number = isinstance(leaf, (int, float)) and not isinstance(leaf, bool)
    return jnp.asarray(leaf) if number else leaf
