"""USF: fixed tables are the methods they name, any table is consistent, all stack to one shape."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import BROAD, fitted_order, median_error

import jaxdiff as jd
from jaxdiff.calibration.solver_space import Moves, SolverSpace
from jaxdiff.solvers.statistics import ModelStatistics
from jaxdiff.solvers.unified import unified
from jaxdiff.solvers.unified_genotype import (
    INTEGRANDS,
    Decision,
    Expansion,
    Genotype,
    fixed_schedule,
    matching_corrector,
    uniform_schedule,
)

VP, EDM, FLOW = jd.processes.vp_linear(), jd.processes.edm(), jd.processes.flow()
SOLVERS = jd.solvers
NAMED = {
    "ddim": SOLVERS.ddim,
    "dpm_solver_pp_2m": lambda g: SOLVERS.dpm_solver_pp_multistep(g, 2),
    "dpm_solver_pp_3m": lambda g: SOLVERS.dpm_solver_pp_multistep(g, 3),
    "dpm_solver_2m": lambda g: SOLVERS.dpm_solver_multistep(g, 2),
    "dpm_solver_3m": lambda g: SOLVERS.dpm_solver_multistep(g, 3),
    "unipc_2": lambda g: SOLVERS.unipc(g, 2),
    "unipc_2_bh1": lambda g: SOLVERS.unipc(g, 2, "bh1"),
    "unipc_3": lambda g: SOLVERS.unipc(g, 3),
    "unipc_2_eps": lambda g: SOLVERS.unipc(g, 2, integrand="eps"),
    "unipc_3_eps": lambda g: SOLVERS.unipc(g, 3, integrand="eps"),
    "flow_pc_2": lambda g: SOLVERS.exponential_adams(
        g, 2, "flow", corrector=3, lower_order_final=True
    ),
}
GRIDS = {
    "vp": jd.grids.half_log_snr(VP, 6),
    "edm": jd.grids.karras(EDM, 6),
    "edm_to_zero": jd.grids.karras(EDM, 6, end="zero"),
    "flow_from_pure_noise": jd.grids.uniform(FLOW, 6),
}


def mixture(**options):
    return jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, **options)


def nodes(denoiser, tables, x, save="nodes"):
    """The solutions at nodes [tables, nodes, ...], or what `save` says, in one program."""
    run = jax.vmap(lambda t: jd.sample(denoiser, t, x, save=save))
    return np.asarray(run(jd.solvers.stack(tables)))


def random_genotypes(grid, nfe, count, seed=0, **options):
    moves, rng = Moves(SolverSpace(**options), grid, nfe), np.random.default_rng(seed)
    return [moves.newcomer(rng) for _ in range(count)]


PUBLISHED = {
    "noise_prediction": "eps", "data_prediction": "x0", "dpmsolver_v3_prediction": "v3",
    None: "none", "dpmsolver-2": "bh2", "unipc-bh1": "bh1", "0.5exp": "grow", "-0.5exp": "shrink",
}  # fmt: skip


def published_expansion(order, start, derivatives):
    found = derivatives[: order - 1]
    scaling = "none"
    if found and found[0]["relaxation"] == "linear":
        scaling = found[0]["relaxation_coefficient"]
    elif found:
        scaling = PUBLISHED[found[0]["relaxation"]]
    points = tuple(tuple(-1 - age for age in entry["active_points"]) for entry in found)
    return Expansion(order, -1 - start, points, scaling)


def published_genotype(table):
    decisions = []
    for i, order in enumerate(table["orders"]):
        fix = table["corrector_types"][i]
        corrector = None
        if fix["type"] == "pseudo":
            corrector = published_expansion(
                fix["taylor_order"], fix["start_point"], fix["derivative_type"]
            )
        predictor = published_expansion(
            order, table["start_points"][i], table["derivative_types"][i]
        )
        decisions.append(Decision(PUBLISHED[table["prediction_types"][i]], predictor, corrector))
    first = {"no_afs": "network", "average_x0": "mean"}[table["afs"]]
    return Genotype(tuple(decisions), tuple(table["timesteps"][1:-1]), first)


def test_the_authors_code(x64):
    """Twelve random tables of decisions (golden/make_usf.py): what the published sampler makes.

    Its statistics are summed by the trapezoid. Left out is its "zero_x0" first step, which takes
    the noise from x_0 = 0 and the data prediction from noise = x_T: two assumptions at once.
    """
    golden = json.loads((Path(__file__).parents[1] / "golden" / "usf.json").read_text())
    grid = jd.grids.from_times(VP, np.array([1.0, 0.5, 1e-3]))
    wave = np.linspace(0.0, 5.0, golden["bins"] + 1)[:, None] + np.arange(2)
    statistics = ModelStatistics(
        np.linspace(grid.lam[0], grid.lam[-1], golden["bins"] + 1),
        0.5 + 0.4 * np.sin(wave), 0.5 * np.cos(wave), np.sin(2.0 * wave),
    )  # fmt: skip
    genotypes = [published_genotype(case["decisions"]) for case in golden["cases"]]
    assert {g.first for g in genotypes} == {"network", "mean"}
    assert {d.prediction for g in genotypes for d in g.decisions} == {"x0", "eps", "v3"}
    tables = [
        unified(grid, g, statistics, mean=np.array([0.3, -0.2]), quadrature="trapezoid")
        for g in genotypes
    ]
    found = nodes(mixture(), tables, np.array(golden["x"]), "final")
    np.testing.assert_allclose(
        found, [case["end"] for case in golden["cases"]], rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("name", GRIDS)
def test_fixed_tables_are_the_methods_they_name(name, x64):
    grid = GRIDS[name]
    known = list(NAMED)
    if grid.ends[0]:
        # eps is refused; a system cut to two evaluations there has no scale, that of UniPC has;
        # and exponential_adams corrects the first step too.
        known = ["ddim", "dpm_solver_pp_2m"]
    x = np.random.default_rng(0).normal(size=(8, 2)) * grid.sigma[0]
    tables = [unified(grid, n) for n in known] + [NAMED[n](grid) for n in known]
    found = nodes(mixture(), tables, x)
    for label, a, b in zip(known, found, found[len(known) :]):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * grid.sigma[0], err_msg=label)


def test_single_step_methods(x64):
    """Stages at the nodes between: expansions that start one node back."""
    grid, outer = jd.grids.half_log_snr(VP, 6), jd.grids.half_log_snr(VP, 3)
    x = np.random.default_rng(0).normal(size=(8, 2))
    for name, integrand in (("dpm_solver_pp_2s", "x0"), ("dpm_solver_2s", "eps")):
        theirs = SOLVERS.dpm_solver_singlestep(outer, 2, integrand, plan=(2, 2, 2))
        found = nodes(mixture(), [unified(grid, name), theirs], x, "final")
        np.testing.assert_allclose(*found, rtol=1e-12, atol=1e-12)


def v3_genotype(steps, order, corrector):
    """DPM-Solver-v3's decisions, `corrector` as there; "pseudo" predictors too."""
    decisions = []
    for i in range(steps):
        terms, fix = min(i + 1, order, steps - i), None
        fewest = tuple(tuple(range(1, k + 1)) for k in range(1, terms))
        used = terms + (corrector == "pseudo")
        if i < steps - 1 and corrector != "none" and used > 1:
            ages = (0, *range(2, used))
            points = tuple(ages[:k] for k in range(1, used)) if corrector == "pseudo" else ()
            fix = Expansion(used, 1, points)
        predictor = Expansion(terms, 0, fewest if corrector == "pseudo" else ())
        decisions.append(Decision("v3", predictor, fix))
    return Genotype(tuple(decisions))


