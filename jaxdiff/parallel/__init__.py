"""Several devices, and several processes.

Sampling, two ways, with the same numbers as on one device:

- `jax.jit` over inputs with a `NamedSharding`: takes everything `jaxdiff.sample` takes, and lets
  the compiler place the work;
- `sharded(jaxdiff.sample, mesh)`: every device runs its own slice of the batch, with no
  communication at all.

Your own `jax.shard_map` or `jax.pmap` around `jaxdiff.sample` works too: pass one key per sample
(`jaxdiff.sample_keys`), `adjoint=diffrax.DirectAdjoint()` to differentiate inside, and to
`shard_map` `check_vma=False`.

Training: `mesh` and `partition` (rules: parameter path -> PartitionSpec) say which device holds
what, `initialize` joins the processes of a run; see `jaxdiff.training`.
"""

from jaxdiff.parallel.meshes import (
    batch_sharding,
    local_rows,
    mesh,
    mesh_of,
    put_batch,
    shards,
    split_batch,
)
from jaxdiff.parallel.processes import (
    abandon,
    agreed,
    barrier,
    everywhere,
    gather,
    initialize,
    is_main,
    same,
)
from jaxdiff.parallel.rules import follow, partition
from jaxdiff.parallel.sampling import sharded

__all__ = [
    "abandon",
    "agreed",
    "barrier",
    "batch_sharding",
    "everywhere",
    "follow",
    "gather",
    "initialize",
    "is_main",
    "local_rows",
    "mesh",
    "mesh_of",
    "partition",
    "put_batch",
    "same",
    "sharded",
    "shards",
    "split_batch",
]
