"""Figures of a trained model: samples against real data."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxdiff import data, metrics
from jaxdiff.data.loader import Source
from jaxdiff.experiment import Experiment
from jaxdiff.generation import balanced_labels, generate
from jaxdiff.solvers.tableau import Tableau

FEATURES = ("digits", "pixels")
HIGHER_IS_BETTER = ("conditional_accuracy",)
_MAX_REAL = 5000


def check_evaluation(experiment: Experiment) -> None:
    """Raise ValueError unless the evaluate section fits the network, its data and averages."""
    chosen, shape = experiment.config.evaluate, experiment.shape
    train = experiment.config.train
    if chosen.ema and chosen.ema not in train.ema_lengths:
        raise ValueError(
            "config.evaluate.ema must be 0 or one of config.train.ema_lengths "
            f"{train.ema_lengths}, got {chosen.ema}"
        )
    for scale in chosen.guidance:
        experiment.check_guidance(scale)
    if chosen.features not in FEATURES:
        raise ValueError(
            f"config.evaluate.features must be one of {list(FEATURES)}, got {chosen.features!r}"
        )
    is_digit = len(shape) == 3 and shape[0] == shape[1] and shape[0] % 8 == 0 and shape[2] == 1
    name = experiment.config.data.name
    if chosen.features == "digits" and name != "digits":
        raise ValueError(
            "config.evaluate.features 'digits' compares with the digits: it needs config.data.name "
            f"'digits', got {name!r}; use 'pixels'"
        )
    if chosen.features == "digits" and not is_digit:
        raise ValueError(
            "config.evaluate.features 'digits' needs square grey images, their size a multiple of "
            f"8; got examples of shape {list(shape)}"
        )
    names = metric_names(experiment)
    if train.best_metric and (train.best_metric not in names or not train.evaluate_every):
        raise ValueError(
            "config.train.best_metric needs config.train.evaluate_every and must be one of "
            f"{', '.join(names)}, got {train.best_metric!r} every {train.evaluate_every} steps"
        )


def metric_names(experiment: Experiment) -> tuple[str, ...]:
    """The distances and accuracies that `evaluate` finds for this experiment."""
    names = ("mmd", "energy_distance", "sliced_wasserstein")
    if experiment.config.evaluate.features == "digits":
        names += ("frechet_distance",)
        names += () if experiment.num_classes is None else ("conditional_accuracy",)
    return names


def evaluate(
    experiment: Experiment, variables: Any, source: Source, tableau: Tableau, guidance: float,
    count: int, seed: int, batch_size: int = 256, progress: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Distances between `count` samples, clipped to the data's range, and the real examples.

    Always "mmd" (unbiased, squared), "energy_distance" and "sliced_wasserstein" of the values; with
    features "digits" also "frechet_distance" on a digit classifier's features, beside it
    "frechet_floor", what that many new real digits would get, and "conditional_accuracy", the
    fraction classified as asked. At most 5,000 real examples are used. Raises as `generate` does.
    """
    labels = balanced_labels(experiment, count)
    samples = generate(
        experiment, variables, tableau, labels, count, seed, guidance, batch_size, progress
    )
    indices = np.linspace(0, len(source) - 1, min(len(source), _MAX_REAL)).round().astype(int)
    real = np.stack([source[i]["x"] for i in indices.tolist()])
    samples = np.clip(samples, real.min(), real.max())
    found = {"guidance": guidance, "count": count, "nfe": int(tableau.nfe)}
    if experiment.config.evaluate.features == "digits":
        found |= _digit_figures(samples, labels)
    return found | {
        "mmd": metrics.mmd(samples, real),
        "energy_distance": metrics.energy_distance(samples, real),
        "sliced_wasserstein": metrics.sliced_wasserstein(samples, real, jax.random.key(0)),
    }


def _digit_figures(
    samples: Float[np.ndarray, "n size size 1"], labels: np.ndarray | None
) -> dict[str, float]:
    classifier = metrics.digit_classifier()
    real = data.digits("all")
    found = {
        "frechet_distance": metrics.frechet_distance(
            classifier.features(samples), classifier.features(real.x)
        ),
        "frechet_floor": metrics.real_floor(classifier, len(samples), len(real)),
    }
    if labels is not None:
        found["conditional_accuracy"] = metrics.conditional_accuracy(classifier, samples, labels)
    return found
