"""Where a state lies, and that a step does not depend on it: 8 simulated devices against one."""

import dataclasses
import re
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from tiny_run import tiny_config

from jaxdiff import config as configuration
from jaxdiff import parallel
from jaxdiff.models import MLP, DiT, UNet
from jaxdiff.settings import SECTIONS
from jaxdiff.training.placement import place_to_read
from jaxdiff.training.run import batches, prepare
from jaxdiff.training.state import State, make_optimizer
from jaxdiff.training.step import make_step

BATCH = 16


def shapes(module, x):
    label = None if module.num_classes is None else jnp.zeros(1, jnp.int32)
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(x), jnp.zeros(1), label)


DIT = DiT(patch_size=2, width=32, depth=1, num_heads=4)
DIT_SHAPES = shapes(DIT, (1, 8, 8, 1))


def mesh(**axes):
    return parallel.mesh(**({"data": 1, "fsdp": 1, "tensor": 1} | axes))


def specs(mesh, rules=(), tensor_rules=DIT.tensor_rules):
    found = parallel.partition(DIT_SHAPES, mesh, rules, tensor_rules)["params"]
    return found | {"block": found["block_0"]}


# --- rules ----------------------------------------------------------------------------------------


def test_without_rules_fsdp_splits_the_largest_dimension_it_divides():
    found = specs(mesh(fsdp=8))
    assert found["block"]["mlp_in"]["kernel"] == P(None, ("fsdp",))  # [32, 128]
    assert found["block"]["mlp_out"]["kernel"] == P(("fsdp",), None)  # [128, 32]
    assert found["block"]["mlp_in"]["bias"] == P(("fsdp",))
    assert found["in"]["kernel"] == P(None, ("fsdp",))  # [4, 32]: 8 divides the second alone
    assert found["out"]["bias"] == P(None)  # [4]: not at all


def test_tensor_rules_are_megatrons_and_fsdp_takes_another_dimension():
    block = specs(mesh(fsdp=4, tensor=2))["block"]
    assert block["attention"]["qkv"]["kernel"] == P(("fsdp",), ("tensor",))
    assert block["attention"]["qkv"]["bias"] == P(("tensor",))
    assert block["attention"]["out"]["kernel"] == P(("tensor",), ("fsdp",))
    assert block["attention"]["out"]["bias"] == P(("fsdp",))
    assert block["mlp_in"]["kernel"] == P(("fsdp",), ("tensor",))
    assert block["mlp_out"]["kernel"] == P(("tensor",), ("fsdp",))


def test_the_first_rule_that_matches_decides_alone():
    rules = ("mlp_in/kernel=fsdp", "mlp_(in|out)/kernel=data+fsdp,-", "bias$=-")
    block = specs(mesh(data=2, fsdp=4), rules)["block"]
    assert block["mlp_in"]["kernel"] == P(("fsdp",))
    assert block["mlp_out"]["kernel"] == P(("data", "fsdp"), None)
    assert block["mlp_in"]["bias"] == P(None)
    assert block["modulation"]["kernel"] == P(None, ("fsdp",))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("mlp_in", "'mlp_in' must be 'regex=axis,axis'"),
        ("=fsdp", "'=fsdp' must be 'regex=axis,axis'"),
        ("mlp_(in=fsdp", "no regular expression"),
        ("mlp_in=fdsp", "no axis 'fdsp'; did you mean fsdp"),
        ("mlp_in/kernel=fsdp,fsdp", "uses an axis twice"),
        ("mlp_inn/kernel=fsdp", "matches none of the parameters params/block_0"),
        ("mlp_in/bias=-,fsdp", r"names 2 dimensions, but params/block_0/mlp_in/bias has shape \[128\]"),
        ("^params/out/bias=fsdp", r"fsdp = 8 does not divide dimension 0 of params/out/bias, .*\[4\]"),
    ],
)
def test_a_bad_rule_is_an_error_before_anything_is_computed(rule, message):
    with pytest.raises(ValueError, match=message):
        specs(mesh(fsdp=8), (rule,))


