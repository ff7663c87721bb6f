"""What a run leaves on its way: averages' snapshots, evaluations, the best checkpoint, timings."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from tiny_run import tiny_config

from jaxdiff.cli import main
from jaxdiff.training import ema
from jaxdiff.training.checkpoints import Checkpoints
from jaxdiff.training.loop import train
from jaxdiff.training.milestones import Milestones
from jaxdiff.training.profile import Profile
from jaxdiff.training.reconstruction import reconstruct
from jaxdiff.training.run import prepare, restore

OPTIONS = (
    "--config.train.ema_lengths=(0.05,0.1)", "--config.train.ema_snapshots_every=4",
    "--config.train.evaluate_every=4", "--config.train.best_metric=sliced_wasserstein",
    "--config.train.ema_warmup=half_life", "--config.train.prefetch=2",
    "--config.train.sample_every=8", "--config.evaluate.ema=0.1", "--config.optimizer.clip_norm=0.0",
)  # fmt: skip


class Killed(Exception):
    pass


def killed(experiment, state):
    raise Killed


def lines(workdir, name):
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(plan, workdir, state after 12 steps, the averaged parameters after each step)."""
    folder = tmp_path_factory.mktemp("milestones")
    plan = prepare(tiny_config(folder, *OPTIONS))
    profile = Profile(folder / "run" / "profile", steps=3)
    state = train(plan, folder / "run", progress=False, profile=profile)
    return plan, folder / "run", state


@pytest.fixture(scope="module")
def path(whole):
    """The parameters after each of the 12 steps, from the plain step."""
    plan, _, last = whole
    from jaxdiff.training.run import batches

    step = jax.jit(plan.step)
    state, stream = jax.jit(plan.init)(), batches(plan.experiment.config, plan.source)
    found = []
    for _ in range(12):
        state, _ = step(state, next(stream))
        found.append(jax.device_get(state.params))
    return found


def test_a_run_that_was_killed_leaves_the_same_and_nothing_twice(whole, tmp_path):
    plan, uninterrupted, expected = whole
    with pytest.raises(Killed):
        train(plan, tmp_path / "run", killed, progress=False)  # after step 8; saved at 6
    assert [line["step"] for line in lines(tmp_path / "run", "evaluations.jsonl")] == [4, 8]
    assert int(restore(plan.experiment, tmp_path / "run").step) == 6
    # A stop that is asked for in the last step finds nothing to stop, and leaves nothing out.
    state = train(plan, tmp_path / "run", progress=False, stop=lambda step: step == 12)
    assert_equal(state, expected)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert lines(tmp_path / "run", name) == lines(uninterrupted, name)
    assert Checkpoints(tmp_path / "run" / "ema").steps() == [4, 8, 12]
    assert Checkpoints(uninterrupted / "ema").steps() == [4, 8, 12]
    assert [line["step"] for line in lines(tmp_path / "run", "throughput.jsonl")] == [4, 8, 12]


def test_what_was_missed_at_the_last_checkpoint_is_made_up_for(whole, tmp_path):
    plan, uninterrupted, _ = whole
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    kept = lines(workdir, "evaluations.jsonl")
    (workdir / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept[:2]))
    shutil.rmtree(workdir / "ema" / "12")
    train(plan, workdir, progress=False)
    assert lines(workdir, "evaluations.jsonl") == kept
    assert 12 in Checkpoints(workdir / "ema").steps()


def test_the_best_checkpoint_is_the_evaluation_with_the_least_distance(whole):
    plan, workdir, _ = whole
    found = lines(workdir, "evaluations.jsonl")
    assert [line["step"] for line in found] == [4, 8, 12]
    scores = {line["step"]: line["figures"][0]["sliced_wasserstein"] for line in found}
    best = restore(plan.experiment, workdir, best=True)
    assert int(best.step) == min(scores, key=scores.get)
    assert Checkpoints(workdir / "best").steps() == [int(best.step)]
    assert sorted(p.name for p in (workdir / "samples").iterdir()) == [
        "00000004.png", "00000008.png", "00000012.png"
    ]  # fmt: skip
    # It can be continued like any other: the position travels with it.
    assert Checkpoints(workdir / "best").restore(plan.placement.abstract)[1]["data"]


def test_higher_is_better_where_the_metric_says_so(whole, monkeypatch, tmp_path):
    """Four evaluations with known figures; the middle one, then the last, is the best."""
    plan, _, state = whole
    given = iter([0.5, 0.7, 0.6, 0.9])
    monkeypatch.setattr(
        "jaxdiff.training.milestones.figures",
        lambda *_: [{"conditional_accuracy": 0.1}, {"conditional_accuracy": next(given)}],
    )
    monkeypatch.setattr("jaxdiff.training.milestones.draw_picture", lambda *_: None)
    monkeypatch.setattr(Milestones, "_snapshot", lambda *_: None)
    config = plan.experiment.config.copy_and_resolve_references()
    config.train.best_metric = "conditional_accuracy"
    other = dataclasses.replace(plan, experiment=dataclasses.replace(plan.experiment, config=config))
    best = []
    for step in (4, 8, 12, 16):
        Milestones(other, tmp_path, step - 1)(step, state, {})
        best.append(Checkpoints(tmp_path / "best").latest())
    assert best == [4, 8, 8, 16]


