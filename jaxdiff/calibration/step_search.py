"""Time steps, and blocks of the network to skip, found by evolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float, Int

from jaxdiff.arrays import as_arrays, jit_trees, structure_hash
from jaxdiff.calibration.evolution import Evolved, draw_unseen, evolve
from jaxdiff.calibration.step_space import Genotype, StepSpace
from jaxdiff.denoisers import Denoiser
from jaxdiff.grids import Grid
from jaxdiff.metrics import frechet_distance, median_bandwidth, rbf
from jaxdiff.metrics.kernels import mean_kernel
from jaxdiff.metrics.points import pair, points
from jaxdiff.models import skip_blocks
from jaxdiff.sampling import check_call, sample
from jaxdiff.solvers.clocks import check_order
from jaxdiff.solvers.combine import stack
from jaxdiff.solvers.tableau import Tableau


class StepSearch(NamedTuple):
    """What `search_steps` found.

    Attributes:
      grid, tableau: the best sampler.
      keep: [rows, blocks], its mask for `jaxdiff.models.skip_blocks`; None without blocks.
      score: its fitness, and the price of its blocks.
      nodes: [steps + 1], its nodes in the fine grid.
      stages: the search over steps and then, with blocks, the one over both: each an `Evolved` of
        genotypes ((node, skipped blocks), ...), one entry a step.
    """

    grid: Grid
    tableau: Tableau
    keep: Float[np.ndarray, "rows blocks"] | None
    score: float
    nodes: Int[np.ndarray, " nodes"]
    stages: tuple[Evolved[Genotype], ...]


def search_steps(
    denoiser: Denoiser, grid: Grid, x_T: Any, steps: int, family: Callable[[Grid], Tableau],
    fitness: Callable[[np.ndarray], float], *, cond: Any = None, key: Any = None,
    free_start: bool = False, blocks: int = 0, max_blocks: int | None = None, price: float = 0.0,
    skipping: Callable[[Denoiser, Any, Tableau], Denoiser] = skip_blocks, generations: int = 10,
    population: int = 50, parents: int = 10, mutated: int = 25, crossed: int = 10,
    mutation: float = 0.25, seed: int = 0, chunk: int | None = None,
) -> StepSearch:  # fmt: skip
    """The `steps` steps between nodes of a fine grid whose samples are fittest, by evolution.

    Li et al., "AutoDiffusion: Training-Free Optimization of Time Steps and Architectures for
    Automated Diffusion Model Acceleration" (2023). A generation is `mutated` mutations (each node
    drawn anew with probability `mutation`), `crossed` children (each step from one of two parents)
    of the best `parents` so far, and newcomers; the first population is the evenly spaced steps,
    random ones, and mutations of the even ones with probability 0.1. With `blocks`, a second search
    follows from the best of the first, over steps and over the blocks that each skips. All samplers
    of a generation run in one compiled program, from the same starts and noise.

    Different from the published code: a child has no node twice, which costs that code a step; the
    number of steps is fixed, and the limit on blocks is met by skipping more of them; the number of
    blocks that may be skipped does not grow from generation to generation; a mask is mutated by one
    block more or fewer in a step, where that code's mutation of the skipped layers changes nothing
    (it compares where it means to assign); starts are shared; the first node is fixed by default;
    `generations` are those of each search.

    Arguments:
      grid: the fine grid, from noise to data; the last node ends every sampler.
      x_T: the starts, [batch, ...], at the grid's first node. Thousands, for a Frechet distance.
      family: grid -> tableau, a builder with its options (`jaxdiff.solvers.ddim`).
      fitness: samples [batch, ...] -> a number, lower is better: `mmd_to(data)`,
        `frechet_to(data)`, or your own. The search fits these starts: judge it on others.
      cond: passed to the denoiser.
      key: as in `jaxdiff.sample`, for a stochastic family.
      free_start: let the first node be chosen too, as published; x_T is then taken for the state
        there, which a process that ends in the same prior from any late time allows.
      blocks: of the network, the length of its `blocks(shape)`; 0 searches the steps alone.
      max_blocks: the most blocks that a sampler may evaluate, summed over its evaluations.
      price: added to the fitness, times the fraction of the blocks that is evaluated.
      skipping: (denoiser, keep [rows, blocks], tableau) -> denoiser, one function at module level:
        with guidance, say, `classifier_free(skip_blocks(denoiser, keep, tableau), 1.5, 10)`.
      generations, population: of each search.
      chunk: samplers run at a time, all of a generation by default.

    Raises ValueError for steps that are not 1 to the fine grid's or other numbers out of range, and
    what `sample`, `skip_blocks` and `evolve` raise.
    """
    space = StepSpace(grid, steps, family, free_start=free_start, blocks=blocks,
                      max_blocks=max_blocks, mutation=mutation)  # fmt: skip
    if not (0 <= price < np.inf and (blocks or price == 0)):
        raise ValueError(f"price must be finite, at least 0, and needs blocks, got {price!r}")
    check_order(population, 10**6, "population", 2)
    check_order(population if chunk is None else chunk, population, "chunk")
    if not 0 <= mutated + crossed <= population:
        raise ValueError(
            f"mutated + crossed must be at most {population}, the population, got "
            f"{mutated} + {crossed}"
        )
    denoiser = as_arrays(denoiser)
    x_T, cond = jax.tree.map(jnp.asarray, (x_T, cond))
    even = space.even()
    table, whole = space.tableau(even), space.evaluated(even)
    check_call(denoiser, table, x_T, key, None, cond, "final", None, None)
    if blocks:
        # Before the first search, for the second is the first to mask.
        masked = skipping(denoiser, space.keep(even, table.rows), table)
        jax.eval_shape(masked, x_T, table.t[0], table.alpha[0], table.sigma[0], cond)

    def score(genotypes: Sequence[Genotype], masked: bool) -> list[float]:
        found = []
        for first in range(0, len(genotypes), chunk or population):
            some = genotypes[first : first + (chunk or population)]
            # Filled up: another number of samplers would be another program.
            padded = [*some, *some[-1:] * ((chunk or population) - len(some))]
            table = stack([space.tableau(g) for g in padded])
            keep = np.stack([space.keep(g, table.rows) for g in padded]) if masked else None
            structure = structure_hash(denoiser, table, x_T, cond)
            samples = _samples(denoiser, table, keep, x_T, key, cond, skipping, structure)
            samples = jax.tree.map(np.asarray, samples)
            found += [fitness(jax.tree.map(lambda a, i=i: a[i], samples)) for i in range(len(some))]
        return [float(f) + price * space.evaluated(g) / max(whole, 1)
                for f, g in zip(found, genotypes, strict=True)]  # fmt: skip

    counts = {
        "generations": generations, "parents": parents, "mutated": mutated, "crossed": crossed,
        "newcomers": population - mutated - crossed, "seed": seed,
    }  # fmt: skip
    rng = np.random.default_rng(seed)
    first = {even: None}
    draw_unseen(lambda: space.newcomer(rng), population // 2, first, {})
    draw_unseen(lambda: space.mutate(even, rng, 0.1), population - len(first), first, {})
    plain = partial(score, masked=False)
    stages = [evolve(plain, [*first], space.mutate, space.cross, space.newcomer, **counts)]
    if blocks:
        ranked = sorted(stages[0].seen, key=lambda pair: pair[1])
        best = [genotype for genotype, _ in ranked[: min(parents, population)]]
        first = dict.fromkeys(space.skip(genotype, rng) for genotype in best)
        around = lambda: space.random_skips(best[rng.integers(len(best))], rng)  # noqa: E731
        draw_unseen(around, population - len(first), first, {})
        stages.append(evolve(
            partial(score, masked=True), [*first],
            lambda g, rng: space.flip(space.mutate(g, rng), rng),
            lambda one, other, rng: space.skip(space.cross(one, other, rng), rng),
            lambda rng: space.random_skips(space.newcomer(rng), rng), **counts,
        ))  # fmt: skip
    best = stages[-1].genotype
    table = space.tableau(best)
    keep = space.keep(best, table.rows) if blocks else None
    return StepSearch(space.sampler_grid(best), table, keep, stages[-1].score, space.nodes(best),
                      tuple(stages))  # fmt: skip


def mmd_to(data: Float[ArrayLike, "n ..."], bandwidth: float | None = None) -> Callable:
    """Fitness: the squared `jaxdiff.metrics.mmd` to the data, unbiased; inf for NaN or infinity.

    Its kernel is Gaussian, of the median distance within the data unless a bandwidth is given: the
    same for all samples. Raises ValueError for fewer than 2 data, NaN or infinity in them, or a
    bandwidth that is not positive.
    """
    data = _two_or_more(data)
    rows = points(data, "the data")
    if bandwidth is None:
        bandwidth = median_bandwidth(data[::2], data[1::2])
    kernel = rbf(bandwidth)
    # Once, not for every candidate.
    within = mean_kernel(kernel, rows, rows, without_diagonal=True)
    return partial(_mmd, data=data, kernel=kernel, within=within)


def _mmd(samples, data, kernel, within):
    if not np.all(np.isfinite(samples)):
        return np.inf
    samples, data = pair(samples, data)
    own = mean_kernel(kernel, samples, samples, without_diagonal=True)
    return own + within - 2 * mean_kernel(kernel, samples, data)


def frechet_to(
    data: Float[ArrayLike, "n ..."], features: Callable[[np.ndarray], np.ndarray] | None = None
) -> Callable:
    """Fitness: the `jaxdiff.metrics.frechet_distance` to the data; inf for NaN or infinity.

    Of features(samples) [n, dim], by default of the samples themselves, flattened. Raises
    ValueError for fewer than 2 data, or NaN or infinity in their features.
    """
    features = features or _flat
    found = features(_two_or_more(data))
    points(found, "the data's features")
    return partial(_frechet, data=found, features=features)


def _two_or_more(data):
    data = np.asarray(data)
    if data.ndim == 0 or len(data) < 2:
        raise ValueError(f"needs at least 2 data, [n, ...], got shape {data.shape}")
    return data


def _flat(x):
    return x.reshape(len(x), -1)


def _frechet(samples, data, features):
    if not np.all(np.isfinite(samples)):
        return np.inf
    return frechet_distance(features(samples), data)


def kept_fraction(keep: Float[ArrayLike, "rows blocks"], tableau: Tableau) -> float:
    """The fraction of the network's blocks that a sampler evaluates with this mask."""
    active = np.asarray(tableau.active)
    return float(active @ np.asarray(keep).mean(1) / active.sum())


@jit_trees
def _samples(denoiser, tables, keep, x_T, key, cond, skipping, structure):
    """The samples of stacked tables and masks, leaves [samplers, batch, ...]."""

    def one(table, keep):
        found = denoiser if keep is None else skipping(denoiser, keep, table)
        return sample(found, table, x_T, key if table.stochastic else None, cond=cond)

    return jax.vmap(one)(tables, keep)
