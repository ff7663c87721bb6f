"""Configurations: Python files with `get_config()`, completed, checked, overridden and locked.

A file may take an argument, `get_config(size)`: "file.py:laptop" calls it with "laptop", as
ml_collections does.

A configuration is an `ml_collections.ConfigDict` of sections (see `jaxdiff.experiment.SECTIONS`). A
section is described by the function it becomes the arguments of: its keys, their defaults and their
types are the function's. A section of several choices has the key "name", which picks one.
"""

import copy
import dataclasses
import inspect
import json
import math
import runpy
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from jaxdiff.files import write_text
from jaxdiff.names import nearest, unknown

_PLAIN = (bool, int, float, str)


class Range(NamedTuple):
    """The numbers a key accepts: `holds`, and the words for it after "must be"."""

    words: str
    holds: Callable[[float], bool]


@dataclasses.dataclass(frozen=True)
class Section:
    """The functions a section may describe, by name; a single one under the name None.

    `hidden` parameters are given by the program, not by the configuration; `ranges` are of its
    numbers, by key.
    """

    choices: Mapping[str | None, Callable]
    hidden: tuple[str, ...] = ()
    ranges: Mapping[str, Range] = dataclasses.field(default_factory=dict)

    @property
    def named(self) -> bool:
        return None not in self.choices

    def parameters(self, name: str | None) -> dict[str, inspect.Parameter]:
        """The keys of the section: parameters that are required or have a plain default."""
        choice = self.choices[name]
        factories = {
            field.name: field.default_factory
            for field in (dataclasses.fields(choice) if dataclasses.is_dataclass(choice) else ())
            if field.default_factory is not dataclasses.MISSING
        }
        found = {}
        for key, parameter in inspect.signature(choice).parameters.items():
            if key in factories:
                parameter = parameter.replace(default=factories[key]())
            if key not in self.hidden and (
                parameter.default is inspect.Parameter.empty or _storable(parameter.default)
            ):
                found[key] = parameter
        return found


def load(path: str | Path, sections: Mapping[str, Section | Any]) -> ConfigDict:
    """The completed configuration of a Python file, "file.py" or "file.py:argument"; see `complete`.

    Raises FileNotFoundError, ValueError or TypeError naming the file; ValueError for any error
    inside it, and for an argument that its get_config does not take.
    """
    name, argument = str(path), None
    if ".py:" in name:
        name, _, argument = name.rpartition(":")
    file = Path(name).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no such configuration file: {str(file)!r}")
    given = () if argument is None else (argument,)
    try:
        get_config = runpy.run_path(str(file)).get("get_config")
        if callable(get_config) and given and not inspect.signature(get_config).parameters:
            raise TypeError(f"get_config() takes no argument, got {argument!r}")
        config = get_config(*given) if callable(get_config) else None
    except SyntaxError as error:
        raise ValueError(f"{str(file)!r} is not a Python file: {error}") from error
    except Exception as error:  # whatever the file does wrong
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__)
                 if f.filename == str(file)]  # fmt: skip
        where = f", line {lines[-1]}" if lines else ""
        raise ValueError(f"{str(file)!r}{where}: {type(error).__name__}: {error}") from error
    if not callable(get_config):
        raise ValueError(f"{str(file)!r} defines no function get_config()")
    if not isinstance(config, (ConfigDict, Mapping)):
        raise TypeError(
            f"get_config() of {str(file)!r} must return an ml_collections.ConfigDict, got "
            f"{type(config).__name__}"
        )
    return complete(ConfigDict(config).copy_and_resolve_references(), sections)


