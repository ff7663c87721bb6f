"""Signals that ask a run to save and stop."""

import os
import signal
from types import FrameType, TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class Signals:
    """Within `with`, SIGTERM and a first SIGINT (Ctrl-C) become an answer of `stop`.

    A second SIGINT interrupts at once, as without this. A SIGINT that the process ignores, as
    background jobs of a shell script do, stays ignored. Signals are taken in the main thread only
    (ValueError elsewhere): that is Python's rule.

    A checkpoint is saved by all processes together, so `stop(step)` has the same value in each,
    whichever of them got the signal. One process answers at once. Several ask one another after every
    `every`-th step: with config.train.log_every those are the steps at which the loop waits for its
    devices anyway, and until which they already have work. (JAX's own
    `reached_preemption_sync_point` takes SIGTERM but no SIGINT; and as orbax asks it from a thread of
    its own, about the step of a checkpoint that was just written, process 0 can miss the step on which
    the others agree. Asking is the same on TPU pods, on GPUs, and with a plain `kill` of one local
    process.)

    Arguments:
      every: steps between two questions of several processes, at least 1; the same in each.

    Attributes:
      received: the last signal this process got, or None.
    """

    def __init__(self, every: int = 1) -> None:
        self.received: signal.Signals | None = None
        self._every = every
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                # None: a handler that is not Python's, which can be replaced but not put back.
                self._before[number] = signal.signal(number, self._receive) or signal.SIG_DFL
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        again = ""
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])
            again = " (once more: at once, without saving)"
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\njaxdiff: {self.received.name}: saving and stopping{again}\n".encode())

    def stop(self, step: int) -> bool:
        """Whether to save and stop after `step`; to be asked after every step, by every process.

        Where several processes talk, after every `every`-th step, no other program should be running
        on the devices: simulated ones can block one another.
        """
        received = self.received is not None
        if jax.process_count() == 1:
            return received
        if step % self._every:
            return False
        return bool(multihost_utils.process_allgather(np.int32(received)).any())
