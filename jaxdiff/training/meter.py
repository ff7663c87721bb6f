"""Where a run's time goes: step time, examples per second, utilisation, waiting for input."""

import time
from collections.abc import Callable, Mapping, Sequence

import jax

from jaxdiff.experiment import Experiment
from jaxdiff.training import flops

# What the loop spends its time on, in its order. "device" is waiting for the devices' results.
PHASES = ("input", "dispatch", "device", "logging", "saving", "evaluating", "other")


class Meter:
    """A stopwatch over the loop's phases.

    `lap(phase)` gives the time since the last lap to a phase, so that all time is accounted for;
    `rates()` closes a window. Nothing here enters the training state, and a resumed run starts
    anew: times are not reproducible.

    Arguments:
      examples: in a step, over all devices.
      flops: model FLOPs of a step, over all devices.
      tokens: in a step, over all devices; None for a network without tokens.
      peak: of all devices together, FLOP/s; None if not known.
      memory: bytes of one device that a step needs, or None.
      clock: seconds.
    """

    def __init__(
        self, examples: int, flops: float, tokens: int | None = None, peak: float | None = None,
        memory: int | None = None, clock: Callable[[], float] = time.perf_counter,
    ):  # fmt: skip
        self._per_step = {"examples": examples, "tokens": tokens, "flops": flops}
        self._peak, self._memory, self._clock = peak, memory, clock
        self._spent = dict.fromkeys((*PHASES, "waiting"), 0.0)
        self._steps = 0
        self._last = clock()
        self._window = self.spent()

    def lap(self, phase: str) -> None:
        """The time since the last lap went to this phase."""
        now = self._clock()
        self._spent[phase] += now - self._last
        self._last = now

    def input(self, previous: Mapping[str, jax.Array] | None) -> None:
        """A batch has come, after the step that made `previous` was dispatched.

        The devices can have waited for it only if that step is done by now: then all of the time
        counts as waiting, which is at most too much.
        """
        before = self._spent["input"]
        self.lap("input")
        if previous is None or all(leaf.is_ready() for leaf in jax.tree.leaves(previous)):
            self._spent["waiting"] += self._spent["input"] - before

    def step(self) -> None:
        """A step was dispatched."""
        self.lap("dispatch")
        self._steps += 1

    def spent(self) -> dict[str, float]:
        """Steps, and seconds of each phase, so far."""
        return {"steps": self._steps, **self._spent}

    def rates(self) -> dict[str, float]:
        """Of the window since the last call, which must end with every step done.

        "step_seconds" and the rates per second leave evaluation out; "..._fraction" are of the
        window's whole time. "mfu" is there if the devices' peak is known.
        """
        found = self.between(self._window, self.spent())
        self._window = self.spent()
        return found

    def total(self) -> dict[str, float]:
        """As `rates`, of the time since the meter was made."""
        return self.between(dict.fromkeys(self.spent(), 0), self.spent())

    def between(self, begin: Mapping[str, float], end: Mapping[str, float]) -> dict[str, float]:
        """As `rates`, between two results of `spent`; empty without a step in between."""
        spent = {name: end[name] - begin[name] for name in end}
        steps = spent.pop("steps")
        whole = sum(spent[phase] for phase in PHASES)
        training = whole - spent["evaluating"]
        if not steps or training <= 0:
            return {}
        found = {"step_seconds": training / steps}
        for name, amount in self._per_step.items():
            if amount is not None:
                found[f"{name}_per_second"] = steps * amount / training
        if self._peak is not None:
            found["mfu"] = found["flops_per_second"] / self._peak
        if self._memory is not None:
            found["memory_bytes"] = self._memory
        return found | {f"{name}_fraction": value / whole for name, value in spent.items()}


def make_meter(
    experiment: Experiment, devices: Sequence[jax.Device], program: jax.stages.Compiled
) -> Meter:
    """The meter of a run's compiled step on these devices."""
    size = experiment.config.train.batch_size
    tokens, peak = flops.tokens(experiment), flops.peak(devices[0])
    return Meter(
        examples=size,
        flops=flops.TRAINING_PASSES * flops.forward(experiment) * size,
        tokens=None if tokens is None else tokens * size,
        peak=None if peak is None else peak * len(devices),
        memory=peak_memory(program),
    )


def peak_memory(compiled: jax.stages.Compiled) -> int | None:
    """Bytes of one device that a compiled program needs: arguments, results and temporaries.

    None where the backend does not say.
    """
    found = compiled.memory_analysis()
    if found is None:
        return None
    return (
        found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
        + found.temp_size_in_bytes
    )  # fmt: skip


def sentence(rates: Mapping[str, float], device_kind: str) -> str:
    """The rates for people, on one line."""
    if not rates:
        return "no step was timed"
    parts = [
        f"{1e3 * rates['step_seconds']:.4g} ms a step",
        f"{rates['examples_per_second']:.4g} examples/s",
    ]
    if "tokens_per_second" in rates:
        parts.append(f"{rates['tokens_per_second']:.4g} tokens/s")
    parts.append(f"{rates['flops_per_second'] / 1e12:.4g} model TFLOP/s")
    if "mfu" in rates:
        parts.append(f"MFU {100 * rates['mfu']:.1f}%")
    else:
        parts.append(f"no MFU (peak of {device_kind!r} not known)")
    if "memory_bytes" in rates:
        parts.append(f"{rates['memory_bytes'] / 2**20:.4g} MiB a device")
    parts.append(f"waiting for input at most {100 * rates['waiting_fraction']:.2f}%")
    return ", ".join(parts)


def breakdown(spent: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds a step of each phase, from a difference of `Meter.spent`."""
    steps = max(spent["steps"], 1)
    return {phase: round(1e3 * spent[phase] / steps, 4) for phase in PHASES}
