"""What every network promises, checked on a tiny one of each."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.models import MLP, DiT, SongUNet, UNet

CLASSES = 3
NETWORKS = {
    "mlp": (MLP(width=16, depth=2, num_classes=CLASSES), (4, 3)),
    "dit": (
        DiT(width=16, depth=2, num_heads=2, qk_norm="rms", num_classes=CLASSES),
        (4, 4, 6, 3),
    ),
    "unet": (
        UNet(
            width=8,
            multipliers=(1, 2),
            num_blocks=1,
            attention_resolutions=(),
            head_channels=8,
            num_classes=CLASSES,
        ),
        (4, 4, 4, 3),
    ),
    "song_unet": (
        SongUNet.ncsn_pp(  # one level: the way down and up is compared with the authors' code
            width=8, multipliers=(1,), num_blocks=1, attention_resolutions=(), num_classes=CLASSES
        ),
        (4, 4, 4, 3),
    ),
}  # fmt: skip
# These tests compile much and run little.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
every_network = pytest.mark.parametrize("name", NETWORKS)


@functools.partial(jit, static_argnums=0)
def forward(module, variables, x, t, cond=None):
    return module.apply(variables, x, t, cond)


@functools.partial(jit, static_argnums=0)
def masked(module, variables, x, t, cond, keep):
    return module.apply(variables, x, t, cond, keep=keep)


@functools.partial(jit, static_argnums=0)
def loss_and_grad(module, variables, x, t, cond, keys):
    def loss(variables):
        out = module.apply(variables, x, t, cond, train=True, rngs=keys)
        return jnp.mean((out - x) ** 2), out

    (value, out), grad = jax.value_and_grad(loss, has_aux=True)(variables)
    return value, grad, out


@pytest.fixture
def setup(name, random_variables):
    """(module, variables with no zeros among them, x, t, labels)."""
    module, shape = NETWORKS[name]
    x = jax.random.normal(jax.random.key(1), shape)
    t = jnp.array([0.1, 0.4, 0.4, 0.9])
    return module, random_variables(module, x, t), x, t, jnp.array([0, 1, 2, 1])


def keys_for(seed):
    return dict(zip(("dropout", "label"), jax.random.split(jax.random.key(seed)), strict=True))


@every_network
def test_output_at_initialisation_is_exactly_zero_and_only_params_are_made(name):
    module, shape = NETWORKS[name]
    x = jax.random.normal(jax.random.key(3), shape)
    variables = jit(module.init)(jax.random.key(0), x, 0.3, jnp.zeros(4, int))
    assert set(variables) == {"params"}
    assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    out = forward(module, variables, x, jnp.full(4, 0.3), jnp.zeros(4, int))
    assert out.shape == shape and out.dtype == jnp.float32
    assert not np.any(out)


@every_network
def test_scalar_t_and_label_equal_full_vectors(name, setup):
    module, variables, x, _, _ = setup
    np.testing.assert_array_equal(
        forward(module, variables, x, 0.37, jnp.asarray(2)),
        forward(module, variables, x, jnp.full(4, 0.37), jnp.full(4, 2)),
    )


@every_network
def test_samples_do_not_see_each_other_and_each_input_counts(name, setup):
    module, variables, x, t, labels = setup
    out = forward(module, variables, x, t, labels)
    order = jnp.array([2, 0, 3, 1])
    shuffled = forward(module, variables, x[order], t[order], labels[order])
    np.testing.assert_allclose(shuffled, out[order], rtol=1e-4, atol=1e-5)
    changes = {
        "x": forward(module, variables, x.at[1].add(0.1), t, labels),
        "t": forward(module, variables, x, t.at[1].set(0.5), labels),
        "label": forward(module, variables, x, t, labels.at[1].set(0)),
    }
    for what, changed in changes.items():
        difference = np.abs(changed - out).reshape(4, -1).max(axis=1)
        assert difference[1] > 1e-3, what
        assert difference[[0, 2, 3]].max() < 1e-5, what


@every_network
def test_no_label_is_the_null_label(name, setup):
    module, variables, x, t, _ = setup
    np.testing.assert_allclose(
        forward(module, variables, x, t),
        forward(module, variables, x, t, jnp.full(4, CLASSES)), rtol=1e-5, atol=1e-6,
    )  # fmt: skip


@every_network
def test_remat_changes_neither_parameters_nor_values_nor_gradients(name, setup):
    module, variables, x, t, labels = setup
    plain = module.clone(dropout=0.3)
    remat = module.clone(dropout=0.3, remat=True)
    made = jax.eval_shape(remat.init, jax.random.key(0), x, t)
    assert jax.tree.structure(made) == jax.tree.structure(variables)
    expected = loss_and_grad(plain, variables, x, t, labels, keys_for(7))
    actual = loss_and_grad(remat, variables, x, t, labels, keys_for(7))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6), actual, expected
    )
    # Every block is one rematerialised call; the layers at both ends are not.
    ends = {"condition", "in", "modulation", "norm_out", "out"}
    ends |= {"norm_out_0", "out_0"}
    blocks = set(variables["params"]) - ends
    equations = jax.make_jaxpr(remat.apply)(variables, x, t).eqns
    assert sum(e.primitive.name in ("remat2", "checkpoint") for e in equations) == len(blocks)


@every_network
def test_gradients_reach_every_parameter(name, setup):
    module, variables, x, t, _ = setup
    labels = jnp.array([0, 1, 2, 3])  # the null row is a parameter too
    module = module.clone(dropout=0.3)
    _, grad, _ = loss_and_grad(module, variables, x, t, labels, keys_for(0))
    dead = [
        jax.tree_util.keystr(path)
        for path, g in jax.tree_util.tree_leaves_with_path(grad)
        if not np.abs(g).max() > 1e-8
    ]
    assert dead == []


@every_network
def test_dropout_draws_by_its_key_only_in_training(name, setup):
    module, variables, x, t, labels = setup
    module = module.clone(dropout=0.3)
    keys = [keys_for(0), keys_for(0), keys_for(0) | {"dropout": jax.random.key(1)}]
    outs = [loss_and_grad(module, variables, x, t, labels, k)[2] for k in keys]
    np.testing.assert_array_equal(outs[0], outs[1])
    assert np.abs(outs[0] - outs[2]).max() > 1e-3
    np.testing.assert_allclose(
        forward(module, variables, x, t, labels),
        forward(NETWORKS[name][0], variables, x, t, labels), rtol=1e-5, atol=1e-6,
    )  # fmt: skip


@every_network
def test_bfloat16_computes_close_to_float32_with_float32_output(name, setup):
    module, variables, x, t, labels = setup
    expected = forward(module, variables, x, t, labels)
    half = module.clone(dtype=jnp.bfloat16)
    out = forward(half, variables, x, t, labels)
    assert out.dtype == jnp.float32
    error = np.linalg.norm(out - expected) / np.linalg.norm(expected)
    assert 1e-5 < error < 0.03  # bfloat16 rounds by up to 2^-9 = 0.002 an operation
    made = jax.eval_shape(half.init, jax.random.key(0), x, t)
    assert {a.dtype for a in jax.tree.leaves(made)} == {jnp.dtype(jnp.float32)}


@every_network
def test_vmap_over_stacked_parameters_is_a_loop(name, setup):
    module, first, x, t, labels = setup
    second = jax.tree.map(lambda a: 0.9 * a, first)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), first, second)
    out = jit(jax.vmap(lambda v: module.apply(v, x, t, labels)))(stacked)
    for i, variables in enumerate((first, second)):
        expected = forward(module, variables, x, t, labels)
        np.testing.assert_allclose(out[i], expected, rtol=1e-3, atol=1e-5)


@every_network
def test_modules_are_equal_hashable_and_pickle(name):
    module = NETWORKS[name][0]
    again = type(module)(**{
        field: getattr(module, field)
        for field in module.__dataclass_fields__ if field not in ("parent", "name")
    })  # fmt: skip
    assert again == module and hash(again) == hash(module)
    assert pickle.loads(pickle.dumps(module)) == module


@every_network
def test_float64_in_float64_out(name, setup):
    module, variables, x, t, labels = setup
    with jax.enable_x64(True):
        x64 = jnp.asarray(np.asarray(x), jnp.float64)
        out = forward(module.clone(dtype=jnp.float64), variables, x64, t, labels)
    assert out.dtype == jnp.float64
    # The same numbers: a formula in float32 and in float64.
    expected = forward(module, variables, x, t, labels)
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-4)


@every_network
def test_bad_calls_name_what_is_wrong(name, setup):
    module, variables, x, t, labels = setup

    def refuses(match, *args, module=module, **options):
        with pytest.raises(ValueError, match=match):
            module.apply(variables, *args, **options)

    refuses(r"got shape \(3,\)", x[0].ravel()[:3], t)
    refuses(r"t must be a scalar or have shape \(4,\), got \(2,\)", x, t[:2], labels)
    refuses(r"labels must be .* shape \(4,\), got \(3,\)", x, t, labels[:3])
    refuses(r"0 to 3 \(3 is the null label\), got 4", x, t, labels + 2)
    refuses("labels must be integers, got float32", x, t, labels * 1.0)
    refuses(r"\['text'\]; this network takes", x, t, {"text": labels})
    refuses("num_classes=None", x, t, labels, module=module.clone(num_classes=None))
    refuses(r"rate of 0.1 needs a key: apply\(..., rngs={'label'", x, t, labels, train=True)
    dropping = module.clone(dropout=0.5)
    refuses("rate of 0.5 needs a key.*'dropout'", x, t, module=dropping, train=True)
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\), got 1.0"):
        module.clone(dropout=1.0)
    with pytest.raises(ValueError, match=r"label_dropout must lie in \[0, 1\), got -0.1"):
        module.clone(label_dropout=-0.1)


# --- masks of blocks ------------------------------------------------------------------------------

# What of a block's parameters its residual is linear in: (layer, parameters) that zeroed skip it.
LINEAR = {"mlp": "out", "dit": "modulation", "unet": "conv_out", "song_unet": "conv_out"}


def without(name, variables, block):
    """The variables, with those of the block's last layer zero."""
    layers = variables["params"][block]
    if "attention" in layers and "unet" in name:
        own = layers["attention"]
        changed = {"attention": {**own, "out": jax.tree.map(jnp.zeros_like, own["out"])}}
    else:
        changed = {LINEAR[name]: jax.tree.map(jnp.zeros_like, layers[LINEAR[name]])}
    return {"params": {**variables["params"], block: {**layers, **changed}}}


@every_network
def test_a_masked_block_is_one_whose_residual_is_zero(name, setup):
    """Every block alone; a mask of ones is no mask."""
    module, variables, x, t, labels = setup
    blocks = module.blocks(x.shape)
    assert set(blocks) == {b for b in variables["params"] if "block" in b or "resample" in b
                           or b == "middle_attention"}  # fmt: skip
    whole = forward(module, variables, x, t, labels)
    for i in range(-1, len(blocks)):
        keep = jnp.arange(len(blocks)) != i
        expected = forward(module, without(name, variables, blocks[i]), x, t, labels)
        out = masked(module, variables, x, t, labels, keep)
        if i < 0:
            expected = whole
        else:
            assert np.abs(out - whole).max() > 1e-3, blocks[i]
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5, err_msg=str(i))


@every_network
def test_a_mask_of_another_length_is_refused(name, setup):
    module, variables, x, t, _ = setup
    count = len(module.blocks(x.shape))
    for keep in (np.ones(count + 1), np.ones(()), np.ones((1, 1, count))):
        with pytest.raises(ValueError, match=rf"keep must be \[{count}\] or \[batch, {count}\]"):
            module.apply(variables, x, t, keep=keep)
