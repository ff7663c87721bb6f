"""Running a sweep: grouped by program, stacked, resumable."""

import collections
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from jaxdiff.ablation.references import References
from jaxdiff.ablation.sweep import THRESHOLDS, Cell, Sweep, make_cells
from jaxdiff.ablation.table import Table
from jaxdiff.arrays import as_arrays, structure_hash
from jaxdiff.denoisers import Denoiser
from jaxdiff.files import write_text
from jaxdiff.guidance import classifier_free
from jaxdiff.noise import sample_keys
from jaxdiff.processes import Process
from jaxdiff.sampling import check_call, sample
from jaxdiff.solvers.combine import stack
from jaxdiff.solvers.tableau import Tableau

RESULTS, SETTING = "cells.jsonl", "sweep.json"


def run(
    sweep: Sweep, denoiser: Denoiser | Mapping[str, Denoiser],
    process: Process | Mapping[str, Process], shape: Sequence[int], *, count: int = 64,
    cond: Any = None, null_cond: Any = None, reference: Any = None,
    metrics: Mapping[str, Callable] | None = None, workdir: str | Path | None = None,
    memory: int = 2**30, mesh: Mesh | None = None, progress: bool = True,
) -> Table:  # fmt: skip
    """Run every cell of a sweep and measure its samples.

    Cells whose samplers have the same number of rows run as one program, their tables stacked under
    `vmap`, in chunks; a row is as in `jaxdiff.sample`, and so are the numbers.

    Arguments:
      sweep: from `product`.
      denoiser: one, or several by name for the axis `network`.
      process: one, or several by name for the axis `process`; x_T is its prior, grids are over it.
      shape: of one sample, without the batch.
      count: samples a cell. Sample i starts from the same x_T in every cell of a seed and process.
      cond: given to the denoiser, leaves [count, ...].
      null_cond: what `jaxdiff.guidance.classifier_free` takes; needed where guidance is not 1.
      reference: where the exact flow ends, for the metrics "error" and "error_mean": a function
        (x_T, process) -> end points; or a mapping of axes that describes a sampler of many steps,
        {"steps": 1000} with "solver" "dpm_solver_pp_2m" and "grid" "half_log_snr" by default, run
        with the cell's own network, process, guidance and thresholding.
      metrics: {column: function(samples, facts) -> number}, `facts` a mapping with "x_T",
        "reference" (or None), "cond" and "axes". With a reference, "error" is always there: the
        median over samples of |x - x*| / sqrt(size), and "error_mean", the root of the mean square.
      workdir: a folder that keeps finished cells: a sweep that was killed goes on there, and cells
        added to a sweep are all that runs. ValueError if it holds another sweep's, naming what is
        different.
      memory: bytes that a chunk may take, by the network's own temporary memory and the states.
      mesh: devices to spread a chunk's cells over.

    Returns a `Table` of one row a cell: its axes, "nfe" and the metrics, in the sweep's order. Every
    cell is checked before any runs: ValueError or TypeError names the first bad one.
    """
    networks = denoiser if isinstance(denoiser, Mapping) else {"network": denoiser}
    processes = process if isinstance(process, Mapping) else {"process": process}
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"count must be an integer of at least 1, got {count!r}")
    metrics = dict(metrics or {})
    cells = make_cells(sweep, processes, list(networks))
    _check_guidance(cells, cond, null_cond)
    lab = _Lab(networks, processes, (count, *shape), cond, null_cond)
    references = References(reference, lab, workdir)
    references.check(cells)
    if reference is not None:
        metrics = {"error": median_error, "error_mean": mean_error, **metrics}
    columns = ("nfe", *metrics)
    taken = {axis for cell in cells for axis in cell.axes if axis in columns and axis != "nfe"}
    if taken:
        raise ValueError(f"{sorted(taken)} are axes and metrics: give the metrics other names")
    lab.check(cells)
    done = _open(workdir, lab, references, metrics)
    todo = [cell for cell in cells if cell.id not in done]
    groups = _groups(todo)
    with tqdm(total=len(cells), initial=len(cells) - len(todo), unit="cell",
              disable=not progress) as bar:  # fmt: skip
        for group in groups:
            for chunk, samples in lab.run(group, memory, mesh):
                rows = []
                for cell, x in zip(chunk, samples):
                    facts = {
                        "x_T": lab.start(cell), "reference": references.of(cell), "cond": cond,
                        "axes": cell.axes,
                    }  # fmt: skip
                    found = {name: float(metric(x, facts)) for name, metric in metrics.items()}
                    rows.append((cell.id, {**cell.axes, "nfe": int(cell.tableau.nfe), **found}))
                _append(workdir, rows)
                done.update(rows)
                bar.update(len(chunk))
    return Table([done[cell.id] for cell in cells], tuple(metrics), len(lab.programs))


