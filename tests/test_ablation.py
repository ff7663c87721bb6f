"""Sweeps: the numbers of `sample`, in few programs, resumable; and the table of results."""

import csv
import io
import json

import compilations
import jax
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff import ablation
from jaxdiff.ablation import product

PROCESS = jd.processes.vp_linear()
RNG = np.random.default_rng(0)
MEANS, NULL = RNG.normal(size=(3, 4)), 3
COND = np.arange(8, dtype=np.int32) % 3


def by_class(means, x, t, label):
    """A made-up eps network with classes; class 3 is no class."""
    centre = jax.numpy.concatenate([means, means.mean(0, keepdims=True)])[label]
    return jax.numpy.tanh(x - centre) * (0.5 + 0.5 * t)


NETWORK = jd.Denoiser(by_class, "eps", MEANS.astype(np.float32))
MIXTURE = jd.gaussian_mixture(MEANS, np.full(3, 0.5), np.ones(3), PROCESS)


def run(sweep, denoiser=MIXTURE, **options):
    options = {"count": 8, "progress": False, **options}
    return ablation.run(sweep, denoiser, options.pop("process", PROCESS), (4,), **options)


def first(samples, facts):
    return samples[0, 0]


def total(samples, facts):
    return samples.sum()


# --- the numbers ----------------------------------------------------------------------------------


def directly(axes, network=NETWORK, process=PROCESS):
    """What `jd.sample` gives for a cell, spelled out."""
    start, steps = jax.random.split(jax.random.key(axes.get("seed", 0)))
    ids = np.arange(8)
    x = process.prior(jd.sample_keys(start, ids), (8, 4))
    grid = getattr(jd.grids, axes.get("grid", "half_log_snr"))(process, axes["steps"])
    options = {name: axes[name] for name in ("order", "eta") if name in axes}
    denoiser = network
    if axes.get("guidance", 1.0) != 1.0:
        denoiser = jd.guidance.classifier_free(denoiser, axes["guidance"], np.int32(NULL))
    if axes.get("thresholding") == "clip_x0":
        denoiser = jd.clip_x0(denoiser)
    elif axes.get("thresholding"):
        denoiser = jd.dynamic_threshold(denoiser, axes["thresholding"]["quantile"])
    tableau = jd.solvers.build(axes["solver"], grid, **options)
    return np.asarray(jd.sample(denoiser, tableau, x, jd.sample_keys(steps, ids), cond=COND))


