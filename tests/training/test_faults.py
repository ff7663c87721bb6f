"""Real processes, killed: their end state is that of a run that nobody disturbed."""

import os
import re
import signal
import socket

import killed_runs as runs
import pytest
from tiny_run import write_config

from jaxdiff.cli import main
from jaxdiff.training import loop, report

# Saves fall into the middle of a window of the log.
TRAIN = [
    "--config.train.steps=150", "--config.train.checkpoint_every=60", "--config.train.log_every=7",
]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where the processes keep compiled programs: where the tests do, or for these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
            folder = str(tmp_path_factory.mktemp("cache"))
            patch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
        yield {"JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"]}


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    return str(write_config(tmp_path_factory.mktemp("config")))


@pytest.fixture(scope="module")
def whole(config_file, cache, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    arguments = ["--config", config_file, "--workdir", str(workdir), "--quiet"]
    assert main(["train", *arguments, *TRAIN]) == 0
    return workdir


@pytest.fixture
def start(config_file, cache, tmp_path):
    """Starts a process of the run in tmp_path / "run"."""

    def start(*more, devices=8, log="log.txt"):
        arguments = ["--config", config_file, "--workdir", str(tmp_path / "run"), "--quiet"]
        return runs.Process(
            ["train", *arguments, *TRAIN, *more], tmp_path / log, devices, "forkserver", cache
        )

    return start


def stopped_at(log):
    return int(re.search(r"stopped and saved at step (\d+) of 150", log.read_text()).group(1))


def test_killed_while_compiling_while_saving_and_between_the_end_is_the_same_bit_for_bit(
    whole, start, tmp_path
):
    workdir = tmp_path / "run"

    run = start()
    run.send_when(lambda: runs.is_compiling(run.log), signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert runs.saved(workdir) == [] and runs.last_line(workdir) == 0

    run = start()
    run.send_when(lambda: runs.is_saving(workdir), signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert runs.is_saving(workdir)  # half a checkpoint is left

    run = start()
    run.send_when(lambda: runs.is_between_saves(workdir), signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    step = runs.saved(workdir)[-1]
    assert step in (60, 120) and not runs.is_saving(workdir)

    run = start()
    run.send_when(lambda: runs.is_compiling(run.log), signal.SIGTERM)
    assert run.wait() == 0
    assert stopped_at(run.log) == runs.saved(workdir)[-1] == step + 1
    assert not (workdir / "metrics.json").exists()

    assert start().wait() == 0
    assert runs.differences(workdir, whole) == [] and not runs.is_saving(workdir)


def start_two(start, log):
    """Two processes of four devices, which notice within seconds that the other one is gone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        several = ["--coordinator", f"127.0.0.1:{free.getsockname()[1]}", "--processes", "2"]
    return [
        start(*several, "--process-id", str(k), "--heartbeat=6", devices=4, log=f"{log}{k}.txt")
        for k in range(2)
    ]


def test_one_of_two_processes_killed_then_signalled_stops_both_and_one_process_goes_on(
    whole, start, tmp_path
):
    workdir = tmp_path / "run"

    both = start_two(start, "killed")
    both[1].send_when(lambda: runs.is_between_saves(workdir), signal.SIGKILL)
    assert both[1].wait() == -signal.SIGKILL
    assert both[0].wait(60) != 0  # which would wait for the other forever
    assert "tasks are unhealthy (stopped sending heartbeats):\n1\n" in both[0].log.read_text()
    saved, logged = runs.saved(workdir)[-1], runs.last_line(workdir)
    assert saved < logged < 150

    both = start_two(start, "stopped")
    both[1].send_when(lambda: runs.last_line(workdir) > logged, signal.SIGTERM)
    assert [run.wait() for run in both] == [0, 0]
    step = stopped_at(both[0].log)
    assert step == runs.saved(workdir)[-1] < 150 and step % 7 == 0  # they talk when they log

    assert start().wait() == 0
    assert runs.differences(workdir, whole, rtol=1e-4) == []


@pytest.mark.parametrize("at", [2, 12])
def test_an_interrupt_saves_and_its_exit_code_tells(
    at, config_file, cache, tmp_path, monkeypatch, capsys, request
):
    def interrupt(rows, experiment, step):
        if step == at:
            os.kill(os.getpid(), signal.SIGINT)

    # As in a terminal: where the tests run in the background, it is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    monkeypatch.setattr(loop, "check_batch", interrupt)
    workdir = tmp_path / "run"
    arguments = ["train", "--config", config_file, "--workdir", str(workdir), "--quiet"]
    assert main(arguments) == 130  # so that `train && evaluate` goes no further
    assert f"stopped and saved at step {at} of 12" in capsys.readouterr().out
    assert runs.saved(workdir)[-1] == at
    assert not (workdir / "metrics.json").exists()


def test_samples_that_are_not_finite_do_not_stop_training(
    config_file, cache, tmp_path, monkeypatch, capsys
):
    def draw(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise FloatingPointError("1 of 4 samples are not finite")
        real(*arguments)

    calls, real = [], report.draw_picture
    monkeypatch.setattr(report, "draw_picture", draw)
    workdir = tmp_path / "run"
    arguments = ["train", "--config", config_file, "--workdir", str(workdir), "--quiet"]
    assert main([*arguments, "--config.train.sample_every=6"]) == 0
    assert "warning: step 6: no picture: 1 of 4 samples" in capsys.readouterr().err
    assert len(calls) == 3 and (workdir / "samples.png").exists()
