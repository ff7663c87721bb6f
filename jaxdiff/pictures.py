"""Pictures of samples that a person can read."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxdiff.files import replacing

_IMAGE_INCHES = 0.6


def sample_grid(
    path: str | Path, samples: Float[np.ndarray, "n ..."], labels: Any = None, title: str = ""
) -> None:
    """Write samples as a PNG: one row a class if there are labels, else a square of them.

    Images [n, height, width, channels] in [-1, 1] (clipped) are enlarged without smoothing, of
    several channels (latents) the first three, of two the first; vectors [n, dim] are drawn as
    points of their first two coordinates, coloured by label.
    """
    samples = np.asarray(samples)
    if samples.ndim == 4:
        figure = _images(samples, labels)
    else:
        figure = _points(samples.reshape(len(samples), -1), labels)
    if title:
        figure.suptitle(title, fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that needs no window and no pyplot."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _images(samples: np.ndarray, labels: Any) -> Figure:
    rows = _rows(len(samples), labels)
    columns = max(len(indices) for _, indices in rows)
    figure = new_figure(_IMAGE_INCHES * columns + 0.5, _IMAGE_INCHES * len(rows) + 0.4)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, indices) in zip(axes, rows):
        for axis in line:
            axis.set_axis_off()
        for axis, index in zip(line, indices):
            channels = 1 if samples.shape[-1] < 3 else 3
            image = np.clip(0.5 + 0.5 * samples[index][..., :channels], 0.0, 1.0)
            axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        line[0].text(
            -0.25, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=9
        )
    return figure


def _rows(count: int, labels: Any) -> list[tuple[str, list[int]]]:
    """(name, indices) of the picture's rows."""
    if labels is None or len(set(np.asarray(labels).tolist())) == 1:
        columns = int(np.ceil(np.sqrt(count)))
        name = "" if labels is None else str(np.asarray(labels)[0])
        starts = range(0, count, columns)
        return [(name, list(range(s, min(s + columns, count)))) for s in starts]
    labels = np.asarray(labels)
    return [(str(k), np.flatnonzero(labels == k).tolist()) for k in np.unique(labels)]


def _points(samples: np.ndarray, labels: Any) -> Figure:
    figure = new_figure(5.0, 5.0)
    axis = figure.subplots()
    second = samples[:, 1] if samples.shape[1] > 1 else np.zeros(len(samples))
    axis.scatter(samples[:, 0], second, c=labels, s=6, cmap="tab10")
    axis.set_aspect("equal")
    return figure
