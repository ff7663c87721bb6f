"""The loader: batch number n as a function of (source, seed, n), and of nothing else."""

import functools
import sys
from typing import Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Bool, Int


@runtime_checkable
class Source(Protocol):
    """What `loader` needs of a source; see `jaxdiff.data.sources`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


def loader(
    source: Source,
    batch_size: int,
    seed: int,
    num_epochs: int | None = None,
    shuffle: bool = True,
    flip: bool = False,
    threads: int = 0,
    rows: Int[np.ndarray, " rows"] | None = None,
) -> grain.DatasetIterator:
    """A grain iterator over batches `{"x": [local batch, ...], "label": [local batch]}` of NumPy.

    The stream of examples is one permutation of the source after another, a new one each epoch.
    Global batch n is elements n * batch_size to (n + 1) * batch_size - 1 of it (it may span two
    epochs, so nothing is left out in between); each of several processes yields its own `rows` of
    it. What does not fill a last global batch is dropped.

    `get_state()` is a small dict that counts batches; `set_state(state)` resumes at exactly the
    next one, under any number of processes. orbax saves and restores the iterator itself.

    Args:
      source: anything with `len`, integer indexing to a dict of arrays, and `shape`.
      batch_size: examples a step over all processes.
      seed: 0 to 2**32 - 1; decides every permutation and every flip.
      num_epochs: passes over the source; None never ends.
      shuffle: False keeps the source's order in every epoch.
      flip: mirror images left to right with probability 1/2, decided by the seed, the epoch and the
        example's index in the source.
      threads: threads that read batches ahead; 0 reads on demand, best for data in memory.
      rows: which elements of each global batch are ours, ascending; all by default. In a run of
        several processes, `jaxdiff.parallel.local_rows`.

    Raises:
      ValueError: an argument out of range, fewer examples than one batch, or `flip` of examples that
        are not [height, width, channels].
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be from 0 to {2**32 - 1}, got {seed}")
    if num_epochs is not None and num_epochs < 1:
        raise ValueError(f"num_epochs must be None or at least 1, got {num_epochs}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    if not rows.size or np.any(np.diff(rows) < 1) or not 0 <= rows[0] <= rows[-1] < batch_size:
        raise ValueError(
            f"rows must be some of 0 to {batch_size - 1}, ascending, got {rows.tolist()}"
        )
    if threads < 0:
        raise ValueError(f"threads must be at least 0, got {threads}")
    if len(source) < 1:
        raise ValueError("the source has no examples")
    if flip and len(source.shape) != 3:
        raise ValueError(
            f"flip needs examples of shape [height, width, channels], got {list(source.shape)}"
        )
    steps = sys.maxsize if num_epochs is None else len(source) * num_epochs // batch_size
    if steps == 0:
        raise ValueError(
            f"batch_size must be at most {len(source) * num_epochs}, the examples of "
            f"num_epochs {num_epochs}, got {batch_size}"
        )
    order = functools.partial(_permutation, len(source), seed if shuffle else None)
    mirrored = functools.partial(_coins, len(source), seed) if flip else None
    batches = _Batches(source, steps, batch_size, rows, order, mirrored)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(options))


def _permutation(count: int, seed: int | None, epoch: int) -> Int[np.ndarray, " count"]:
    if seed is None:
        return np.arange(count)
    return np.random.default_rng((seed, epoch)).permutation(count)


def _coins(count: int, seed: int, epoch: int) -> Bool[np.ndarray, " count"]:
    return np.random.default_rng((seed, epoch, 1)).random(count) < 0.5


class _Batches:
    """Random access to our block of every batch.

    grain runs it (state, threads), but does not shuffle and batch it: its shuffle, which never
    writes a permutation down, costs 20 us an example for sets as small as the digits, and each
    further stage several more; here an example costs about 2 us.
    """

    def __init__(self, source, steps, batch_size, rows, order, mirrored):
        self._source = source
        self._steps = steps
        self._batch_size = batch_size
        self._rows = rows
        # Two epochs: a batch may span them, and threads may be one epoch ahead of one another.
        self._order = functools.lru_cache(maxsize=2)(order)
        self._mirrored = mirrored and functools.lru_cache(maxsize=2)(mirrored)

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        positions = step * self._batch_size + self._rows
        examples = [self._example(*divmod(at, len(self._source))) for at in positions.tolist()]
        return {name: np.stack([e[name] for e in examples]) for name in examples[0]}

    def _example(self, epoch: int, rank: int) -> dict[str, np.ndarray]:
        index = int(self._order(epoch)[rank])
        example = self._source[index]
        if self._mirrored is None or not self._mirrored(epoch)[index]:
            return example
        return example | {"x": example["x"][:, ::-1]}
