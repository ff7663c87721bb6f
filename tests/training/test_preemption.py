import os
import signal

import numpy as np
import pytest

from jaxdiff.training import preemption
from jaxdiff.training.preemption import Signals


def send(number):
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def interruptible():
    """As in a terminal; where the tests run in the background, it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_becomes_an_answer(capfd):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Signals() as signals:
        assert not signals.stop(1)
        send(signal.SIGTERM)
        assert signals.stop(2) and signals.stop(3)
        send(signal.SIGTERM)  # again changes nothing
        assert signals.received == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert "SIGTERM: saving and stopping\n" in capfd.readouterr().err


def test_a_second_interrupt_is_one(capfd):
    with Signals() as signals:
        send(signal.SIGINT)
        assert signals.stop(1) and signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert "once more: at once" in capfd.readouterr().err


def test_an_ignored_interrupt_stays_ignored():
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals() as signals:
            send(signal.SIGINT)
            assert not signals.stop(1)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, old)


def test_several_processes_stop_at_one_step(monkeypatch):
    """Two processes, asked in turn, of which the second gets a signal after step 6."""
    both = [Signals(every=4), Signals(every=4)]
    asked = []

    def gather(value):
        asked.append(step)
        assert value == (one.received is not None)
        return np.array([int(each.received is not None) for each in both])

    monkeypatch.setattr(preemption.jax, "process_count", lambda: 2)
    monkeypatch.setattr(preemption.multihost_utils, "process_allgather", gather)
    answers = {}
    for step in range(1, 10):
        if step == 7:
            both[1].received = signal.SIGTERM
        answers[step] = []
        for one in both:
            answers[step].append(one.stop(step))
    assert asked == [4, 4, 8, 8]
    assert [step for step, found in answers.items() if any(found)] == [8]
    assert answers[8] == [True, True]
