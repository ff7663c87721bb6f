import types

import jax
import jax.numpy as jnp
import pytest

from jaxdiff.training.meter import Meter, breakdown, peak_memory, sentence


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def metrics(ready):
    return {"loss": types.SimpleNamespace(is_ready=lambda: ready)}


def one_step(meter, clock, ready, read=1.0, compute=3.0):
    clock.now += read
    meter.input(metrics(ready))
    clock.now += 0.5
    meter.step()
    clock.now += compute
    meter.lap("device")


def test_rates_of_a_window(clock):
    meter = Meter(16, flops=8e9, tokens=64, peak=16e9, memory=2**20, clock=clock)
    one_step(meter, clock, ready=True)
    one_step(meter, clock, ready=False)
    clock.now += 1.0
    meter.lap("saving")
    clock.now += 10.0
    meter.lap("evaluating")
    found = meter.rates()
    # Two steps in 10 s, 20 s with the evaluation; one of the two batches kept the device waiting.
    assert found["step_seconds"] == pytest.approx(5.0)
    assert found["examples_per_second"] == pytest.approx(3.2)
    assert found["tokens_per_second"] == pytest.approx(12.8)
    assert found["mfu"] == pytest.approx(0.1)
    assert found["waiting_fraction"] == pytest.approx(1 / 20)
    shares = {"input": 2, "dispatch": 1, "device": 6, "logging": 0, "saving": 1, "evaluating": 10}
    for phase, seconds in shares.items():
        assert found[f"{phase}_fraction"] == pytest.approx(seconds / 20)

    one_step(meter, clock, ready=True, read=0.25, compute=0.25)
    assert meter.rates()["step_seconds"] == pytest.approx(1.0)  # the next window alone
    assert meter.total()["step_seconds"] == pytest.approx(11 / 3)
    assert meter.rates() == {}


def test_the_first_batch_is_always_waited_for(clock):
    meter = Meter(1, flops=1.0, clock=clock)
    clock.now += 2.0
    meter.input(None)
    meter.step()
    assert meter.rates()["waiting_fraction"] == 1.0


def test_the_sentence_says_why_there_is_no_mfu(clock):
    meter = Meter(16, flops=8e9, clock=clock)
    one_step(meter, clock, ready=False)
    text = sentence(meter.rates(), "cpu")
    assert "4500 ms a step" in text and "no MFU (peak of 'cpu' not known)" in text
    assert "tokens" not in text
    known = Meter(16, flops=9e9, tokens=4, peak=4e9, clock=clock)
    one_step(known, clock, ready=False)
    assert "MFU 50.0%" in sentence(known.total(), "x") and "tokens/s" in sentence(known.total(), "x")
    assert sentence({}, "cpu") == "no step was timed"


def test_the_breakdown_is_in_milliseconds_a_step(clock):
    meter = Meter(1, flops=1.0, clock=clock)
    for _ in range(4):
        one_step(meter, clock, ready=True, read=0.1, compute=0.2)
    found = breakdown(meter.spent())
    assert found["input"] == pytest.approx(100.0) and found["dispatch"] == pytest.approx(500.0)
    assert found["device"] == pytest.approx(200.0) and found["saving"] == 0.0


def test_memory_holds_arguments_results_and_temporaries():
    # x and sin x are 4 KiB each; a donated argument is not counted twice.
    x = jax.ShapeDtypeStruct((1024,), jnp.float32)
    kept = jax.jit(jnp.sin).lower(x).compile()
    donated = jax.jit(jnp.sin, donate_argnums=0).lower(x).compile()
    assert 8192 <= peak_memory(kept) < 8192 + 4096
    assert peak_memory(kept) - peak_memory(donated) == 4096
