"""A tidy table of results: one row a cell, columns by name."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.files import write_text


class Table:
    """Columns of equal length, read by name: `table["error"]` is an array.

    `rows` are mappings; a row without a column has None there. `metrics` are the columns of figures,
    the others say what was run. `programs` is how many programs were compiled for the cells that
    this run computed.
    """

    def __init__(
        self, rows: Sequence[Mapping[str, Any]], metrics: Sequence[str] = (), programs: int = 0
    ):
        self.rows = tuple(dict(row) for row in rows)
        self.columns = tuple(dict.fromkeys(name for row in self.rows for name in row))
        self.metrics, self.programs = tuple(metrics), programs

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, column: str) -> np.ndarray:
        if column not in self.columns:
            raise KeyError(f"no column {column!r}; the columns are {', '.join(self.columns)}")
        values = [row.get(column) for row in self.rows]
        if any(all(isinstance(v, kind) for v in values) for kind in (str, (bool, int, float))):
            return np.asarray(values)
        found = np.empty(len(values), object)
        found[:] = values
        return found

    def where(self, **equal: Any) -> "Table":
        """The rows in which each of these columns has that value, or one of a list of values."""
        wanted = {
            name: value if isinstance(value, (list, tuple, range)) else [value]
            for name, value in equal.items()
        }
        for name in wanted:
            self[name]
        keep = [r for r in self.rows if all(r.get(name) in w for name, w in wanted.items())]
        return self._of(keep)

    def group(self, by: str | Sequence[str], column: str) -> dict[tuple, np.ndarray]:
        """{values of the columns `by`: the values of `column` in those rows}, in order."""
        by = (by,) if isinstance(by, str) else tuple(by)
        for name in (*by, column):
            self[name]
        found: dict[tuple, list] = {}
        for row in self.rows:
            found.setdefault(tuple(_hashable(row.get(name)) for name in by), []).append(row[column])
        return {key: np.asarray(values) for key, values in found.items()}

    def best(self, column: str, by: str | Sequence[str] = ()) -> "Table":
        """For each value of `by`, the sampler with the least median of `column` over seeds.

        A row has the sampler's axes, without the seed, and the medians of its metrics.
        """
        by = (by,) if isinstance(by, str) else tuple(by)
        axes = [name for name in self.axes if name != "seed"]
        self[column]
        samplers: dict[tuple, list] = {}
        for row in self.rows:
            samplers.setdefault(tuple(_hashable(row.get(name)) for name in axes), []).append(row)
        chosen: dict[tuple, dict] = {}
        for rows in samplers.values():
            medians = {m: float(np.median([row[m] for row in rows])) for m in self.metrics}
            key = tuple(_hashable(rows[0].get(name)) for name in by)
            value = medians[column]
            if np.isfinite(value) and (key not in chosen or value < chosen[key][column]):
                own = {name: rows[0][name] for name in axes if name in rows[0]}
                chosen[key] = {**own, **medians}
        return self._of(list(chosen.values()))

    def pareto(self, cost: str = "nfe", error: str = "error") -> "Table":
        """The samplers that no other beats in both: least median error first at each cost."""
        front, least = [], np.inf
        for row in sorted(self.best(error, cost).rows, key=lambda r: r[cost]):
            if row[error] < least:
                front.append(row)
                least = row[error]
        return self._of(front)

    @property
    def axes(self) -> tuple[str, ...]:
        """The columns that say what was run."""
        return tuple(name for name in self.columns if name not in self.metrics)

    def _of(self, rows: Sequence[Mapping[str, Any]]) -> "Table":
        return Table(rows, self.metrics, self.programs)

    def to_csv(self, path: str | Path | None = None) -> str:
        """As CSV; written to `path` if one is given."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return _written(text.getvalue(), path)

    def to_json(self, path: str | Path | None = None) -> str:
        """As a JSON list of rows; written to `path` if one is given."""
        return _written(json.dumps(self.rows, indent=1) + "\n", path)

    def to_pandas(self) -> Any:
        """As a pandas.DataFrame; ImportError without pandas."""
        import pandas

        return pandas.DataFrame(json.loads(self.to_json()))

    def to_markdown(self, columns: Sequence[str] | None = None) -> str:
        """As a Markdown table."""
        shown = columns or self.columns
        lines = ["| " + " | ".join(shown) + " |", "|" + " --- |" * len(shown)]
        for row in self.rows:
            lines.append("| " + " | ".join(_text(row.get(name)) for name in shown) + " |")
        return "\n".join(lines)


def _hashable(value: Any) -> Any:
    return json.dumps(value, sort_keys=True) if isinstance(value, (dict, list)) else value


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        write_text(path, text)
    return text