def test_cells_are_what_sample_gives():
    quantiles = [{"name": "dynamic_threshold", "quantile": q} for q in (0.5, 0.9)]
    sweep = (
        product(solver="unipc", order=[1, 2, 3], steps=[3, 5], guidance=[1.0, 2.0, 3.5])
        + product(solver="ddim", eta=[0.0, 0.5, 1.0], steps=3, grid=["karras", "logistic"], seed=[1, 2])
        + product(solver="heun", steps=3, thresholding=[None, "clip_x0", *quantiles], guidance=2.0)
    )
    table = run(sweep, NETWORK, cond=COND, null_cond=np.int32(NULL),
                metrics={"first": first, "total": total})  # fmt: skip
    assert len(table) == len(sweep) == 18 + 12 + 4
    for row, axes in zip(table.rows, sweep.cells):
        x = directly(axes)
        assert {name: row[name] for name in axes} == dict(axes)
        np.testing.assert_allclose(row["first"], x[0, 0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(row["total"], x.sum(), rtol=1e-5, atol=1e-4)
    assert len(set(table["total"].tolist())) >= 30  # clipping may change nothing


def test_networks_and_processes_by_name():
    networks = {"a": NETWORK, "b": jd.Denoiser(by_class, "eps", -NETWORK.params)}
    processes = {"linear": PROCESS, "cosine": jd.processes.vp_cosine(t_max=0.9)}
    sweep = product(solver="ddim", steps=2, network=["a", "b"], process=["linear", "cosine"])
    table = run(sweep, networks, process=processes, cond=COND, metrics={"total": total})
    for row in table.rows:
        x = directly(row, networks[row["network"]], processes[row["process"]])
        np.testing.assert_allclose(row["total"], x.sum(), rtol=1e-5, atol=1e-4)


def test_chunks_and_devices_change_nothing():
    sweep = product(solver=["ddim", "unipc_3", "dpm_solver_pp_3m"], steps=4, seed=range(4))
    whole = run(sweep, metrics={"total": total})
    small = run(sweep, metrics={"total": total}, memory=1)
    spread = run(sweep, metrics={"total": total}, mesh=jd.parallel.mesh(cells=8))
    for other in (small, spread):
        np.testing.assert_allclose(other["total"], whole["total"], rtol=1e-5, atol=1e-4)


def test_one_program_for_all_samplers_of_a_length():
    solvers = ["ddim", "dpm_solver_pp_2m", "dpm_solver_pp_3m", "unipc_2", "ipndm_4", "deis_tab3"]
    sweep = product(solver=solvers, steps=7, grid=["half_log_snr", "karras", "logistic"])
    table = run(sweep, metrics={"total": total})
    assert (len(table), table.programs) == (18, 1)
    others = product(solver=solvers, steps=7, grid=["uniform", "quadratic", "power"])
    with compilations.counted() as compiled:
        run(others, metrics={"total": total})
    # The network alone, whose memory decides the chunks: a thousand samplers more, no program.
    assert len(compiled) <= 1


def test_evaluations_decide_the_steps():
    sweep = product(solver=["ddim", "heun", "dpm_solver_pp_2s", "f_pndm"], nfe=13)
    table = run(sweep.where(lambda cell: cell["solver"] in ("ddim", "f_pndm")), metrics={"t": total})
    assert table["nfe"].tolist() == [13, 13]
    with pytest.raises(ValueError, match="in the cell .*'heun'.*no number of steps makes 13"):
        run(sweep)


# --- references -----------------------------------------------------------------------------------


def test_error_to_many_steps_and_to_a_function():
    sweep = product(solver=["ddim", "unipc_3"], steps=[5, 20], seed=[0, 1])
    many = run(sweep, reference={"solver": "unipc_3", "steps": 200})

    def ends(x, process):
        tableau = jd.solvers.build("unipc_3", jd.grids.half_log_snr(process, 200))
        return jd.sample(MIXTURE, tableau, x)

    exact = run(sweep, reference=ends)
    np.testing.assert_allclose(many["error"], exact["error"], rtol=1e-3, atol=1e-6)
    errors = many.group(("solver", "steps"), "error")
    assert (errors["unipc_3", 20] < 0.1 * errors["ddim", 20]).all()
    assert (errors["ddim", 20] < 0.5 * errors["ddim", 5]).all()


# --- errors before anything runs ------------------------------------------------------------------


@pytest.mark.parametrize(
    "axes, options, error, message",
    [
        ({"solver": "dddim", "steps": 2}, {}, ValueError, "'dddim'; did you mean ddim"),
        ({"solver": "ddim", "steps": 2, "grid": "karas"}, {}, ValueError, "did you mean karras"),
        ({"solver": "ddim", "steps": 2, "etta": 1.0}, {}, ValueError, "did you mean eta"),
        ({"solver": "ddim", "steps": 2, "eta": -1.0}, {}, ValueError, "eta"),
        ({"solver": "ddim", "steps": 0}, {}, ValueError, "at least 1, got 0"),
        ({"solver": "ddim", "steps": 2, "guidance": 2.0}, {}, ValueError, "cond= and null_cond="),
        ({"solver": "ddim", "steps": 2, "seed": -1}, {}, ValueError, "seed must be from 0"),
        ({"solver": "ddim", "steps": 2, "thresholding": "clip"}, {}, ValueError, "clip_x0"),
        ({"solver": "ddim", "steps": 2, "process": "edm"}, {}, ValueError, "unknown process 'edm'"),
        ({"solver": "ddim", "steps": [2, 2]}, {}, ValueError, "twice"),
        ({"solver": "ddim", "steps": 2}, {"count": 0}, ValueError, "count must be"),
        ({"solver": "ddim", "steps": 2}, {"reference": 3}, TypeError, "reference must be"),
        ({"solver": "ddim", "steps": 2}, {"reference": {"seed": 3}}, ValueError, "is a sampler"),
        ({"solver": "ddim", "steps": 2}, {"reference": {"solver": "ddpm"}}, ValueError, "determ"),
    ],
)
def test_a_bad_axis_fails_before_anything_runs(axes, options, error, message, tmp_path):
    def never(samples, facts):
        raise AssertionError("a cell ran")

    good = product(solver="ddim", steps=3)
    with pytest.raises(error, match=message):
        run(good + product(**axes), metrics={"never": never}, workdir=tmp_path / "sweep", **options)
    assert not (tmp_path / "sweep" / "cells.jsonl").exists()


def test_a_product_needs_solver_and_steps():
    for axes in ({"steps": 3}, {"solver": "ddim"}, {"solver": "ddim", "steps": 3, "nfe": 3}):
        with pytest.raises(ValueError, match="needs solver, and either steps or nfe"):
            product(**axes)
    with pytest.raises(ValueError, match="'seed' has no values"):
        product(solver="ddim", steps=3, seed=[])


# --- a folder -------------------------------------------------------------------------------------


def test_a_killed_sweep_goes_on(tmp_path):
    sweep = product(solver=["ddim", "unipc_2"], steps=[2, 3, 4])
    asked = []

    def counted(samples, facts):
        asked.append(facts["axes"])
        if len(asked) == 5:
            raise KeyboardInterrupt
        return samples.sum()

    options = {"workdir": tmp_path, "reference": {"steps": 20}, "memory": 1}
    with pytest.raises(KeyboardInterrupt):
        run(sweep, metrics={"total": counted}, **options)
    kept = (tmp_path / "cells.jsonl").read_text()
    assert len(kept.splitlines()) == 4
    (tmp_path / "cells.jsonl").write_text(kept[:-30])  # killed while it wrote the fourth
    table = run(sweep, metrics={"total": counted}, **options)
    cut = json.loads(kept.splitlines()[3])["row"]
    again = [axes for axes in asked[5:] if axes not in asked[:3]]
    assert len(asked) == 5 + 3 and again == asked[5:]
    assert {name: cut[name] for name in ("solver", "steps")} in again
    whole = run(sweep, metrics={"total": total}, reference={"steps": 20}, memory=1)
    np.testing.assert_array_equal(table["total"], whole["total"])
    np.testing.assert_array_equal(table["error"], whole["error"])
    # All is there now: another run computes nothing; a longer sweep, only what is new.
    again = run(sweep, metrics={"total": counted}, **options)
    assert (len(asked), again.programs) == (8, 0)
    run(sweep + product(solver="heun", steps=2), metrics={"total": counted}, **options)
    assert len(asked) == 9


def test_a_changed_function_is_asked_again(tmp_path):
    for value in (0.0, 1.0):

        def ends(x, process, value=value):
            return np.full_like(x, value)

        sweep = product(solver="ddim", steps=2 + int(value))
        table = run(sweep, workdir=tmp_path, reference=ends, metrics={"end": reference_entry})
        assert table["end"].tolist() == [value]


def reference_entry(samples, facts):
    return facts["reference"][0, 0]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"count": 9}, "shape: .8, 4. there, .9, 4. here"),
        ({"denoiser": jd.gaussian_mixture(MEANS, np.full(3, 0.6), np.ones(3))}, "networks"),
        ({"reference": {"steps": 10}}, "reference"),
        ({"process": jd.processes.vp_linear(beta_max=19.0)}, "processes"),
    ],
)
def test_another_sweep_is_refused(change, message, tmp_path):
    sweep = product(solver="ddim", steps=2)
    run(sweep, workdir=tmp_path, metrics={"total": total})
    with pytest.raises(ValueError, match=f"another sweep: .*{message}"):
        run(sweep, **{"workdir": tmp_path, "metrics": {"total": total}, **change})


