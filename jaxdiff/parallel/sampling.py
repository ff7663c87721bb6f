"""Sampling with the batch split over devices by hand: `sharded`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxdiff.arrays import as_arrays, structure_hash
from jaxdiff.denoisers import Denoiser
from jaxdiff.noise import BrownianPath, per_sample
from jaxdiff.sampling import check_call
from jaxdiff.solvers.tableau import Tableau

# Which axis of what `sample` returns is the batch.
_BATCH_AXIS = {"final": 0, "trajectory": 1, "nodes": 1, "x0": 1}


def sharded(sample: Callable, mesh: Mesh, axis: str | tuple[str, ...] = "data") -> Callable:
    """`sample`, with the batch split over a mesh axis (or several): no device waits for another.

    Arguments:
      sample: `jaxdiff.sample`, or a function with its arguments.
      mesh: a `jax.sharding.Mesh`; see `mesh`.
      axis: name or names of the axes to split over; the others repeat the work.

    Returns a compiled function

        (denoiser, tableau, x_T, key=None, noise=None, cond=None, save="final", adjoint=None)

    that returns what `sample` returns, still split over `axis`. x_T is split, and with it the keys,
    noise, and every leaf of `cond` whose first axis is the batch; the rest is copied to every
    device. A single key is first made into one key per sample by the sample's index in the whole
    batch, so the numbers are those of `sample` on one device: noise bit for bit, results to
    rounding. Gradients and vmap work from outside; a denoiser's
    parameters get the sum over devices. The default adjoint is `diffrax.DirectAdjoint()`, because
    diffrax's default cannot be differentiated under shard_map.

    Raises, before tracing, what `sample` raises; ValueError for a batch that does not divide by the
    devices, an axis that the mesh has not, `save="state"`, or a denoiser with memory, and TypeError
    for `sample`'s other arguments: use jit with a NamedSharding for those.
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(f"expected a jax.sharding.Mesh, got {type(mesh).__name__}")
    names = (axis,) if isinstance(axis, str) else tuple(axis)
    for name in names:
        if name not in mesh.axis_names:
            raise ValueError(f"the mesh has no axis {name!r}; its axes are {mesh.axis_names}")
    return _Sharded(sample, mesh, names)


@dataclasses.dataclass(frozen=True)
class _Sharded:
    sample: Callable
    mesh: Mesh
    axes: tuple[str, ...]

    def __call__(
        self, denoiser: Denoiser, tableau: Tableau, x_T: Any, key: jax.Array | None = None,
        noise: Any = None, cond: Any = None, save: str = "final",
        adjoint: diffrax.AbstractAdjoint | None = None, **other: Any,
    ) -> Any:  # fmt: skip
        jit = "jit jaxdiff.sample over inputs with a NamedSharding instead"
        if other:
            raise TypeError(f"a sharded sampler takes no {', '.join(other)}: {jit}")
        denoiser, x_T, noise, cond = (
            as_arrays(tree) for tree in (denoiser, x_T, noise, cond)
        )
        check_call(denoiser, tableau, x_T, key, noise, cond, save, adjoint, None)
        if save not in _BATCH_AXIS or denoiser.memory is not None:
            what = "a denoiser with memory" if save in _BATCH_AXIS else f"save={save!r}"
            raise ValueError(f"a sharded sampler takes no {what}: {jit}")
        batch = jax.tree.leaves(x_T)[0].shape[0]
        devices = int(np.prod([self.mesh.shape[name] for name in self.axes]))
        if batch % devices:
            raise ValueError(
                f"a batch of {batch} does not split over the {devices} devices of the mesh axes "
                f"{self.axes}: use a multiple of {devices}"
            )
        tableau = as_arrays(tableau)
        adjoint = diffrax.DirectAdjoint() if adjoint is None else adjoint
        structure = structure_hash(denoiser, tableau, x_T, noise, cond)
        inputs = (denoiser, tableau, x_T, key, noise, cond)
        return _run(self, inputs, batch, save, adjoint, structure)


@eqx.filter_jit
def _run(
    call: _Sharded, inputs: Any, batch: int, save: str, adjoint: Any, structure: int
) -> Any:
    *model, x, key, noise, cond = inputs
    split = P(call.axes)
    noise_specs = P(None, call.axes)
    if key is not None:
        key = per_sample(key, batch)
    if isinstance(noise, BrownianPath):
        noise = dataclasses.replace(noise, key=per_sample(noise.key, batch))
        noise_specs = dataclasses.replace(noise, process=P(), key=split)
    arrays, static = eqx.partition((model, x, key, noise, cond), eqx.is_array)
    cond_specs = jax.tree.map(
        lambda a: split if a.ndim and a.shape[0] == batch else P(), arrays[-1]
    )

    def local(arrays):
        (denoiser, tableau), x, key, noise, cond = eqx.combine(arrays, static)
        return call.sample(
            denoiser, tableau, x, key=key, noise=noise, cond=cond, save=save, adjoint=adjoint
        )

    return jax.shard_map(
        local, mesh=call.mesh, in_specs=((P(), split, split, noise_specs, cond_specs),),
        out_specs=P(*[None] * _BATCH_AXIS[save], call.axes), check_vma=False,
    )(arrays)  # fmt: skip
