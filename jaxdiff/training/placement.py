"""Which device holds what: the mesh of a run, its state and its batches on it."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int
from ml_collections import ConfigDict

from jaxdiff import parallel
from jaxdiff.experiment import Experiment
from jaxdiff.training.state import State


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh, and what lies where on it.

    Attributes:
      mesh: with the axes "data", "fsdp" and "tensor".
      abstract: the state's shapes and dtypes, each with its sharding.
    """

    mesh: Mesh
    abstract: State

    @property
    def state(self) -> State:
        """The state's shardings."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)

    @property
    def batch(self) -> NamedSharding:
        """Of every array of a batch: its examples split over "data" and "fsdp"."""
        return parallel.batch_sharding(self.mesh)

    @property
    def replicated(self) -> NamedSharding:
        """Of what every device holds: the metrics."""
        return NamedSharding(self.mesh, P())

    def rows(self, batch_size: int) -> Int[np.ndarray, " rows"]:
        """The rows of a batch that this process reads."""
        return parallel.local_rows(self.mesh, batch_size)

    def put(self, batch: Mapping[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
        """The global batch, of this process's rows of it."""
        return parallel.put_batch(self.mesh, batch, batch_size)


def place(
    experiment: Experiment, init: Callable[[], State], devices: Sequence[jax.Device] | None = None
) -> Placement:
    """The mesh of config.mesh over the devices (all by default), and the state that `init` makes.

    Parameters lie by config.mesh.rules, then by the network's own rules for the axis "tensor" and
    by size for "fsdp" (`jaxdiff.parallel.partition`); the optimiser's copies and the averages as
    their parameters. Raises ValueError, before anything is computed, for a mesh that does not fit
    the devices, rules that do not fit the network, or a batch that does not split.
    """
    config = experiment.config
    chosen = config.mesh
    try:
        mesh = parallel.mesh(
            devices=devices, data=chosen.data, fsdp=chosen.fsdp, tensor=chosen.tensor
        )
    except ValueError as error:
        raise ValueError(f"config.mesh: {error}") from error
    _check_batch_size(config, mesh)
    return _placed(mesh, init, chosen.rules, getattr(experiment.module, "tensor_rules", ()))


def place_to_read(experiment: Experiment, init: Callable[[], State]) -> Placement:
    """As the run's own mesh where that fits the devices here; else a whole state on each device.

    A warning says so if the run itself had only a part of it on each.
    """
    chosen = experiment.config.mesh
    sizes = {"data": chosen.data, "fsdp": chosen.fsdp, "tensor": chosen.tensor}
    try:
        mesh = parallel.mesh(**sizes)
    except ValueError:
        mesh = parallel.mesh()
        if (chosen.fsdp, chosen.tensor) != (1, 1) and parallel.is_main():
            warnings.warn(
                f"config.mesh (data {chosen.data}, fsdp {chosen.fsdp}, tensor {chosen.tensor}) does "
                f"not fit the devices here, {mesh.size}: each of them holds the whole state",
                stacklevel=4,
            )  # fmt: skip
        return _placed(mesh, init, (), ())
    return _placed(mesh, init, chosen.rules, getattr(experiment.module, "tensor_rules", ()))


def _placed(
    mesh: Mesh, init: Callable[[], State], rules: Sequence[str], tensor_rules: Sequence[str]
) -> Placement:
    shapes = jax.eval_shape(init)
    try:
        specs = parallel.partition(shapes.params, mesh, rules, tensor_rules)
    except ValueError as error:
        raise ValueError(f"config.mesh: {error}") from error
    followed = parallel.follow(shapes, shapes.params, specs)

    def placed(leaf: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return Placement(mesh, jax.tree.map(placed, shapes, followed))


def _check_batch_size(config: ConfigDict, mesh: Mesh) -> None:
    pieces = parallel.shards(mesh) * config.train.accumulate
    if config.train.batch_size % pieces:
        raise ValueError(
            f"config.train.batch_size must be a multiple of {pieces}: {parallel.shards(mesh)} devices "
            f"(data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}) share it, in "
            f"{config.train.accumulate} parts (config.train.accumulate); got "
            f"{config.train.batch_size}"
        )
