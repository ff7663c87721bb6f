"""Checkpoints: the only module that knows orbax."""

import copy
import json
import shutil
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxdiff.parallel.processes import agreed, barrier
from jaxdiff.training.state import State

_policies = ocp.checkpoint_managers

FILES = "files.json"  # in a checkpoint: the size and CRC-32 of each of its files
_OURS = (FILES, "_CHECKPOINT_METADATA", "commit_success.txt")  # orbax writes the last two later


class Checkpoints:
    """The checkpoints of one run, in folders named by their step.

    A checkpoint is the state, the loop's own position (a JSON dict: the data iterator's state and
    what has not been logged yet) and the configuration. Saving is asynchronous and atomic: until
    everything is written a checkpoint has a temporary name, and such a folder is never read. `with`
    waits for the last one. Before it gets its name, a list of its files with their sizes and CRC-32s
    is put into it, so that later damage, or half a copy, is noticed before it is used.

    With several processes the folder is on a file system that all of them see, all of them call every
    method but `steps` and `problem`, and all of them get the same answer: process 0 looks at the
    folder and at the lists, and what it finds damaged is used by none.

    Arguments:
      folder: where they are; made by the first save.
      keep: how many of the latest stay.
      keep_every: those of steps that this divides stay as well; 0 for none.
      config: plain values stored with every checkpoint, for whoever finds it alone.

    Raises ValueError for a `keep` below 1 or a negative `keep_every`.
    """

    def __init__(
        self, folder: str | Path, keep: int = 2, keep_every: int = 0,
        config: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        if keep < 1:
            raise ValueError(f"keep must be at least 1 checkpoint, got {keep}")
        if keep_every < 0:
            raise ValueError(f"keep_every must be at least 0 steps, got {keep_every}")
        self._folder = Path(folder).absolute()
        self._kept = [_policies.LatestN(keep)]
        if keep_every:
            self._kept.append(_policies.EveryNSteps(keep_every))
        self._config = dict(config or {})
        self._opened: ocp.CheckpointManager | None = None
        self._saving = 0

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    @property
    def _manager(self) -> ocp.CheckpointManager:
        if self._opened is None:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=_policies.AnyPreservationPolicy(self._kept),
                cleanup_tmp_directories=True,
                async_options=ocp.options.AsyncOptions(post_finalization_callback=self._list_files),
                # Two folders of one run may be written at the same time.
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    barrier_sync_key_prefix=self._folder.name
                ),
            )
            self._opened = ocp.CheckpointManager(self._folder, options=options)
        return self._opened

    def steps(self) -> list[int]:
        """The steps with a complete checkpoint, ascending, as this process sees the folder."""
        if not self._folder.is_dir():
            return []
        return sorted(ocp.path.step.checkpoint_steps(self._folder))

    def latest(self) -> int | None:
        """The newest of them, or None."""
        return self._newest(below=None)

    def save(self, step: int, state: State, loop: dict[str, Any]) -> None:
        """Start saving, once the save before is done; the state may be donated when this returns."""
        self._manager.wait_until_finished()
        self._saving = step
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            loop=ocp.args.JsonSave(copy.deepcopy(loop)),  # written later, when the caller goes on
            config=ocp.args.JsonSave(self._config),
        )  # fmt: skip
        # Forced: when to save is the caller's to decide, and orbax would pass over a step in silence.
        self._manager.save(step, args=arguments, force=True)

    def restore(self, like: State) -> tuple[State, dict[str, Any], int]:
        """(state, loop, step) of the newest checkpoint that can be read.

        `like` holds the `jax.ShapeDtypeStruct`s wanted, with their shardings: those of any mesh,
        whatever mesh the state was saved from. A damaged checkpoint is passed over with a warning
        that names it. Raises FileNotFoundError if there is none, ValueError if all are damaged, or
        if the one to use is whole and cannot be read all the same (say, as it holds another state).
        """
        damage: list[str] = []
        step = self.latest()
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {str(self._folder)!r}")
        while problem := _anywhere(self.problem(step) if jax.process_index() == 0 else ""):
            damage.append(f"checkpoint {step} cannot be read: {problem}")
            step = self._newest(below=step)
            if step is None:
                raise ValueError(f"{str(self._folder)!r}: {'; '.join(damage)}")
            warnings.warn(f"{damage[-1]}; trying an older one", stacklevel=2)
        try:
            found = self._read(step, like)
        except Exception as error:  # orbax, tensorstore and json each raise their own
            raise ValueError(
                f"checkpoint {step} in {str(self._folder)!r} is whole, but cannot be read: "
                f"{_first_line(error)}"
            ) from error
        return found.state, found.loop, step

    def load(self, step: int, like: Any) -> Any:
        """The state of one checkpoint, whose files were looked at before (`problem`)."""
        return self._read(step, like).state

    def problem(self, step: int) -> str:
        """What is wrong with a checkpoint's files, in words; "" if nothing is."""
        folder = self._folder / str(step)
        try:
            wanted = json.loads((folder / FILES).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return f"{FILES}, the list of its files, is missing or damaged"
        found = _sums(folder)
        for name, sums in wanted.items():
            if found.get(name) != sums:
                return f"{name} is {'damaged' if name in found else 'missing'}"
        return ""

    def discard_after(self, step: int) -> None:
        """Remove checkpoints newer than `step`: those that `restore` found damaged."""
        if jax.process_index() == 0:
            for newer in self.steps():
                if newer > step:
                    shutil.rmtree(self._folder / str(newer))
        barrier("discarded checkpoints")  # nobody lists the folder before they are gone

    def _newest(self, below: int | None) -> int | None:
        steps = [step for step in self.steps() if below is None or step < below]
        step = agreed(max(steps, default=-1))
        return None if step < 0 else step

    def _read(self, step: int, like: State) -> Any:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            return reader.restore(
                self._folder / str(step),
                ocp.args.Composite(
                    state=ocp.args.StandardRestore(like), loop=ocp.args.JsonRestore()
                ),
            )

    def _list_files(self) -> None:
        """Called in process 0 when all is written, just before the folder gets its final name."""
        (folder,) = self._folder.glob(f"{self._saving}{ocp.utils.TMP_DIR_SUFFIX}*")
        (folder / FILES).write_text(json.dumps(_sums(folder), indent=1), encoding="utf-8")


def _anywhere(problem: str) -> str:
    """`problem`, or a word for that of another process; "" if no process has one."""
    found = multihost_utils.process_allgather(np.int32(bool(problem)))
    return problem or ("another process found it damaged" if found.any() else "")


def _sums(folder: Path) -> dict[str, list[int]]:
    """Relative path -> [size, CRC-32] of every file, but for those that are written later."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name in _OURS:
            continue
        crc = 0
        with path.open("rb") as file:
            while block := file.read(2**20):
                crc = zlib.crc32(block, crc)
        found[name] = [path.stat().st_size, crc]
    return found


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
