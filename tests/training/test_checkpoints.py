import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdiff.parallel import mesh
from jaxdiff.training import checkpoints
from jaxdiff.training.checkpoints import Checkpoints

SPECS = {"kernel": P("fsdp", "data"), "bias": P(), "half": P(("data", "fsdp")), "key": P()}


def tree(step):
    x = np.random.default_rng(step).standard_normal((8, 16))
    return {
        "kernel": jnp.asarray(x, jnp.float32), "bias": jnp.asarray(x[0], jnp.float32),
        "half": jnp.asarray(x, jnp.bfloat16), "key": jax.random.key(step),
    }  # fmt: skip


def on(devices):
    return {name: NamedSharding(devices, spec) for name, spec in SPECS.items()}


def like(devices):
    return jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
        jax.eval_shape(lambda: tree(0)), on(devices),
    )  # fmt: skip


def assert_same(a, b):
    for name in SPECS:
        x, y = (t[name] if name != "key" else jax.random.key_data(t[name]) for t in (a, b))
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.fixture(scope="module")
def eight():
    return mesh(data=2, fsdp=4)


@pytest.fixture(scope="module")
def saved(eight, tmp_path_factory):
    """A folder with steps 1 to 9 saved from eight devices, the last two and every fourth kept."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(folder, keep=2, keep_every=4, config={"seed": 3}) as found:
        for step in range(1, 10):
            found.save(step, jax.device_put(tree(step), on(eight)), {"data": {"next": step}})
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def test_the_last_and_every_mth_are_kept(saved):
    with Checkpoints(saved) as found:
        assert found.steps() == [4, 8, 9]
        assert found.latest() == 9


def test_a_checkpoint_holds_the_configuration_and_a_list_of_its_files(saved):
    assert json.loads((saved / "9" / "config" / "metadata").read_text()) == {"seed": 3}
    listed = set(json.loads((saved / "9" / checkpoints.FILES).read_text()))
    there = {p.relative_to(saved / "9").as_posix() for p in (saved / "9").rglob("*") if p.is_file()}
    assert there - listed == set(checkpoints._OURS)  # what is written later than the list
    assert listed < there


@pytest.mark.parametrize("count", [8, 4, 1])
def test_any_mesh_gets_the_same_bits_where_it_wants_them(saved, count):
    devices = mesh(devices=jax.devices()[:count], data=-1, fsdp=min(count, 2))
    with Checkpoints(saved) as found:
        state, loop, step = found.restore(like(devices))
    assert (step, loop) == (9, {"data": {"next": 9}})
    assert_same(state, tree(9))
    for name, at in on(devices).items():
        assert state[name].sharding.is_equivalent_to(at, state[name].ndim)
        assert len(state[name].addressable_shards) == count


def test_damage_anywhere_in_a_checkpoint_is_found(folder, eight):
    """Every file in turn, by a bit turned around, or gone."""
    for path in sorted(p for p in (folder / "9").rglob("*") if p.is_file()):
        if path.name in checkpoints._OURS[1:]:  # orbax's own marks, which hold nothing of a run
            continue
        data = path.read_bytes()
        for damaged in (bytes([data[0] ^ 1]) + data[1:] if data else b"\0", None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with Checkpoints(folder) as found:
                assert found.problem(9), path
        path.write_bytes(data)
    with Checkpoints(folder) as found:
        assert found.problem(9) == ""
        assert found.restore(like(eight))[2] == 9


def test_half_a_copy_gives_way_to_the_one_before(folder, eight):
    shutil.rmtree(folder / "9" / "state")
    (folder / "8" / checkpoints.FILES).unlink()
    with Checkpoints(folder) as found:
        with pytest.warns(UserWarning) as told:
            state, _, step = found.restore(like(eight))
        assert step == 4
        assert_same(state, tree(4))
        found.discard_after(step)
        assert found.steps() == [4]
    messages = [str(one.message) for one in told]
    assert "checkpoint 9 cannot be read: state/" in messages[0] and "is missing" in messages[0]
    assert "checkpoint 8 cannot be read: files.json" in messages[1]


def test_a_whole_checkpoint_of_another_state_is_an_error_and_stays(folder, eight):
    with Checkpoints(folder) as found:
        with pytest.raises(ValueError, match="checkpoint 9 in .* is whole, but cannot be read: "):
            found.restore(like(eight) | {"more": like(eight)["bias"]})
        assert found.latest() == 9


def test_what_process_0_finds_damaged_is_used_by_none(folder, eight, monkeypatch):
    def gather(value):
        """Process 0, which finds the newest damaged."""
        calls.append(value)
        return np.array([len(calls) == 1, value])

    calls = []
    monkeypatch.setattr(checkpoints.multihost_utils, "process_allgather", gather)
    with Checkpoints(folder) as found, pytest.warns(UserWarning, match="9 .*another process"):
        assert found.restore(like(eight))[2] == 8


def test_what_is_saved_is_what_was_given(tmp_path, eight):
    """orbax writes it later, when the loop has gone on."""
    position = {"data": {"next": 3}, "pending": [{"loss": 1.0}]}
    with Checkpoints(tmp_path) as found:
        found.save(3, jax.device_put(tree(3), on(eight)), position)
        position["pending"].append({"loss": 2.0})
        position["data"]["next"] = 4
    with Checkpoints(tmp_path) as found:
        assert found.restore(like(eight))[1] == {"data": {"next": 3}, "pending": [{"loss": 1.0}]}


def test_a_save_that_failed_raises_and_leaves_no_checkpoint(folder, eight, monkeypatch):
    def full(folder):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoints, "_sums", full)
    with pytest.raises(OSError, match="no space left"), Checkpoints(folder) as found:
        found.save(10, jax.device_put(tree(10), on(eight)), {})
    assert Checkpoints(folder).latest() == 9


def test_a_step_is_saved_once(folder, eight):
    with pytest.raises(ValueError, match="already exists"), Checkpoints(folder) as found:
        found.save(9, jax.device_put(tree(9), on(eight)), {})


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep_every": -1}])
def test_bad_options_are_named(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Checkpoints(tmp_path, **options)
