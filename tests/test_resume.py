import json
import os
import shutil

import jax
import numpy as np
import pytest
from tiny_run import tiny_config

from jaxdiff.training.continuing import changes
from jaxdiff.training.loop import train
from jaxdiff.training.run import prepare, restore

SAMPLE_AT_SIX = "--config.train.sample_every=6"


class Killed(Exception):
    pass


def killed(experiment, state):
    if int(state.step) == 6:
        raise Killed


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_equal(a, b):
    a, b = (jax.tree.map(_data, tree) for tree in (a, b))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def _data(leaf):
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(plan, workdir, final state) of an uninterrupted run of 12 steps."""
    folder = tmp_path_factory.mktemp("whole")
    plan = prepare(tiny_config(folder, SAMPLE_AT_SIX))
    return plan, folder / "run", train(plan, folder / "run", progress=False)


@pytest.fixture(scope="module")
def half(whole, tmp_path_factory):
    """The same run, killed after step 6; copy it before going on."""
    workdir = tmp_path_factory.mktemp("half") / "run"
    with pytest.raises(Killed):
        train(whole[0], workdir, killed, progress=False)
    return workdir


@pytest.fixture
def workdir(half, tmp_path):
    return shutil.copytree(half, tmp_path / "moved")


def test_a_continued_run_is_bit_for_bit_the_uninterrupted_one(whole, workdir):
    plan, uninterrupted, expected = whole
    assert int(restore(plan.experiment, workdir).step) == 6
    assert [line["step"] for line in lines(workdir)] == [4]
    state = train(plan, workdir, progress=False)
    assert int(state.step) == 12
    assert_equal(state, expected)
    # Step 6 lies within the window that is logged at 8: its losses travel with the checkpoint.
    assert lines(workdir) == lines(uninterrupted)


def test_what_came_after_the_checkpoint_is_written_once(whole, workdir):
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss": 1.0}\n{"step": 9, "lo')
    train(whole[0], workdir, progress=False)
    assert lines(workdir) == lines(whole[1])


def test_a_stop_saves_the_step_it_came_in_and_fewer_devices_go_on_to_rounding(whole, tmp_path):
    plan, uninterrupted, expected = whole
    config, workdir = plan.experiment.config, tmp_path / "run"
    state = train(plan, workdir, progress=False, stop=lambda step: step == 5)
    assert int(state.step) == 5 and int(restore(plan.experiment, workdir).step) == 5
    sharded = config.copy_and_resolve_references()
    sharded.mesh.fsdp = 2
    four, one = prepare(sharded, jax.devices()[:4]), prepare(config, jax.devices()[:1])
    with pytest.warns(UserWarning, match="other settings:\n  config.mesh.fsdp: 1 -> 2"):
        state = train(four, workdir, progress=False, stop=lambda step: step >= 10)
    assert int(state.step) == 10 and len(state.step.devices()) == 4
    kernels = jax.tree.leaves(state.params)
    assert any(leaf.addressable_shards[0].data.size < leaf.size for leaf in kernels)
    state = train(one, workdir, progress=False)
    assert int(state.step) == 12 and len(state.step.devices()) == 1
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(_data(a), _data(b), rtol=1e-4, atol=1e-6)
    for a, b in zip(lines(workdir), lines(uninterrupted), strict=True):
        assert (a["step"], a["loss"]) == (b["step"], pytest.approx(b["loss"], rel=1e-5))


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "metadata", "list"])
def test_a_damaged_checkpoint_gives_way_loudly_to_the_one_before(whole, workdir, damage):
    files = [p for p in (workdir / "checkpoints" / "6").rglob("*") if p.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    if damage == "truncate":
        os.truncate(largest, largest.stat().st_size // 2)
    elif damage == "flip":
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 0xFF
        largest.write_bytes(data)
    elif damage == "remove":
        largest.unlink()
    elif damage == "list":
        (workdir / "checkpoints" / "6" / "files.json").unlink()
    else:
        (workdir / "checkpoints" / "6" / "loop" / "metadata").write_text("{")
    with pytest.warns(UserWarning, match="checkpoint 6 cannot be read.*an older one"):
        state = train(whole[0], workdir, progress=False)
    assert_equal(state, whole[2])
    assert lines(workdir) == lines(whole[1])


def test_nothing_but_damage_is_an_error_that_names_every_checkpoint(whole, workdir):
    for step in (3, 6):
        shutil.rmtree(workdir / "checkpoints" / str(step) / "state")
    with (
        pytest.warns(UserWarning, match="checkpoint 6"),
        pytest.raises(ValueError, match="checkpoint 6 .*checkpoint 3 "),
    ):
        train(whole[0], workdir, progress=False)


def test_a_half_written_checkpoint_is_not_read(whole, workdir):
    source = workdir / "checkpoints" / "6"
    shutil.copytree(source, workdir / "checkpoints" / "9.orbax-checkpoint-tmp-1")
    assert int(restore(whole[0].experiment, workdir).step) == 6
    assert_equal(train(whole[0], workdir, progress=False), whole[2])


def test_no_checkpoint_is_named(whole, workdir):
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(FileNotFoundError, match="no checkpoint in .*checkpoints"):
        restore(whole[0].experiment, workdir)


def test_another_configuration_is_refused_with_the_difference(whole, workdir):
    other = whole[0].experiment.config.copy_and_resolve_references()
    other.optimizer.learning_rate = 0.5
    before = sorted(p.name for p in workdir.rglob("*"))
    with pytest.raises(ValueError, match=r"config.optimizer.learning_rate: 0.003 -> 0.5"):
        train(prepare(other), workdir, progress=False)
    assert sorted(p.name for p in workdir.rglob("*")) == before


def test_settings_that_the_state_does_not_depend_on_may_change_loudly(whole, workdir):
    other = whole[0].experiment.config.copy_and_resolve_references()
    other.train.checkpoint_every, other.train.keep, other.train.keep_every = 4, 1, 2
    with pytest.warns(UserWarning, match="other settings") as told:
        state = train(prepare(other), workdir, progress=False)
    [message] = [str(one.message) for one in told]
    assert "config.train.checkpoint_every: 3 -> 4\n  config.train.keep: 3 -> 1\n" in message
    assert_equal(state, whole[2])
    assert {int(p.name) for p in (workdir / "checkpoints").iterdir()} == {6, 8, 12}


def test_what_may_change(whole):
    """Everything that is not listed makes another run; dropout ties the micro-batches."""
    old = whole[0].experiment.config
    new = old.copy_and_resolve_references()
    new.mesh.fsdp, new.train.accumulate, new.train.steps, new.seed = 2, 4, 13, 1
    allowed, refused = changes(old, new)
    assert allowed == ["config.mesh.fsdp: 1 -> 2", "config.train.accumulate: 1 -> 4"]
    assert refused == ["config.seed: 0 -> 1", "config.train.steps: 12 -> 13"]
    for config in (old, new):
        with config.unlocked():
            config.model.dropout = 0.1
    assert changes(old, new)[0] == ["config.mesh.fsdp: 1 -> 2"]


def test_a_folder_of_something_else_is_refused(whole, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not empty"):
        train(whole[0], tmp_path, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_loss_that_is_not_finite_stops_with_its_step_and_keeps_the_last_good(tmp_path):
    # Adam moves every weight by about the rate: 0 in step 1, then 1e29, whose square overflows.
    config = tiny_config(
        tmp_path, "--config.optimizer.learning_rate=1e30", "--config.optimizer.warmup_steps=10",
        "--config.optimizer.schedule=constant", "--config.train.checkpoint_every=1",
    )  # fmt: skip
    plan = prepare(config)
    with pytest.raises(FloatingPointError, match=r"step 2: param_norm is inf"):
        train(plan, tmp_path / "run", progress=False)
    state = restore(plan.experiment, tmp_path / "run")
    assert int(state.step) == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.params)))
