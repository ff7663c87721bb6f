"""`jaxdiff ablate`: the table of a sweep on a run's network, and what it refuses."""

import csv

import numpy as np
import pytest
from tiny_run import write_config

from jaxdiff import solvers
from jaxdiff.cli import main
from jaxdiff.experiment import make_tableau
from jaxdiff.generation import balanced_labels, generate
from jaxdiff.training.run import read_experiment, restore

CONFIG = '''
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict()
    config.ablation = {
        "run": %r, "count": 4, "reference": {"solver": "ddim", "steps": 20, "grid": "uniform"},
        "axes": (
            {"solver": ("ddim", "euler_flow"), "nfe": (2, 3), "grid": "uniform", "guidance": (1.0, 2.0)},
            {"solver": "ddim_eta1", "steps": 3, "grid": "uniform", "seed": (0, 1)},
        ),
    }
    return config
'''


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablate")
    cache = str(folder / "cache")
    arguments = ["--config", str(write_config(folder)), "--workdir", str(folder / "run"), "--quiet"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", cache)
        assert main(["train", *arguments, "--config.train.steps=3"]) == 0
    config = folder / "sweep.py"
    config.write_text(CONFIG % str(folder / "run"))
    return folder / "run", config


def test_a_sweep_of_a_run(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    workdir, config = run
    arguments = ["ablate", "--config", str(config), "--workdir", str(tmp_path / "sweep"), "--quiet"]
    assert main(arguments) == 0
    assert "10 cells" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "sweep" / "table.csv").open()))
    assert len(rows) == 10 and {"nfe", "error", "error_mean"} <= rows[0].keys()
    assert {p.name for p in (tmp_path / "sweep").glob("*.png")} == {
        "error_against_nfe.png", "pareto.png", "heat_map.png"
    }  # fmt: skip
    # A cell's error, from what `jaxdiff sample` draws.
    experiment = read_experiment(workdir)
    ema, labels = restore(experiment, workdir).ema, balanced_labels(experiment, 4)
    draws = [
        generate(experiment, ema, make_tableau(experiment.process, name, steps, "uniform"), labels,
                 4, 0, 2.0)
        for name, steps in (("ddim", 3), ("ddim", 20))
    ]  # fmt: skip
    error = np.median(np.sqrt(np.mean((draws[0] - draws[1]) ** 2, 1)))
    (row,) = [r for r in rows if r["solver"] == "ddim" and r["nfe"] == "3" and r["guidance"] == "2.0"]
    np.testing.assert_allclose(float(row["error"]), error, rtol=1e-4)
    # Stopped after its first cells, it goes on; a stored solver is one more.
    cells = tmp_path / "sweep" / "cells.jsonl"
    kept = cells.read_text().splitlines()[:6]
    cells.write_text("\n".join(kept) + "\n")
    assert main(arguments) == 0
    assert list(csv.DictReader((tmp_path / "sweep" / "table.csv").open())) == rows
    assert cells.read_text().splitlines()[:6] == kept


@pytest.mark.parametrize(
    "change, words",
    [
        ("--config.ablation.metrics=('mmd',)", "the run's data are 'arrays'"),
        ("--config.ablation.plot=mmd", "plot must be 'error'"),
        ("--config.ablation.count=0", "at least 1"),
        ("--config.ablation.run=nowhere", "no such folder"),
        ("--config.ablation.rum=x", "did you mean"),
    ],
)
def test_a_wrong_sweep_writes_nothing(run, change, words, tmp_path, capsys):
    _, config = run
    sweep = tmp_path / "sweep"
    assert main(["ablate", "--config", str(config), "--workdir", str(sweep), change]) == 2
    assert words in capsys.readouterr().err and not sweep.exists()


def test_a_bad_axis_writes_nothing(run, tmp_path, capsys):
    workdir, config = run
    wrong = tmp_path / "wrong.py"
    wrong.write_text((config.read_text()).replace('"euler_flow"', '"euler_flaw"'))
    sweep = tmp_path / "sweep"
    assert main(["ablate", "--config", str(wrong), "--workdir", str(sweep)]) == 2
    assert "did you mean euler_flow" in capsys.readouterr().err and not sweep.exists()


def test_sample_with_a_stored_solver(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    workdir, _ = run
    experiment = read_experiment(workdir)
    path = tmp_path / "mine.json"
    solvers.save(make_tableau(experiment.process, "ddim", 4, "uniform"), path)
    common = ["sample", "--workdir", str(workdir), "--count", "3", "--quiet"]
    for name, chosen in (("a", ["--solver", str(path)]), ("b", ["--solver", "ddim", "--steps", "4"])):
        assert main([*common, *chosen, "--output", str(tmp_path / f"{name}.png")]) == 0
    found = [np.load(tmp_path / f"{name}.npz")["x"] for name in "ab"]
    np.testing.assert_array_equal(*found)
    assert main([*common, "--solver", str(path), "--steps", "3"]) == 2
    assert "has its own: --steps cannot change it" in capsys.readouterr().err
