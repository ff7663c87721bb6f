"""Evolutionary search over hashable genotypes, on the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from jaxdiff.solvers.clocks import check_order

G = TypeVar("G")
# Children tried for each one wanted, before newcomers take its place.
TRIES = 10


class Evolved(NamedTuple, Generic[G]):
    """What a search found.

    `genotype` is the best one and `score` its score. `history`, [generations + 1], is the best
    score so far, that of the initial population first. `seen` has every (genotype, score), in the
    order of scoring.
    """

    genotype: G
    score: float
    history: np.ndarray
    seen: tuple[tuple[G, float], ...]


def evolve(
    score: Callable[[list[G]], Sequence[float]], initial: Sequence[G],
    mutate: Callable[[G, np.random.Generator], G],
    cross: Callable[[G, G, np.random.Generator], G], newcomer: Callable[[np.random.Generator], G],
    *, generations: int, parents: int, mutated: int, crossed: int, newcomers: int, seed: int = 0,
) -> Evolved[G]:  # fmt: skip
    """Minimise `score` over genotypes, which are hashable.

    The loop of Li et al., "AutoDiffusion" (2023): the parents of a generation are the best
    `parents` of all genotypes seen so far; it has `mutated` mutations of a random parent, `crossed`
    children of two random parents, and `newcomers`. A genotype seen before is drawn again, at most
    ten times for each one wanted; newcomers take the places that stay free. So every genotype is
    scored once, and generations have one size until the space is nearly exhausted.

    Arguments:
      score: a list of genotypes to their scores, called once a generation; lower is better, NaN is
        read as inf.
      initial: the first population, of any size; repeated genotypes count once.
      mutate, cross, newcomer: draw with the generator they are given, and return a genotype.
      seed: decides every draw.

    Raises ValueError for an empty initial population, numbers that are not integers of at least 0
    (parents: 1), generations without children, or scores of another number than the genotypes.
    """
    counts = {"mutated": mutated, "crossed": crossed, "newcomers": newcomers}
    for name, value in {"generations": generations, "seed": seed, **counts}.items():
        check_order(value, None, name, 0)
    check_order(parents, None, "parents", 1)
    if generations and not sum(counts.values()):
        raise ValueError("a generation needs mutated, crossed or newcomers of at least 1")
    if not len(initial):
        raise ValueError("the initial population is empty")
    rng = np.random.default_rng(seed)
    seen: dict[G, float] = {}
    history = []

    def rate(genotypes: list[G]) -> None:
        if genotypes:
            found = np.asarray(score(list(genotypes)), np.float64)
            if found.shape != (len(genotypes),):
                raise ValueError(f"{len(genotypes)} genotypes got scores of shape {found.shape}")
            seen.update(zip(genotypes, np.where(np.isnan(found), np.inf, found).tolist()))
        history.append(min(seen.values()))

    rate(list(dict.fromkeys(initial)))
    for _ in range(generations):
        best = sorted(seen, key=seen.__getitem__)[:parents]

        def mutation(best=best) -> G:
            return mutate(best[rng.integers(len(best))], rng)

        def child(best=best) -> G:
            one, other = rng.choice(len(best), 2, replace=len(best) < 2)
            return cross(best[one], best[other], rng)

        new: dict[G, None] = {}
        draw_unseen(mutation, mutated, new, seen)
        draw_unseen(child, crossed, new, seen)
        draw_unseen(lambda: newcomer(rng), sum(counts.values()) - len(new), new, seen)
        rate(list(new))
    genotype = min(seen, key=seen.__getitem__)
    return Evolved(genotype, seen[genotype], np.array(history), tuple(seen.items()))


def draw_unseen(
    draw: Callable[[], G], count: int, new: dict[G, None], seen: Mapping[G, Any]
) -> None:
    """Add `count` draws that are in neither to `new`; fewer if ten times `count` have no more."""
    for _ in range(TRIES * count):
        if not count:
            return
        genotype = draw()
        if genotype not in seen and genotype not in new:
            new[genotype] = None
            count -= 1
