import json
import shutil

import numpy as np
import pytest
from tiny_run import write_config

from jaxdiff import cli
from jaxdiff.cli import main


@pytest.fixture(scope="module", autouse=True)
def no_user_cache(tmp_path_factory):
    """Tests leave the user's cache of compiled programs alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    return str(write_config(tmp_path_factory.mktemp("config")))


@pytest.fixture(scope="module")
def finished(config_file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("cli") / "run"
    arguments = ["--config", config_file, "--workdir", str(workdir), "--quiet"]
    assert main(["train", *arguments, "--config.train.steps=3"]) == 0
    return workdir


@pytest.fixture
def moved(finished, tmp_path, monkeypatch):
    """The run in another place, seen from another working directory."""
    shutil.copytree(finished, tmp_path / "elsewhere" / "run")
    monkeypatch.chdir(tmp_path)
    return "elsewhere/run"


def fails(capsys, arguments, code, *words):
    try:
        found = main([str(a) for a in arguments])
    except SystemExit as stop:  # argparse
        found = stop.code
    message = capsys.readouterr().err
    assert found == code, message
    assert "Traceback" not in message
    for word in words:
        assert word in message


def test_train_writes_the_whole_run(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "checkpoints", "config.json", "data.json", "metrics.json", "metrics.jsonl", "samples.png",
        "throughput.jsonl",
    }  # fmt: skip
    figures = json.loads((finished / "metrics.json").read_text())
    assert figures["step"] == 3 and figures["figures"][0]["nfe"] == 4
    assert json.loads((finished / "data.json").read_text()) == {"shape": [2], "num_classes": 3}
    assert (finished / "samples.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_finished_run_says_so(finished, config_file, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    arguments = ["--config", config_file, "--workdir", str(finished), "--config.train.steps=3"]
    assert main(["train", *arguments]) == 0
    assert "finished" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


def test_train_refuses_a_run_of_another_configuration(finished, config_file, capsys):
    arguments = ["train", "--config", config_file, "--workdir", finished]
    fails(capsys, arguments, 1, "config.train.steps: 3 -> 12")


def test_samples_depend_on_seed_and_number_alone(moved, tmp_path, capsys):
    common = ["sample", "--workdir", moved, "--solver", "ddim", "--steps", "3", "--quiet",
              "--option", "eta=1.0", "--label", "2", "0"]  # fmt: skip
    assert main([*common, "--count", "6", "--output", "a.png"]) == 0
    assert "6 samples, 3 evaluations" in capsys.readouterr().out
    assert main([*common, "--count", "6", "--batch-size", "2", "--output", "b.png"]) == 0
    assert main([*common, "--count", "6", "--seed", "1", "--output", "c.png"]) == 0
    a, b, c = (np.load(tmp_path / f"{name}.npz") for name in "abc")
    np.testing.assert_array_equal(a["label"], [2, 0] * 3)
    np.testing.assert_allclose(a["x"], b["x"], rtol=1e-5, atol=1e-6)
    assert np.abs(a["x"] - c["x"]).max() > 0.1
    assert (tmp_path / "a.png").exists()


def test_one_step_works_and_guidance_moves_samples(moved, tmp_path):
    common = ["sample", "--workdir", moved, "--steps", "1", "--count", "4", "--quiet"]
    for scale in ("0", "1", "3"):
        assert main([*common, "--guidance", scale, "--output", f"g{scale}.png"]) == 0
    zero, one, three = (np.load(tmp_path / f"g{s}.npz")["x"] for s in ("0", "1", "3"))
    # One step from alpha = 0 returns the denoised state, which is linear in the scale.
    np.testing.assert_allclose(three, zero + 3 * (one - zero), atol=1e-5)
    assert np.abs(one - zero).max() > 1e-4


def test_evaluate_repeats_the_figures_of_the_run(moved, tmp_path, capsys):
    assert main(["evaluate", "--workdir", moved, "--quiet"]) == 0
    printed = json.loads(capsys.readouterr().out)
    written = json.loads((tmp_path / moved / "evaluate.json").read_text())
    trained = json.loads((tmp_path / moved / "metrics.json").read_text())
    assert printed == written
    for now, then in zip(written["figures"], trained["figures"], strict=True):
        assert now == pytest.approx(then, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["COMMAND"]),
        (["trian"], ["trian", "did you mean train"]),
        (["train", "--config", "{config}"], ["--workdir"]),
        (["train", "--config", "absent.py", "--workdir", "w"], ["absent.py"]),
        (["train", "--config", "{config}", "--workdir", "w", "--config.train.stesp=1"],
         ["config.train.stesp", "did you mean steps"]),
        (["train", "--config", "{config}", "--workdir", "w", "--config.train.steps=x"],
         ["config.train.steps", "int", "'x'"]),
        (["train", "--config", "{config}", "--workdir", "w", "--config.train.steps=0"],
         ["config.train.steps", "at least 1", "0"]),
        (["train", "--config", "{config}", "--workdir", "w", "--config.train.batch_size=9"],
         ["batch_size", "8 devices", "9"]),
        (["train", "--config", "{config}", "--workdir", "w", "--config.sample.solver=unipcc"],
         ["unipcc", "unipc"]),
        (["train", "--config", "{config}", "--workdir", "w", "--config.sample.grid=karas"],
         ["karas", "did you mean karras"]),
        (["train", "--config", "{config}", "--workdir", "w", "--config.loss.weighting=simpel"],
         ["simpel", "simple"]),
        (["train", "--config", "{config}", "--workdir", "w", "--config.loss.time_law=unifrom"],
         ["unifrom", "uniform"]),
        (["train", "--config", "{config}", "--workdir", "w", "--config.denoiser.prediction=u"],
         ["'u'", "eps"]),
        (["train", "--config", "{config}", "--workdir", "w", "--config.data.data=none.npz"],
         ["none.npz"]),
        (["train", "--config", "{config}", "--workdir", "w", "--config.train.ema_decay=1"],
         ["ema_decay", "1.0"]),
        (["train", "--config", "{config}", "--workdir", "w", "--config.denoiser.prediction=eps"],
         ["alpha = 0", "'eps'", "v, x0 or flow"]),
        (["train", "--config", "{config}", "--workdir", "w", "--config.sample.count=0"],
         ["config.sample.count", "0"]),
        (["train", "--config", "{config}", "--workdir", "w", "--config.evaluate.features=x"],
         ["features", "digits", "'x'"]),
        (["train", "--config", "{config}", "--workdir", "w", "--config.evaluate.features=digits"],
         ["config.data.name", "'digits'", "'arrays'"]),
        (["train", "--config", "{config}", "--workdir", "w", "--config.denoiser.precondition=true"],
         ["precondition", "x0"]),
        (["train", "--config", "{config}", "--workdir", "w", "--config.denoiser.precondition=true",
          "--config.denoiser.prediction=x0"],
         ["precondition", "alpha = 0", "config.process.t_max below 1", "'v' or 'flow'"]),
        (["train", "--config", "{config}", "--workdir", "w",
          "--config.sample.seed=99999999999999999999"],
         ["config.sample.seed", "0 to 4294967295", "99999999999999999999"]),
        (["train", "--config", "{config}", "--workdir", "w", "--config.seed=-1"],
         ["config.seed", "0 to 4294967295", "-1"]),
        (["train", "--config", "{config}", "--workdir", "w", "--config.model.width=0"],
         ["config.model.width", "at least 1", "0"]),
        (["train", "--config", "{config}", "--workdir", "w", "--config.model.depth=-1"],
         ["config.model.depth", "at least 1", "-1"]),
        (["train", "--config", "{config}", "--workdir", "w", "--config.model.time_scale=inf"],
         ["config.model.time_scale", "finite", "inf"]),
        (["train", "--config", "{config}", "--workdir", "w", "--config.optimizer.b1=2.0"],
         ["config.optimizer.b1", "[0, 1)", "2.0"]),
        (["train", "--config", "{config}", "--workdir", "w", "--config.evaluate.guidance=('a',)"],
         ["config.evaluate.guidance", "float", "'a'"]),
        (["train", "--config", "{config}", "--workdir", "w",
          "--config.loss.time_options={'stratifed': True}"],
         ["stratifed", "did you mean stratified"]),
        (["train", "--config", "{config}", "--workdir", "w",
          "--config.sample.options={'eta': 'abc'}"],
         ["'ddim'", "eta", "'abc'"]),
        (["train", "--config", "{config}", "--workdir", "gs://bucket/run"],
         ["--workdir must be a path", "'gs://bucket/run'", "docs/pods.md"]),
        (["evaluate", "--workdir", "gs://bucket/run"], ["--workdir must be a path"]),
        (["sample", "--workdir", "{run}", "--ema", "0.9"], ["at most 1 / sqrt(12)", "0.9"]),
        (["sample", "--workdir", "{run}", "--ema", "0.1"], ["config.train.ema_lengths is empty"]),
        (["evaluate", "--workdir", "{run}", "--ema", "0.1"], ["config.train.ema_lengths is empty"]),
        (["sample", "--workdir", "absent"], ["absent"]),
        (["sample", "--workdir", "{run}", "--seed", "99999999999999999999"],
         ["--seed", "0 to 4294967295", "99999999999999999999"]),
        (["evaluate", "--workdir", "{run}", "--seed", "-1"], ["--seed", "0 to 4294967295"]),
        (["sample", "--workdir", "{run}", "--label", "4294967297"], ["4294967297", "0 to 2"]),
        (["sample", "--workdir", "{run}", "--label", "9" * 30], ["9" * 30, "0 to 2"]),
        (["sample", "--workdir", "{run}", "--option", "grid=3"], ["no option 'grid'", "eta"]),
        (["sample", "--workdir", "{run}", "--option", "name=3"], ["no option 'name'", "eta"]),
        (["sample", "--workdir", "{run}", "--option", "eta=abc"], ["'ddim'", "eta", "'abc'"]),
        (["sample", "--workdir", "{run}", "--grid", "karras", "--grid-option", "rho=abc"],
         ["'karras'", "rho", "'abc'"]),
        (["sample", "--workdir", "{run}", "--sovler", "ddim"], ["--sovler", "--solver"]),
        (["sample", "--workdir", "{run}", "--solver", "dimm"], ["dimm", "ddim"]),
        (["sample", "--workdir", "{run}", "--grid", "unifrom"], ["unifrom", "did you mean uniform"]),
        (["sample", "--workdir", "{run}", "--steps", "0"], ["at least 1", "0"]),
        (["sample", "--workdir", "{run}", "--steps", "two"], ["--steps", "two"]),
        (["sample", "--workdir", "{run}", "--option", "etaa=1"], ["etaa", "eta"]),
        (["sample", "--workdir", "{run}", "--grid-option", "rho=1"], ["rho", "t_max"]),
        (["sample", "--workdir", "{run}", "--option", "eta"], ["KEY=VALUE", "eta"]),
        (["sample", "--workdir", "{run}", "--label", "3"], ["label 3", "0 to 2"]),
        (["sample", "--workdir", "{run}", "--label", "-1"], ["label -1", "0 to 2"]),
        (["sample", "--workdir", "{run}", "--count", "0"], ["--count", "0"]),
        (["sample", "--workdir", "{run}", "--guidance", "nan"], ["guidance", "nan"]),
        (["sample", "--workdir", "{run}", "--batch-size", "0"], ["batch", "0"]),
        (["sample", "--workdir", "{run}", "--output", "x.jpg"], [".png", "x.jpg"]),
        (["sample", "--workdir", "{run}", "--output", "no/x.png"], ["no such folder", "no"]),
        (["evaluate", "--workdir", "{run}", "--count", "1"], ["--count", "1"]),
    ],
)  # fmt: skip
def test_a_wrong_command_names_what_is_wrong_and_writes_nothing(
    finished, config_file, tmp_path, monkeypatch, capsys, arguments, words
):
    monkeypatch.chdir(tmp_path)
    places = {"{config}": config_file, "{run}": str(finished)}
    before = sorted(finished.rglob("*"))
    fails(capsys, [places.get(a, a) for a in arguments], 2, *words)
    assert list(tmp_path.iterdir()) == [] and sorted(finished.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import math\nx = mth.pi\n", ["line 2", "NameError", "'mth'"]),
        ("def get_config():\n    return 1 / 0\n", ["line 2", "ZeroDivisionError"]),
        ("def get_config(:\n", ["not a Python file"]),
    ],
)
def test_an_error_in_the_configuration_file_names_it(tmp_path, capsys, text, words):
    (tmp_path / "broken.py").write_text(text)
    arguments = ["train", "--config", tmp_path / "broken.py", "--workdir", tmp_path / "run"]
    fails(capsys, arguments, 2, "broken.py", *words)
    assert not (tmp_path / "run").exists()


def test_an_arithmetic_error_is_reported(config_file, tmp_path, monkeypatch, capsys):
    """As those that a builder raises for numbers which no range foresees."""

    def divide(config):
        return 1 / 0

    monkeypatch.setattr("jaxdiff.training.run.prepare", divide)
    arguments = ["train", "--config", config_file, "--workdir", tmp_path / "run"]
    fails(capsys, arguments, 2, "division by zero")


@pytest.mark.parametrize(
    ("interruption", "ended"), [(KeyboardInterrupt, [130]), (cli._Stopped, [])]
)
def test_a_second_interrupt_does_not_leave_other_processes_waiting(
    config_file, tmp_path, monkeypatch, capsys, interruption, ended
):
    """But one that all have answered, with everything saved, ends this one in the ordinary way."""

    def interrupted(config):
        raise interruption

    codes = []
    monkeypatch.setattr("jaxdiff.training.run.prepare", interrupted)
    monkeypatch.setattr("jaxdiff.parallel.abandon", lambda code, words: codes.append(code))
    arguments = ["train", "--config", config_file, "--workdir", tmp_path / "run"]
    fails(capsys, arguments, 130, "interrupted")
    assert codes == ended


def test_data_with_nan_are_refused(config_file, tmp_path, capsys):
    np.savez(tmp_path / "nan.npz", x=np.full((32, 2), np.nan, np.float32), label=np.zeros(32, int))
    path = f"--config.data.data={tmp_path / 'nan.npz'}"
    workdir = tmp_path / "run"
    arguments = ["train", "--config", config_file, "--workdir", workdir, path]
    fails(capsys, arguments, 2, "nan", "finite")
    assert not workdir.exists()


def test_a_run_without_a_checkpoint_is_an_error(moved, tmp_path, capsys):
    shutil.rmtree(tmp_path / moved / "checkpoints")
    fails(capsys, ["sample", "--workdir", moved], 1, "no checkpoint")
    assert not (tmp_path / "samples.png").exists()


@pytest.mark.parametrize("command", ["train", "sample", "evaluate", "ablate"])
def test_help_lists_the_options(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "--workdir" in capsys.readouterr().out
