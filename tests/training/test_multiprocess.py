"""Two real processes of four devices each against one process with one device."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import write_config

from jaxdiff import config as configuration
from jaxdiff import parallel
from jaxdiff.cli import main
from jaxdiff.data import arrays, loader
from jaxdiff.experiment import make_tableau, sampler
from jaxdiff.generation import generate
from jaxdiff.settings import SECTIONS
from jaxdiff.training.loop import train
from jaxdiff.training.run import prepare, restore

OVERRIDES = ("--config.optimizer.eps=1e-3", "--config.train.sample_every=6")
# Every parameter is split over both processes, and each reads its half of the batch.
MESH = ("--config.mesh.fsdp=8",)

SCRIPT = """
import sys
from jaxdiff.cli import main
config, workdir, out, *overrides = sys.argv[1:]
codes = [
    main(["train", "--config", config, "--workdir", workdir, "--quiet", *overrides]),
    main(["train", "--config", config, "--workdir", workdir, "--quiet", *overrides]),
    main(["sample", "--workdir", workdir, "--count", "6", "--output", out, "--quiet"]),
    main(["evaluate", "--workdir", workdir, "--quiet"]),
]
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
    """(configuration file, workdir, what each process printed) of a run of two processes."""
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
    return file, workdir, [out for out, _ in found]


@pytest.fixture(scope="module")
def alone(both, tmp_path_factory):
    """(plan, workdir, last state) of the same run in one process, on one device."""
    file, _, _ = both
    config = configuration.override(configuration.load(file, SECTIONS), OVERRIDES)
    plan = prepare(config, jax.devices()[:1])
    workdir = tmp_path_factory.mktemp("alone") / "run"
    return plan, workdir, train(plan, workdir, progress=False)


def test_two_processes_end_where_one_does(both, alone):
    plan, _, expected = alone
    state = restore(plan.experiment, both[1])  # of two processes, read by one
    assert int(state.step) == int(expected.step) == 12
    for name in ("params", "opt_state", "ema"):
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
    assert [line for line in second.splitlines() if not line.startswith("[Gloo]")] == []


def test_samples_are_those_of_one_device(both, alone):
    plan, _, state = alone
    tableau = make_tableau(plan.experiment.process, **sampler(plan.experiment.config))
    labels = np.arange(6, dtype=np.int32) % 3
    expected = generate(plan.experiment, state.ema, tableau, labels, 6, 0)
    with np.load(both[1].parent / "six.npz") as found:
        np.testing.assert_allclose(found["x"], expected, rtol=1e-3, atol=1e-5)


def test_the_figures_are_those_of_the_end_of_the_run(both):
    end, again = (
        json.loads((both[1] / name).read_text())["figures"] for name in ("metrics.json", "evaluate.json")
    )
    assert end == again and end[0]["count"] == 24


def test_blocks_and_rows_of_a_batch_are_the_batch():
    source = arrays({"x": np.linspace(-1, 1, 20)[:, None]}, label_key=None)
    whole = next(loader(source, 8, seed=1))["x"]
    rows = next(loader(source, 8, seed=1, rows=np.array([1, 2, 6])))["x"]
    np.testing.assert_array_equal(rows, whole[[1, 2, 6]])
    for wrong in ([2, 1], [0, 8], [3, 3]):
        with pytest.raises(ValueError, match="rows must ascend from 0 to at most 7"):
            loader(source, 8, seed=1, rows=np.array(wrong))


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