@pytest.mark.parametrize("corrector", ["none", "same", "pseudo"])
def test_the_third_prediction_is_dpm_solver_v3(corrector, x64):
    grid = GRIDS["vp"]
    wave = np.linspace(0.0, 5.0, 21)[:, None] + np.arange(2)
    statistics = ModelStatistics(
        jd.grids.half_log_snr(VP, 20).lam,
        0.5 + 0.4 * np.sin(wave), 0.5 * np.cos(wave), np.sin(2.0 * wave),
    )  # fmt: skip
    x = np.random.default_rng(0).normal(size=(8, 2))
    tables = [
        unified(grid, v3_genotype(6, 3, corrector), statistics),
        SOLVERS.dpm_solver_v3(
            grid, statistics, 3, pseudo=corrector == "pseudo", corrector=corrector
        ),
    ]
    ours, theirs = nodes(mixture(), tables, x)
    np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-11)


def test_v3_holds_both_others(x64):
    """l = 1 is the data prediction, l = 0, s = -1 the noise prediction."""
    grid = GRIDS["vp"]
    for prediction, statistics in (("x0", (1.0, 0.0, 0.0)), ("eps", (0.0, -1.0, 0.0))):
        made = [
            unified(grid, uniform_schedule(6, p, 3, corrector=True), statistics)
            for p in (prediction, "v3")
        ]
        np.testing.assert_allclose(made[0].B, made[1].B, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("first", ["noise", "mean"])
def test_an_analytic_first_step(first, x64):
    """`analytic_first_step` with the same x0, and one evaluation less."""
    grid = GRIDS["vp"]
    alpha, sigma = grid.alpha[0], grid.sigma[0]
    mean, std = (0.0, (sigma / (sigma + np.hypot(alpha, sigma))) ** 0.5)
    if first == "mean":
        mean, std = np.array([0.3, -0.2]), 1e-12
    theirs = SOLVERS.analytic_first_step(NAMED["unipc_3"](grid), mean, std)
    ours = unified(grid, dataclasses.replace(fixed_schedule("unipc_3", 6), first=first), mean=mean)
    assert ours.nfe == theirs.nfe == 5
    x = np.random.default_rng(0).normal(size=(8, 2))
    a, b = (np.asarray(jd.sample(mixture(), t, x, save="nodes")) for t in (ours, theirs))
    np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_evaluating_again_by_hand(x64):
    """Two DDIM steps, the first corrected by the trapezium in lambda and evaluated again."""
    grid = jd.grids.half_log_snr(VP, 2)
    trapezium = matching_corrector(Expansion())
    genotype = Genotype((Decision("x0", Expansion(), trapezium, True), Decision()))
    x = np.random.default_rng(0).normal(size=(8, 2))
    network = mixture()
    at = [lambda y, i=i: np.asarray(network(y, *grid.node(i))) for i in range(2)]
    h = np.diff(grid.lam)
    carry = grid.sigma[1:] / grid.sigma[:-1]
    whole = -grid.alpha[1:] * np.expm1(-h)
    first = at[0](x)
    predicted = carry[0] * x + whole[0] * first
    slope = (at[1](predicted) - first) / h[0]
    corrected = predicted + grid.alpha[1] * (np.exp(-h[0]) - 1.0 + h[0]) * slope
    table = unified(grid, genotype)
    assert table.nfe == genotype.nfe == 3
    expected = [x, corrected, carry[1] * corrected + whole[1] * at[1](corrected)]
    np.testing.assert_allclose(
        jd.sample(network, table, x, save="nodes"), expected, rtol=1e-12, atol=1e-12
    )


def test_one_shape_and_any_prediction(x64):
    """Genotypes of as many evaluations stack as they are; what the network predicts is free."""
    grid = GRIDS["edm"]
    tables = [unified(grid, g) for g in random_genotypes(grid, 6, 12)]
    assert len({jax.tree.structure(t) for t in tables}) == 1
    assert {(t.A.shape, t.B.shape, t.nfe) for t in tables} == {((6, 3, 3), (6, 3, 6, 1), 6)}
    x = np.random.default_rng(0).normal(size=(4, 2)) * 80.0
    ends = [nodes(mixture(prediction=p), tables, x, "final") for p in ("x0", "eps")]
    np.testing.assert_allclose(ends[1], ends[0], rtol=1e-8, atol=1e-8)


def test_single_precision_costs_nothing():
    """States written with x_T and x0 alone round no worse than the methods' own registers."""
    grid = jd.grids.karras(EDM, 10)
    x = np.random.default_rng(0).normal(size=(64, 2)) * 80.0
    with jax.enable_x64(True):
        exact = nodes(mixture(), [NAMED["unipc_3_eps"](grid)], x)
    ours = nodes(mixture(prediction="eps"), [unified(grid, "unipc_3_eps")], x)
    np.testing.assert_allclose(ours[0, -1], exact[0, -1], atol=2e-5)


STEPS = (10, 20, 40)


def test_random_genotypes_are_consistent(x64):
    """Five random decisions in turn, on the inner span: order 1; uniform ones have their own.

    Turned, because the first steps' orders decide the error: tables drawn anew for each number of
    steps have none. Scalings are 1 + O(h) and cost no order here.
    """
    grids = [jd.grids.half_log_snr(VP, n, t_max=0.6, t_min=0.05) for n in STEPS]
    a, s, a1, s1 = (float(v[i]) for i in (0, -1) for v in (grids[0].alpha, grids[0].sigma))
    x = BROAD.sample(np.random.default_rng(0), 64, a, s)
    exact, kinds = BROAD.flow(x, (a, s), (a1, s1)), []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        drawn = [Moves(SolverSpace(), grids[0], 10).draw(rng) for _ in range(5)]
        kinds.append([])
        for grid in grids:
            fitted = Moves(SolverSpace(), grid, grid.steps).fitted
            turns = (fitted(drawn[i % 5], i, i == grid.steps - 1) for i in range(grid.steps))
            kinds[-1].append(Genotype(tuple(turns)))
    for prediction in INTEGRANDS:
        options = {"corrector": True, "lower_order_final": False}
        kinds.append([uniform_schedule(g.steps, prediction, 2, **options) for g in grids])
    tables = [unified(g, genotype) for kind in kinds for g, genotype in zip(grids, kind)]
    errors = [median_error(e, exact) for e in nodes(mixture(), tables, x, "final")]
    orders = [fitted_order(STEPS, errors[i : i + 3]) for i in range(0, len(errors), 3)]
    assert min(orders[:6]) >= 0.75, orders
    assert min(orders[6:]) >= 2.6, orders


def test_traced_nodes(x64):
    grid = jd.grids.half_log_snr(VP, 4)
    genotype = random_genotypes(grid, 4, 1, times=False, first=("network",))[0]

    def table(t):
        return unified(jd.grids.from_times(VP, t), genotype).B

    np.testing.assert_allclose(
        jax.jit(table)(jnp.asarray(grid.t)), unified(grid, genotype).B, rtol=1e-7, atol=1e-7
    )


@pytest.mark.parametrize("name", ["edm_to_zero", "flow_from_pure_noise"])
def test_every_end_gives_finite_samples(name):
    grid = GRIDS[name]
    tables = [unified(grid, g) for g in random_genotypes(grid, 6, 10)]
    x = np.random.default_rng(0).normal(size=(16, 2)) * grid.sigma[0]
    assert np.all(np.isfinite(nodes(mixture(), tables, x, "final")))


TWO = (Decision(), Decision())


@pytest.mark.parametrize(
    "genotype, error, message",
    [
        ("unipc", ValueError, "schedule 'unipc'; did you mean unipc_"),
        (TWO, TypeError, "must be a Genotype or a name, got tuple"),
        (Genotype(()), TypeError, "tuple of one Decision or more"),
        (Genotype((Decision("v"), Decision())), ValueError, "prediction of step 0.*'v'"),
        (Genotype((Decision("x0", Expansion(5)), *TWO)), ValueError, "order of the predictor of"),
        (Genotype((Decision("x0", Expansion(2)), *TWO)), ValueError, "ages from 0 to 0.*got"),
        (Genotype((Decision("x0", Expansion(1, 1)), *TWO)), ValueError, "start of the predictor"),
        (
            Genotype((*TWO, Decision("x0", Expansion(3, 0, ((1,), (1,)))))), ValueError,
            "derivative 2 of the predictor of step 2 takes at least 2",
        ),
        (Genotype((*TWO, Decision("x0", Expansion(2, 0, (1,))))), ValueError, "1 tuples of ages"),
        (
            Genotype((Decision(), Decision("x0", Expansion(2, 0, (), "bh3")))), ValueError,
            "scaling of the predictor.*'bh3'",
        ),
        (
            Genotype((Decision(), Decision("x0", Expansion(2, 0, (), np.nan)))), ValueError,
            "must be finite",
        ),
        (Genotype((Decision("x0", Expansion(), Expansion(2)), *TWO)), ValueError, "corrector of"),
        (
            Genotype((Decision(), Decision("x0", Expansion(), Expansion(2, 1)))), ValueError,
            "last step",
        ),
        (Genotype((Decision("x0", Expansion(), None, True), *TWO)), ValueError, "no corrector"),
        (Genotype(TWO, (0.5, 0.4)), ValueError, "no or 1 numbers"),
        (Genotype(TWO, ("0.5",)), ValueError, "times must be a tuple of numbers, got .'0.5'"),
        (Genotype((*TWO, Decision()), (0.4, 0.5)), ValueError, "times must decrease"),
        (Genotype(TWO, (1.5,)), ValueError, "within the grid's"),
        (Genotype(TWO, (np.nan,)), ValueError, "within the grid's.*nan"),
        (Genotype(TWO, (), "zero"), ValueError, "first.*'zero'"),
        (Genotype((Decision(),), (), "mean"), ValueError, "makes no evaluation"),
        (Genotype(TWO), ValueError, "2 decisions and no times, but the grid 3 steps"),
    ],
)  # fmt: skip
def test_bad_genotypes(genotype, error, message):
    with pytest.raises(error, match=message):
        unified(jd.grids.half_log_snr(VP, 3), genotype)


def test_times_may_be_numpy_numbers():
    """And are float64 all the same."""
    grid = jd.grids.half_log_snr(VP, 2)
    found, want = (unified(grid, Genotype(TWO, (time,))) for time in (np.float32(0.5), 0.5))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
        np.testing.assert_array_equal(a, b)


def test_bad_grids():
    with pytest.raises(ValueError, match="alpha = 0 needs the prediction x0 or flow, got 'eps'"):
        unified(GRIDS["flow_from_pure_noise"], "unipc_2_eps")
    arrays = jd.grids.from_arrays([1.0, 0.5, 0.1], [0.1, 0.5, 0.9], [0.9, 0.5, 0.1])
    with pytest.raises(ValueError, match="needs a grid from a process"):
        unified(arrays, Genotype(TWO, (0.4,)))
    for options in ({"corrector": True}, {"lower_order_final": False}):
        with pytest.raises(ValueError, match="singlestep=True"):
            uniform_schedule(4, singlestep=True, **options)
    with pytest.raises(ValueError, match="scaling.*'bh3'"):
        uniform_schedule(4, order=1, scaling="bh3")
