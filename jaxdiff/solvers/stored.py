"""A tableau as a file: learned and searched samplers, kept and shared."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.files import write_text
from jaxdiff.names import unknown
from jaxdiff.solvers.tableau import Start, Tableau

_FORMAT = "jaxdiff tableau 1"
_INTEGERS = ("draw", "nodes")


def save(tableau: Tableau, path: str | Path, about: Any = None) -> None:
    """Write a tableau as JSON, at once; `about` is kept beside it (how it was made, say).

    Numbers are written so that they read back bit for bit. Raises ValueError for a stacked or traced
    tableau, and for one whose start is an operator or whose coefficients are pytrees.
    """
    if not isinstance(tableau, Tableau):
        raise TypeError(f"expected a Tableau, got {type(tableau).__name__}")
    if np.ndim(tableau.active) != 1:
        raise ValueError("a stacked tableau holds several: save each")
    write_text(path, json.dumps({"format": _FORMAT, "about": about, **_to_plain(tableau)}) + "\n")


def load(path: str | Path) -> Tableau:
    """The tableau of a file that `save` wrote.

    Raises FileNotFoundError; ValueError for anything else than such a file.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no such solver file: {str(file)!r}")
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(stored, dict) or stored.get("format") != _FORMAT:
            raise ValueError(f"its format is not {_FORMAT!r}")
        names = {field.name for field in dataclasses.fields(Tableau)}
        given = {k: v for k, v in stored.items() if k not in ("format", "about", "start")}
        if given.keys() | {"start"} != names:
            odd = sorted((given.keys() | {"start"}) ^ names)[0]
            raise ValueError(unknown("wrong or missing field", odd, sorted(names)))
        tableau = Tableau(start=Start(**_arrays(stored["start"])), **_arrays(given))
        _check(tableau)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{str(file)!r} is not a solver file: {error}") from error
    return tableau


def _to_plain(node: Any) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if isinstance(value, Start):
            found[field.name] = _to_plain(value)
        elif value is None or field.metadata.get("static"):
            found[field.name] = value
        elif hasattr(value, "shape") and hasattr(value, "dtype"):
            found[field.name] = np.asarray(value).tolist()
        else:
            raise ValueError(f"{field.name} is no array, and cannot be stored: {value!r}")
    return found


def _arrays(stored: dict[str, Any]) -> dict[str, Any]:
    static = {f.name for f in dataclasses.fields(Tableau) if f.metadata.get("static")}
    found = {}
    for name, value in stored.items():
        if name == "blind":
            found[name] = tuple(tuple(names) for names in value)
        elif name in static or value is None:
            found[name] = value
        else:
            found[name] = np.asarray(value, np.int32 if name in _INTEGERS else np.float64)
    return found


def _check(tableau: Tableau) -> None:
    r, k, p = tableau.registers, tableau.history, tableau.outputs
    rows = tableau.active.shape[0]
    shapes = {"A": (rows, r, r), "B": (rows, r, k, p), "u": (rows, p, 5), "w": (rows, p, 5),
              "t": (rows,), "alpha": (rows,), "sigma": (rows,), "draw": (rows,)}  # fmt: skip
    for name, shape in shapes.items():
        found = getattr(tableau, name).shape
        if found[: len(shape)] != shape:
            raise ValueError(f"{name} must have the shape {shape}, got {found}")
        if name in "AB" and not np.all(np.isfinite(getattr(tableau, name))):
            raise ValueError(f"{name} has entries that are not finite")
