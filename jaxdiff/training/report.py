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
from jaxdiff.pictures import sample_grid
from jaxdiff.training.run import FIGURES, SAMPLES
from jaxdiff.training.state import State


def draw_picture(experiment: Experiment, variables: Any, workdir: Path) -> None:
    """Write the grid of samples that the sample section describes, one row a class."""
    chosen = experiment.config.sample
    classes = experiment.num_classes
    count = chosen.count * (classes or chosen.count)
    labels = None
    if classes is not None:
        labels = np.repeat(np.arange(classes, dtype=np.int32), chosen.count)
    tableau = make_tableau(experiment.process, **sampler(experiment.config))
    samples = generate(
        experiment, variables, tableau, labels, count, chosen.seed, chosen.guidance,
        chosen.batch_size,
    )  # fmt: skip
    title = f"{chosen.solver}, {chosen.steps} steps, guidance {chosen.guidance:g}"
    sample_grid(workdir / SAMPLES, samples, labels, title)


def final_report(
    experiment: Experiment, state: State, source: Source, workdir: Path, progress: bool = False
) -> dict[str, Any]:
    """Write the picture, then the figures of the evaluate section; returns the figures.

    The figures are written last: they mark a run as finished.
    """
    config = experiment.config
    draw_picture(experiment, state.ema, workdir)
    tableau = make_tableau(experiment.process, **sampler(config))
    figures = [
        evaluate(
            experiment, state.ema, source, tableau, guidance, config.evaluate.count,
            config.sample.seed, config.sample.batch_size, progress,
        )
        for guidance in config.evaluate.guidance
    ]  # fmt: skip
    found = {"step": int(state.step), **sampler(config), "figures": figures}
    write_text(workdir / FIGURES, json.dumps(found, indent=2) + "\n")
    return found
