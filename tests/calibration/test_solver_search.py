"""S^3: moves stay in the space, a search beats every fixed table, the predictor learns ranks."""

import functools

import numpy as np
import pytest
from oracles import Mixture

import jaxdiff as jd
from jaxdiff.calibration.solver_search import _kendall, _train, search_solver
from jaxdiff.calibration.solver_space import Moves, SolverSpace
from jaxdiff.solvers.unified import unified
from jaxdiff.solvers.unified_genotype import Decision, Expansion, Genotype, check_genotype

EDM, VP, FLOW = jd.processes.edm(), jd.processes.vp_linear(), jd.processes.flow()
GRIDS = {
    "edm": jd.grids.karras(EDM, 5),
    "edm_to_zero": jd.grids.karras(EDM, 5, end="zero"),
    "vp": jd.grids.half_log_snr(VP, 5),
    "flow": jd.grids.uniform(FLOW, 5),
    "discrete_to_zero": jd.grids.karras(jd.processes.ddpm("linear", 1000), 5, end="zero"),
}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("times", [True, False])
def test_moves_stay_in_the_space(name, times):
    """Every draw is a genotype of five evaluations whose table can be built."""
    grid, rng = GRIDS[name], np.random.default_rng(0)
    space = SolverSpace(
        predictions=("x0", "flow"), highest_order=3, corrected=0.6, reevaluated=0.3, times=times,
        scalings=("none", "linear"), rate=0.4,
    )  # fmt: skip
    moves = Moves(space, grid, 5)
    found = moves.fixed(rng)
    for _ in range(40):
        a, b = (found[i] for i in rng.integers(len(found), size=2))
        found += [moves.mutate(a, rng), moves.cross(a, b, rng), moves.newcomer(rng)]
    drawn = found[len(moves.fixed(rng)) :]
    for genotype in found:
        check_genotype(genotype)
        assert genotype.nfe == 5 and unified(grid, genotype).nfe == 5
        assert moves.fit(genotype, rng) == genotype
        assert all(d.predictor.order <= 3 for d in genotype.decisions)
    assert len({moves.encode(g).shape for g in found}) == 1
    # Everything that may vary does.
    assert {g.first for g in drawn} == {"network", "noise", "mean"}
    assert {d.prediction for g in drawn for d in g.decisions} >= {"x0", "flow"}
    assert any(d.reevaluate for g in drawn for d in g.decisions)
    assert len({g.times for g in drawn if len(g.decisions) == 5}) > 20 or not times
    assert all(len(np.unique(g.times)) == len(g.times) for g in drawn)


def test_different_genotypes_have_different_codes():
    """Also where only the scaling of a corrector differs."""
    moves, rng = Moves(SolverSpace(), GRIDS["vp"], 5), np.random.default_rng(0)
    found = {moves.newcomer(rng) for _ in range(100)}
    for scaling in ("none", "bh1", 0.1, 0.2):
        decision = Decision("x0", Expansion(), Expansion(2, 1, (), scaling))
        found.add(Genotype((*[decision] * 4, Decision())))
    assert len({moves.encode(g).tobytes() for g in found}) == len(found) == 104


def test_narrow_spaces_end():
    """One genotype, which no mutation changes; and evaluations that can only come in pairs."""
    rng = np.random.default_rng(0)
    options = {"predictions": ("x0",), "highest_order": 1, "corrected": 0.0, "times": False}
    moves = Moves(SolverSpace(first=("network",), **options), GRIDS["vp"], 5)
    assert moves.mutate(moves.newcomer(rng), rng) == moves.newcomer(rng)
    space = SolverSpace(corrected=1.0, reevaluated=1.0, first=("network",))
    for grid in (GRIDS["vp"], jd.grids.half_log_snr(VP, 4)):
        moves = Moves(space, grid, grid.steps)
        assert check_genotype(moves.newcomer(rng)).nfe == grid.steps


def test_the_predictor_learns_a_ranking():
    """A score that is a sum over the decisions, ranked on genotypes that were not seen."""
    moves, rng = Moves(SolverSpace(), GRIDS["vp"], 5), np.random.default_rng(0)
    found = [moves.newcomer(rng) for _ in range(256)]

    def score(genotype):
        wrong = sum(d.prediction != "flow" for d in genotype.decisions)
        return wrong + sum(d.corrector is None for d in genotype.decisions)

    scores = [float(score(g)) for g in found]
    predict = _train(moves, dict(zip(found[:192], scores)), rng, 192)
    assert _kendall(predict(found[192:]), scores[192:]) > 0.5


@functools.cache
def problem():
    """Eight components in 8 dimensions on EDM's span: (denoiser, starts, ends)."""
    rng = np.random.default_rng(3)
    mixture = Mixture(rng.normal(size=(8, 8)), rng.uniform(0.25, 0.6, 8), np.full(8, 1 / 8))
    x = mixture.sample(rng, 448, 1.0, 80.0)
    ends = mixture.flow(x, (1.0, 80.0), (1.0, 0.002))
    denoiser = jd.gaussian_mixture(mixture.means, mixture.std, mixture.weights)
    return denoiser, x.astype(np.float32), ends.astype(np.float32)


