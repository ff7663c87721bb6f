"""`jaxdiff ablate`: a sweep over the samplers of a trained run, from a configuration."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff import data, metrics
from jaxdiff.ablation.report import report
from jaxdiff.ablation.run import run
from jaxdiff.ablation.sweep import Sweep, make_cells, product
from jaxdiff.ablation.table import Table
from jaxdiff.config import Range, Section
from jaxdiff.experiment import Experiment
from jaxdiff.generation import balanced_labels
from jaxdiff.names import unknown
from jaxdiff.training.run import read_experiment, restore


@dataclasses.dataclass(frozen=True)
class AblationSettings:
    """A sweep over the samplers of a trained network.

    `run` is the folder of the run. `axes` are mappings, each the arguments of one
    `jaxdiff.ablation.product`; the sweep is their union. `count` samples a cell, of all classes in
    turn; `reference` describes the many-step sampler whose end points "error" is measured from;
    `metrics` are more columns, names of `METRICS`; `plot` is the column of the pictures.
    """

    run: str
    axes: tuple
    count: int = 64
    reference: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"steps": 1000})
    metrics: tuple[str, ...] = ()
    plot: str = "error"
    memory: int = 2**30


SECTIONS = {
    "ablation": Section(
        {None: AblationSettings},
        ranges={name: Range("at least 1", lambda v: v >= 1) for name in ("count", "memory")},
    )
}


def _real() -> np.ndarray:
    return data.digits("all").x


def frechet_distance(samples: np.ndarray, facts: Mapping[str, Any]) -> float:
    """Of digit-classifier features, to all real digits."""
    classifier = metrics.digit_classifier()
    features = (classifier.features(x) for x in (np.clip(samples, -1, 1), _real()))
    return metrics.frechet_distance(*features)


def mmd(samples: np.ndarray, facts: Mapping[str, Any]) -> float:
    """Unbiased squared MMD of the pixels, to all real digits."""
    return metrics.mmd(np.clip(samples, -1, 1), _real())


def conditional_accuracy(samples: np.ndarray, facts: Mapping[str, Any]) -> float:
    """The fraction of samples classified as asked."""
    classifier = metrics.digit_classifier()
    return metrics.conditional_accuracy(classifier, np.clip(samples, -1, 1), facts["cond"])


METRICS: dict[str, Callable] = {
    f.__name__: f for f in (frechet_distance, mmd, conditional_accuracy)
}


def prepare(settings: Any, workdir: str | Path, progress: bool = True) -> Callable[[], Table]:
    """Check a completed `ablation` section; returns the work that is left to do.

    Raises ValueError or TypeError for a bad axis, metric or network; FileNotFoundError without a
    run.
    """
    experiment = read_experiment(settings.run)
    sweep = Sweep(())
    for axes in settings.axes:
        if not isinstance(axes, Mapping):
            raise TypeError(f"config.ablation.axes must be mappings of axes, got {axes!r}")
        sweep += product(**axes)
    if not len(sweep):
        raise ValueError("config.ablation.axes is empty: give at least one mapping of axes")
    for cell in make_cells(sweep, {"process": experiment.process}, ["network"]):
        experiment.check_guidance(cell.guidance)
    for name in settings.metrics:
        if name not in METRICS:
            raise ValueError(unknown("unknown metric", name, METRICS))
    if settings.metrics and experiment.config.data.name != "digits":
        raise ValueError(
            f"the metrics {', '.join(METRICS)} compare with the digits, and the run's data are "
            f"{experiment.config.data.name!r}"
        )
    if settings.plot not in ("error", "error_mean", *settings.metrics):
        raise ValueError(
            f"config.ablation.plot must be 'error', 'error_mean' or one of the metrics, got "
            f"{settings.plot!r}"
        )
    return functools.partial(_ablate, experiment, sweep, settings, Path(workdir), progress)


def _ablate(
    experiment: Experiment, sweep: Sweep, settings: Any, workdir: Path, progress: bool
) -> Table:
    labels = balanced_labels(experiment, settings.count)
    variables = restore(experiment, settings.run).ema
    null = None if experiment.num_classes is None else np.int32(experiment.num_classes)
    table = run(
        sweep, experiment.denoiser(variables), experiment.process, experiment.shape,
        count=settings.count, cond=labels, null_cond=null, reference=dict(settings.reference),
        metrics={name: METRICS[name] for name in settings.metrics}, workdir=workdir,
        memory=settings.memory, progress=progress,
    )  # fmt: skip
    report(table, workdir, settings.plot, f"Samplers on {experiment.config.data.name}")
    return table
