"""Which device holds which part of a parameter: rules "regex=axis,axis".

A rule is a regular expression, searched for in a parameter's path ("params/block_0/mlp_in/kernel"),
and a comma-separated `PartitionSpec`: for each dimension the mesh axis that splits it, "-" for
none, or several joined by "+". Dimensions that it does not name are not split.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxdiff.names import unknown


def partition(
    params: Any, mesh: Mesh, rules: Sequence[str] = (), tensor_rules: Sequence[str] = ()
) -> Any:
    """A `PartitionSpec` for each parameter (arrays or `jax.ShapeDtypeStruct`s).

    The first of `rules` that matches decides alone. Without one, the first match of `tensor_rules`
    (the network's own, used where the mesh's axis "tensor" is larger than 1) places that axis, and
    then "fsdp" splits the largest of the other dimensions that it divides, if any.

    Raises ValueError for a rule that cannot be read, names an axis that the mesh has not or more
    dimensions than a parameter has, does not divide it, or (of `rules`) matches nothing, or only
    parameters that earlier rules match; and for a mesh whose tensor axis no rule uses.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(params)
    flat = [(_name(path), leaf.shape) for path, leaf in flat]
    own = [_parse(rule, mesh, f"rule {rule!r}") for rule in rules]
    _check_used(rules, own, [name for name, _ in flat])
    used = mesh.shape.get("tensor", 1) > 1
    network = [_parse(rule, mesh, f"rule {rule!r}") for rule in tensor_rules] if used else []
    if used and not network and not any("tensor" in _axes(axes) for _, axes in own):
        raise ValueError(
            f"the mesh splits tensors by {mesh.shape['tensor']}, but this network has no rules for "
            'it: use "fsdp" for that many devices, or write rules that name the axis "tensor"'
        )
    found = []
    for name, shape in flat:
        axes = _first(own, name)
        if axes is None:
            axes = _add_fsdp(_check(_first(network, name) or (), name, shape, mesh), shape, mesh)
        found.append(P(*_check(axes, name, shape, mesh)))
    return structure.unflatten(found)


def follow(tree: Any, params: Any, specs: Any) -> Any:
    """Specs for a tree that holds copies of the parameters: optimiser states, averages.

    A leaf whose path ends in a parameter's path, with that parameter's shape, gets its spec; the
    others (counters, keys) are whole on every device.
    """
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    is_spec = lambda leaf: isinstance(leaf, P)  # noqa: E731
    spec_leaves = jax.tree.leaves(specs, is_leaf=is_spec)
    known = {
        (_name(path), leaf.shape): spec for (path, leaf), spec in zip(flat, spec_leaves, strict=True)
    }

    def of(path, leaf):
        parts = _name(path).split("/")
        endings = ("/".join(parts[start:]) for start in range(len(parts)))
        return next((known[e, leaf.shape] for e in endings if (e, leaf.shape) in known), P())

    return jax.tree_util.tree_map_with_path(of, tree)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _parse(rule: str, mesh: Mesh, where: str) -> tuple[re.Pattern, tuple]:
    """(pattern, for each dimension None or a tuple of axes)"""
    text, equals, spec = rule.rpartition("=")
    if not equals or not text:
        raise ValueError(f"{where} must be 'regex=axis,axis', for example 'mlp_in/kernel=-,tensor'")
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise ValueError(f"{where} has no regular expression before '=': {error}") from error
    axes = tuple(
        None if part.strip() in ("-", "") else tuple(a.strip() for a in part.split("+"))
        for part in spec.split(",")
    )
    for axis in _axes(axes):
        if axis not in mesh.axis_names:
            raise ValueError(f"{where}: {unknown('the mesh has no axis', axis, mesh.axis_names)}")
    if len(set(_axes(axes))) < len(_axes(axes)):
        raise ValueError(f"{where} uses an axis twice")
    return pattern, axes


def _check_used(
    rules: Sequence[str], parsed: Sequence[tuple[re.Pattern, tuple]], names: Sequence[str]
) -> None:
    """Raise ValueError for a rule that decides nothing."""
    left = list(names)
    for rule, (pattern, _) in zip(rules, parsed, strict=True):
        matched = [name for name in names if pattern.search(name)]
        if not matched:
            some = ", ".join(names[:4])
            raise ValueError(f"rule {rule!r} matches none of the parameters {some}, ...")
        if not set(matched) & set(left):
            raise ValueError(
                f"rule {rule!r} decides nothing: rules before it match all of its parameters, "
                f"{', '.join(matched[:4])}; put it first"
            )
        left = [name for name in left if name not in matched]


def _axes(axes: tuple) -> list[str]:
    return [name for names in axes if names for name in names]


def _first(rules: Sequence[tuple[re.Pattern, tuple]], name: str) -> tuple | None:
    return next((axes for pattern, axes in rules if pattern.search(name)), None)


def _check(axes: tuple, name: str, shape: tuple[int, ...], mesh: Mesh) -> tuple:
    if len(axes) > len(shape):
        raise ValueError(
            f"a rule names {len(axes)} dimensions, but {name} has shape {list(shape)}"
        )
    for dimension, names in enumerate(axes):
        size = int(np.prod([mesh.shape[n] for n in names or ()]))
        if shape[dimension] % size:
            raise ValueError(
                f"{' x '.join(names)} = {size} does not divide dimension {dimension} of {name}, "
                f"whose shape is {list(shape)}"
            )
    return axes


def _add_fsdp(axes: tuple, shape: tuple[int, ...], mesh: Mesh) -> tuple:
    size = mesh.shape.get("fsdp", 1)
    axes = axes + (None,) * (len(shape) - len(axes))
    free = [d for d in range(len(shape)) if axes[d] is None and shape[d] and shape[d] % size == 0]
    if size == 1 or not free or "fsdp" in _axes(axes):
        return axes
    chosen = max(free, key=lambda d: (shape[d], d))
    return tuple(("fsdp",) if d == chosen else names for d, names in enumerate(axes))