def error(table):
    """On the last 128 starts, which no search sees."""
    denoiser, x, ends = problem()
    gap = np.asarray(jd.sample(denoiser, table, x[320:])) - ends[320:]
    return float(np.mean(np.sqrt(np.mean(gap**2, 1))))


@functools.cache
def searched(**options):
    denoiser, x, ends = problem()
    fit, held = slice(0, 192), slice(192, 320)
    return search_solver(
        denoiser, GRIDS["edm"], x[fit], ends[fit], (x[held], ends[held]), **options
    )


def test_it_beats_every_fixed_table():
    """300 candidates of 5 evaluations: 0.2 of the error of the best fixed table on this grid.

    Most of that is the nodes: of the fixed tables on logistic nodes, which the search begins with,
    the best is at 0.034 and the library's `flow_pc_2` at 0.0365. 14 runs found 0.027 to 0.034. With
    ranks drawn at random the score stays that of the first population.
    """
    found = searched()
    assert len(found.seen) <= 300 and found.tableau.nfe == 5
    assert np.all(np.diff(found.history) <= 0)
    assert found.history[-1] <= 0.95 * found.history[0]  # 0.74 to 0.89
    assert found.score >= found.history[-1] and found.agreement.shape == (4,)
    moves = Moves(SolverSpace(), GRIDS["edm"], 5)
    fixed = [g for g in moves.fixed(np.random.default_rng(0)) if not g.times]
    best = error(found.tableau)
    assert best <= 0.3 * min(error(unified(GRIDS["edm"], g)) for g in fixed)
    assert best < error(jd.solvers.build("flow_pc_2", jd.grids.logistic(EDM, 5)))


def test_the_same_seed_finds_the_same():
    few = {"population": 40, "stages": 1, "proposals": 10}
    one, other, another = (searched.__wrapped__(seed=seed, **few) for seed in (1, 1, 2))
    assert one.genotype == other.genotype and one.seen == other.seen
    np.testing.assert_array_equal(one.history, other.history)
    assert one.seen != another.seen


def test_any_fitness_of_samples():
    """The mean square of the samples, which a solver can lower: nothing else is looked at."""
    denoiser, x, _ = problem()

    def fitness(samples):
        assert samples.shape in ((192, 8), (128, 8))
        return float(np.mean(samples**2))

    found = search_solver(
        denoiser, GRIDS["edm"], x[:192], None, x[192:320], fitness=fitness, population=40, stages=1,
        proposals=10,
    )  # fmt: skip
    scores = [score for _, score in found.seen]
    assert found.score == dict(found.seen)[found.genotype] and found.history[-1] == min(scores)
    samples = np.asarray(jd.sample(denoiser, found.tableau, x[:192]))
    np.testing.assert_allclose(found.score, fitness(samples), rtol=1e-4)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"population": 0}, ValueError, "population must be an integer of at least 1, got 0"),
        ({"chunk": True}, ValueError, "chunk must be"),
        ({"seed": -1}, ValueError, "seed must be an integer of at least 0, got -1"),
        ({"space": "x0"}, TypeError, "must be a SolverSpace, got 'x0'"),
        ({"held_out": np.ones((2, 4, 2))}, ValueError, "held_out must be a tuple"),
        ({"held_out_cond": np.ones(4)}, ValueError, "held_out_cond is that of held_out"),
        ({"initial": [None] * 101}, ValueError, "no room for 101"),
        ({"target": None}, ValueError, "either target or fitness"),
        ({"fitness": len}, ValueError, "either target or fitness"),
        ({"fitness": 3, "target": None}, TypeError, "fitness must be callable, got 3"),
        ({"target": np.ones((3, 2))}, ValueError, "starts' shapes"),
        (
            {"grid": jd.grids.from_arrays([1.0, 0.5], [0.1, 0.9], [0.9, 0.1])}, ValueError,
            "from arrays",
        ),
        (
            {"initial": Moves(SolverSpace(), GRIDS["vp"], 4).fixed(np.random.default_rng(0))[:1]},
            ValueError, "need 5 evaluations, got 4",
        ),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    x = np.ones((4, 2), np.float32)
    options = {"grid": GRIDS["vp"], "x_T": x, "target": x, **change}
    denoiser = jd.gaussian_mixture(np.zeros((1, 2)), [1.0], [1.0])
    with pytest.raises(error, match=message):
        search_solver(denoiser, options.pop("grid"), options.pop("x_T"), **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"predictions": ("v",)}, "predictions must be one of.*'v'"),
        ({"predictions": "x0"}, "tuple of names, got 'x0'"),
        ({"scalings": ()}, "tuple of names"),
        ({"times": "no"}, "times must be True or False, got 'no'"),
        ({"highest_order": 5}, "highest_order must be an integer from 1 to 4, got 5"),
        ({"corrected": 1.5}, "corrected must lie in .0, 1., got 1.5"),
    ],
)
def test_bad_space(options, message):
    with pytest.raises(ValueError, match=message):
        SolverSpace(**options)