def test_samples_that_are_not_finite_do_not_stop_the_run(whole, monkeypatch, tmp_path):
    plan, _, state = whole

    def bad(*_):
        raise FloatingPointError("3 of 24 samples are not finite")

    monkeypatch.setattr("jaxdiff.training.milestones.figures", bad)
    milestones = Milestones(plan, tmp_path)
    with pytest.warns(UserWarning, match="step 4 was not evaluated: 3 of 24"):
        milestones(4, state, {})
    assert lines(tmp_path, "evaluations.jsonl") == [
        {"step": 4, "error": "3 of 24 samples are not finite"}
    ]
    assert not (tmp_path / "best").exists()
    Milestones(plan, tmp_path, 4)  # and such a line is read again


def test_the_tracked_averages_are_weighted_means_of_the_path(whole, path):
    state = whole[2]
    for track, length in zip(state.ema_tracks, (0.05, 0.1), strict=True):
        weights = np.diff((np.arange(13) / 12) ** (ema.exponent(length) + 1))
        expected = jax.tree.map(lambda *leaves, w=weights: np.tensordot(w, np.stack(leaves), 1), *path)
        jax.tree.map(
            lambda a, e: np.testing.assert_allclose(a, e, rtol=2e-4, atol=1e-5), track, expected
        )


def test_an_average_of_another_length_from_the_folder(whole, path, tmp_path):
    plan, workdir, state = whole

    def miss(workdir, sigma_rel):
        found, error = reconstruct(plan.experiment, workdir, state, sigma_rel)
        weights = np.diff((np.arange(13) / 12) ** (ema.exponent(sigma_rel) + 1))
        expected = jax.tree.map(lambda *leaves: np.tensordot(weights, np.stack(leaves), 1), *path)
        span = max(np.abs(leaf).max() for leaf in jax.tree.leaves(
            jax.tree.map(lambda a, b: a - b, path[-1], path[0])))  # fmt: skip
        gaps = jax.tree.map(lambda a, e: np.abs(np.asarray(a) - e).max(), found, expected)
        return max(jax.tree.leaves(gaps)) / span, error

    assert miss(workdir, 0.1)[0] < 1e-3 and miss(workdir, 0.1)[1] < 1e-6
    gap, error = miss(workdir, 0.08)
    assert gap < 0.02 and error < 0.05
    fewer = shutil.copytree(workdir, tmp_path / "fewer")
    shutil.rmtree(fewer / "ema" / "4")
    (largest, *_) = sorted(
        (p for p in (fewer / "ema" / "8").rglob("*") if p.is_file()), key=lambda p: -p.stat().st_size
    )
    largest.write_bytes(b"x" + largest.read_bytes()[1:])
    with pytest.warns(UserWarning, match="snapshot of step 8 is left out: .* is damaged"):
        assert miss(fewer, 0.08)[1] > error


def test_throughput_is_beside_the_losses(whole):
    plan, workdir, _ = whole
    found = lines(workdir, "throughput.jsonl")
    assert [line["step"] for line in found] == [4, 8, 12]
    width, size = 16, 16
    products = 2 * width * width + 2 * 2 * width + width * 2 * width + 2 * width * width
    for line in found:
        rate = line["examples_per_second"]
        assert rate == pytest.approx(size / line["step_seconds"])
        assert line["flops_per_second"] == pytest.approx(3 * 2 * products * rate)
        shares = [v for k, v in line.items() if k.endswith("_fraction") and k != "waiting_fraction"]
        assert sum(shares) == pytest.approx(1.0)
        assert 0 <= line["waiting_fraction"] <= line["input_fraction"] + 1e-12
        assert "mfu" not in line and line["memory_bytes"] > 0  # a CPU has no known peak
    assert not set(found[0]) & set(lines(workdir, "metrics.jsonl")[0]) - {"step"}


def test_a_profile_has_a_trace_and_a_breakdown(whole):
    folder = whole[1] / "profile"
    found = json.loads((folder / "breakdown.json").read_text())
    assert found["steps"] == 3
    assert found["milliseconds_a_step"]["dispatch"] > 0 < found["milliseconds_a_step"]["device"]
    (trace,) = folder.rglob("*.xplane.pb")
    assert b"train" in trace.read_bytes()


def test_the_command_line_makes_an_average_of_any_length(whole, tmp_path, capsys):
    workdir = str(whole[1])
    output = str(tmp_path / "x.png")
    arguments = ["sample", "--workdir", workdir, "--count", "6", "--output", output, "--quiet"]
    assert main([*arguments, "--ema", "0.15"]) == 0
    assert "average of length 0.15 at step 12, made to" in capsys.readouterr().err
    other = np.load(tmp_path / "x.npz")["x"]
    assert main([*arguments, "--ema", "0.1"]) == 0
    same = np.load(tmp_path / "x.npz")["x"]
    assert main(arguments) == 0  # config.evaluate.ema is 0.1
    np.testing.assert_allclose(np.load(tmp_path / "x.npz")["x"], same, atol=1e-4)
    assert np.abs(other - same).max() > 1e-4
    assert main([*arguments, "--ema", "0.9"]) == 2
    assert "at most 1 / sqrt(12)" in capsys.readouterr().err
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # only best/ is left
    arguments[2] = str(tmp_path / "run")
    assert main(arguments) == 1 and main([*arguments, "--best"]) == 0
    arguments = ["train", "--config", "x.py", "--workdir", str(tmp_path / "y"), "--profile", "0"]
    assert main(arguments) == 2 and "at least 1 step, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.evaluate.ema=0.2", "one of config.train.ema_lengths"),
        ("--config.train.best_metric=mmd", "evaluate_every"),
        ("--config.train.ema_lengths=(0.4,)", "ema_lengths must be above 0 and at most"),
        ("--config.train.ema_warmup=slow", "ema_warmup must be one of"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, override, words):
    with pytest.raises(ValueError, match=words):
        prepare(tiny_config(tmp_path, override))
