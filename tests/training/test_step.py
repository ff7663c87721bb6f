import jax
import numpy as np
import optax
import pytest
from tiny_run import tiny_config

from jaxdiff import losses
from jaxdiff.noise import normal, sample_keys
from jaxdiff.training.run import batches, prepare
from jaxdiff.training.state import make_optimizer, make_schedule


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(tmp_path_factory.mktemp("step"), "--config.optimizer.warmup_steps=2")


@pytest.fixture(scope="module")
def plan(config):
    return prepare(config, jax.devices()[:1])


def run(plan, steps):
    """(states after each step, losses)"""
    placement = plan.placement
    out = placement.state, placement.replicated
    state, step = jax.jit(plan.init, out_shardings=out[0])(), jax.jit(plan.step, out_shardings=out)
    stream = batches(plan.experiment.config, plan.source, placement)
    states, found = [state], []
    for _ in range(steps):
        state, metrics = step(state, placement.put(next(stream), 16))
        states.append(state)
        found.append(float(metrics["loss"]))
    return states, np.array(found)


def test_the_average_is_the_warmed_up_recurrence(plan):
    states, _ = run(plan, 4)
    expected = jax.device_get(states[0].params)
    for step, state in enumerate(states[1:]):
        decay = min(0.999, (1 + step) / (10 + step))
        expected = jax.tree.map(
            lambda e, p, d=decay: d * e + (1 - d) * np.asarray(p), expected, state.params
        )
        jax.tree.map(
            lambda e, a: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6), expected, state.ema
        )


def test_a_step_is_the_optimizer_on_the_mean_score_matching_loss(plan):
    """The same step written out with every key named, from the third state (warm-up is over)."""
    states, found = run(plan, 3)
    state = states[2]
    stream = batches(plan.experiment.config, plan.source)
    batch = [next(stream) for _ in range(3)][2]
    keys = jax.random.split(jax.random.fold_in(state.key, 2), 4)
    noise = normal(sample_keys(keys[0], np.arange(16)), batch["x"])
    t = losses.sample_times("uniform", keys[1], 16, plan.experiment.process)

    def loss(params):
        denoiser = plan.experiment.denoiser(params, {"label": keys[2], "dropout": keys[3]})
        x_t = (1 - t[:, None]) * batch["x"] + t[:, None] * noise
        out = denoiser(x_t, t, 1 - t, t, batch["label"])
        return ((out - (noise - batch["x"])) ** 2).mean()

    value, grads = jax.value_and_grad(loss)(state.params)
    np.testing.assert_allclose(value, found[2], rtol=1e-5)
    grads = jax.tree.map(lambda g: g * min(1.0, 1.0 / float(optax.tree.norm(grads))), grads)
    rule = optax.adamw(make_schedule(plan.experiment.config), weight_decay=0.0)
    updates, _ = rule.update(grads, state.opt_state[1], state.params)
    expected = optax.apply_updates(state.params, updates)
    jax.tree.map(
        lambda e, p: np.testing.assert_allclose(p, e, rtol=1e-4, atol=1e-6),
        expected, states[3].params,
    )  # fmt: skip


def test_eight_devices_follow_the_loss_curve_of_one(config, plan):
    _, one = run(plan, 50)
    eight_devices = prepare(config)
    _, eight = run(eight_devices, 50)
    assert eight_devices.placement.mesh.size == 8
    np.testing.assert_allclose(eight, one, rtol=2e-4)
    assert one[-10:].mean() < one[:10].mean()  # and it learns


def test_schedule_warms_up_then_follows_half_a_cosine(tmp_path):
    config = tiny_config(
        tmp_path, "--config.train.steps=100", "--config.optimizer.warmup_steps=20",
        "--config.optimizer.learning_rate=0.1", "--config.optimizer.end_fraction=0.1",
    )  # fmt: skip
    rate = make_schedule(config)
    np.testing.assert_allclose([rate(0), rate(5), rate(10)], [0.0, 0.025, 0.05], rtol=1e-6)
    for step in (20, 40, 60, 100):
        cosine = 0.5 * (1 + np.cos(np.pi * (step - 20) / 80))
        np.testing.assert_allclose(rate(step), 0.1 * (0.1 + 0.9 * cosine), rtol=1e-5)


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("--config.optimizer.name=sgdx", "adamw"),
        ("--config.optimizer.schedule=linear", "cosine"),
        ("--config.optimizer.learning_rate=0", "learning_rate"),
        ("--config.optimizer.learning_rate=nan", "learning_rate"),
        ("--config.optimizer.warmup_steps=-1", "warmup_steps"),
        ("--config.optimizer.clip_norm=-1", "clip_norm"),
        ("--config.optimizer.b1=2.0", r"config.optimizer.b1 must be in \[0, 1\), got 2.0"),
        ("--config.optimizer.b2=-0.1", r"config.optimizer.b2 must be in \[0, 1\), got -0.1"),
        ("--config.optimizer.eps=0", "config.optimizer.eps must be positive, got 0.0"),
        ("--config.optimizer.end_fraction=-3", r"end_fraction must be in \[0, 1\], got -3.0"),
        ("--config.optimizer.weight_decay=-1", "weight_decay must be at least 0, got -1.0"),
    ],
)
def test_a_bad_optimizer_is_named(tmp_path, override, word):
    with pytest.raises(ValueError, match=word):
        make_optimizer(tiny_config(tmp_path, override))