def test_a_rule_behind_others_that_match_all_its_parameters_is_an_error():
    rules = ("mlp_in=-", "out/bias=-", "mlp_in/kernel=fsdp,-")
    with pytest.raises(ValueError, match="'mlp_in/kernel=fsdp,-' decides nothing.*block_0/mlp_in"):
        specs(mesh(fsdp=8), rules)
    block = specs(mesh(fsdp=8), (rules[2], rules[0], "mlp_(in|out)/bias=fsdp"))["block"]
    assert block["mlp_in"] == {"kernel": P(("fsdp",), None), "bias": P(None)}
    assert block["mlp_out"]["bias"] == P(("fsdp",))


def test_a_network_without_tensor_rules_needs_them_written_out():
    x = (1, 8, 8, 1)
    params = shapes(UNet(width=8, multipliers=(1,), attention_resolutions=()), x)
    devices = mesh(data=4, tensor=2)
    assert not hasattr(UNet, "tensor_rules")
    with pytest.raises(ValueError, match='no rules for it: use "fsdp".*"tensor"'):
        parallel.partition(params, devices)
    found = parallel.partition(params, devices, (r"conv_in/kernel=-,-,-,tensor",))
    assert found["params"]["middle_block_0"]["conv_in"]["kernel"] == P(None, None, None, ("tensor",))
    with pytest.raises(ValueError, match="tensor = 2 does not divide dimension 0 of .*hidden/bias"):
        network = MLP(width=3, depth=1, time_scale=1.0)
        parallel.partition(shapes(network, (1, 2)), devices, (), network.tensor_rules)


def test_copies_of_the_parameters_lie_where_the_parameters_do():
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    tree = {
        "opt": jax.eval_shape(optimizer.init, DIT_SHAPES), "ema_tracks": (DIT_SHAPES,),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }  # fmt: skip
    wanted = parallel.partition(DIT_SHAPES, mesh(fsdp=4, tensor=2), (), DIT.tensor_rules)
    found = parallel.follow(tree, DIT_SHAPES, wanted)
    assert found["ema_tracks"] == (wanted,)
    adam = found["opt"][1][0]
    assert adam.mu == wanted and adam.nu == wanted
    assert adam.count == P() and found["step"] == P()


def test_a_process_reads_the_rows_that_its_devices_hold_in_any_order():
    found = parallel.local_rows(mesh(data=4, tensor=2), 16)
    np.testing.assert_array_equal(found, np.arange(16))
    devices = np.array(jax.devices())[[3, 0, 6, 1, 7, 4, 2, 5]]
    shuffled = Mesh(devices.reshape(4, 2), ("data", "tensor"))
    batch = parallel.put_batch(shuffled, {"x": np.arange(16)}, 16)["x"]
    np.testing.assert_array_equal(batch, np.arange(16))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(4,)}


# --- the state ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Everything that is drawn for an example: noise, a stratified time, a dropped label."""
    config = tiny_config(
        tmp_path_factory.mktemp("mesh"), "--config.model.label_dropout=0.5",
        "--config.optimizer.eps=1e-3",
    )  # fmt: skip
    with config.unlocked():
        config.loss.time_options = {"stratified": True}
    return config


def planned(config, devices=None, **sections):
    config = config.copy_and_resolve_references()
    for section, values in sections.items():
        config[section].update(values)
    return prepare(config, devices)


class Run(NamedTuple):
    state: State
    history: list  # (loss, parameters, optimiser's state, averages) after each step, on the host
    flops: float


def run(plan):
    placement = plan.placement
    out = placement.state, placement.replicated
    state = jax.jit(plan.init, out_shardings=out[0])()
    step = jax.jit(
        plan.step, donate_argnums=0, in_shardings=(out[0], placement.batch), out_shardings=out
    )
    step = step.lower(placement.abstract, plan.batch).compile()
    found = follow(step, state, plan, lambda rows: placement.put(rows, BATCH))
    return found._replace(flops=step.cost_analysis()["flops"])


def follow(step, state, plan, put, steps=3):
    stream = batches(plan.experiment.config, plan.source)
    history = []
    for _ in range(steps):
        state, metrics = step(state, put(next(stream)))
        found = metrics["loss"], state.params, state.opt_state, state.ema
        history.append(jax.device_get(found))
    return Run(state, history, 0.0)


def assert_close(found, expected):
    for one, other in zip(found.history, expected.history, strict=False):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, other
        )


