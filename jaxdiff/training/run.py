"""The folder of a run: what is in it, how a run is checked before it starts, and read back."""

import dataclasses
import functools
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxdiff import config as configuration
from jaxdiff import parallel
from jaxdiff.data import loader
from jaxdiff.data.loader import Source
from jaxdiff.evaluation import check_evaluation
from jaxdiff.experiment import Experiment, make_experiment, make_source
from jaxdiff.files import write_text
from jaxdiff.settings import SECTIONS
from jaxdiff.training import ema
from jaxdiff.training.checkpoints import Checkpoints
from jaxdiff.training.continuing import changes
from jaxdiff.training.placement import Placement, place, place_to_read
from jaxdiff.training.state import State, init_state, make_optimizer
from jaxdiff.training.step import Step, make_step
from jaxdiff.training.writers import require_tensorboard

CONFIG = "config.json"
DATA = "data.json"
LOSSES = "metrics.jsonl"
FIGURES = "metrics.json"
SAMPLES = "samples.png"
CHECKPOINTS = "checkpoints"
BEST = "best"
SNAPSHOTS = "ema"
EVALUATIONS = "evaluations.jsonl"
PICTURES = "samples"
THROUGHPUT = "throughput.jsonl"
PROFILE = "profile"

_PATIENCE = 60.0  # seconds until a shared disk shows what another process wrote


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked run, ready to start: nothing has been written yet."""

    experiment: Experiment
    source: Source
    init: Callable[[], State]
    step: Step
    placement: Placement
    batch: Mapping[str, jax.ShapeDtypeStruct]


def prepare(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Plan:
    """Build and check everything a run needs, on all devices or those given.

    All processes call it together, and get a ValueError if their configurations or data differ.
    Raises ValueError, TypeError, FileNotFoundError, ImportError.
    """
    config = configuration.complete(config, SECTIONS)  # it may have been changed since
    compare_sections(config)
    settings = config.train
    if settings.tensorboard:
        require_tensorboard()
    source = make_source(config)
    found = f"{len(source)} examples of shape {source.shape}, classes: {source.num_classes}"
    parallel.same("their data", found)
    experiment = make_experiment(config, source.shape, source.num_classes)
    check_evaluation(experiment)
    ema.check(settings)
    optimizer = make_optimizer(config)
    init = functools.partial(init_state, experiment, optimizer)
    step = make_step(experiment, optimizer)
    placement = place(experiment, init, devices)
    rows = next(batches(config, source, placement))
    check_batch(rows, experiment, 1)
    batch = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((settings.batch_size, *a.shape[1:]), a.dtype), rows
    )
    jax.eval_shape(step, placement.abstract, batch)
    return Plan(experiment, source, init, step, placement, batch)


def compare_sections(config: ConfigDict) -> None:
    """Raise ValueError, in every process, if their completed configurations differ."""
    for section, values in sorted(configuration.to_dict(config).items()):
        parallel.same(f"config.{section}", json.dumps(values, sort_keys=True))


def open_run(experiment: Experiment, workdir: Path) -> None:
    """Make the folder of a run, or check that it holds a run of the same configuration.

    What `jaxdiff.training.continuing` lists may differ, and is told by a warning: the mesh, say,
    changes where a run happens, and its numbers by rounding alone. Raises FileNotFoundError, in
    every process, if one of them does not see the folder of the others.
    """
    config = experiment.config
    if parallel.agreed((workdir / CONFIG).exists()):
        _check_shared(workdir)
        allowed, refused = changes(configuration.read(workdir / CONFIG, SECTIONS), config)
        if refused:
            listed = "\n  ".join(refused)
            raise ValueError(
                f"{str(workdir)!r} holds a run of another configuration:\n  {listed}\n"
                "Use another workdir, or the configuration it was started with."
            )
        if allowed and parallel.is_main():
            listed = "\n  ".join(allowed)
            warnings.warn(f"the run goes on with other settings:\n  {listed}", stacklevel=2)
        return
    if workdir.exists() and not workdir.is_dir():
        raise NotADirectoryError(f"the workdir {str(workdir)!r} is a file")
    # A run killed while it made its folder left these, and they are written again.
    ours = (workdir / DATA, *workdir.glob(".*"))
    if workdir.is_dir() and set(workdir.iterdir()) - set(ours):
        raise ValueError(
            f"the workdir {str(workdir)!r} is not empty and holds no run (no {CONFIG}): use another"
        )
    parallel.barrier("the workdir was checked")
    if parallel.is_main():
        workdir.mkdir(parents=True, exist_ok=True)
        shape = {"shape": list(experiment.shape), "num_classes": experiment.num_classes}
        write_text(workdir / DATA, json.dumps(shape) + "\n")
        configuration.write(workdir / CONFIG, config)
    parallel.barrier("the workdir was made")
    _check_shared(workdir)


def _check_shared(workdir: Path) -> None:
    end = time.monotonic() + _PATIENCE
    while not (seen := (workdir / CONFIG).exists()) and time.monotonic() < end:
        time.sleep(0.5)
    if not parallel.everywhere(seen):
        raise FileNotFoundError(
            f"the workdir {str(workdir)!r} is not on a disk that all processes see"
        )


def is_finished(experiment: Experiment, workdir: Path) -> bool:
    """Whether the folder holds this run's final figures; raises as `open_run` for another run."""
    if not parallel.agreed((workdir / FIGURES).exists()):
        return False
    open_run(experiment, workdir)
    return True


def read_experiment(workdir: str | Path) -> Experiment:
    """The experiment of a run's folder; needs neither its data nor a checkpoint.

    Raises FileNotFoundError if there is no run, ValueError if its files are damaged.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise FileNotFoundError(f"no such folder: {str(workdir)!r}")
    config = configuration.read(workdir / CONFIG, SECTIONS)
    try:
        example = json.loads((workdir / DATA).read_text(encoding="utf-8"))
        shape, classes = tuple(example["shape"]), example["num_classes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(workdir / DATA)!r} is missing or damaged: {error}") from error
    return make_experiment(config, shape, classes)


def restore(experiment: Experiment, workdir: str | Path, best: bool = False) -> State:
    """The state of the newest readable checkpoint; see `Checkpoints.restore` for what it raises.

    `best` takes the one with the best config.train.best_metric instead. The state lies on the run's
    own mesh where that fits the devices, else whole on each of them.
    """
    init = functools.partial(init_state, experiment, make_optimizer(experiment.config))
    with Checkpoints(Path(workdir) / (BEST if best else CHECKPOINTS)) as checkpoints:
        return checkpoints.restore(place_to_read(experiment, init).abstract)[0]


def batches(config: ConfigDict, source: Source, placement: Placement | None = None) -> Any:
    """The iterator of batches, decided by config.seed and the step.

    With a placement, of the rows that this process's devices hold.
    """
    size = config.train.batch_size
    return loader(
        source, size, config.seed, flip=config.train.flip, threads=config.train.prefetch,
        rows=None if placement is None else placement.rows(size),
    )  # fmt: skip


def check_batch(batch: Mapping[str, np.ndarray], experiment: Experiment, step: int) -> None:
    """Raise ValueError, naming the step, for data that are not finite or labels out of range."""
    if not np.all(np.isfinite(batch["x"])):
        raise ValueError(f"the data of step {step} hold NaN or infinite values")
    if experiment.num_classes is not None:
        label = batch["label"]
        if label.min() < 0 or label.max() >= experiment.num_classes:
            raise ValueError(
                f"the labels of step {step} must be 0 to {experiment.num_classes - 1}, got "
                f"{label.min()} to {label.max()}"
            )
