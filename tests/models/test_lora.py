"""Adapters of low rank: what they add, to which kernels, and that training finds one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff.models import MLP, UNet, add_lora, lora


def variables_of(module, x):
    return module.init(jax.random.key(0), x, jnp.zeros(len(x)))


def test_what_is_added_is_the_product():
    variables = variables_of(MLP(width=16, depth=1), jnp.zeros((1, 3)))
    adapter = lora(jax.random.key(1), variables, rank=2, match=r"block_0/.*kernel$")
    assert sorted(adapter) == [f"block_0/{n}/kernel" for n in ("hidden", "modulation", "out")]
    jax.tree.map(np.testing.assert_array_equal, add_lora(variables, adapter), variables)
    rng = np.random.default_rng(0)
    adapter = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), adapter)
    changed = add_lora(variables, adapter, 0.5)["params"]
    pair = adapter["block_0/hidden/kernel"]
    kernel = variables["params"]["block_0"]["hidden"]["kernel"]
    expected = kernel + 0.5 * np.asarray(pair["down"]) @ np.asarray(pair["up"])
    np.testing.assert_allclose(changed["block_0"]["hidden"]["kernel"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(changed["in"]["kernel"], variables["params"]["in"]["kernel"])


def test_a_convolution_is_a_matrix_of_its_window():
    x = jnp.zeros((1, 8, 8, 1))
    module = UNet(width=8, multipliers=(1,), num_blocks=1, attention_resolutions=())
    variables = jax.eval_shape(lambda: variables_of(module, x))
    variables = jax.tree.map(lambda a: jnp.zeros(a.shape), variables)
    adapter = lora(jax.random.key(0), variables, rank=3, match=r"conv.*kernel$")
    shapes = {pair["down"].shape for pair in adapter.values()}
    assert (72, 3) in shapes  # 3 x 3 of 8 channels
    changed = add_lora(variables, jax.tree.map(jnp.ones_like, adapter))
    assert jax.tree.map(jnp.shape, changed) == jax.tree.map(jnp.shape, variables)


def test_training_finds_a_change_of_that_rank():
    rng = np.random.default_rng(0)
    shape = (6, 5)
    kernel, change = rng.normal(size=shape), rng.normal(size=(6, 2)) @ rng.normal(size=(2, 5))
    variables = {"params": {"dense": {"kernel": jnp.asarray(kernel, jnp.float32)}}}
    x = jnp.asarray(rng.normal(size=(64, 6)), jnp.float32)

    def loss(adapter):
        found = x @ add_lora(variables, adapter)["params"]["dense"]["kernel"]
        return jnp.mean((found - x @ (kernel + change)) ** 2)

    optimizer = optax.adam(0.03)

    @jax.jit
    def train(adapter):
        def step(carry, _):
            updates, state = optimizer.update(jax.grad(loss)(carry[0]), carry[1])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, (adapter, optimizer.init(adapter)), None, 1500)[0][0]

    losses = {}
    for rank in (1, 2):
        adapter = lora(jax.random.key(0), variables, rank)
        losses[rank] = float(loss(train(adapter)))
    # What rank 1 leaves is the second singular direction.
    assert losses[2] < 1e-5 < 0.05 < losses[1]


def test_bad_arguments():
    variables = variables_of(MLP(width=8, depth=1), jnp.zeros((1, 2)))
    key, adapter = jax.random.key(0), lora(jax.random.key(0), variables)
    for message, call in (
        ("params", lambda: lora(key, variables["params"])),
        ("rank must be a positive integer, got 0", lambda: lora(key, variables, 0)),
        ("no kernel matches 'attention'", lambda: lora(key, variables, match="attention")),
        ("the adapter changes 'a/kernel'", lambda: add_lora(variables, {"a/kernel": {}})),
        (
            "of 2 x 8, the variables' has shape",
            lambda: add_lora(variables_of(MLP(width=9, depth=1), jnp.zeros((1, 2))),
                             {"in/kernel": adapter["in/kernel"]}),
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
