"""The training loop, top to bottom."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from jaxdiff.experiment import Experiment
from jaxdiff.parallel import mesh
from jaxdiff.training.checkpoints import Checkpoints
from jaxdiff.training.run import (
    CHECKPOINTS,
    LOSSES,
    Plan,
    abstract_state,
    batches,
    check_batch,
    open_run,
)
from jaxdiff.training.state import State, make_schedule
from jaxdiff.training.step import shardings
from jaxdiff.training.writers import ConsoleWriter, JSONLinesWriter, TensorBoardWriter

Hook = Callable[[Experiment, State], None]


def train(
    plan: Plan, workdir: str | Path, hook: Hook | None = None, progress: bool = True
) -> State:
    """Train, or continue, a run in `workdir` until config.train.steps; returns the last state.

    Continuing gives, bit for bit, what an uninterrupted run would have given. `hook` is called
    every config.train.sample_every steps.

    Raises ValueError if the folder holds a run of another configuration; FloatingPointError, naming
    the step, at a loss that is not finite (the last good checkpoint stays).
    """
    experiment, workdir = plan.experiment, Path(workdir)
    config, settings = experiment.config, experiment.config.train
    open_run(experiment, workdir)

    over_examples, replicated = shardings(mesh())
    stream = batches(config, plan.source)
    initial = jax.jit(plan.init, out_shardings=replicated)
    train_step = jax.jit(
        plan.step, donate_argnums=0, in_shardings=(replicated, over_examples),
        out_shardings=(replicated, replicated),
    )  # fmt: skip
    schedule = make_schedule(config)
    with Checkpoints(workdir / CHECKPOINTS, settings.keep) as checkpoints:
        start, pending = 0, []
        if checkpoints.steps():
            state, position, start = checkpoints.restore(abstract_state(plan.init))
            checkpoints.discard_after(start)
            stream.set_state(position["data"])
            pending = position["pending"]
        else:
            state = initial()
        if start >= settings.steps:
            return state

        bar = tqdm(
            total=settings.steps, initial=start, unit="step", disable=not progress,
            file=sys.stderr, dynamic_ncols=True,
        )  # fmt: skip
        writers = [ConsoleWriter(bar)]
        if jax.process_index() == 0:
            writers.append(JSONLinesWriter(workdir / LOSSES, resume=start))
            if settings.tensorboard:
                writers.append(TensorBoardWriter(workdir / "tensorboard", resume=start))
        try:
            unread = []
            for step in range(start + 1, settings.steps + 1):
                batch = next(stream)
                check_batch(batch, experiment, step)
                batch = {
                    name: jax.make_array_from_process_local_data(over_examples, array)
                    for name, array in batch.items()
                }
                state, metrics = train_step(state, batch)
                unread.append(metrics)
                bar.update()

                log = step % settings.log_every == 0 or step == settings.steps
                save = step % settings.checkpoint_every == 0 or step == settings.steps
                if log or save:
                    # Reading waits for the device, so it is done for many steps at once.
                    pending += _finite(jax.device_get(unread), step)
                    unread = []
                if log:
                    mean = {k: float(np.mean([m[k] for m in pending])) for k in pending[0]}
                    mean["learning_rate"] = float(schedule(step - 1))
                    for writer in writers:
                        writer.write(step, mean)
                    pending = []
                if save:
                    position = {"data": stream.get_state(), "pending": pending}
                    checkpoints.save(step, state, position)
                if hook and settings.sample_every and step % settings.sample_every == 0:
                    hook(experiment, state)
        finally:
            for writer in writers:
                writer.close()
    return state


def _finite(metrics: Sequence[Mapping[str, np.ndarray]], last: int) -> list[dict[str, float]]:
    """The metrics of the steps up to `last` as numbers, if all of them are finite."""
    values = [{name: float(value) for name, value in one.items()} for one in metrics]
    for step, one in enumerate(values, last - len(values) + 1):
        for name, value in one.items():
            if not np.isfinite(value):
                raise FloatingPointError(
                    f"step {step}: {name} is {value}; training stopped, the last checkpoint before "
                    "it is kept. Lower config.optimizer.learning_rate, or check the data"
                )
    return values