def median_error(samples: np.ndarray, facts: Mapping[str, Any]) -> float:
    """The median over samples of |x - x*| / sqrt(size)."""
    return float(np.median(_distances(samples, facts)))


def mean_error(samples: np.ndarray, facts: Mapping[str, Any]) -> float:
    """The root of the mean square of x - x*."""
    return float(np.sqrt(np.mean(_distances(samples, facts) ** 2)))


def _distances(samples, facts):
    gap = np.asarray(samples, np.float64) - facts["reference"]
    return np.sqrt(np.mean(gap.reshape(len(gap), -1) ** 2, 1))


def _check_guidance(cells: Sequence[Cell], cond: Any, null_cond: Any) -> None:
    for cell in cells:
        if cell.guidance != 1.0 and (cond is None or null_cond is None):
            raise ValueError(
                f"in the cell {dict(cell.axes)}: guidance needs cond= and null_cond= of `run`"
            )


def _groups(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells of one program each: equal rows, network, and kinds of guidance, threshold and noise."""
    found = collections.defaultdict(list)
    for cell in cells:
        threshold = cell.thresholding and tuple(sorted(cell.thresholding))
        name = cell.thresholding and cell.thresholding["name"]
        key = (cell.network, cell.tableau.rows, cell.guidance != 1.0, threshold, name,
               cell.tableau.stochastic, np.ndim(cell.tableau.A))  # fmt: skip
        found[key].append(cell)
    return list(found.values())


# --- the program ----------------------------------------------------------------------------------


@dataclasses.dataclass
class _Lab:
    """The networks and starts that all cells share."""

    networks: Mapping[str, Denoiser]
    processes: Mapping[str, Process]
    shape: tuple[int, ...]
    cond: Any
    null: Any
    programs: set = dataclasses.field(default_factory=set)
    starts: dict[tuple[str, int], tuple] = dataclasses.field(default_factory=dict)
    temporary: dict[str, int] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """What decides the samples of a cell, as plain values."""
        return {
            "networks": {name: fingerprint(d) for name, d in self.networks.items()},
            "processes": {name: repr(p) for name, p in self.processes.items()},
            "shape": list(self.shape), "cond": fingerprint((self.cond, self.null)),
        }  # fmt: skip

    def start(self, cell: Cell) -> jax.Array:
        """x_T, [count, ...]: decided by the process, the seed and the sample's number."""
        return self._drawn(cell)[0]

    def _drawn(self, cell: Cell) -> tuple[jax.Array, jax.Array]:
        """(x_T, the samples' keys of noise)."""
        name = cell.process, cell.seed
        if name not in self.starts:
            process = as_arrays(self.processes[cell.process])
            seed = jnp.uint32(cell.seed)
            self.starts[name] = _draw(process, seed, self.shape, structure_hash(process))
        return self.starts[name]

    def _strengths(self, cells: Sequence[Cell]) -> Any:
        options = [
            {k: v for k, v in (cell.thresholding or {}).items() if k != "name"} for cell in cells
        ]
        dtype = jnp.result_type(float)
        return jnp.asarray([c.guidance for c in cells], dtype), jax.tree.map(
            lambda *values: jnp.asarray(values, dtype), *options
        )

    def _call(self, stacked: Tableau, cells: Sequence[Cell], chosen: Any, mesh: Any) -> tuple:
        """The arguments of `_run` for the cells with these numbers."""
        some = [cells[i] for i in chosen]
        drawn = [self._drawn(c) for c in some]
        inputs = (
            as_arrays(jax.tree.map(lambda a: a[np.asarray(chosen)], stacked)),
            *(jnp.stack(values) for values in zip(*drawn)),
            self._strengths(some),
        )
        first = cells[0]
        denoiser = as_arrays(self.networks[first.network])
        cond, null = (as_arrays(tree) for tree in (self.cond, self.null))
        threshold = first.thresholding and first.thresholding["name"]
        kinds = first.guidance != 1.0, threshold, first.tableau.stochastic, mesh
        return inputs, (denoiser, cond, null), kinds, structure_hash(denoiser, inputs, cond)

    def check(self, cells: Sequence[Cell]) -> None:
        """Raise what sampling these cells raises, but for what a trace alone can find."""
        for cell in cells:
            denoiser, x, keys = self.networks[cell.network], *self._drawn(cell)
            if cell.guidance != 1.0:
                denoiser = classifier_free(denoiser, cell.guidance, self.null)
            check_call(denoiser, cell.tableau, x, keys, None, self.cond, "final", None, None)

    def chunk(self, cells: Sequence[Cell], stacked: Tableau, memory: int, devices: int) -> int:
        """How many cells fit into `memory`, from one evaluation of the network and the states."""
        inputs, (denoiser, cond, _), *_ = self._call(stacked, cells, [0], None)
        tables, x = inputs[0], inputs[1][0]
        name = cells[0].network
        if name not in self.temporary:
            level = tables.t[0, 0], tables.alpha[0, 0], tables.sigma[0, 0]
            arrays, static = eqx.partition((denoiser, x, *level, cond), eqx.is_array)
            call = jax.jit(lambda arrays: _evaluate(*eqx.combine(arrays, static)))
            analysis = call.lower(arrays).compile().memory_analysis()
            self.temporary[name] = analysis.temp_size_in_bytes
        # Both halves of a guided evaluation are alive at once.
        network = self.temporary[name] * (1 + (cells[0].guidance != 1.0))
        each = network + x.nbytes * (stacked.registers + stacked.history + 4)
        fits = max(memory // each, 1)
        return -(-min(fits * devices, len(cells)) // devices) * devices

    def run(self, cells: Sequence[Cell], memory: int, mesh: Mesh | None = None):
        """(cells, samples [cells, count, ...]) of each chunk."""
        stacked = stack([c.tableau for c in cells])
        size = self.chunk(cells, stacked, memory, 1 if mesh is None else mesh.size)
        for first in range(0, len(cells), size):
            # Filled up: another number of cells would be another program.
            chosen = np.minimum(np.arange(first, first + size), len(cells) - 1)
            call = self._call(stacked, cells, chosen, mesh)
            shapes = tuple((a.shape, a.dtype) for a in jax.tree.leaves(call[:2]))
            self.programs.add((*call[2:], shapes))
            samples = np.asarray(_run(*call))
            chunk = list(cells[first : first + size])
            yield chunk, samples[: len(chunk)]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _draw(process: Process, seed: Any, shape: tuple[int, ...], structure: int) -> tuple:
    """(x_T, keys of the noise) of a seed, as `jaxdiff sample` draws them."""
    start, steps = (
        sample_keys(key, jnp.arange(shape[0])) for key in jax.random.split(jax.random.key(seed))
    )
    return process.prior(start, shape, jnp.result_type(float)), steps


def _evaluate(denoiser, x, t, alpha, sigma, cond):
    return denoiser(x, t, alpha, sigma, cond)


@eqx.filter_jit
def _run(inputs: Any, shared: Any, kinds: tuple, structure: int) -> jax.Array:
    """Samples [cells, count, ...] of stacked tables."""
    guided, threshold, stochastic, mesh = kinds
    arrays, static = eqx.partition((inputs, shared), eqx.is_array)

    def local(inputs_arrays, shared_arrays):
        inputs, (denoiser, cond, null) = eqx.combine((inputs_arrays, shared_arrays), static)

        def one(table, x, keys, strengths):
            scale, options = strengths
            found = classifier_free(denoiser, scale, null) if guided else denoiser
            found = found if threshold is None else THRESHOLDS[threshold](found, **options)
            adjoint = None if mesh is None else diffrax.DirectAdjoint()
            key = keys if stochastic else None
            return sample(found, table, x, key, cond=cond, adjoint=adjoint)

        return jax.vmap(one)(*inputs)

    if mesh is None:
        return local(*arrays)
    split = P(mesh.axis_names)
    return jax.shard_map(
        local, mesh=mesh, in_specs=(split, P()), out_specs=split, check_vma=False
    )(*arrays)


# --- what is kept ---------------------------------------------------------------------------------


def _open(workdir: Any, lab: _Lab, references: References, metrics: Mapping) -> dict[str, dict]:
    """The finished cells of a folder, after a check that they are of the same sweep."""
    if workdir is None:
        return {}
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    setting = {**lab.facts, "reference": references.text, "metrics": list(metrics)}
    if (folder / SETTING).exists():
        old = json.loads((folder / SETTING).read_text())
        changed = [name for name in setting if old.get(name) != setting[name]]
        if changed and (folder / RESULTS).exists():
            listed = "; ".join(f"{n}: {old.get(n)} there, {setting[n]} here" for n in changed)
            raise ValueError(f"{str(folder)!r} holds cells of another sweep: {listed}")
    write_text(folder / SETTING, json.dumps(setting, indent=1) + "\n")
    found = {}
    if (folder / RESULTS).exists():
        for line in (folder / RESULTS).read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the line that was being written when the run died
                continue
            found[entry["id"]] = entry["row"]
    return found


def fingerprint(tree: Any) -> str:
    """A hash of the leaves of a pytree and their places."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def _append(workdir: Any, rows: Sequence[tuple[str, Mapping]]) -> None:
    if workdir is None:
        return
    path = Path(workdir) / RESULTS
    with path.open("a+b") as file:
        # A line that a killed run left unfinished is ended first.
        if file.tell() and not path.read_bytes().endswith(b"\n"):
            file.write(b"\n")
        for id, row in rows:
            file.write((json.dumps({"id": id, "row": row}) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
