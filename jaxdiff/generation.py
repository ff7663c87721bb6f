"""Drawing any number of samples from an experiment, a batch at a time."""

from typing import Any

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from jaxdiff import parallel
from jaxdiff.experiment import Experiment
from jaxdiff.solvers.tableau import Tableau


def generate(
    experiment: Experiment, variables: Any, tableau: Tableau, labels: np.ndarray | None,
    count: int, seed: int, guidance: float = 1.0, batch_size: int = 256, progress: bool = False,
) -> Float[np.ndarray, "count ..."]:  # fmt: skip
    """`count` samples; number i is decided by (seed, i, labels[i]), whatever the batch size.

    `labels` are integers [count], or None for a network without classes. Where the variables lie on
    a mesh of several devices (`jaxdiff.training.restore`, or a state in training), each draws its
    share, and every process gets all samples; all of them have to call. Raises ValueError for a
    count, batch size, label or guidance that does not apply, and FloatingPointError if samples are
    not finite.
    """
    for name, value in (("count", count), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if (labels is None) != (experiment.num_classes is None):
        needed = "no labels" if experiment.num_classes is None else "a label for each sample"
        raise ValueError(f"this network takes {needed}")
    mesh = parallel.mesh_of(variables)
    share = 1 if mesh is None else parallel.shards(mesh)
    batch_size = -(-min(batch_size, count) // share) * share
    found = []
    silent = not (progress and parallel.is_main())
    for start in tqdm(range(0, count, batch_size), unit="batch", disable=silent, leave=False):
        # Batches are filled up with more samples: another shape would compile again, or not split.
        ids = np.arange(start, start + batch_size)
        chosen = None if labels is None else labels[np.minimum(ids, count - 1)]
        drawn = experiment.sample(variables, tableau, chosen, ids, seed, guidance, mesh)
        found.append(parallel.gather(drawn))
    samples = np.concatenate(found)[:count]
    bad = np.flatnonzero(~np.isfinite(samples.reshape(count, -1)).all(axis=1))
    if bad.size:
        raise FloatingPointError(
            f"{bad.size} of {count} samples are not finite, the first is number {bad[0]}"
        )
    return samples


def balanced_labels(experiment: Experiment, count: int) -> np.ndarray | None:
    """`count` labels that go through all classes in turn, or None without classes."""
    if experiment.num_classes is None:
        return None
    return np.arange(count, dtype=np.int32) % experiment.num_classes
