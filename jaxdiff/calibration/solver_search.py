"""S^3: a search for the table of decisions that suits a network, guided by a learned ranking."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float

from jaxdiff.arrays import as_arrays, jit_trees, structure_hash
from jaxdiff.calibration.evolution import draw_unseen, evolve
from jaxdiff.calibration.learned import AVERAGES
from jaxdiff.calibration.solver_space import Moves, SolverSpace
from jaxdiff.denoisers import Denoiser
from jaxdiff.grids import Grid
from jaxdiff.sampling import check_call, sample
from jaxdiff.solvers.clocks import check_choice, check_order
from jaxdiff.solvers.combine import stack
from jaxdiff.solvers.tableau import Tableau
from jaxdiff.solvers.unified import unified
from jaxdiff.solvers.unified_genotype import Genotype, check_genotype

_MARGIN = 1.0  # of the ranking loss
_STEPS = 300  # of the predictor's training
_BLUR = 0.5  # noise on its standardised inputs, which it would else learn by heart


class SolverSearch(NamedTuple):
    """What `search_solver` found.

    `genotype` with its `tableau` and `score`; `history`, [stages + 1], the best score so far, that
    of the first population first; `seen`, every (genotype, score) in the order of scoring;
    `agreement`, [stages], the rank correlation (Kendall's tau) of what the predictor said of a
    stage's proposals with their scores, 0 for a stage without one.
    """

    genotype: Genotype
    tableau: Tableau
    score: float
    history: np.ndarray
    seen: tuple[tuple[Genotype, float], ...]
    agreement: np.ndarray


def search_solver(
    denoiser: Denoiser, grid: Grid, x_T: Any, target: Any = None, held_out: Any = None, *,
    average: str = "arithmetic", fitness: Callable[[Any], float] | None = None, cond: Any = None,
    held_out_cond: Any = None, space: SolverSpace | None = None, initial: Sequence[Genotype] = (),
    statistics: Any = (0.5, -0.5, 0.0), mean: ArrayLike = 0.0, population: int = 100,
    stages: int = 4, proposals: int = 50, finalists: int = 8, chunk: int = 50, seed: int = 0,
) -> SolverSearch:  # fmt: skip
    """Search the decisions of `jaxdiff.solvers.unified`, with as many evaluations as grid steps.

    Liu et al., "A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic
    Models" (2024), S^3. A first population is scored: the space's fixed schedules, mutations of
    them and random genotypes. In each stage a predictor is trained on all scores so far with the
    pairwise hinge loss max(0, margin - (p_worse - p_better)), an evolution ranks some hundred
    genotypes by it, and the best of those not yet scored are scored, `chunk` at a time in one
    vmapped program. The authors' published code has an evolution without a predictor; this one is
    a multilayer perceptron on the encoded decisions, with the loss of the same authors' OMS-DPM
    (2023), in which pairs of bad genotypes weigh less here.

    Arguments:
      denoiser: under the guidance that it will be used with.
      grid: its ends, process and number of steps count, and its nodes for the fixed schedules.
      x_T: starts [batch, ...].
      target: where a teacher ends from them (an exact flow, or `jaxdiff.sample` with many steps);
        the score is the average over samples of |x - x*| / sqrt(size). Or give `fitness`.
      average: "arithmetic"; or "geometric", which the few samples that end in another mode do not
        rule.
      held_out: (x_T, target), or x_T alone with `fitness`: the `finalists` best genotypes are
        compared on these, and the best there is returned; without it, the one of the best score.
      fitness: samples [batch, ...] -> a number, lower is better (`mmd_to(data)`,
        `frechet_to(data)`, or your own), called on the host for each genotype.
      cond, held_out_cond: passed to the denoiser.
      space: which decisions may be taken.
      initial: genotypes to score before the fixed schedules, `population` at most.
      statistics, mean: as in `unified`.
      population, stages, proposals: population + stages * proposals genotypes are scored.
      chunk: genotypes that run at once.
      seed: decides every draw; the same seed finds the same genotype.

    Raises ValueError for a grid without a process, counts that are not positive integers, neither
    or both of target and fitness, starts without targets of their shape, or what `sample` does.
    """
    space = SolverSpace() if space is None else space
    if not isinstance(space, SolverSpace):
        raise TypeError(f"space must be a SolverSpace, got {space!r}")
    counts = {"population": population, "proposals": proposals, "finalists": finalists,
              "chunk": chunk}  # fmt: skip
    for name, value in counts.items():
        check_order(value, None, name, 1)
    check_order(stages, None, "stages", 0)
    check_order(seed, None, "seed", 0)
    if len(initial) > population:
        raise ValueError(f"a population of {population} has no room for {len(initial)} initial")
    if held_out is None and held_out_cond is not None:
        raise ValueError("held_out_cond is that of held_out, which is None")
    if grid.process is None:
        raise ValueError("a search moves nodes: build the grid with jaxdiff.grids, not from arrays")
    judge, held_judge = _judges(x_T, target, held_out, fitness, average)
    denoiser = as_arrays(denoiser)
    moves = Moves(space, grid, grid.steps)
    rng = np.random.default_rng(seed)

    def tables(genotypes: Sequence[Genotype]) -> list[Tableau]:
        return [unified(grid, genotype, statistics, mean) for genotype in genotypes]

    def rate(genotypes: Sequence[Genotype]) -> list[float]:
        return _scores(denoiser, tables(genotypes), x_T, cond, judge, chunk)

    for genotype in initial:
        if check_genotype(genotype).nfe != grid.steps:
            raise ValueError(f"initial genotypes need {grid.steps} evaluations, got {genotype.nfe}")
    known = list(dict.fromkeys([*initial, *moves.fixed(rng)]))[:population]
    first = dict.fromkeys(known)
    near = lambda: moves.mutate(known[rng.integers(len(known))], rng)  # noqa: E731
    draw_unseen(near, (population - len(first)) // 2, first, {})
    draw_unseen(lambda: moves.newcomer(rng), population - len(first), first, {})
    seen = dict(zip(first, rate([*first])))
    history, agreement = [min(seen.values())], []
    for _ in range(stages):
        predict = _train(moves, seen, rng, population + stages * proposals)
        best = sorted(seen, key=seen.__getitem__)
        evolved = evolve(
            predict, best[: 2 * proposals], moves.mutate, moves.cross, moves.newcomer,
            generations=4, parents=30, mutated=60, crossed=25, newcomers=15,
            seed=int(rng.integers(2**31)),
        )  # fmt: skip
        ranked = sorted(evolved.seen, key=lambda pair: pair[1])
        chosen = [pair for pair in ranked if pair[0] not in seen][:proposals]
        found = rate([genotype for genotype, _ in chosen])
        agreement.append(_kendall([p for _, p in chosen], found))
        seen.update(zip([genotype for genotype, _ in chosen], found))
        history.append(min(seen.values()))
    best = sorted(seen, key=seen.__getitem__)[: finalists if held_out is not None else 1]
    if held_out is not None:
        x = held_out if target is None else held_out[0]
        some = min(chunk, len(best))
        held = _scores(denoiser, tables(best), x, held_out_cond, held_judge, some)
        best = [best[int(np.argmin(held))]]
    return SolverSearch(
        best[0], tables(best[:1])[0], seen[best[0]], np.array(history), tuple(seen.items()),
        np.array(agreement),
    )  # fmt: skip


def _judges(
    x_T: Any, target: Any, held_out: Any, fitness: Any, average: str
) -> tuple[Callable, Callable]:
    """Samples to a number, for the starts and for those held out."""
    check_choice("average", average, AVERAGES)
    if (target is None) == (fitness is None):
        raise ValueError("give either target or fitness")
    if fitness is not None:
        if not callable(fitness):
            raise TypeError(f"fitness must be callable, got {fitness!r}")
        return fitness, fitness
    if held_out is not None and not (isinstance(held_out, tuple) and len(held_out) == 2):
        raise ValueError("held_out must be a tuple (x_T, target) where there is a target")
    pairs = [(x_T, target)] if held_out is None else [(x_T, target), held_out]
    for x, ends in pairs:
        if jax.tree.map(np.shape, x) != jax.tree.map(np.shape, ends):
            raise ValueError(
                f"target must have the starts' shapes {jax.tree.map(np.shape, x)}, got "
                f"{jax.tree.map(np.shape, ends)}"
            )

    def to(ends: Any) -> Callable[[Any], float]:
        def distance(found: Any) -> float:
            gaps = [
                (np.asarray(a, np.float64) - np.asarray(b)).reshape(len(a), -1)
                for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(ends))
            ]
            errors = np.sqrt(np.mean(np.concatenate(gaps, 1) ** 2, 1))
            if average == "geometric":
                return float(np.exp(np.mean(np.log(np.maximum(errors, 1e-10)))))
            return float(np.mean(errors))

        return distance

    return to(target), to(pairs[-1][1])


def _scores(
    denoiser: Denoiser, tables: Sequence[Tableau], x: Any, cond: Any, judge: Callable, chunk: int
) -> list[float]:
    """The judge's numbers, NaN as inf; `chunk` tables a program, the last of them filled up."""
    if not tables:
        return []
    x, cond = jax.tree.map(jnp.asarray, (x, cond))
    check_call(denoiser, tables[0], x, None, None, cond, "final", None, None)
    found = []
    for begin in range(0, len(tables), chunk):
        part = list(tables[begin : begin + chunk])
        count = len(part)
        stacked = stack(part + part[:1] * (chunk - count))
        ends = _samples(denoiser, stacked, x, cond, structure_hash(denoiser, stacked, x, cond))
        ends = jax.tree.map(np.asarray, ends)
        found += [float(judge(jax.tree.map(lambda a, i=i: a[i], ends))) for i in range(count)]
    return np.nan_to_num(found, nan=np.inf, posinf=np.inf).tolist()


@jit_trees
def _samples(denoiser: Denoiser, tables: Tableau, x: Any, cond: Any, structure: int) -> Any:
    return jax.vmap(lambda table: sample(denoiser, table, x, cond=cond))(tables)


def _train(
    moves: Moves, seen: dict[Genotype, float], rng: np.random.Generator, rows: int
) -> Callable[[list[Genotype]], np.ndarray]:
    """A predictor of ranks: genotypes -> numbers, lower for those that it takes for better.

    The data are filled up to `rows` with what counts for nothing: stages share a program.
    """
    codes = np.stack([moves.encode(genotype) for genotype in seen])
    scores = np.asarray(list(seen.values()))
    centre, size = codes.mean(0), np.maximum(codes.std(0), 0.05)
    fill = np.zeros(rows - len(codes))
    inputs = np.concatenate([(codes - centre) / size, np.zeros((len(fill), codes.shape[1]))])
    ranks = np.concatenate([np.argsort(np.argsort(scores)), fill])
    real = np.concatenate([np.isfinite(scores), fill])
    keys = jax.random.split(jax.random.key(int(rng.integers(2**31))))
    net = eqx.nn.MLP(codes.shape[1], "scalar", 64, 2, jax.nn.silu, key=keys[0])
    net = _fit(net, *(jnp.asarray(a, jnp.float32) for a in (inputs, ranks, real)), keys[1])

    def predict(genotypes: list[Genotype]) -> np.ndarray:
        found = np.stack([moves.encode(genotype) for genotype in genotypes])
        count = len(found)
        padded = np.zeros((128 * -(-count // 128), found.shape[1]), np.float32)
        padded[:count] = (found - centre) / size
        return np.asarray(_predict(net, padded), np.float64)[:count]

    return predict


@eqx.filter_jit
def _predict(net: eqx.nn.MLP, inputs: Float[Array, "n features"]) -> Float[Array, " n"]:
    return jax.vmap(net)(inputs)


@eqx.filter_jit
def _fit(
    net: eqx.nn.MLP, inputs: Float[Array, "n features"], ranks: Float[Array, " n"],
    real: Float[Array, " n"], key: Array,
) -> eqx.nn.MLP:  # fmt: skip
    """The perceptron after 300 steps of AdamW on the hinge loss of all pairs."""
    parts, rest = eqx.partition(net, eqx.is_array)
    # What matters is the order of the best: pairs weigh less the worse their better one is.
    weight = jnp.exp(-3.0 * ranks / jnp.maximum(ranks.max(), 1.0)) * real
    pairs = (ranks[:, None] < ranks[None]) * weight[:, None] * real[None]
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, _STEPS), weight_decay=1e-2)

    def loss(parts: Any, key: Any) -> Any:
        blurred = inputs + _BLUR * jax.random.normal(key, inputs.shape)
        value = jax.vmap(eqx.combine(parts, rest))(blurred)
        gap = value[None] - value[:, None]
        return jnp.sum(pairs * jax.nn.relu(_MARGIN - gap)) / jnp.maximum(jnp.sum(pairs), 1.0)

    def step(carry: Any, key: Any) -> tuple[Any, None]:
        parts, state = carry
        updates, state = optimizer.update(jax.grad(loss)(parts, key), state, parts)
        return (optax.apply_updates(parts, updates), state), None

    keys = jax.random.split(key, _STEPS)
    (parts, _), _ = jax.lax.scan(step, (parts, optimizer.init(parts)), keys)
    return eqx.combine(parts, rest)


def _kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's rank correlation of two lists."""
    with np.errstate(invalid="ignore"):  # two that are inf are no pair
        signs = [np.sign(np.subtract.outer(np.asarray(v), np.asarray(v))) for v in (a, b)]
    pairs = len(a) * (len(a) - 1)
    return float(np.nansum(signs[0] * signs[1]) / pairs) if pairs else 0.0
