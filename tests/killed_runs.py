"""Real processes of `jaxdiff train`, stopped at chosen instants, and what they leave behind."""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

TEMPORARY = "*.orbax-checkpoint-tmp*"
_MODULES = ["jaxdiff.cli", "jaxdiff.training.loop", "jaxdiff.training.report", "jaxdiff.settings"]


class Process:
    """A process of the command line, its output in a file.

    "spawn" starts an interpreter from nothing; "forkserver" forks one that has done the imports,
    which take most of a short run's time, and nothing else.
    """

    def __init__(
        self, arguments: Sequence[str], log: Path, devices: int = 8, method: str = "spawn",
        environment: Mapping[str, str] | None = None,
    ):  # fmt: skip
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(_MODULES)
        self.log = log
        log.write_text("")
        self._process = context.Process(
            target=_command, args=(list(arguments), str(log), devices, dict(environment or {}))
        )
        self._process.start()

    def send(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def wait(self, seconds: float = 240.0) -> int:
        """The exit code, minus the signal's number if one ended it."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(f"still running after {seconds} s: {self.log.read_text()[-2000:]}")
        return self._process.exitcode

    def send_when(self, reached: Callable[[], bool], number: int, seconds: float = 240.0) -> None:
        """Send a signal at an instant at which `reached()` holds, for sure.

        The process is frozen, looked at, and goes on unless it is so. Raises AssertionError if it
        ends before.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._process.is_alive():
            if reached():
                self.send(signal.SIGSTOP)
                time.sleep(0.01)  # until its last thread stands still
                if reached():
                    self.send(number)
                    if number != signal.SIGKILL:
                        self.send(signal.SIGCONT)
                    return
                self.send(signal.SIGCONT)
            time.sleep(0.001)
        raise AssertionError(f"the instant never came: {self.log.read_text()[-2000:]}")


def _command(arguments: list[str], log: str, devices: int, environment: dict[str, str]) -> None:
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    os.environ.update(environment, XLA_FLAGS=flags, MPLBACKEND="Agg")
    from jaxdiff.cli import main

    jax.config.update("jax_log_compiles", True)  # tells when the first step is being compiled
    if cache := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    code = main(arguments)
    jax.distributed.shutdown()  # multiprocessing leaves out what an interpreter does at its end
    sys.exit(code)


# --- instants -------------------------------------------------------------------------------------


def is_compiling(log: Path) -> bool:
    """Whether the first step has begun, and its program is not there yet."""
    text = log.read_text()
    begun, done = "Compiling jit(train_step)", "Finished XLA compilation of jit(train_step)"
    return begun in text and done not in text


def is_saving(workdir: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any((workdir / "checkpoints").glob(TEMPORARY))


def saved(workdir: Path, folder: str = "checkpoints") -> list[int]:
    """The steps of complete checkpoints."""
    return sorted(int(path.name) for path in (workdir / folder).glob("*") if path.name.isdigit())


def lines(path: Path) -> list[dict]:
    """The whole lines of a file of JSON lines."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def last_line(workdir: Path) -> int:
    """The step of the last line of a run's losses; 0 without one."""
    return max((line["step"] for line in lines(workdir / "metrics.jsonl")), default=0)


def is_between_saves(workdir: Path) -> bool:
    """Whether steps after the last checkpoint are done, and none is being written."""
    steps = saved(workdir)
    return bool(steps) and last_line(workdir) > steps[-1] and not is_saving(workdir)


# --- the end state --------------------------------------------------------------------------------


def differences(workdir: Path, other: Path, rtol: float = 0.0) -> list[str]:
    """What differs between two finished runs: the arrays of the last and of the best state, the files'
    numbers, and which steps were best or stored for the averages; bit for bit with rtol = 0.
    """
    found = [name for name in ("best", "ema") if saved(workdir, name) != saved(other, name)]
    for best in (False, True):
        if not best or (saved(workdir, "best") and saved(other, "best")):
            a, b = (_arrays(path, best) for path in (workdir, other))
            name = "best" if best else "last"
            found += [f"{name} state{key}" for key in a if gap(a[key], b[key]) > rtol]
    for name in ("metrics.jsonl", "evaluations.jsonl", "metrics.json"):
        a, b = (_numbers(path / name) for path in (workdir, other))
        if a.keys() != b.keys() or any(gap(a[key], b[key]) > rtol for key in a):
            found.append(name)
    return found


def gap(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference over the largest magnitude; infinite if other than numbers differ."""
    if np.array_equal(a, b):
        return 0.0
    if a.shape != b.shape or not np.issubdtype(a.dtype, np.floating):
        return np.inf
    found = np.abs(a - b).max() / max(np.abs(b).max(), np.finfo(b.dtype).tiny)
    return float(found) if np.isfinite(found) else np.inf


def _arrays(workdir: Path, best: bool = False) -> dict[str, np.ndarray]:
    """Path within the state -> array, of a run's last checkpoint."""
    from jaxdiff.training.run import read_experiment, restore

    state = restore(read_experiment(workdir), workdir, best)
    return {jax.tree_util.keystr(at): _data(leaf) for at, leaf in jax.tree.leaves_with_path(state)}


def _data(leaf: jax.Array) -> np.ndarray:
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def _numbers(path: Path) -> dict[str, np.ndarray]:
    """Path within the file -> value."""
    if not path.exists():
        return {}
    content = lines(path) if path.suffix == ".jsonl" else json.loads(path.read_text())
    leaves = jax.tree.leaves_with_path(content)
    return {jax.tree_util.keystr(at): np.asarray(value) for at, value in leaves}
