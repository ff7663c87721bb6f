"""Names that people type: messages for unknown ones, and the options a function takes."""

import difflib
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def unknown(what: str, name: Any, known: Iterable[str], listing: str = "choose from") -> str:
    """The message "`what` 'name'; did you mean a or b? choose from a, b, c"."""
    known = [str(k) for k in known]
    return f"{what} {name!r}; {nearest(name, known)}{listing} {', '.join(known)}"


def nearest(name: Any, known: Iterable[str]) -> str:
    """"did you mean a or b? " with the names closest to `name`, or nothing."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=3)
    return f"did you mean {' or '.join(close)}? " if close else ""


def check_options(
    what: str, function: Callable, options: Mapping[str, Any], skip: int, more: Sequence[str] = ()
) -> None:
    """Check `options` against the parameters of `function` after the first `skip`, and `more`.

    Raises ValueError for a name that is none of them, and TypeError for text given to a parameter
    that takes none: a number mistyped on a command line arrives as text.
    """
    parameters = dict(list(inspect.signature(function).parameters.items())[skip:])
    accepted = [*parameters, *more]
    for option, value in options.items():
        if option not in accepted:
            raise ValueError(
                f"{what} has no option {option!r}; {nearest(option, accepted)}it takes {accepted}"
            )
        if isinstance(value, str) and option in parameters:
            default = parameters[option].default
            hint = typing.get_type_hints(function).get(option, str)
            if not isinstance(default, str) and str not in (hint, *typing.get_args(hint)):
                usual = "" if default is None else f" such as {default!r}"
                raise TypeError(f"{what}: {option} must be a value{usual}, not text, got {value!r}")
