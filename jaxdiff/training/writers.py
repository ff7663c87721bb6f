"""Where metrics go: the console, JSON lines, TensorBoard."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from jaxdiff.files import write_text


class ConsoleWriter:
    """Shows metrics at the end of a progress bar."""

    def __init__(self, bar: tqdm):
        self._bar = bar

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._bar.set_postfix({"loss": f"{metrics['loss']:.4f}"}, refresh=False)

    def close(self) -> None:
        self._bar.close()


class JSONLinesWriter:
    """One JSON object a line, {"step": ..., ...}; each line is on disk when `write` returns.

    Lines of an earlier attempt after step `resume` (and a torn last line) are removed first, so
    that a step never appears twice.
    """

    def __init__(self, path: str | Path, resume: int = 0):
        self._path = Path(path)
        if self._path.exists():
            kept = kept_lines(self._path, resume)
            write_text(self._path, "".join(f"{line}\n" for line in kept))
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def kept_lines(path: Path, last: int) -> list[str]:
    """The whole lines of steps up to `last`."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= last]


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def require_tensorboard() -> type:
    """tensorboardX's SummaryWriter; ImportError naming the extra if it is not installed."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            'TensorBoard files need tensorboardX: pip install "jaxdiff[tensorboard]"'
        ) from error
    return SummaryWriter


class TensorBoardWriter:
    """Event files for TensorBoard; steps after `resume` of an earlier attempt are hidden."""

    def __init__(self, folder: str | Path, resume: int = 0):
        self._writer = require_tensorboard()(str(folder), purge_step=resume + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