@pytest.fixture(scope="module")
def alone(config):
    return run(planned(config, jax.devices()[:1]))


def test_a_state_is_made_and_kept_in_pieces(config, alone):
    found = run(planned(config, mesh={"fsdp": 8}))
    assert_close(found, alone)
    assert found.flops < 0.25 * alone.flops  # the work is split as well
    leaves = jax.tree.leaves((found.state.params, found.state.opt_state, found.state.ema))
    whole = sum(leaf.nbytes for leaf in leaves)
    for device in jax.devices():
        here = [s.data.nbytes for a in leaves for s in a.addressable_shards if s.device == device]
        assert whole / 8 <= sum(here) < 1.05 * whole / 8


def test_no_device_ever_holds_the_whole_state(config):
    plan = planned(config, mesh={"fsdp": 8}, model={"width": 256})
    made = jax.jit(plan.init, out_shardings=plan.placement.state).lower().compile()
    memory = made.memory_analysis()
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(plan.placement.abstract.params))
    assert 4 * whole / 8 < memory.output_size_in_bytes < 1.02 * 4 * whole / 8  # with three copies
    assert memory.temp_size_in_bytes < whole / 2


@pytest.mark.parametrize(
    ("sizes", "accumulate"),
    [
        ({"data": 4, "fsdp": 2}, 2),
        ({"tensor": 2}, 4),
    ],
)
def test_a_step_is_the_same_on_any_mesh_and_in_any_number_of_parts(config, alone, sizes, accumulate):
    plan = planned(config, mesh=sizes, train={"accumulate": accumulate})
    found = run(plan)
    assert_close(found, alone)
    kernel = found.state.params["params"]["block_0"]["hidden"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (16, 8)


def test_the_step_of_one_device_under_pmap_is_the_same(config, alone):
    plan = planned(config, jax.devices()[:1], train={"accumulate": 2})
    experiment = plan.experiment
    step = make_step(experiment, make_optimizer(experiment.config), axis_name="devices")
    mapped = jax.pmap(step, axis_name="devices", in_axes=(None, 0), out_axes=None)

    def put(rows):
        return {name: a.reshape(8, -1, *a.shape[1:]) for name, a in rows.items()}

    assert_close(follow(mapped, jax.jit(plan.init)(), plan, put, steps=1), alone)


def test_a_tensor_split_transformer_is_the_whole_one():
    draw = np.random.default_rng(0)
    x, t = draw.standard_normal((8, 8, 8, 1), np.float32), np.linspace(0.1, 0.9, 8, dtype=np.float32)
    # Not the initial parameters: with those the network is zero.
    params = jax.tree.map(lambda a: 0.2 * draw.standard_normal(a.shape, np.float32), DIT_SHAPES)

    devices = mesh(data=4, tensor=2)
    where = jax.tree.map(
        lambda spec: jax.sharding.NamedSharding(devices, spec),
        parallel.partition(params, devices, (), DIT.tensor_rules),
    )
    split = jax.device_put(params, where), *parallel.split_batch(devices, (x, t))
    program = jax.jit(DIT.apply).lower(*split).compile()
    expected = jax.jit(DIT.apply)(params, x, t)
    np.testing.assert_allclose(program(*split), expected, rtol=1e-3, atol=1e-4)
    # Megatron's: one sum over devices after the attention, one after the MLP.
    assert len(re.findall(r" all-reduce\(", program.as_text())) == 2


def test_a_run_is_read_on_its_own_mesh_where_that_fits_else_whole(config):
    plan = planned(config, jax.devices()[:1])
    for sizes, expected in (({"fsdp": 8}, {"fsdp": 8}), ({"fsdp": 3}, {"data": 8})):
        changed = plan.experiment.config.copy_and_resolve_references()
        changed.mesh.update(sizes)
        experiment = dataclasses.replace(plan.experiment, config=changed)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = place_to_read(experiment, plan.init)
        said = "fsdp 3, tensor 1) does not fit the devices here, 8: each of them holds the whole state"
        assert [said in str(one.message) for one in told] == ([True] if "data" in expected else [])
        assert {k: v for k, v in found.mesh.shape.items() if v > 1} == expected


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"mesh": {"fsdp": 3}}, r"config.mesh: the mesh axes .*'fsdp': 3.* multiply to the 8 devices"),
        ({"mesh": {"data": 0}}, "config.mesh: .*must be positive"),
        ({"mesh": {"rules": ("nothing=fsdp",)}}, "config.mesh: rule 'nothing=fsdp' matches none"),
        ({"train": {"accumulate": 4}}, r"multiple of 32: 8 devices \(data 8 x fsdp 1\).* in 4 parts"),
        ({"train": {"accumulate": 0}}, "config.train.accumulate must be at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_said_before_the_run(config, sections, message):
    with pytest.raises(ValueError, match=message):
        planned(config, **sections)


# --- memory and precision -------------------------------------------------------------------------


def test_remat_keeps_the_values_and_needs_less_memory():
    draw = np.random.default_rng(0)
    x, t = draw.standard_normal((512, 2), np.float32), np.linspace(0.1, 0.9, 512, dtype=np.float32)

    def of(remat, depth):
        """(function of the parameters, their shapes)"""
        network = MLP(width=32, depth=depth, remat=remat)
        return (lambda params: jnp.mean(network.apply(params, x, t) ** 2)), shapes(network, (1, 2))

    def kept(remat, depth):
        """How many numbers the backward pass is given, in units of a block's input."""
        loss, params = of(remat, depth)
        residuals = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(residuals)) / x.shape[0] / 32

    def of_a_block(remat):
        return kept(remat, 2) - kept(remat, 1)

    params = 4 * 32 * 32 / x.shape[0] / 32  # those of a block, without biases
    # Of each block its input; its input and three products, one twice as wide of which half is kept.
    assert params + 1 < of_a_block(True) == of_a_block("full") < params + 1.1
    assert params + 4 < of_a_block("dots") < params + 4.1 < params + 10 < of_a_block(False)

    params = jax.tree.map(lambda a: 0.2 * draw.standard_normal(a.shape, np.float32), of(False, 3)[1])
    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    found, memory = [], []
    for remat in (False, "dots", True):
        grad = jax.jit(jax.grad(of(remat, 3)[0])).lower(params).compile(options)
        found.append(grad(params))
        memory.append(grad.memory_analysis().temp_size_in_bytes)
    assert memory[2] < memory[1] < memory[0]
    for other in found[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), other, found[0]
        )


