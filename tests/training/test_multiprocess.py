"""Two real processes of four devices each against one process with one device."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from tiny_run import tiny_config, write_config

from jaxdiff import config as configuration
from jaxdiff import parallel
from jaxdiff.cli import main
from jaxdiff.experiment import make_tableau, sampler
from jaxdiff.generation import generate
from jaxdiff.settings import SECTIONS
from jaxdiff.training import ema, reconstruction, run
from jaxdiff.training.checkpoints import Checkpoints
from jaxdiff.training.loop import train
from jaxdiff.training.reconstruction import reconstruct
from jaxdiff.training.run import prepare, restore

OVERRIDES = (
    "--config.optimizer.eps=1e-3", "--config.train.sample_every=6", "--config.train.evaluate_every=5",
    "--config.train.best_metric=sliced_wasserstein", "--config.train.ema_lengths=(0.05,0.1)",
    "--config.train.ema_snapshots_every=4", "--config.train.prefetch=2",
    "--config.train.checkpoint_every=5", "--config.train.keep=2",
)  # fmt: skip
# Every parameter is split over both processes, and each reads its half of the batch.
MESH = ("--config.mesh.fsdp=8",)

SCRIPT = """
import sys
import jax
from jaxdiff import config as configuration
from jaxdiff.cli import main
from jaxdiff.settings import SECTIONS
from jaxdiff.training.run import prepare
config, workdir, out, *overrides = sys.argv[1:]
codes = [
    main(["train", "--config", config, "--workdir", workdir, "--quiet", *overrides]),
    main(["train", "--config", config, "--workdir", workdir, "--quiet", *overrides]),
    main(["sample", "--workdir", workdir, "--count", "6", "--output", out, "--quiet", "--ema", "0.08"]),
    main(["evaluate", "--workdir", workdir, "--quiet", "--best"]),
]
other = configuration.load(config, SECTIONS)
other.seed = jax.process_index()
try:
    prepare(other)
except ValueError as error:
    print("refused:", error, file=sys.stderr)
sys.exit(max(codes))
"""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(number, port, arguments):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2]),
        "JAXDIFF_COORDINATOR": f"127.0.0.1:{port}", "JAXDIFF_PROCESSES": "2",
        "JAXDIFF_PROCESS_ID": str(number),
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(configuration file, workdir, what each process printed, to both streams), two processes."""
    folder = tmp_path_factory.mktemp("processes")
    file, workdir = write_config(folder), folder / "run"
    port = free_port()
    arguments = [str(file), str(workdir), str(folder / "six.png"), *OVERRIDES, *MESH]
    started = [start(number, port, arguments) for number in (0, 1)]
    try:
        found = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, found, strict=True):
        assert process.returncode == 0, errors
    return file, workdir, [out for out, _ in found], [errors for _, errors in found]


@pytest.fixture(scope="module")
def alone(both, tmp_path_factory):
    """(plan, workdir, last state) of the same run in one process, on one device."""
    file = both[0]
    config = configuration.override(configuration.load(file, SECTIONS), OVERRIDES)
    plan = prepare(config, jax.devices()[:1])
    workdir = tmp_path_factory.mktemp("alone") / "run"
    return plan, workdir, train(plan, workdir, progress=False)


def test_two_processes_end_where_one_does(both, alone):
    plan, _, expected = alone
    state = restore(plan.experiment, both[1])  # of two processes, read by one
    assert int(state.step) == int(expected.step) == 12
    for name in ("params", "opt_state", "ema", "ema_tracks"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            getattr(state, name), getattr(expected, name),
        )  # fmt: skip


