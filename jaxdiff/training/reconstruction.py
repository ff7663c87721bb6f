"""An average of any length, made after training from the stored ones (EDM2's post-hoc EMA)."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxdiff.experiment import Experiment
from jaxdiff.parallel import agreed, is_main
from jaxdiff.training import ema
from jaxdiff.training.checkpoints import Checkpoints
from jaxdiff.training.run import SNAPSHOTS
from jaxdiff.training.state import State


def check_reconstruction(experiment: Experiment, sigma_rel: float) -> None:
    """Raise ValueError for a length that no profile has, and for a run without
    config.train.ema_lengths."""
    ema.check_length("the length of an average", sigma_rel)
    if not experiment.config.train.ema_lengths:
        raise ValueError(
            "this run tracked no power-function averages (config.train.ema_lengths is empty): it "
            "only has its classical one"
        )


def reconstruct(
    experiment: Experiment, workdir: str | Path, state: State, sigma_rel: float
) -> tuple[Any, float]:
    """(weights, error) of the power-function average of length `sigma_rel` at the state's step.

    Made of the snapshots up to that step in the run's folder and of the averages in the state
    itself; `error` is that of `jaxdiff.training.ema.fit`. A snapshot that is damaged is left out
    with a warning. All processes call it together. Raises ValueError as `check_reconstruction`.
    """
    check_reconstruction(experiment, sigma_rel)
    lengths = experiment.config.train.ema_lengths
    last = int(state.step)
    if last < 1:
        raise ValueError("there is no average before the first step")
    snapshots = Checkpoints(Path(workdir) / SNAPSHOTS)
    # Processes load together, so all go by what process 0 found.
    found = _whole(snapshots, last) if is_main() else []
    count = agreed(len(found))
    steps = [agreed(step) for step in (found if is_main() else [0] * count)]
    fit = ema.fit(
        [step for step in [*steps, last] for _ in lengths], [*lengths] * (len(steps) + 1),
        last, sigma_rel,
    )  # fmt: skip

    def trees() -> Iterator[Any]:
        for step in steps:
            yield from snapshots.load(step, state.ema_tracks)
        yield from state.ema_tracks

    return ema.combine(fit.coefficients, trees()), fit.error


def _whole(snapshots: Checkpoints, last: int) -> list[int]:
    """The snapshots before the step `last` whose files are as they were written."""
    steps = []
    for step in snapshots.steps():
        problem = snapshots.problem(step) if step < last else ""
        if problem:
            warnings.warn(f"the snapshot of step {step} is left out: {problem}", stacklevel=3)
        elif step < last:
            steps.append(step)
    return steps