def complete(config: ConfigDict | Mapping, sections: Mapping[str, Section | Any]) -> ConfigDict:
    """The configuration with every default filled in, checked and locked.

    `sections` maps a section's name to a `Section`, or a top-level key to its default. Raises
    ValueError for an unknown key or name (with the nearest ones), a missing one, or a number that
    is not finite or out of its range; TypeError for a value of another type than the default's.
    """
    config = ConfigDict(config)
    _check_known("config", config.keys(), sections)
    full = ConfigDict()
    for key, section in sections.items():
        if isinstance(section, Section):
            full[key] = _complete_section(key, config.get(key, ConfigDict()), section)
        else:
            full[key] = _checked(f"config.{key}", config.get(key, section), section, None)
    return full.lock()


def _complete_section(key: str, given: Any, section: Section) -> ConfigDict:
    where = f"config.{key}"
    if not isinstance(given, (ConfigDict, Mapping)):
        raise TypeError(f"{where} must be a section of keys, got {given!r}")
    given = dict(given)
    name = None
    full = ConfigDict()
    if section.named:
        if "name" not in given:
            raise ValueError(f"{where}.name is missing; choose from {', '.join(section.choices)}")
        name = full.name = given.pop("name")
        if name not in section.choices:
            raise ValueError(unknown(f"unknown {where}.name", name, section.choices))
    parameters = section.parameters(name)
    _check_known(where, given, parameters, of=name)
    hints = typing.get_type_hints(section.choices[name])
    for option, parameter in parameters.items():
        required = parameter.default is inspect.Parameter.empty
        if required and option not in given:
            raise ValueError(f"{where}.{option} is missing: {name or key} needs it")
        default = None if required else parameter.default
        value = given.get(option, default)
        value = _checked(f"{where}.{option}", value, default, hints.get(option))
        _check_range(f"{where}.{option}", value, section.ranges.get(option))
        if value is None:
            full[option] = config_dict.placeholder(object)
        elif len(_accepted(hints.get(option))) > 1:  # a later value may be of another type
            full[option] = config_dict.FieldReference(value, field_type=object)
        else:
            full[option] = value
    return full


