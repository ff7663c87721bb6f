"""The loader: one stream, whatever the number of processes, and exact resume."""

import collections

import numpy as np
import pytest

from jaxdiff import data


def _numbered(count):
    """A source whose label is the example's index, and whose x says it too, twice."""
    x = np.arange(count)[:, None, None, None] + np.zeros((1, 1, 2, 1))
    x[:, :, 1] += 0.5  # the right pixel, so that a mirror shows
    return data.arrays({"x": x, "label": np.arange(count)}, bounds=None)


def _take(iterator, count):
    return [next(iterator) for _ in range(count)]


def _labels(batches):
    return np.concatenate([batch["label"] for batch in batches])


def test_batches_hold_matching_examples():
    batch = next(data.loader(_numbered(10), batch_size=4, seed=0))
    assert batch["x"].shape == (4, 1, 2, 1) and batch["x"].dtype == np.float32
    assert batch["label"].shape == (4,) and batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["x"][:, 0, 0, 0], batch["label"])
    unlabelled = data.arrays({"x": np.zeros((3, 2))}, label_key=None)
    assert set(next(data.loader(unlabelled, batch_size=2, seed=0))) == {"x"}


def test_every_epoch_is_another_permutation():
    # Batches of 4 span the epochs of 10: five batches are two whole epochs.
    stream = _labels(_take(data.loader(_numbered(10), batch_size=4, seed=3), 15)).reshape(6, 10)
    np.testing.assert_array_equal(np.sort(stream, axis=1), np.tile(np.arange(10), (6, 1)))
    assert len({tuple(epoch) for epoch in stream.tolist()}) == 6


def test_permutations_are_uniform():
    # 24 permutations of 4 examples, 4,800 epochs: each expected 200 times, standard deviation 13.8.
    stream = _labels(_take(data.loader(_numbered(4), batch_size=400, seed=0), 48)).reshape(-1, 4)
    counts = collections.Counter(map(tuple, stream.tolist()))
    assert len(counts) == 24
    chi_squared = sum((n - 200) ** 2 / 200 for n in counts.values())
    assert chi_squared < 49.7  # 23 degrees of freedom: exceeded with probability 0.001


def test_same_seed_same_batches_other_seed_others():
    first, again, other = (
        _labels(_take(data.loader(_numbered(50), 10, seed), 5)) for seed in (7, 7, 8)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_without_shuffle_the_order_is_the_sources():
    labels = _labels(_take(data.loader(_numbered(5), 4, seed=0, shuffle=False), 5))
    np.testing.assert_array_equal(labels, np.tile(np.arange(5), 4))


def test_finite_epochs_drop_the_remainder():
    batches = list(data.loader(_numbered(10), batch_size=4, seed=0, num_epochs=2))
    assert [len(batch["label"]) for batch in batches] == [4, 4, 4, 4, 4]
    batches = list(data.loader(_numbered(10), batch_size=4, seed=0, num_epochs=1))
    assert len(batches) == 2 and len(set(_labels(batches))) == 8
    # With 3 processes of 2 examples the last, unfilled global batch is dropped by all of them.
    lengths = [
        len(list(data.loader(_numbered(10), 6, 0, num_epochs=1, rows=rows)))
        for rows in np.arange(6).reshape(3, 2)
    ]
    assert lengths == [1, 1, 1]


@pytest.mark.parametrize("processes", [2, 3, 6])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("threads", [0, 2])
def test_rows_of_all_processes_are_the_global_batch(processes, interleaved, threads):
    source = _numbered(17)
    whole = _take(data.loader(source, 12, seed=5, flip=True), 6)
    rows = np.arange(12).reshape((-1, processes) if interleaved else (processes, -1))
    for ours in rows.T if interleaved else rows:
        part = _take(data.loader(source, 12, 5, rows=ours, flip=True, threads=threads), 6)
        for step, batch in enumerate(whole):
            for name in ("x", "label"):
                np.testing.assert_array_equal(part[step][name], batch[name][ours])


@pytest.mark.parametrize("threads", [0, 2])
def test_state_resumes_at_the_next_batch(threads):
    def make(**options):
        return data.loader(_numbered(17), 6, seed=1, flip=True, threads=threads, **options)

    iterator = make()
    _take(iterator, 4)
    state = iterator.get_state()
    rest = _take(iterator, 5)
    resumed = make()
    next(resumed)  # a used iterator is moved just as well
    resumed.set_state(state)
    for got, want in zip(_take(resumed, 5), rest, strict=True):
        np.testing.assert_array_equal(got["x"], want["x"])
        np.testing.assert_array_equal(got["label"], want["label"])
    # The state counts global steps: another number of processes goes on with the same batches.
    halves = [make(rows=rows) for rows in np.arange(6).reshape(2, 3)]
    for half in halves:
        half.set_state(state)
    joined = np.concatenate([next(half)["x"] for half in halves])
    np.testing.assert_array_equal(joined, rest[0]["x"])


def test_flips_mirror_half_the_images_and_change_with_the_epoch():
    stream = _take(data.loader(_numbered(500), 500, seed=0, flip=True), 4)
    flipped = np.empty((4, 500), bool)
    for epoch, batch in enumerate(stream):
        left, right = batch["x"][:, 0, 0, 0], batch["x"][:, 0, 1, 0]
        np.testing.assert_array_equal(np.sort([left, right], axis=0)[0], batch["label"])
        np.testing.assert_array_equal(np.abs(left - right), 0.5)
        flipped[epoch, batch["label"]] = left > right
    assert abs(flipped.mean() - 0.5) < 4 * 0.5 / np.sqrt(flipped.size)
    # Independent between epochs: two of them agree on half the images.
    assert abs((flipped[0] == flipped[1]).mean() - 0.5) < 4 * 0.5 / np.sqrt(500)
    # Decided by seed, epoch and index alone: the same without the shuffle.
    x = next(data.loader(_numbered(500), 500, seed=0, flip=True, shuffle=False))["x"]
    np.testing.assert_array_equal(x[:, 0, 0, 0] > x[:, 0, 1, 0], flipped[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 4, "rows": [3, 4]}, r"some of 0 to 3, ascending, got \[3, 4\]"),
        ({"batch_size": 4, "rows": [3, 3]}, r"some of 0 to 3, ascending, got \[3, 3\]"),
        ({"batch_size": 4, "rows": [2, 1]}, r"some of 0 to 3, ascending, got \[2, 1\]"),
        ({"batch_size": 4, "rows": []}, r"some of 0 to 3, ascending, got \[\]"),
        ({"batch_size": 4, "seed": -1}, "seed must be from 0 to 4294967295, got -1"),
        ({"batch_size": 4, "num_epochs": 0}, "num_epochs must be None or at least 1, got 0"),
        ({"batch_size": 21, "num_epochs": 2}, "at most 20, the examples of num_epochs 2, got 21"),
        ({"batch_size": 4, "threads": -1}, "threads must be at least 0, got -1"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        data.loader(_numbered(10), **({"seed": 0} | options))


def test_bad_sources_are_named():
    with pytest.raises(ValueError, match="no examples"):
        data.loader(data.ArraySource(np.zeros((0, 2))), batch_size=1, seed=0)
    vectors = data.arrays({"x": np.zeros((4, 2))}, label_key=None)
    with pytest.raises(ValueError, match=r"height, width, channels\], got \[2\]"):
        data.loader(vectors, batch_size=2, seed=0, flip=True)