def test_remat_is_a_flag_or_a_name_in_a_configuration(tmp_path):
    for text, value in (("true", True), ("dots", "dots")):
        config = tiny_config(tmp_path, f"--config.model.remat={text}")
        assert prepare(config, jax.devices()[:1]).experiment.module.remat == value
        configuration.write(tmp_path / "config.json", config)
        assert configuration.read(tmp_path / "config.json", SECTIONS).model.remat == value
    with pytest.raises(ValueError, match="remat must be False, True or one of .*'dots'.* got 'dot'"):
        prepare(tiny_config(tmp_path, "--config.model.remat=dot"))
    with pytest.raises(TypeError, match="config.model.remat must be of type bool or str, got 3"):
        tiny_config(tmp_path, "--config.model.remat=3")


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_bfloat16_is_for_the_network_alone(config):
    plan = planned(
        config, jax.devices()[:1], denoiser={"dtype": "bfloat16"}, train={"accumulate": 2}
    )
    after = jax.eval_shape(plan.step, plan.placement.abstract, plan.batch)
    floats = [a.dtype for a in jax.tree.leaves(after) if jnp.issubdtype(a.dtype, jnp.floating)]
    assert len(floats) > 40 and set(floats) == {jnp.dtype("float32")}
    found = list(equations(jax.make_jaxpr(plan.step)(plan.placement.abstract, plan.batch).jaxpr))
    products = [eqn.outvars[0].aval.dtype for eqn in found if eqn.primitive.name == "dot_general"]
    assert jnp.bfloat16 in products
    (scan,) = [e for e in found if e.primitive.name == "scan" and e.params["length"] == 2]
    sums = [v.aval for v in scan.outvars[: scan.params["num_carry"]]]
    assert len(sums) > 10 and {a.dtype for a in sums} == {jnp.dtype("float32")}
    totals = [e for e in found if e.primitive.name == "reduce_sum" and not e.outvars[0].aval.shape]
    assert totals and {e.outvars[0].aval.dtype for e in totals} == {jnp.dtype("float32")}