def _accepted(hint: Any) -> list[type]:
    """The plain types of an annotation: bool and str for `bool | str`; of numbers alone the first."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    found = [t for t in (typing.get_args(hint) if union else (hint,)) if t in _PLAIN]
    return found if str in found else found[:1]


def _storable(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_storable, value))
    return value is None or isinstance(value, (*_PLAIN, Mapping))


def _checked(where: str, value: Any, default: Any, hint: Any) -> Any:
    """`value` in the type of the default (or of the annotation where the default is None)."""
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, list):
        value = tuple(value)
    if not _storable(value):
        raise TypeError(f"{where} must be a plain value, got {value!r}")
    expected, accepted = type(default), _accepted(hint)
    if default is None:
        if value is None or not accepted:
            return value
        expected = accepted[0]
    elif len(accepted) > 1:
        if type(value) not in accepted:
            names = " or ".join(kind.__name__ for kind in accepted)
            raise TypeError(f"{where} must be of type {names}, got {value!r}")
        return value
    if expected is float and type(value) is int:
        return float(value)
    if isinstance(default, Mapping) and isinstance(value, Mapping):
        return ConfigDict(value)
    if type(value) is not expected:
        raise TypeError(f"{where} must be of type {expected.__name__}, got {value!r}")
    return _checked_items(where, value, hint) if expected is tuple else value


def _checked_items(where: str, value: tuple, hint: Any) -> tuple:
    """`value` with items of the types that the annotation (tuple[float, ...], say) names."""
    kinds = {t for a in typing.get_args(hint) for t in (a, *typing.get_args(a)) if t in _PLAIN}
    if kinds == {float}:
        value = tuple(float(item) if type(item) is int else item for item in value)
    if kinds and any(type(item) not in kinds for item in value):
        names = " or ".join(sorted(kind.__name__ for kind in kinds))
        raise TypeError(f"{where} must be a tuple of {names}, got {value!r}")
    return value


def _check_range(where: str, value: Any, accepted: Range | None) -> None:
    numbers = [v for v in (value if isinstance(value, tuple) else (value,)) if v is not None]
    if not all(math.isfinite(v) for v in numbers if isinstance(v, float)):
        raise ValueError(f"{where} must be finite, got {value!r}")
    if accepted and not all(accepted.holds(v) for v in numbers):
        raise ValueError(f"{where} must be {accepted.words}, got {value!r}")


def override(config: ConfigDict, arguments: Sequence[str]) -> ConfigDict:
    """The configuration with command-line overrides such as "--config.train.steps=100".

    `ml_collections.config_flags` parses the values by the type they replace. Raises ValueError for
    an unknown key (with the nearest ones), what is no override, or a value of another type.
    """
    config = copy.deepcopy(config)
    if not arguments:
        return config
    keys = []
    for argument in arguments:
        if argument.startswith("--config."):
            keys.append(argument.removeprefix("--config.").partition("=")[0])
            _check_path(config, keys[-1])
        elif not keys or argument.startswith("-"):
            raise ValueError(f"unknown argument {argument!r}; an override is --config.KEY=VALUE")
    parsed = flags.FlagValues()
    argv = ["jaxdiff", *arguments]
    config_flags.DEFINE_config_dict("config", config, flag_values=parsed, sys_argv=argv)
    try:
        rest = parsed(argv)[1:]
    except (flags.Error, ValueError, TypeError) as error:
        raise ValueError(_bad_value(config, arguments, error)) from error
    if rest:
        raise ValueError(f"unknown argument {rest[0]!r}; an override is --config.KEY=VALUE")
    return parsed["config"].value


def _bad_value(config: ConfigDict, arguments: Sequence[str], error: Exception) -> str:
    for argument in arguments:
        key, _, value = argument.removeprefix("--config.").partition("=")
        if f"config.{key}" in str(error):
            *path, last = key.split(".")
            for part in path:
                config = config[part]
            kind = config.get_type(last)
            wanted = "a section of keys" if kind is ConfigDict else f"of type {kind.__name__}"
            return f"config.{key} must be {wanted}, got {value!r}"
    return str(error)


def _check_path(config: ConfigDict, path: str) -> None:
    where, node = "config", config
    for part in path.split("."):
        if not isinstance(node, ConfigDict):
            raise ValueError(f"{where} is a value and has no key {part!r}")
        _check_known(where, [part], node.keys())
        where, node = f"{where}.{part}", node[part]


def _check_known(
    where: str, keys: Iterable[str], known: Iterable[str], of: str | None = None
) -> None:
    known = [str(k) for k in known]
    for key in keys:
        if key not in known:
            subject = f" of {of!r}" if of else ""
            raise ValueError(f"unknown key {where}.{key}{subject}; {nearest(key, known)}accepted: "
                             f"{', '.join(known)}")  # fmt: skip


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """What `write` stores: plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(config.to_dict()))


def write(path: str | Path, config: ConfigDict) -> None:
    """Store a configuration as JSON, at once."""
    write_text(path, json.dumps(to_dict(config), indent=2) + "\n")


def read(path: str | Path, sections: Mapping[str, Section | Any]) -> ConfigDict:
    """A configuration stored by `write`. Raises FileNotFoundError; ValueError if it is damaged."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no configuration {str(file)!r}: not the folder of a run")
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        return complete(stored, sections)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the configuration {str(file)!r} is damaged: {error}") from error


def difference(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Lines "config.train.steps: 100 -> 200" for the values that differ."""

    def flatten(tree, prefix):
        if not isinstance(tree, dict) or not tree:
            return {prefix: tree}
        pairs = (flatten(value, f"{prefix}.{key}") for key, value in tree.items())
        return {path: value for pair in pairs for path, value in pair.items()}

    a, b = (flatten(to_dict(c), "config") for c in (old, new))
    absent = object()

    def show(value):
        return "(absent)" if value is absent else repr(value)

    return [
        f"{key}: {show(a.get(key, absent))} -> {show(b.get(key, absent))}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key, absent) != b.get(key, absent)
    ]