# --- the table and the report ---------------------------------------------------------------------

ROWS = [
    {"solver": s, "nfe": n, "seed": k, "error": e}
    for s, n, k, e in [
        ("a", 5, 0, 1.0), ("a", 5, 1, 3.0), ("a", 5, 2, 9.0), ("b", 5, 0, 4.0), ("b", 5, 1, 4.0),
        ("b", 5, 2, 0.1), ("a", 10, 0, 2.0), ("b", 10, 0, 5.0), ("a", 20, 0, 2.5), ("b", 20, 0, 0.5),
    ]
]  # fmt: skip


def test_table():
    table = ablation.Table(ROWS, ["error"])
    best = table.best("error", "nfe")
    assert [(r["solver"], r["nfe"], r["error"]) for r in best.rows] == [
        ("a", 5, 3.0), ("a", 10, 2.0), ("b", 20, 0.5)
    ]  # fmt: skip
    assert [r["nfe"] for r in table.pareto().rows] == [5, 10, 20]
    worse = [{**row, "error": 2.2} if row["nfe"] == 20 else row for row in ROWS]
    assert [r["nfe"] for r in ablation.Table(worse, ["error"]).pareto().rows] == [5, 10]
    assert len(table.where(solver="a", nfe=[5, 10])) == 4
    assert table.axes == ("solver", "nfe", "seed")
    np.testing.assert_array_equal(table.group("solver", "error")["b",], [4.0, 4.0, 0.1, 5.0, 0.5])
    with pytest.raises(KeyError, match="no column 'errors'; the columns are solver, nfe"):
        table["errors"]
    read = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert [float(row["error"]) for row in read] == [row["error"] for row in ROWS]
    assert json.loads(table.to_json()) == ROWS
    mixed = ablation.Table([{"value": 1}, {"value": "a"}, {"value": None}])
    assert mixed["value"].tolist() == [1, "a", None] and mixed.where(value=1).rows[0]["value"] == 1
    assert table.to_markdown().splitlines()[2] == "| a | 5 | 0 | 1 |"


def test_report(tmp_path):
    sweep = product(solver=["ddim", "unipc_2"], nfe=[2, 4], grid=["half_log_snr", "karras"], seed=[0, 1])
    table = run(sweep, reference={"steps": 20})
    ablation.report(table, tmp_path, title="A test")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"table.csv", "table.json", "report.md", "error_against_nfe.png", "pareto.png",
                     "heat_map.png"}  # fmt: skip
    page = (tmp_path / "report.md").read_text()
    best = table.best("error", "nfe").rows[0]
    assert f"| 2 | {best['solver']} | {best['grid']} | {best['error']:.4g} |" in page
    with pytest.raises(KeyError, match="no column 'mmd'"):
        ablation.report(table, tmp_path, "mmd")
