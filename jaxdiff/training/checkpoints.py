"""Checkpoints: the only module that knows orbax."""

import json
import shutil
import warnings
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxdiff.files import write_text
from jaxdiff.training.state import State

_policies = ocp.checkpoint_managers


class Checkpoints:
    """The checkpoints of one run, in folders named by their step.

    A checkpoint is the state and the loop's own position (a JSON dict: the data iterator's state
    and losses not yet logged). Saving is asynchronous and atomic: a half-written checkpoint keeps a
    temporary name and is never read. `with` waits for the last one. Beside each complete one lies a
    list of its files' sizes and CRC-32s, so that later damage is noticed before it is used.

    Arguments:
      folder: where they are; made by the first save.
      keep: how many of the latest stay.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep must be at least 1 checkpoint, got {keep}")
        self._folder = Path(folder).absolute()
        self._keep = keep
        self._opened: ocp.CheckpointManager | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if self._opened is not None:
            self._opened.close()
            self._opened = None
            self._seal()

    @property
    def _manager(self) -> ocp.CheckpointManager:
        if self._opened is None:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=_policies.LatestN(self._keep), cleanup_tmp_directories=True
            )
            self._opened = ocp.CheckpointManager(self._folder, options=options)
        return self._opened

    def steps(self) -> list[int]:
        """The steps with a complete checkpoint, ascending."""
        if not self._folder.is_dir():
            return []
        return sorted(ocp.path.step.checkpoint_steps(self._folder))

    def save(self, step: int, state: State, loop: dict[str, Any]) -> None:
        """Start saving; the state may be donated as soon as this returns."""
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state), loop=ocp.args.JsonSave(loop)
        )
        self._manager.wait_until_finished()
        self._seal()
        self._manager.save(step, args=arguments)

    def restore(self, like: State) -> tuple[State, dict[str, Any], int]:
        """(state, loop, step) of the newest checkpoint that can be read.

        `like` holds the `jax.ShapeDtypeStruct`s wanted, with their shardings. A checkpoint that
        cannot be read is passed over with a warning that names it. Raises FileNotFoundError if
        there is none, ValueError if none can be read.
        """
        steps = self.steps()
        if not steps:
            raise FileNotFoundError(f"no checkpoint in {str(self._folder)!r}")
        damage = []
        for step in reversed(steps):
            try:
                return *self._read(step, like), step
            except Exception as error:  # orbax, tensorstore and json each raise their own
                damage.append(f"checkpoint {step} cannot be read: {_first_line(error)}")
                if step != steps[0]:
                    warnings.warn(f"{damage[-1]}; trying an older one", stacklevel=2)
        raise ValueError(f"{str(self._folder)!r}: {'; '.join(damage)}")

    def _read(self, step: int, like: State) -> tuple[State, dict[str, Any]]:
        self._check(step)
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            found = reader.restore(
                self._folder / str(step),
                ocp.args.Composite(
                    state=ocp.args.StandardRestore(like), loop=ocp.args.JsonRestore()
                ),
            )
        return found.state, found.loop

    def discard_after(self, step: int) -> None:
        """Remove checkpoints newer than `step`: those that `restore` could not read."""
        for newer in self.steps():
            if newer > step and jax.process_index() == 0:
                shutil.rmtree(self._folder / str(newer))
                self._list(newer).unlink(missing_ok=True)

    def _list(self, step: int) -> Path:
        return self._folder / f"{step}.files.json"

    def _seal(self) -> None:
        """List the files of the complete checkpoints; forget those that were removed."""
        if jax.process_index() != 0:
            return
        steps = self.steps()
        for step in steps:
            if not self._list(step).exists():
                write_text(self._list(step), json.dumps(_sums(self._folder / str(step)), indent=1))
        for path in self._folder.glob("*.files.json"):
            if path.name not in {self._list(step).name for step in steps}:
                path.unlink()

    def _check(self, step: int) -> None:
        if not self._list(step).exists():
            return  # the run was killed between saving and listing
        wanted = json.loads(self._list(step).read_text(encoding="utf-8"))
        found = _sums(self._folder / str(step))
        for name, sums in wanted.items():
            if found.get(name) != sums:
                raise ValueError(f"{name} is {'damaged' if name in found else 'missing'}")


def _sums(folder: Path) -> dict[str, list[int]]:
    """Relative path -> [size, CRC-32] of every file."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        crc = 0
        with path.open("rb") as file:
            while block := file.read(2**20):
                crc = zlib.crc32(block, crc)
        found[path.relative_to(folder).as_posix()] = [path.stat().st_size, crc]
    return found


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
