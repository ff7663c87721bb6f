"""A sweep's report: the table, three pictures and a page of Markdown."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jaxdiff.ablation.table import Table
from jaxdiff.files import replacing, write_text
from jaxdiff.pictures import new_figure

LINES = 10  # samplers in the first picture: more cannot be told apart


def report(table: Table, folder: str | Path, error: str = "error", title: str = "") -> None:
    """Write table.csv, table.json, report.md and its pictures into `folder`.

    The pictures are `error_against_nfe`, `pareto_front` and, where two axes have several values,
    `heat_map`. Raises KeyError if `error` is no column.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table[error]
    table.to_csv(folder / "table.csv")
    table.to_json(folder / "table.json")
    pictures = {
        "error_against_nfe.png": error_against_nfe(table, error),
        "pareto.png": pareto_front(table, error),
    }
    heat = heat_map(table, error)
    if heat is not None:
        pictures["heat_map.png"] = heat
    for name, figure in pictures.items():
        with replacing(folder / name) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    write_text(folder / "report.md", _page(table, error, title, list(pictures)))


def varied(table: Table) -> list[str]:
    """The axes with several values, other than steps, evaluations and seed."""
    left_out = ("nfe", "steps", "seed")
    return [
        name for name in table.axes
        if name not in left_out and len({str(row.get(name)) for row in table.rows}) > 1
    ]  # fmt: skip


def _labelled(table: Table, error: str) -> dict[str, dict[int, np.ndarray]]:
    """{sampler: {evaluations: values over seeds}}."""
    axes, found = varied(table), {}
    for row in table.rows:
        values = (row.get(name) for name in axes)
        label = ", ".join(
            str(v) if isinstance(v, (str, dict)) else f"{name} {v:g}"
            for name, v in zip(axes, values) if v is not None
        ) or "all"  # fmt: skip
        found.setdefault(label, {}).setdefault(row["nfe"], []).append(row[error])
    return {
        label: {nfe: np.asarray(v) for nfe, v in sorted(points.items())}
        for label, points in found.items()
    }


def _chosen(lines: dict[str, dict[int, np.ndarray]]) -> list[str]:
    """The samplers to draw: by their mean ratio to the best at the same evaluations."""
    least: dict[int, float] = {}
    for points in lines.values():
        for nfe, values in points.items():
            least[nfe] = min(least.get(nfe, np.inf), np.median(values))
    ratios = {
        label: np.mean([np.log(np.median(v) / least[nfe]) for nfe, v in points.items()])
        for label, points in lines.items()
    }
    return sorted(ratios, key=ratios.get)[:LINES]


def error_against_nfe(table: Table, error: str = "error") -> Figure:
    """Medians over seeds with the band from the least to the largest, of the ten best samplers."""
    lines = _labelled(table, error)
    figure = new_figure(8.0, 4.5)
    axis = figure.subplots()
    for label in _chosen(lines):
        nfe = list(lines[label])
        low, middle, high = (
            [f(values) for values in lines[label].values()] for f in (np.min, np.median, np.max)
        )
        (line,) = axis.plot(nfe, middle, "o-", ms=4, label=label)
        axis.fill_between(nfe, low, high, color=line.get_color(), alpha=0.15, lw=0)
    _axes(axis, error, sorted(set(table["nfe"].tolist())))
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def pareto_front(table: Table, error: str = "error") -> Figure:
    """Every sampler, and those that no other beats in both evaluations and error."""
    figure = new_figure(6.5, 4.5)
    axis = figure.subplots()
    for points in _labelled(table, error).values():
        axis.plot(list(points), [np.median(v) for v in points.values()], ".", color="0.75", ms=5)
    front = table.pareto(error=error)
    axis.plot(front["nfe"], front[error], "o-", color="C3", ms=5)
    _axes(axis, error, sorted(set(table["nfe"].tolist())))
    for number, row in enumerate(front.rows, 1):
        axis.annotate(str(number), (row["nfe"], row[error]), (4, 4), textcoords="offset points")
    return figure


def _axes(axis: Any, error: str, nfe: Sequence[int]) -> None:
    axis.set(xscale="log", yscale="log", xlabel="evaluations (NFE)", ylabel=error)
    axis.set_xticks(nfe, [str(n) for n in nfe], minor=False)
    axis.set_xticks([], minor=True)
    axis.grid(alpha=0.3)


def heat_map(
    table: Table, error: str = "error", axes: tuple[str, str] | None = None
) -> Figure | None:
    """The least of `error` for each pair of values of two axes, rows and columns.

    By default the two with the most values; None if there are no two.
    """
    counts = {name: len({str(r.get(name)) for r in table.rows}) for name in varied(table)}
    if len(set(table["nfe"].tolist())) > 1:
        counts["nfe"] = len(set(table["nfe"].tolist()))
    if axes is None and len(counts) < 2:
        return None
    down, across = axes or sorted(counts, key=counts.get, reverse=True)[:2]
    groups = table.group((down, across), error)
    keys = [list(dict.fromkeys(key[i] for key in groups)) for i in (0, 1)]
    cells = np.full([len(k) for k in keys], np.nan)
    for key, values in groups.items():
        # The best of the other axes' values, not their mean: one bad one would hide it.
        cells[keys[0].index(key[0]), keys[1].index(key[1])] = np.min(values)
    figure = new_figure(2.5 + 0.8 * len(keys[1]), 1.2 + 0.3 * len(keys[0]))
    axis = figure.subplots()
    image = axis.imshow(np.log10(cells), aspect="auto", cmap="viridis_r")
    middle = np.nanmean([np.nanmin(np.log10(cells)), np.nanmax(np.log10(cells))])
    for (i, j), value in np.ndenumerate(cells):
        if np.isfinite(value):
            color = "w" if np.log10(value) > middle else "k"
            axis.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=7, color=color)
    axis.set_yticks(range(len(keys[0])), [str(k) for k in keys[0]], fontsize=7)
    axis.set_xticks(range(len(keys[1])), [str(k) for k in keys[1]], fontsize=7, rotation=30)
    axis.set(xlabel=across, ylabel=down)
    figure.colorbar(image, label=f"log10 least {error}")
    return figure


def _page(table: Table, error: str, title: str, pictures: Sequence[str]) -> str:
    columns = [name for name in ("nfe", *varied(table), *table.metrics) if name in table.columns]
    front = table.pareto(error=error)
    parts = [
        f"# {title or 'A sweep of samplers'}", "",
        f"{len(table)} cells; {table.programs} programs compiled in the last run. `{error}` is the "
        "median over seeds.", "",
        "## The best at each number of evaluations", "",
        table.best(error, "nfe").to_markdown(columns), "",
        "## No other is better in both", "",
        "As numbered in the picture.", "", front.to_markdown(columns), "",
    ]  # fmt: skip
    for name in pictures:
        parts += [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})", ""]
    return "\n".join(parts)
