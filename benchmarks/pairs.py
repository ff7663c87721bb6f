"""Run time as a ratio: medians over interleaved pairs, A B A B ..., in one run."""

import time
from collections.abc import Callable

import jax
import numpy as np


def seconds(call: Callable) -> float:
    """Wall time of one call, waited for."""
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin


def paired(first: Callable, second: Callable, rounds: int, timer: Callable = seconds) -> list[float]:
    """Quartiles of the ratios timer(first) / timer(second) over interleaved pairs."""
    ratios = [timer(first) / timer(second) for _ in range(rounds)]
    return [round(float(q), 4) for q in np.quantile(ratios, [0.25, 0.5, 0.75])]
