"""Where the exact flow ends: what the samples of a sweep are compared with."""

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.ablation.sweep import AXES, Cell, Sweep, make_cells
from jaxdiff.files import replacing

_FOLDER = "references"
_SAMPLER = {"solver": "dpm_solver_pp_2m", "grid": "half_log_snr", "steps": 1000}


class References:
    """End points for each setting of a sweep, computed once; kept in the folder if there is one."""

    def __init__(self, given: Callable | Mapping[str, Any] | None, lab: Any, workdir: Any):
        if given is not None and not callable(given) and not isinstance(given, Mapping):
            raise TypeError(
                "reference must be a function (x_T, process) -> end points, a mapping of axes, or "
                f"None, got {given!r}"
            )
        if isinstance(given, Mapping):
            given = {**_SAMPLER, **given}
            if "nfe" in given:
                del given["steps"]
        self.given, self.lab = given, lab
        self.folder = None if workdir is None else Path(workdir) / _FOLDER
        self.found: dict[str, np.ndarray] = {}

    @property
    def text(self) -> str:
        """What the references are, for a comparison with an earlier run."""
        if callable(self.given):
            return f"function {getattr(self.given, '__qualname__', type(self.given).__name__)}"
        return str(self.given)

    def check(self, cells: Sequence[Cell]) -> None:
        """Raise ValueError or TypeError for a reference that cannot be computed."""
        if callable(self.given):
            inspect.signature(self.given).bind(None, None)
        elif self.given is not None and cells:
            allowed = set(AXES) - {"network", "process", "guidance", "thresholding", "seed"}
            if set(self.given) - allowed:
                raise ValueError(
                    f"a reference is a sampler, with the axes {sorted(allowed)}; got {self.given}"
                )
            if self._cell(cells[0]).tableau.stochastic:
                raise ValueError(f"a reference must be deterministic, got {self.given}")

    def of(self, cell: Cell) -> np.ndarray | None:
        """End points [count, ...] in float64, or None without a reference."""
        if self.given is None:
            return None
        if cell.setting not in self.found:
            self.found[cell.setting] = self._kept(cell)
        return self.found[cell.setting]

    def _kept(self, cell: Cell) -> np.ndarray:
        # A function may have changed under its name: its end points are not kept.
        if self.folder is None or callable(self.given):
            return self._compute(cell)
        self.folder.mkdir(exist_ok=True)
        decided = json.dumps([self.lab.facts, self.text, cell.setting])
        path = self.folder / f"{hashlib.sha256(decided.encode()).hexdigest()[:16]}.npy"
        if not path.exists():
            with replacing(path) as temporary:
                np.save(temporary, self._compute(cell))
        return np.load(path)

    def _compute(self, cell: Cell) -> np.ndarray:
        if callable(self.given):
            process = self.lab.processes[cell.process]
            return np.asarray(self.given(np.asarray(self.lab.start(cell)), process), np.float64)
        (_, samples), = self.lab.run([self._cell(cell)], 1)
        return np.asarray(samples[0], np.float64)

    def _cell(self, cell: Cell) -> Cell:
        """The cell of the reference's sampler in this cell's setting."""
        made = make_cells(
            Sweep(({**self.given, "process": cell.process, "network": cell.network},)),
            self.lab.processes, list(self.lab.networks),
        )[0]  # fmt: skip
        return dataclasses.replace(cell, axes=made.axes, tableau=made.tableau)
