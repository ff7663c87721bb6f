"""What to run: products of axes, and the cell that each point of them is."""

import dataclasses
import inspect
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdiff import solvers
from jaxdiff.denoisers import clip_x0, dynamic_threshold
from jaxdiff.experiment import check_seed, is_stored, make_tableau
from jaxdiff.names import nearest, unknown
from jaxdiff.processes import Process
from jaxdiff.settings import GRIDS
from jaxdiff.solvers.tableau import Tableau

# Axes with a meaning of their own; any other is an option of the solver or of the grid.
AXES = (
    "network", "process", "solver", "options", "grid", "grid_options", "steps", "nfe", "guidance",
    "thresholding", "seed",
)  # fmt: skip
THRESHOLDS = {"clip_x0": clip_x0, "dynamic_threshold": dynamic_threshold}


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Cells to run: mappings from axis to value. Sweeps add up: `product(...) + product(...)`."""

    cells: tuple[Mapping[str, Any], ...]

    def __add__(self, other: "Sweep") -> "Sweep":
        return Sweep(self.cells + other.cells)

    def __len__(self) -> int:
        return len(self.cells)

    def where(self, keep: Callable[[Mapping[str, Any]], bool]) -> "Sweep":
        """The cells for which `keep(cell)` is true."""
        return Sweep(tuple(cell for cell in self.cells if keep(cell)))


def product(**axes: Any) -> Sweep:
    """Every combination of the axes' values; a value that is no list, tuple or range is one value.

    Axes (`solver`, and `steps` or `nfe`, are needed):

      solver: a name of `jaxdiff.solvers.CATALOGUE`, one of its settings, an alias, or a file of
        `jaxdiff.solvers.save`, which has steps, grid and options of its own.
      options: a mapping of the solver's options.
      grid: a name of a spacing of `jaxdiff.grids`; by default the alias's own, or "half_log_snr".
      grid_options: a mapping of its options.
      steps, nfe: steps, or network evaluations in all: one of the two.
      guidance: s of uncond + s (cond - uncond).
      thresholding: None, "clip_x0" or "dynamic_threshold", or a mapping {"name": ..., options}.
      seed: decides x_T and the noise; the same seed is the same x_T for every sampler.
      process, network: keys of what `run` is given.
      anything else: an option of that name of the solver (`order`, `eta`, `s_churn`, ...) or of the
        grid (`rho`, `exponent`, `shift`, ...): of whichever takes it.

    Raises ValueError for an axis without values or without a solver and steps.
    """
    if "solver" not in axes or ("steps" in axes) == ("nfe" in axes):
        raise ValueError(f"a product needs solver, and either steps or nfe; got {sorted(axes)}")
    values = {}
    for name, given in axes.items():
        several = isinstance(given, (list, tuple, range, np.ndarray))
        values[name] = [_plain(v) for v in given] if several else [_plain(given)]
        if not values[name]:
            raise ValueError(f"the axis {name!r} has no values")
    points = itertools.product(*values.values())
    return Sweep(tuple(dict(zip(values, point)) for point in points))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


@dataclasses.dataclass(frozen=True)
class Cell:
    """One checked run: its axes as given, and what they mean."""

    axes: Mapping[str, Any]
    tableau: Tableau
    network: str
    process: str
    guidance: float
    thresholding: Mapping[str, Any] | None
    seed: int

    @property
    def id(self) -> str:
        """The axes as text: the same in every run of the sweep."""
        return json.dumps(dict(sorted(self.axes.items())), default=str)

    @property
    def setting(self) -> str:
        """What decides where the exact flow ends: everything but the sampler."""
        names = ("network", "process", "guidance", "thresholding", "seed")
        return json.dumps({name: getattr(self, name) for name in names})


def make_cells(
    sweep: Sweep, processes: Mapping[str, Process], networks: Sequence[str]
) -> list[Cell]:
    """Build and check every cell; ValueError or TypeError naming the first bad one."""
    cells, known = [], {}
    for axes in sweep.cells:
        try:
            cell = _make_cell(axes, processes, networks)
        except (ValueError, TypeError) as error:
            raise type(error)(f"in the cell {dict(axes)}: {error}") from error
        if cell.id in known:
            raise ValueError(f"the sweep has the cell {dict(axes)} twice")
        known[cell.id] = cell
        cells.append(cell)
    return cells


def _make_cell(
    axes: Mapping[str, Any], processes: Mapping[str, Process], networks: Sequence[str]
) -> Cell:
    process = _choose("process", axes, processes)
    network = _choose("network", axes, networks)
    make = _stored if is_stored(axes["solver"]) else _built
    tableau = make(axes, processes[process])
    seed, guidance = axes.get("seed", 0), float(axes.get("guidance", 1.0))
    check_seed("seed", seed)
    if not np.isfinite(guidance):
        raise ValueError(f"guidance must be a finite number, got {guidance!r}")
    thresholding = axes.get("thresholding")
    if isinstance(thresholding, str):
        thresholding = {"name": thresholding}
    if thresholding is not None and thresholding.get("name") not in THRESHOLDS:
        raise ValueError(unknown("unknown thresholding", thresholding.get("name"), THRESHOLDS))
    return Cell(axes, tableau, network, process, guidance, thresholding, seed)


def _stored(axes: Mapping[str, Any], process: Process) -> Tableau:
    name = axes["solver"]
    tableau = make_tableau(process, name, 0, "")
    own = set(axes) - {"solver", "nfe", "network", "process", "guidance", "thresholding", "seed"}
    if own:
        raise ValueError(f"the file {name!r} has its own {', '.join(sorted(own))}")
    if axes["nfe"] != int(tableau.nfe):
        raise ValueError(f"the file {name!r} has nfe = {int(tableau.nfe)}, got {axes['nfe']!r}")
    return tableau


def _built(axes: Mapping[str, Any], process: Process) -> Tableau:
    name = axes["solver"]
    entry, preset = solvers.find(name)
    grid, own = solvers.own_grid(name) or ("half_log_snr", {})
    if "grid" in axes and axes["grid"] != grid:
        grid, own = axes["grid"], {}
    if grid not in GRIDS:
        raise ValueError(unknown("unknown grid", grid, GRIDS))
    options, grid_options = dict(axes.get("options", {})), {**own, **axes.get("grid_options", {})}
    of_solver = list(inspect.signature(entry.build).parameters)[1:]
    of_grid = [*list(inspect.signature(GRIDS[grid]).parameters)[2:], "shift"]
    for axis, value in axes.items():
        if axis in AXES:
            continue
        takers = [o for o, names in ((options, of_solver), (grid_options, of_grid)) if axis in names]
        if len(takers) != 1:
            known = [*AXES, *of_solver, *of_grid]
            both = f"is an option of {name!r} and of {grid!r}: use options or grid_options"
            neither = f"is no axis and no option of {name!r} or {grid!r}; {nearest(axis, known)}"
            raise ValueError(f"{axis!r} {both if takers else neither}")
        takers[0][axis] = value

    def build(steps):
        return make_tableau(process, name, steps, grid, options, grid_options)

    if "steps" in axes:
        return build(axes["steps"])
    each = entry.nfe_per_step_of(_setting(entry, name, {**preset, **options}))
    return _with_evaluations(build, axes["nfe"], each)


def _choose(axis: str, axes: Mapping[str, Any], known: Iterable[str]) -> str:
    known = list(known)
    if axis not in axes and len(known) > 1:
        raise ValueError(f"there are several of them, so it needs the axis {axis!r}: one of {known}")
    chosen = axes.get(axis, known[0])
    if chosen not in known:
        raise ValueError(unknown(f"unknown {axis}", chosen, known))
    return chosen


def _setting(entry: Any, name: str, options: Mapping[str, Any]) -> Any:
    """The named setting, or the one with these options, or the first: for its evaluations a step."""
    if name in entry.settings:
        return entry.settings[name]
    alike = [s for s in entry.settings.values() if dict(s.options) == dict(options)]
    return alike[0] if alike else next(iter(entry.settings.values()))


def _with_evaluations(build: Callable[[int], Tableau], nfe: int, each: int) -> Tableau:
    """The sampler of exactly `nfe` evaluations: steps near nfe / each, for a start may cost more."""
    if isinstance(nfe, bool) or not isinstance(nfe, int) or nfe < 1:
        raise ValueError(f"nfe must be an integer of at least 1, got {nfe!r}")
    guess, near = max(nfe // max(each, 1), 1), []
    for steps in sorted(range(1, nfe + 2), key=lambda n: abs(n - guess))[:12]:
        tableau = build(steps)
        if int(tableau.nfe) == nfe:
            return tableau
        near.append(int(tableau.nfe))
    raise ValueError(f"no number of steps makes {nfe} evaluations; near it are {sorted(set(near))}")
