"""Trees into compiled functions: what is traced, what is static, what is told apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.arrays import as_arrays, jit_trees


def counted(fn):
    """(jit_trees of fn, list that grows by one a trace)."""
    traces = []

    def body(*trees):
        traces.append(None)
        return fn(*trees)

    return jit_trees(body), traces


def test_new_arrays_compile_nothing_and_other_leaves_are_static():
    call, traces = counted(lambda tree, x: (tree["gain"] * x, tree["name"] == "a", tree["flag"]))
    tree = {"gain": np.float32(2.0), "name": "a", "flag": True}
    for gain in (np.float32(2.0), np.float32(3.0)):
        y, named, flag = call({**tree, "gain": gain}, jnp.ones(2))
        np.testing.assert_array_equal(y, gain * np.ones(2))
        assert named and flag
    assert len(traces) == 1
    assert not call({**tree, "name": "b"}, jnp.ones(2))[1]
    assert not call({**tree, "flag": False}, jnp.ones(2))[2]
    assert len(traces) == 3
    call(tree, jnp.ones(3))
    assert len(traces) == 4


def test_numpy_arrays_take_jaxs_types_and_are_read_at_every_call(x64):
    call, traces = counted(lambda a: 2 * a)
    a = np.arange(3.0)
    assert call(a).dtype == jnp.float64
    with jax.enable_x64(False):
        assert call(a).dtype == jnp.float32
        assert call(np.arange(3)).dtype == jnp.int32
    a[0] = 7.0
    assert call(a)[0] == 14.0
    assert len(traces) == 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class One:
    a: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Other:
    a: jax.Array


def test_classes_with_the_same_fields_have_programs_of_their_own():
    call, _ = counted(lambda tree: tree.a + (1 if isinstance(tree, One) else 2))
    x = jnp.zeros(())
    assert (call(One(x)), call(Other(x)), call(One(x))) == (1, 2, 1)


def test_it_runs_under_jit_grad_and_vmap():
    call, _ = counted(lambda tree, x: tree[0] * jnp.sin(x))
    x = jnp.linspace(0.0, 1.0, 4)
    np.testing.assert_allclose(jax.jit(lambda x: call((2.0 * x,), x))(x), 2 * x * jnp.sin(x), rtol=1e-6)
    np.testing.assert_allclose(
        jax.vmap(jax.grad(lambda x: call((jnp.ones(()), 3), x)))(x), jnp.cos(x), rtol=1e-6
    )


def test_a_leaf_without_a_hash_is_refused():
    call, _ = counted(lambda tree, x: x)

    class Unhashable:
        __hash__ = None

    with pytest.raises((TypeError, ValueError), match="hashable"):
        call(Unhashable(), jnp.ones(2))


def test_as_arrays_leaves_flags_and_arrays_as_they_are():
    x = jnp.ones(2)
    tree = (x, 1.5, 2, True, None, "name", np.arange(3.0))
    found = as_arrays(tree)
    assert found[0] is x and found[3] is True and found[5] == "name"
    assert all(isinstance(found[i], jax.Array) for i in (1, 2, 6))
    assert found[6].dtype == jnp.float32
    arrays = {"a": x}
    assert as_arrays(arrays) is arrays
