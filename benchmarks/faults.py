"""Runs of `jaxdiff train` killed at random instants, against one that was left alone.

    python benchmarks/faults.py           # about 20 minutes; writes results/faults.json

Every trial is the tiny run of the tests (an MLP on points in the plane, 8 simulated devices, 400
steps, a checkpoint every 40) in a folder of its own. A process of the real command line gets
SIGKILL or SIGTERM at an instant drawn uniformly from the time between the making of its folder and
the end of an undisturbed process (again, if this one has ended by then); then the same command runs
again until it is finished. Compared, bit for bit: every array of the last checkpoint and of the
best one (parameters, optimiser, averages, step, key), the lines of metrics.jsonl and
evaluations.jsonl, the final figures, and the steps in best/ and ema/. Three instants that a draw
may miss are also chosen: while the first step is compiled, while a checkpoint is written, and
between two checkpoints. The last trial goes on with fewer devices each time, and is compared to
rounding.
"""

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

import machine
import numpy as np

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import killed_runs as runs  # noqa: E402
from tiny_run import write_config  # noqa: E402

STEPS, EVERY = 400, 40
TRAIN = [
    f"--config.train.steps={STEPS}", f"--config.train.checkpoint_every={EVERY}",
    "--config.train.log_every=7", "--config.train.evaluate_every=100",
    "--config.train.best_metric=mmd", "--config.train.ema_lengths=(0.05,0.1)",
    "--config.train.ema_snapshots_every=80",
]  # fmt: skip


class Trial:
    """A folder, and the processes that run in it one after another."""

    def __init__(self, folder: Path, name: str, config: Path):
        self.workdir, self.log = folder / name, folder / f"{name}.txt"
        self._arguments = ["train", "--config", str(config), "--workdir", str(self.workdir), "--quiet"]
        self._cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}

    def start(self, devices: int = 8) -> runs.Process:
        return runs.Process([*self._arguments, *TRAIN], self.log, devices, environment=self._cache)

    def is_open(self) -> bool:
        return (self.workdir / "config.json").exists()

    def found(self) -> dict:
        """What the process that was just stopped has left."""
        line, steps = runs.last_line(self.workdir), runs.saved(self.workdir)
        if runs.is_saving(self.workdir):
            phase = "while saving"
        elif (self.workdir / "metrics.json").exists():
            phase = "after the end"
        elif steps[-1:] == [STEPS]:
            phase = "final figures"
        elif not line and not steps:
            phase = "first step"
        else:
            phase = "between saves"
        return {"phase": phase, "last checkpoint": max(steps, default=0), "last line": line}


def wait_until(reached, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > deadline:
            raise TimeoutError("the run did not start")
        time.sleep(0.001)


def undisturbed(trial: Trial) -> float:
    """Seconds from the making of the folder to the end."""
    process = trial.start()
    wait_until(trial.is_open)
    begun = time.monotonic()
    assert process.wait() == 0, trial.log.read_text()
    return time.monotonic() - begun


def stopped(trial: Trial, number: int, seconds: float | None = None, when=None) -> dict:
    """Stop a process after some seconds, or at the instant `when`, and tell what is left."""
    process = trial.start()
    if when is None:
        wait_until(trial.is_open)
        time.sleep(seconds)
        process.send(number)
        instant = {"seconds": round(seconds, 3)}
    else:
        process.send_when(when, number)
        instant = {}
    code = process.wait()
    return {"signal": signal.Signals(number).name, **instant, "exit code": code, **trial.found()}


def finished(trial: Trial, whole: Trial, devices: int = 8, rtol: float = 0.0) -> dict:
    """Run to the end and compare."""
    assert trial.start(devices).wait() == 0, trial.log.read_text()
    return {"differences": runs.differences(trial.workdir, whole.workdir, rtol)}


def main(kills: int, terms: int, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = write_config(folder)

        def trial(name):
            return Trial(folder, name, config)

        undisturbed(trial("first"))  # fills the compilation cache
        whole = trial("whole")
        duration = undisturbed(whole)
        trials, late = [], 0
        for number, count in ((signal.SIGKILL, kills), (signal.SIGTERM, kills + terms)):
            while len(trials) < count:
                one = trial(f"random{len(trials) + late}")
                found = stopped(one, number, float(rng.uniform(0, duration)))
                if found["phase"] == "after the end":  # nothing was left to disturb: draw again
                    late += 1
                    continue
                trials.append(found | finished(one, whole))
                print(trials[-1], flush=True)
        chosen = []
        for i, when in enumerate((
            lambda one: runs.is_compiling(one.log), lambda one: runs.is_saving(one.workdir),
            lambda one: runs.is_between_saves(one.workdir),
        )):  # fmt: skip
            one = trial(f"chosen{i}")
            found = stopped(one, signal.SIGKILL, when=lambda one=one, when=when: when(one))
            chosen.append(found | finished(one, whole))
            print(chosen[-1], flush=True)
        fewer = trial("fewer")
        steps = []
        for devices, step in ((8, 100), (4, 250)):
            process = fewer.start(devices)
            process.send_when(lambda step=step: runs.last_line(fewer.workdir) > step, signal.SIGTERM)
            assert process.wait() == 0, fewer.log.read_text()
            steps.append({"devices": devices, "until step": runs.saved(fewer.workdir)[-1]})
        steps.append({"devices": 1, "until step": STEPS})
        rounding = finished(fewer, whole, devices=1, rtol=ROUNDING)
    return {
        "seed": seed, "steps": STEPS, "checkpoint every": EVERY,
        "undisturbed, seconds from the folder to the end": round(duration, 2),
        "random instants": trials, "drawn again, as the run had ended": late,
        "random instants with another end state": sum(bool(one["differences"]) for one in trials),
        "chosen instants": chosen,
        "fewer devices": {"parts": steps, "relative tolerance": ROUNDING, **rounding},
    }  # fmt: skip


ROUNDING = 1e-3

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--terms", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    machine.write("faults", main(**vars(parser.parse_args())))
