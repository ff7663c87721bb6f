"""An average of any length, made after training from the stored ones (EDM2's post-hoc EMA)."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxdiff.experiment import Experiment
from jaxdiff.training import ema
from jaxdiff.training.checkpoints import Checkpoints
from jaxdiff.training.run import SNAPSHOTS
from jaxdiff.training.state import State


def reconstruct(
    experiment: Experiment, workdir: str | Path, state: State, sigma_rel: float
) -> tuple[Any, float]:
    """(weights, error) of the power-function average of length `sigma_rel` at the state's step.

    Made of the snapshots up to that step in the run's folder and of the averages in the state
    itself; `error` is that of `jaxdiff.training.ema.fit`. A snapshot that cannot be read is left
    out with a warning. Raises ValueError for a length that no profile has, and for a run without
    config.train.ema_lengths.
    """
    ema.check_length("the length of an average", sigma_rel)
    lengths = experiment.config.train.ema_lengths
    if not lengths:
        raise ValueError(
            "this run tracked no power-function averages (config.train.ema_lengths is empty): it "
            "only has its classical one"
        )
    last = int(state.step)
    if last < 1:
        raise ValueError("there is no average before the first step")
    snapshots = Checkpoints(Path(workdir) / SNAPSHOTS)
    steps = []
    for step in snapshots.steps():
        problem = snapshots.problem(step) if step < last else ""
        if problem:
            warnings.warn(f"the snapshot of step {step} is left out: {problem}", stacklevel=2)
        elif step < last:
            steps.append(step)
    found = ema.fit(
        [step for step in [*steps, last] for _ in lengths], [*lengths] * (len(steps) + 1),
        last, sigma_rel,
    )  # fmt: skip

    def trees() -> Iterator[Any]:
        for step in steps:
            yield from snapshots.load(step, state.ema_tracks)
        yield from state.ema_tracks

    return ema.combine(found.coefficients, trees()), found.error
