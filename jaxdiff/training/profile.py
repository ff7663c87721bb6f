"""A trace of a few training steps, and where their time went."""

import json
from pathlib import Path
from typing import Any

import jax

from jaxdiff.files import write_text
from jaxdiff.parallel import is_main
from jaxdiff.training.meter import Meter, breakdown

WARMUP = 10
BREAKDOWN = "breakdown.json"


class Profile:
    """Traces `steps` steps after a warm-up of 10 into `folder`, for TensorBoard, XProf or Perfetto.

    Each traced step is waited for, so that what its phases took can be told apart: the milliseconds
    of each are written to breakdown.json in the folder. Raises ValueError for less than one step.
    """

    def __init__(self, folder: str | Path, steps: int = 5):
        if steps < 1:
            raise ValueError(f"a profile needs at least 1 step, got {steps}")
        self._folder, self._steps = Path(folder), steps
        self._begin: dict[str, float] | None = None
        self._wanted = range(0)

    def before(self, step: int, steps: int, metrics: Any, meter: Meter) -> None:
        """Before a step, number `step` of this attempt's `steps`; `metrics` are of the one before."""
        if step == 1:
            first = 1 + min(WARMUP, max(steps - self._steps, 0))
            self._wanted = range(first, min(first + self._steps, steps + 1))
        if step != self._wanted.start:
            return
        jax.block_until_ready(metrics)
        meter.lap("device")
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it would slow what is measured
        jax.profiler.start_trace(str(self._folder), profiler_options=options)
        meter.lap("other")
        self._begin = meter.spent()

    def after(self, step: int, metrics: Any, meter: Meter) -> None:
        """After it was dispatched."""
        if step not in self._wanted:
            return
        jax.block_until_ready(metrics)
        meter.lap("device")
        if step + 1 in self._wanted:
            return
        end = meter.spent()
        spent = {name: end[name] - value for name, value in self._begin.items()}
        self.close()
        meter.lap("other")
        if is_main():
            found = {"steps": spent["steps"], "milliseconds_a_step": breakdown(spent)}
            write_text(self._folder / BREAKDOWN, json.dumps(found, indent=2) + "\n")

    def close(self) -> None:
        """Write the trace, if one is being made: also of a run that stops in the middle of it."""
        if self._begin is not None:
            self._begin = None
            jax.profiler.stop_trace()
