"""Checks of the numbers that inverse samplers take, on the host."""

from typing import Any

import numpy as np

from jaxdiff.arrays import is_concrete


def check_count(name: str, value: Any, least: int = 1) -> int:
    """`value` as an int; ValueError unless it is an integer of at least `least`."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)


def check_number(name: str, value: Any, low: float = 0.0, high: float = np.inf) -> None:
    """ValueError unless `value` is a scalar in [low, high], and finite; a traced one passes."""
    if isinstance(value, (bool, str)) or np.ndim(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if is_concrete(value) and not (low <= value <= high and np.isfinite(value)):
        accepted = f"in [{low}, {high}]" if np.isfinite(high) else f"at least {low}, and finite"
        raise ValueError(f"{name} must be {accepted}, got {value!r}")
