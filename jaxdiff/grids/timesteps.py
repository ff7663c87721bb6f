"""Spacings in the timesteps of a discrete process."""

from typing import Any

import numpy as np

from jaxdiff.grids.grid import Grid, from_times
from jaxdiff.grids.spacings import span
from jaxdiff.processes import Process
from jaxdiff.processes.discrete import is_discrete


def _num_timesteps(process: Process, steps: Any, end: str) -> int:
    """How many timesteps a discrete process has; raises unless `steps` of them can be chosen."""
    span(process, steps, None, None, end)
    if not is_discrete(process):
        raise TypeError(
            "leading, linspace and trailing spacings need a discrete process (jaxdiff.processes."
            f"ddpm, or its zero_terminal_snr), got {type(process).__name__}"
        )
    total = int(process.t_max) + 1
    if steps > total:
        raise ValueError(f"{steps} steps, but the process has {total} timesteps")
    return total


def _discrete(process: Process, timesteps: np.ndarray, end: str) -> Grid:
    if end == "t_min" and timesteps[-1] > 0:
        timesteps = np.append(timesteps, 0.0)
    if end == "t_min" and timesteps.size < 2:
        raise ValueError(
            "one step of this spacing starts at timestep 0, where end='t_min' ends: use end='zero'"
        )
    return from_times(process, timesteps, end)


def leading(process: Process, steps: int, offset: int = 0, end: str = "zero") -> Grid:
    """Timesteps 0, k, 2k, ... (k = num_steps // steps) plus `offset`: DDIM's original spacing.

    The last step goes to sigma = 0 (`end="zero"`) or to timestep 0 (`end="t_min"`, for which the
    step is dropped where the last timestep is 0 already). The names are those of Lin et al. (2024),
    who show its flaw: the first timestep is not the last of training, and with one step it is
    `offset`. Raises TypeError unless the process is discrete, ValueError for more steps than it
    has or an offset that leads out of it.
    """
    total = _num_timesteps(process, steps, end)
    t = np.arange(steps)[::-1] * (total // steps) + offset
    if t[0] > process.t_max or offset < 0:
        raise ValueError(f"offset {offset} puts a timestep outside 0..{total - 1}")
    return _discrete(process, t * 1.0, end)


def linspace(process: Process, steps: int, end: str = "zero", keep_zero: bool = True) -> Grid:
    """`steps` timesteps rounded from num_steps - 1 to 0, then the end as in `leading`.

    `keep_zero=False` rounds steps + 1 of them and leaves out timestep 0, as diffusers' multistep
    schedulers do, whose last step to sigma = 0 is then longer. One step starts at num_steps - 1.
    Raises as `leading` does.
    """
    total = _num_timesteps(process, steps, end)
    number = max(steps + (not keep_zero), 2)
    return _discrete(process, np.round(np.linspace(0.0, total - 1.0, number))[::-1][:steps], end)


def trailing(process: Process, steps: int, end: str = "zero") -> Grid:
    """Timesteps num_steps - 1, num_steps - 1 - k, ... (k = num_steps / steps), end as in `leading`.

    Raises as `leading` does.
    """
    total = _num_timesteps(process, steps, end)
    t = np.round(np.arange(total, 0, -total / steps)[:steps]) - 1
    return _discrete(process, t, end)
