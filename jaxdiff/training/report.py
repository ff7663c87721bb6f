"""What a run writes about itself: the picture and the figures."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.data.loader import Source
from jaxdiff.evaluation import evaluate
from jaxdiff.experiment import Experiment, make_tableau, sampler
from jaxdiff.files import write_text
from jaxdiff.generation import generate
from jaxdiff.parallel import is_main
from jaxdiff.pictures import sample_grid
from jaxdiff.training.run import FIGURES, SAMPLES
from jaxdiff.training.state import State

_MOST_ROWS = 16


def averaged(experiment: Experiment, state: State) -> Any:
    """The weights that the evaluate section names: the classical average, or one of a length."""
    length = experiment.config.evaluate.ema
    if not length:
        return state.ema
    return state.ema_tracks[experiment.config.train.ema_lengths.index(length)]


def draw_picture(experiment: Experiment, variables: Any, path: Path) -> None:
    """Write the grid of samples that the sample section describes, one row a class.

    Of more than 16 classes, 16 that are evenly spaced.
    """
    chosen = experiment.config.sample
    classes = experiment.num_classes
    labels, count = None, chosen.count**2
    if classes is not None:
        shown = np.linspace(0, classes - 1, min(classes, _MOST_ROWS)).round().astype(np.int32)
        labels, count = np.repeat(shown, chosen.count), chosen.count * len(shown)
    tableau = make_tableau(experiment.process, **sampler(experiment.config))
    samples = generate(
        experiment, variables, tableau, labels, count, chosen.seed, chosen.guidance,
        chosen.batch_size,
    )  # fmt: skip
    title = f"{chosen.solver}, {chosen.steps} steps, guidance {chosen.guidance:g}"
    if is_main():
        sample_grid(path, samples, labels, title)


def figures(
    experiment: Experiment, variables: Any, source: Source, progress: bool = False
) -> list[dict[str, float]]:
    """The figures of the evaluate section, one dict for each guidance scale."""
    config = experiment.config
    tableau = make_tableau(experiment.process, **sampler(config))
    return [
        evaluate(
            experiment, variables, source, tableau, guidance, config.evaluate.count,
            config.sample.seed, config.sample.batch_size, progress,
        )
        for guidance in config.evaluate.guidance
    ]  # fmt: skip


def final_report(
    experiment: Experiment, state: State, source: Source, workdir: Path, progress: bool = False
) -> dict[str, Any]:
    """Write the picture, then the figures of the evaluate section; returns the figures.

    The figures are written last: they mark a run as finished.
    """
    variables = averaged(experiment, state)
    draw_picture(experiment, variables, workdir / SAMPLES)
    found = {
        "step": int(state.step), **sampler(experiment.config),
        "figures": figures(experiment, variables, source, progress),
    }  # fmt: skip
    if is_main():
        write_text(workdir / FIGURES, json.dumps(found, indent=2) + "\n")
    return found
