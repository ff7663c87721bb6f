"""Samplers as genotypes: which nodes of a fine grid they step between, which blocks they skip."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from jaxdiff.arrays import is_concrete
from jaxdiff.grids import Grid
from jaxdiff.grids.grid import make
from jaxdiff.solvers.clocks import check_order
from jaxdiff.solvers.tableau import Tableau

# A step: the node where it begins, and the blocks that it skips. A sampler: steps, in order.
Genotype = tuple[tuple[int, tuple[int, ...]], ...]


class StepSpace:
    """The samplers of `steps` steps between nodes of a fine grid, ending at its last node.

    Arguments:
      family: grid -> tableau.
      free_start: whether the first node is chosen too, or is the grid's first.
      blocks: of the network; 0 for samplers that skip none.
      max_blocks: the most blocks that a sampler may evaluate in all, or None.
      mutation: probability with which each step mutates.

    Raises ValueError for numbers out of range or a traced grid.
    """

    def __init__(
        self, grid: Grid, steps: int, family: Callable[[Grid], Tableau], *,
        free_start: bool = False, blocks: int = 0, max_blocks: int | None = None,
        mutation: float = 0.25,
    ):  # fmt: skip
        if not is_concrete(grid) or grid.backward:
            raise ValueError("the fine grid must have values and run from noise to data")
        check_order(steps, grid.steps, "steps")
        check_order(blocks, 10**6, "blocks", 0)
        if max_blocks is not None:
            if not blocks:
                raise ValueError("max_blocks needs blocks, the number of the network's")
            check_order(max_blocks, 10**9, "max_blocks", 0)
        if not 0 < mutation <= 1:
            raise ValueError(f"mutation must lie in (0, 1], got {mutation!r}")
        self.grid, self.steps, self.mutation = grid, steps, mutation
        self.blocks, self.max_blocks = blocks, max_blocks
        self._family, self._first = family, () if free_start else (0,)
        self._open = frozenset(range(len(self._first), grid.steps))
        self._built = functools.cache(self._build)

    # --- what a genotype means --------------------------------------------------------------------

    def nodes(self, genotype: Genotype) -> np.ndarray:
        """[steps + 1], its nodes in the fine grid."""
        return np.array([*(node for node, _ in genotype), self.grid.steps])

    def sampler_grid(self, genotype: Genotype) -> Grid:
        """The grid of its nodes."""
        g, chosen = self.grid, self.nodes(genotype)
        return make(g.t[chosen], g.alpha[chosen], g.sigma[chosen], g.process, g.ends, g.backward)

    def tableau(self, genotype: Genotype) -> Tableau:
        """The family's table on its grid."""
        return self._built(tuple(node for node, _ in genotype))[0]

    def keep(self, genotype: Genotype, rows: int) -> Float[np.ndarray, "rows blocks"]:
        """Its mask, 1 for kept, filled up to `rows` with that of the last row.

        A row has the mask of the last step that begins at its level or before.
        """
        mask = np.ones((self.steps, self.blocks))
        for step, (_, skipped) in enumerate(genotype):
            mask[step, list(skipped)] = 0.0
        found = mask[self._step_of_row(genotype)]
        return np.concatenate([found, found[[-1] * (rows - len(found))]])

    def evaluated(self, genotype: Genotype) -> int:
        """Blocks that it evaluates in all."""
        kept = [self.blocks - len(skipped) for _, skipped in genotype]
        return int(np.sum(np.array(kept)[self._step_of_row(genotype)]))

    def _build(self, nodes):
        whole = tuple((node, ()) for node in nodes)
        grid = self.sampler_grid(whole)
        table = self._family(grid)
        with np.errstate(divide="ignore"):
            level = np.log(np.asarray(table.alpha)) - np.log(np.asarray(table.sigma))
        begins = np.asarray(grid.lam)[:-1] - 1e-6
        return table, np.maximum(np.searchsorted(begins, level, side="right") - 1, 0)

    def _step_of_row(self, genotype):
        return self._built(tuple(node for node, _ in genotype))[1]

    # --- how genotypes are drawn ------------------------------------------------------------------

    def even(self) -> Genotype:
        """Steps over equally many nodes each, as near as may be, that skip nothing."""
        return tuple((i * self.grid.steps // self.steps, ()) for i in range(self.steps))

    def newcomer(self, rng: np.random.Generator) -> Genotype:
        """Random steps that skip nothing."""
        count = self.steps - len(self._first)
        drawn = rng.choice(sorted(self._open), count, replace=False)
        return tuple((node, ()) for node in sorted([*self._first, *drawn.tolist()]))

    def mutate(
        self, genotype: Genotype, rng: np.random.Generator, rate: float | None = None
    ) -> Genotype:
        """Each step begins at another node with probability `rate`, by default `mutation`."""
        unused = sorted(self._open - {node for node, _ in genotype})
        found = list(genotype[: len(self._first)])
        for node, skipped in genotype[len(self._first) :]:
            if unused and rng.random() < (self.mutation if rate is None else rate):
                node = unused.pop(rng.integers(len(unused)))
            found.append((node, skipped))
        return tuple(sorted(found))

    def cross(self, one: Genotype, other: Genotype, rng: np.random.Generator) -> Genotype:
        """Each step from one parent or the other; a node taken twice gives way to one of theirs."""
        pairs = zip(one, other, strict=True)
        picked = dict(pair[rng.integers(2)] for pair in pairs)
        spare = [step for step in {**dict(one), **dict(other)}.items() if step[0] not in picked]
        for i in rng.permutation(len(spare))[: self.steps - len(picked)]:
            picked.update([spare[i]])
        return tuple(sorted(picked.items()))

    def skip(
        self, genotype: Genotype, rng: np.random.Generator, max_blocks: int | None = None
    ) -> Genotype:
        """With random blocks skipped until it evaluates at most `max_blocks`, or the space's."""
        limit = self.max_blocks if max_blocks is None else max_blocks
        if limit is None or self.evaluated(genotype) <= limit:
            return genotype
        nodes, skipped = zip(*genotype, strict=True)
        counts = np.bincount(self._step_of_row(genotype), minlength=self.steps)
        kept = [
            (step, block) for step in np.flatnonzero(counts) for block in range(self.blocks)
            if block not in skipped[step]
        ]  # fmt: skip
        skipped, total = [set(s) for s in skipped], self.evaluated(genotype)
        for i in rng.permutation(len(kept)):
            if total <= limit:
                break
            step, block = kept[i]
            skipped[step].add(block)
            total -= counts[step]
        return tuple((node, tuple(sorted(s))) for node, s in zip(nodes, skipped, strict=True))

    def random_skips(self, genotype: Genotype, rng: np.random.Generator) -> Genotype:
        """With random blocks skipped: as many as the limit asks for, or any number without one."""
        limit = self.max_blocks
        if limit is None:
            limit = int(rng.integers(self.evaluated(genotype) + 1))
        return self.skip(genotype, rng, limit)

    def flip(self, genotype: Genotype, rng: np.random.Generator) -> Genotype:
        """With the probability `mutation`, each step skips one more block or one fewer."""
        found = []
        for node, skipped in genotype:
            if rng.random() < self.mutation:
                skipped = tuple(sorted({*skipped} ^ {int(rng.integers(self.blocks))}))
            found.append((node, skipped))
        return self.skip(tuple(found), rng)
