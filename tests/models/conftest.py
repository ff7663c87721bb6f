import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@functools.cache
def _random_variables(module, shapes, static):
    made = jax.eval_shape(
        lambda *arrays: module.init(jax.random.key(0), *arrays, *static),
        *(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes),
    )
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(mean, 0.2, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, made)


@pytest.fixture
def jit():
    """`jax.jit` for programs that take long to compile and no time to run."""
    return functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture
def random_variables():
    """(module, *arrays, static=()) -> its variables, all random: no zero left by an initialiser."""

    def make(module, *arrays, static=()):
        arrays = [jnp.asarray(a) for a in arrays]
        return _random_variables(module, tuple((a.shape, a.dtype) for a in arrays), static)

    return make
