"""The evolutionary search: a known optimum, every genotype scored once, and what it refuses."""

import collections

import numpy as np
import pytest

from jaxdiff.calibration import evolve

TARGET = (3, 1, 4, 1, 5, 9, 2, 6)


def distance(genotype):
    return sum(abs(a - b) for a, b in zip(genotype, TARGET))


def mutate(genotype, rng):
    return tuple(int(rng.integers(10)) if rng.random() < 0.25 else g for g in genotype)


def cross(one, other, rng):
    return tuple(a if rng.random() < 0.5 else b for a, b in zip(one, other))


def newcomer(rng):
    return tuple(rng.integers(10, size=len(TARGET)).tolist())


COUNTS = {"generations": 30, "parents": 10, "mutated": 25, "crossed": 10, "newcomers": 15}


def search(score=lambda batch: [distance(g) for g in batch], initial=((0,) * 8,), **options):
    return evolve(score, initial, mutate, cross, newcomer, **{**COUNTS, **options})


def test_the_optimum_of_ten_to_the_eight_is_found():
    """In 1501 scores; as many newcomers alone come nowhere near."""
    found = search()
    assert found.genotype == TARGET and found.score == 0
    assert len(found.seen) == 1 + 30 * 50
    random = search(mutated=0, crossed=0, newcomers=50)
    assert len(random.seen) == 1501 and random.score > 5


@pytest.mark.parametrize("kind", ["mutated", "crossed"])
def test_both_kinds_of_children_help(kind):
    counts = {"mutated": 0, "crossed": 0, "newcomers": 15, kind: 35}
    assert search(**counts).score < search(mutated=0, crossed=0, newcomers=50).score


def test_each_genotype_is_scored_once_and_the_best_never_gets_worse():
    calls, batches = collections.Counter(), []

    def score(batch):
        calls.update(batch)
        batches.append(list(batch))
        return [distance(g) for g in batch]

    initial = [(0,) * 8, (9,) * 8, (0,) * 8]
    found = search(score, initial, generations=6)
    assert max(calls.values()) == 1
    assert batches[0] == initial[:2] and [len(b) for b in batches[1:]] == [50] * 6
    assert [g for g, _ in found.seen] == [g for batch in batches for g in batch]
    assert all(s == distance(g) for g, s in found.seen)
    best = [min(map(distance, batch)) for batch in batches]
    np.testing.assert_array_equal(found.history, np.minimum.accumulate(best))


def test_the_seed_decides_everything():
    assert search(generations=3, seed=1).seen == search(generations=3, seed=1).seen
    assert search(generations=3, seed=1).seen != search(generations=3, seed=2).seen


def test_an_exhausted_space_ends_without_repeats():
    """Five genotypes, all found; the generations after that score nothing."""
    sizes = []

    def score(batch):
        sizes.append(len(batch))
        return [abs(g - 3) for g in batch]

    draw = lambda *args: int(args[-1].integers(5))  # noqa: E731
    found = evolve(score, [0], draw, draw, draw, generations=4, parents=2, mutated=3, crossed=3,
                   newcomers=3)  # fmt: skip
    assert sorted(g for g, _ in found.seen) == [0, 1, 2, 3, 4] and sizes == [1, 4]
    assert found.genotype == 3 and found.history.tolist() == [3, 0, 0, 0, 0]


def test_nan_is_worst():
    found = search(lambda batch: [np.nan if g[0] == 3 else distance(g) for g in batch])
    assert found.genotype[0] in (2, 4) and found.score == 1
    assert all(s == np.inf for g, s in found.seen if g[0] == 3)
    only = search(lambda batch: [np.nan] * len(batch), generations=1)
    assert only.score == np.inf and only.genotype == (0,) * 8


def test_without_generations_the_best_of_the_first_population():
    found = search(initial=[(0,) * 8, (3,) * 8], generations=0, mutated=0, crossed=0, newcomers=0)
    assert found.genotype == (3,) * 8 and found.history.shape == (1,)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"generations": -1}, "generations must be an integer of at least 0, got -1"),
        ({"generations": 2.0}, "generations must be an integer of at least 0, got 2.0"),
        ({"parents": 0}, "parents must be an integer of at least 1, got 0"),
        ({"mutated": True}, "mutated must be"),
        ({"crossed": -2}, "crossed must be"),
        ({"newcomers": "5"}, "newcomers must be"),
        ({"seed": -1}, "seed must be"),
        ({"mutated": 0, "crossed": 0, "newcomers": 0}, "a generation needs"),
        ({"initial": ()}, "the initial population is empty"),
        ({"score": lambda batch: [0.0]}, r"50 genotypes got scores of shape \(1,\)"),
    ],
)
def test_what_it_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        search(**options)
