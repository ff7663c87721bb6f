"""Meshes, and batches on them."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

# The axes that a batch is split over; the others hold the same examples.
DATA_AXES = ("data", "fsdp")


def mesh(*, devices: Sequence[jax.Device] | None = None, **axes: int) -> Mesh:
    """A device mesh with the given axes in order, for example `mesh(data=4, fsdp=2)`.

    One size may be -1: what is left of the devices. No axis is `mesh(data=-1)`. The axes have
    type `Auto`: JAX's own default since 0.7, `Explicit`, breaks ordinary Flax modules. `devices`
    are all of them by default. Raises ValueError if the sizes do not multiply to their number.
    """
    axes = axes or {"data": -1}
    count = jax.device_count() if devices is None else len(devices)
    sizes = list(axes.values())
    known = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) == 1 and known > 0 and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if min(sizes) < 1 or int(np.prod(sizes)) != count:
        raise ValueError(
            f"the mesh axes {axes} must be positive (one may be -1) and multiply to the {count} "
            "devices"
        )
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(sizes), tuple(axes), axis_types=kinds, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples split over the mesh's axes "data" and "fsdp", the same ones along the others."""
    return NamedSharding(mesh, P(tuple(name for name in mesh.axis_names if name in DATA_AXES)))


def shards(mesh: Mesh) -> int:
    """Into how many pieces `batch_sharding` splits a batch."""
    return int(np.prod([mesh.shape[name] for name in DATA_AXES if name in mesh.axis_names]))


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that a tree of arrays lies on; None if it lies on one device, or on no mesh."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


def local_rows(mesh: Mesh, batch_size: int) -> Int[np.ndarray, " rows"]:
    """The rows of a batch that this process's devices hold, ascending.

    They need not be consecutive: a mesh follows the network between the devices, not the order of
    the processes. Two processes hold the same rows where an axis that does not split the batch
    ("tensor") runs across them.
    """
    found = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in found]))


def put_batch(mesh: Mesh, rows: Any, batch_size: int) -> Any:
    """Global arrays [batch_size, ...] from this process's `local_rows` of them (a tree)."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda a: jax.make_array_from_process_local_data(sharding, a, (batch_size, *a.shape[1:])),
        rows,
    )


def split_batch(mesh: Mesh, whole: Any) -> Any:
    """Arrays (or typed keys) that every process holds whole, split by `batch_sharding`."""
    sharding = batch_sharding(mesh)

    def put(array):
        if not jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
            host = np.asarray(array)
            return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
        kind = jax.random.key_impl(array)
        return jax.random.wrap_key_data(put(jax.random.key_data(array)), impl=kind)

    return jax.tree.map(put, whole)
