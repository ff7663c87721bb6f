"""The folder of a run: what is in it, how a run is checked before it starts, and read back."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxdiff import config as configuration
from jaxdiff.data import loader
from jaxdiff.data.loader import Source
from jaxdiff.evaluation import check_evaluation
from jaxdiff.experiment import Experiment, make_experiment, make_source
from jaxdiff.files import write_text
from jaxdiff.parallel import mesh
from jaxdiff.settings import SECTIONS
from jaxdiff.training.checkpoints import Checkpoints
from jaxdiff.training.state import State, init_state, make_optimizer
from jaxdiff.training.step import Step, make_step, shardings
from jaxdiff.training.writers import require_tensorboard

CONFIG = "config.json"
DATA = "data.json"
LOSSES = "metrics.jsonl"
FIGURES = "metrics.json"
SAMPLES = "samples.png"
CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked run, ready to start: nothing has been written yet."""

    experiment: Experiment
    source: Source
    init: Callable[[], State]
    step: Step


def prepare(config: ConfigDict) -> Plan:
    """Build and check everything a run needs. Raises ValueError, TypeError, FileNotFoundError,
    ImportError."""
    config = configuration.complete(config, SECTIONS)  # it may have been changed since
    settings = config.train
    if settings.batch_size % jax.device_count():
        raise ValueError(
            f"config.train.batch_size must be a multiple of the {jax.device_count()} devices, got "
            f"{settings.batch_size}"
        )
    if settings.tensorboard:
        require_tensorboard()
    source = make_source(config)
    experiment = make_experiment(config, source.shape, source.num_classes)
    check_evaluation(experiment)
    optimizer = make_optimizer(config)
    init = functools.partial(init_state, experiment, optimizer)
    step = make_step(experiment, optimizer)
    batch = next(batches(config, source))
    check_batch(batch, experiment, 1)
    jax.eval_shape(step, jax.eval_shape(init), batch)
    return Plan(experiment, source, init, step)


def open_run(experiment: Experiment, workdir: Path) -> None:
    """Make the folder of a run, or check that it holds a run of the same configuration."""
    config = experiment.config
    if (workdir / CONFIG).exists():
        changes = configuration.difference(configuration.read(workdir / CONFIG, SECTIONS), config)
        if changes:
            listed = "\n  ".join(changes)
            raise ValueError(
                f"{str(workdir)!r} holds a run of another configuration:\n  {listed}\n"
                "Use another workdir, or the configuration it was started with."
            )
        return
    if workdir.exists() and not workdir.is_dir():
        raise NotADirectoryError(f"the workdir {str(workdir)!r} is a file")
    # A run killed while it made its folder left these, and they are written again.
    ours = (workdir / DATA, *workdir.glob(".*"))
    if workdir.is_dir() and set(workdir.iterdir()) - set(ours):
        raise ValueError(
            f"the workdir {str(workdir)!r} is not empty and holds no run (no {CONFIG}): use another"
        )
    workdir.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        shape = {"shape": list(experiment.shape), "num_classes": experiment.num_classes}
        write_text(workdir / DATA, json.dumps(shape) + "\n")
        configuration.write(workdir / CONFIG, config)


def is_finished(experiment: Experiment, workdir: Path) -> bool:
    """Whether the folder holds this run's final figures; raises as `open_run` for another run."""
    if not (workdir / FIGURES).exists():
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


def restore(experiment: Experiment, workdir: str | Path) -> State:
    """The state of the newest readable checkpoint; see `Checkpoints.restore` for what it raises."""
    init = functools.partial(init_state, experiment, make_optimizer(experiment.config))
    with Checkpoints(Path(workdir) / CHECKPOINTS) as checkpoints:
        return checkpoints.restore(abstract_state(init))[0]


def abstract_state(init: Callable[[], State]) -> State:
    """Shapes, dtypes and shardings of the state that `init` makes."""
    replicated = shardings(mesh())[1]
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
        jax.eval_shape(init),
    )


def batches(config: ConfigDict, source: Source) -> Any:
    """This process's iterator of batches, decided by config.seed and the step."""
    return loader(
        source, config.train.batch_size, config.seed, flip=config.train.flip,
        process_index=jax.process_index(), process_count=jax.process_count(),
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
