"""What a run leaves at set steps, besides checkpoints: snapshots of its averages, evaluations with
pictures, and the best checkpoint."""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdiff.config import to_dict
from jaxdiff.evaluation import HIGHER_IS_BETTER
from jaxdiff.parallel import agreed, is_main
from jaxdiff.training.checkpoints import Checkpoints
from jaxdiff.training.report import averaged, draw_picture, figures
from jaxdiff.training.run import BEST, EVALUATIONS, PICTURES, SNAPSHOTS, Plan
from jaxdiff.training.state import State
from jaxdiff.training.writers import JSONLinesWriter, kept_lines


class Milestones:
    """Called after a step, does what is due there and has not been done before.

    Every config.train.ema_snapshots_every steps the averages of config.train.ema_lengths go into
    the folder ema/. Every config.train.evaluate_every steps the averaged weights are evaluated: a
    line {"step", "figures": [one for each guidance scale]} in evaluations.jsonl, a picture in
    samples/, and, if config.train.best_metric is the best so far, the checkpoint in best/.

    Everything is on disk when the call returns, the evaluation's line last: so a run that was
    killed in between does again what is missing, and nothing twice. All processes call it together.

    Arguments:
      plan: of the run.
      workdir: its folder.
      resume: the step that the run goes on from; what an earlier attempt did after it is done anew.
    """

    def __init__(self, plan: Plan, workdir: Path, resume: int = 0):
        self._plan, self._workdir = plan, workdir
        self._settings = plan.experiment.config.train
        self._config = plan.experiment.config
        path = workdir / EVALUATIONS
        lines = kept_lines(path, resume) if path.exists() else []
        earlier = [json.loads(line) for line in lines]
        self._evaluated = {found["step"] for found in earlier}
        scores = [self._score(found.get("figures", ())) for found in earlier]
        self._best = min((score for score in scores if _is_finite(score)), default=None)

    def due(self, step: int) -> bool:
        """Whether the call after this step has anything to do."""
        return any(self._due(step))

    def _due(self, step: int) -> tuple[bool, bool]:
        every = self._settings.ema_snapshots_every, self._settings.evaluate_every
        return tuple(n > 0 and step % n == 0 for n in every)

    def __call__(self, step: int, state: State, position: Mapping[str, Any]) -> None:
        """`position` is the loop's own, as its checkpoints have it."""
        snapshot, evaluation = self._due(step)
        if snapshot:
            self._snapshot(step, state)
        if evaluation and not agreed(step in self._evaluated):
            self._evaluate(step, state, position)

    def _snapshot(self, step: int, state: State) -> None:
        with Checkpoints(self._workdir / SNAPSHOTS, keep_every=1) as snapshots:
            if not agreed(step in snapshots.steps()):
                snapshots.save(step, state.ema_tracks, {})

    def _evaluate(self, step: int, state: State, position: Mapping[str, Any]) -> None:
        experiment, pictures = self._plan.experiment, self._workdir / PICTURES
        if is_main():
            pictures.mkdir(exist_ok=True)
        variables = averaged(experiment, state)
        try:
            found = figures(experiment, variables, self._plan.source)
            draw_picture(experiment, variables, pictures / f"{step:08d}.png")
        except FloatingPointError as error:  # bad samples are no reason to stop training
            warnings.warn(f"step {step} was not evaluated: {error}", stacklevel=3)
            self._write(step, {"error": str(error)})
            return
        score = self._score(found)
        better = _is_finite(score) and (self._best is None or score < self._best)
        if agreed(better):
            self._best = score
            with Checkpoints(self._workdir / BEST, keep=1, config=to_dict(self._config)) as best:
                best.discard_after(step - 1)  # an earlier attempt may have been here
                best.save(step, state, dict(position))
        self._write(step, {"figures": found})

    def _write(self, step: int, line: Mapping[str, Any]) -> None:
        if is_main():
            writer = JSONLinesWriter(self._workdir / EVALUATIONS, resume=step - 1)
            writer.write(step, line)
            writer.close()

    def _score(self, found: Sequence[Mapping[str, float]]) -> float | None:
        """The best of the guidance scales, turned so that lower is better."""
        metric = self._settings.best_metric
        if not metric or not found:
            return None
        sign = -1.0 if metric in HIGHER_IS_BETTER else 1.0
        return min(sign * one[metric] for one in found)


def _is_finite(score: float | None) -> bool:
    return score is not None and math.isfinite(score)
