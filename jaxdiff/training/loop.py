"""The training loop, top to bottom."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from jaxdiff.config import to_dict
from jaxdiff.experiment import Experiment
from jaxdiff.parallel import is_main
from jaxdiff.training.checkpoints import Checkpoints
from jaxdiff.training.meter import make_meter, sentence
from jaxdiff.training.milestones import Milestones
from jaxdiff.training.profile import Profile
from jaxdiff.training.run import (
    CHECKPOINTS,
    LOSSES,
    THROUGHPUT,
    Plan,
    batches,
    check_batch,
    open_run,
)
from jaxdiff.training.state import State, make_schedule
from jaxdiff.training.writers import ConsoleWriter, JSONLinesWriter, TensorBoardWriter

Hook = Callable[[Experiment, State], None]


def train(
    plan: Plan, workdir: str | Path, hook: Hook | None = None, progress: bool = True,
    stop: Callable[[int], bool] = lambda step: False, profile: Profile | None = None,
) -> State:  # fmt: skip
    """Train, or continue, a run in `workdir` until config.train.steps; returns the last state.

    Continuing gives, bit for bit, what an uninterrupted run would have given. `hook` is called
    every config.train.sample_every steps. After a step for which `stop(step)` is true, in every
    process, the state is saved and returned: see `jaxdiff.training.preemption.Signals.stop`.
    `profile` traces a few steps.

    Raises ValueError if the folder holds a run of another configuration; FloatingPointError, naming
    the step, at a loss that is not finite (the last good checkpoint stays).
    """
    experiment, workdir = plan.experiment, Path(workdir)
    config, settings = experiment.config, experiment.config.train
    open_run(experiment, workdir)

    placement = plan.placement
    stream = batches(config, plan.source, placement)
    # Each device makes its own part of the state: it is whole on none.
    initial = jax.jit(plan.init, out_shardings=placement.state)
    train_step = jax.jit(
        plan.step, donate_argnums=0, in_shardings=(placement.state, placement.batch),
        out_shardings=(placement.state, placement.replicated),
    )  # fmt: skip
    schedule = make_schedule(config)
    with Checkpoints(
        workdir / CHECKPOINTS, settings.keep, settings.keep_every, to_dict(config)
    ) as checkpoints:
        start, pending = 0, []
        if checkpoints.latest() is not None:
            state, position, start = checkpoints.restore(placement.abstract)
            checkpoints.discard_after(start)
            stream.set_state(position["data"])
            pending = position["pending"]
        else:
            state = initial()
        milestones = Milestones(plan, workdir, start)
        if start and milestones.due(start):  # the run may have been killed before it did them
            milestones(start, state, position)
        if start >= settings.steps:
            return state
        train_step = train_step.lower(placement.abstract, plan.batch).compile()

        bar = tqdm(
            total=settings.steps, initial=start, unit="step",
            disable=not (progress and is_main()), file=sys.stderr, dynamic_ncols=True,
        )  # fmt: skip
        writers, timings = [ConsoleWriter(bar)], []
        if is_main():
            writers.append(JSONLinesWriter(workdir / LOSSES, resume=start))
            # Times are never the same twice: apart from the losses, which are.
            timings.append(JSONLinesWriter(workdir / THROUGHPUT, resume=start))
            if settings.tensorboard:
                board = TensorBoardWriter(workdir / "tensorboard", resume=start)
                writers.append(board)
                timings.append(board)
        try:
            unread, metrics = [], None
            devices = placement.mesh.devices.ravel()
            meter = make_meter(experiment, devices, train_step)
            for step in range(start + 1, settings.steps + 1):
                if profile:
                    profile.before(step - start, settings.steps - start, metrics, meter)
                rows = next(stream)  # of this process
                meter.input(metrics)
                check_batch(rows, experiment, step)
                batch = placement.put(rows, settings.batch_size)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, metrics = train_step(state, batch)
                unread.append(metrics)
                bar.update()
                meter.step()
                if profile:
                    profile.after(step - start, metrics, meter)

                last = step == settings.steps
                log = last or step % settings.log_every == 0
                due = last or step % settings.checkpoint_every == 0
                milestone = milestones.due(step)
                pictures = settings.sample_every and step % settings.sample_every == 0
                if log or due or milestone or pictures:
                    jax.block_until_ready(state)  # processes talk while no step is running
                stopping = not last and stop(step)
                save = due or stopping
                if log or save or milestone:
                    # Reading waits for the device, so it is done for many steps at once.
                    pending = [*pending, *_finite(jax.device_get(unread), step)]
                    unread = []
                    meter.lap("device")
                if log:
                    mean = {k: float(np.mean([m[k] for m in pending])) for k in pending[0]}
                    mean["learning_rate"] = float(schedule(step - 1))
                    for writer in writers:
                        writer.write(step, mean)
                    rates = meter.rates()
                    for writer in timings:
                        writer.write(step, rates)
                    pending = []
                    meter.lap("logging")
                if save or milestone:
                    position = {"data": stream.get_state(), "pending": pending}
                if save:
                    checkpoints.save(step, state, position)
                    meter.lap("saving")
                if stopping:
                    break
                if milestone:
                    milestones(step, state, position)
                if hook and pictures:
                    hook(experiment, state)
                meter.lap("evaluating" if milestone or pictures else "other")
            if is_main() and progress:
                tqdm.write(sentence(meter.total(), devices[0].device_kind), file=sys.stderr)
        finally:
            if profile:
                profile.close()
            for writer in {*writers, *timings}:
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
