"""Which array namespace a formula runs in.

Schedules, grids and tableaux are written once and run twice: in float64 NumPy on the host by
default, in JAX when a value is traced (someone differentiates or vmaps over a schedule or a grid).
"""

import functools
from collections.abc import Callable
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


def as_arrays(tree: Any) -> Any:
    """The tree with numbers and NumPy arrays as JAX arrays; other leaves, flags too, unchanged.

    A Python number would be part of the program: as an array, a new guidance scale is new data.
    """
    if all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree)):
        return tree  # nothing to rebuild, in what is often the longest part of a small call
    return jax.tree.map(_as_array, tree)


def _as_array(leaf):
    if isinstance(leaf, (np.ndarray, np.generic)):
        return jnp.asarray(_narrowed(leaf))
    number = isinstance(leaf, (int, float)) and not isinstance(leaf, bool)
    return jnp.asarray(leaf) if number else leaf


def jit_trees(fn: Callable) -> Callable:
    """`jax.jit` for pytrees of anything: `fn(*trees)` traces the arrays, all other leaves are static.

    `equinox.filter_jit` for positional arguments and results of arrays alone, with less to do a call.
    NumPy arrays stay on the host until the compiled function places them: one by one, a table's took
    as long as a small network's call. Structures are told apart as by `structure_hash`.
    """

    @functools.partial(jax.jit, static_argnums=(0, 1, 2))
    def run(treedef, static, structure, arrays):
        arrays = iter(arrays)
        leaves = [next(arrays) if leaf is _ARRAY else leaf for leaf in static]
        return fn(*jax.tree.unflatten(treedef, leaves))

    @functools.wraps(fn)
    def call(*trees):
        leaves, treedef = jax.tree.flatten(trees)
        static = tuple(_ARRAY if isinstance(leaf, _ARRAYS) else leaf for leaf in leaves)
        arrays = [_narrowed(leaf) for leaf in leaves if isinstance(leaf, _ARRAYS)]
        return run(treedef, static, hash(treedef), arrays)

    return call


def _narrowed(leaf: Any) -> Any:
    # jax 0.10.2 may keep float64 with x64 off once it was on in the process.
    if isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype.itemsize >= 8:
        return np.asarray(leaf, jax.dtypes.canonicalize_dtype(leaf.dtype))
    return leaf


_ARRAYS = (jax.Array, np.ndarray, np.generic)
_ARRAY = object()