def test_the_log_is_written_once_and_agrees(both, alone):
    one, two = (
        [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        for workdir in (alone[1], both[1])
    )
    assert [line["step"] for line in two] == [4, 8, 12]
    for name in ("loss", "grad_norm", "param_norm", "learning_rate"):
        np.testing.assert_allclose([r[name] for r in two], [r[name] for r in one], rtol=1e-5)


def test_the_first_process_alone_prints(both):
    first, second = both[2]
    assert '"mmd"' in first and "is finished: 12 steps" in first and "6 samples" in first
    # Gloo's own lines, which two threads of it may write into one another.
    ours = [line for line in second.splitlines() if not re.search("Gloo|peer ranks", line)]
    assert "".join(ours).strip() == ""


def test_samples_of_an_average_of_any_length_are_those_of_one_device(both, alone):
    plan, workdir, state = alone
    for folder in (workdir, both[1]):
        assert Checkpoints(folder / "ema").steps() == [4, 8, 12]
    variables, _ = reconstruct(plan.experiment, workdir, state, 0.08)
    tableau = make_tableau(plan.experiment.process, **sampler(plan.experiment.config))
    labels = np.arange(6, dtype=np.int32) % 3
    expected = generate(plan.experiment, variables, tableau, labels, 6, 0)
    with np.load(both[1].parent / "six.npz") as found:
        np.testing.assert_allclose(found["x"], expected, rtol=1e-3, atol=1e-5)


def test_evaluations_on_the_way_are_those_of_one_device(both, alone):
    one, two = (
        [json.loads(line) for line in (workdir / "evaluations.jsonl").read_text().splitlines()]
        for workdir in (alone[1], both[1])
    )
    assert [line["step"] for line in one] == [line["step"] for line in two] == [5, 10]
    for a, b in zip(one, two, strict=True):
        (a,), (b,) = a["figures"], b["figures"]
        assert a["count"] == 24 and a == pytest.approx(b, rel=1e-3)
    best = json.loads((both[1] / "evaluate.json").read_text())
    score = {line["step"]: line["figures"][0]["sliced_wasserstein"] for line in two}
    assert best["step"] == min(score, key=score.get)  # not the newest, which is of step 12
    assert best["figures"] == {line["step"]: line["figures"] for line in two}[best["step"]]


def test_processes_of_different_configurations_are_refused(both):
    for number, errors in enumerate(both[3]):
        words = f"refused: the processes differ in config.seed; this one has {number}"
        assert words in errors.splitlines()


def test_every_section_and_the_data_are_compared(tmp_path, monkeypatch):
    compared = []

    def same(what, text):
        compared.append(what)
        if what == "their data":
            assert "96 examples of shape (2,), classes: 3" in text
            raise ValueError(f"the processes differ in {what}")

    monkeypatch.setattr(parallel, "same", same)
    with pytest.raises(ValueError, match="the processes differ in their data"):
        prepare(tiny_config(tmp_path))
    assert {"config.data", "config.train", "config.optimizer", "config.seed"} < set(compared)


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_other_commands_compare_their_arguments(command, tmp_path, monkeypatch, capsys):
    compared = {}

    def same(what, text):
        compared[what] = text
        if what == "--seed":  # after most others: they come in the order of their names
            raise ValueError(f"the processes differ in {what}; this one has {text}")

    monkeypatch.setattr(parallel, "same", same)
    arguments = ["--workdir", str(tmp_path / "no run"), "--seed", "3", "--guidance", "2"]
    assert main([command, *arguments]) == 2
    assert "error: the processes differ in --seed; this one has 3\n" in capsys.readouterr().err
    assert compared["--guidance"] == "2.0" and compared["--ema"] == "None"
    assert {"--best", "--count", "--batch-size", "--grid-option"} < set(compared)
    assert not {"--workdir", "--process-id", "--quiet"} & set(compared)


@pytest.mark.parametrize("made", [True, False])
def test_a_workdir_of_which_one_process_sees_nothing_is_refused(alone, tmp_path, monkeypatch, made):
    plan, _, _ = alone
    workdir = tmp_path / "run"
    # Process 1 of two, on another disk than process 0, which has made the folder, or makes it now.
    monkeypatch.setattr(run, "_PATIENCE", 0.0)
    for name, value in (("agreed", made), ("barrier", None), ("is_main", False)):
        monkeypatch.setattr(parallel, name, lambda *_, value=value: value)
    with pytest.raises(FileNotFoundError, match="run' is not on a disk that all processes see"):
        run.open_run(plan.experiment, workdir)
    assert not workdir.exists()


def test_everywhere_is_true_if_it_is_in_every_process(monkeypatch):
    assert parallel.everywhere(True) and not parallel.everywhere(False)
    parallel.same("nothing: there is one process", "a")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for other, expected in ((1, True), (0, False)):
        monkeypatch.setattr(
            multihost_utils, "process_allgather", lambda mine, other=other: np.array([other, mine])
        )
        assert parallel.everywhere(True) is expected and not parallel.everywhere(False)


def test_snapshots_are_those_that_process_0_found(alone, monkeypatch):
    """As process 1 of two, which sees none: process 0 says that there is one, of step 4."""
    plan, workdir, state = alone
    said = iter([1, 4])
    monkeypatch.setattr(reconstruction, "is_main", lambda: False)
    monkeypatch.setattr(reconstruction, "agreed", lambda value: next(said))
    monkeypatch.setattr(Checkpoints, "steps", lambda self: [])
    _, error = reconstruct(plan.experiment, workdir, state, 0.08)
    assert error == ema.fit([4, 4, 12, 12], [0.05, 0.1] * 2, 12, 0.08).error
    assert next(said, None) is None


def test_a_failure_among_several_processes_ends_this_one_at_once(monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    parallel.abandon(1, "alone")
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    parallel.abandon(1, "still alone")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    parallel.abandon(2, "one of two")
    assert codes == [2] and capsys.readouterr().err == "one of two"


# --- initialize -----------------------------------------------------------------------------------


@pytest.fixture
def plain(monkeypatch):
    for name in [*os.environ]:
        if name.startswith(("JAXDIFF_", "SLURM_", "OMPI_")):
            monkeypatch.delenv(name)
    return monkeypatch


def test_a_plain_host_is_one_process(plain):
    assert not parallel.initialize() and not parallel.initialize("off")
    plain.setenv("SLURM_NTASKS", "1")
    plain.setenv("SLURM_STEP_NODELIST", "node1")
    assert not parallel.initialize()
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n[1-4]"}, ((), {})),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, ((), {})),
        (
            {"JAXDIFF_COORDINATOR": "h:1", "JAXDIFF_PROCESSES": "2", "JAXDIFF_PROCESS_ID": "1"},
            (("h:1", 2, 1), {"cluster_detection_method": "deactivate"}),
        ),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "JAXDIFF_HEARTBEAT": "30"},
            ((), {"heartbeat_timeout_seconds": 30}),
        ),
    ],
)
def test_several_tasks_are_joined(plain, environment, found):
    called = []
    plain.setattr(jax.distributed, "initialize", lambda *args, **kwargs: called.append((args, kwargs)))
    for name, value in environment.items():
        plain.setenv(name, value)
    parallel.initialize()
    assert called == [found]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "maybe"}, "mode must be one of .*'auto'.* got 'maybe'"),
        ({"coordinator": "h:1"}, r"\['processes', 'process_id'\] missing .*JAXDIFF_PROCESSES"),
        ({"coordinator": "h:1", "processes": 2, "process_id": 2}, "process_id 2 of 2"),
        ({"coordinator": "host", "processes": 2, "process_id": 0}, "HOST:PORT .* got 'host'"),
        ({"mode": "off", "processes": 2}, "'off' takes no"),
        ({"mode": "on", "heartbeat": 0}, "heartbeat must be at least 1 second, got 0"),
    ],
)
def test_half_an_answer_is_an_error(plain, arguments, message):
    with pytest.raises(ValueError, match=message):
        parallel.initialize(**arguments)


def test_the_command_line_says_it_too(plain, tmp_path, capsys):
    plain.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    for command in ("train", "sample", "evaluate"):
        more = ["--config", "c.py"] if command == "train" else []
        assert main([command, "--workdir", "w", *more, "--processes", "2"]) == 2
        assert "['coordinator', 'process_id'] missing" in capsys.readouterr().err


def test_a_variable_that_is_no_number_is_named(plain):
    for name, value in (("COORDINATOR", "h:1"), ("PROCESSES", "two"), ("PROCESS_ID", "0")):
        plain.setenv(f"JAXDIFF_{name}", value)
    with pytest.raises(ValueError, match="processes must be an integer, got 'two'"):
        parallel.initialize()
