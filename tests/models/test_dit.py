import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.models import DiT
from jaxdiff.models.dit import SIZES, patchify, unpatchify
from jaxdiff.models.embeddings import ConditionEmbedding, sincos_2d


def count(module, shape):
    made = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shape), 0.0)
    return sum(a.size for a in jax.tree.leaves(made))


# --- parameter counts -----------------------------------------------------------------------------

# The paper's table of sizes, in millions.
PUBLISHED = {"DiT-S/2": 33, "DiT-B/2": 130, "DiT-L/2": 458, "DiT-XL/2": 675}
# (depth, width) of the same table.
SHAPES = {"S": (12, 384), "B": (12, 768), "L": (24, 1024), "XL": (28, 1152)}


def by_hand(name, learn_sigma, channels=4, classes=1000):
    """Trainable parameters, layer by layer (weights + biases)."""
    size, patch = name.removeprefix("DiT-").split("/")
    (depth, d), p = SHAPES[size], int(patch)
    pixels = p * p * channels
    patches = pixels * d + d
    time = (256 * d + d) + (d * d + d)
    labels = (classes + 1) * d
    attention = (3 * d * d + 3 * d) + (d * d + d)
    mlp = (4 * d * d + 4 * d) + (4 * d * d + d)
    modulation = 6 * d * d + 6 * d
    outputs = pixels * (2 if learn_sigma else 1)
    final = (2 * d * d + 2 * d) + (d * outputs + outputs)
    return patches + time + labels + depth * (attention + mlp + modulation) + final


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name, learn_sigma):
    module = DiT.from_size(name, num_classes=1000, learn_sigma=learn_sigma)
    total = count(module, (1, 32, 32, 4))
    assert total == by_hand(name, learn_sigma)
    assert round(total / 1e6) == PUBLISHED[name]


def test_parameter_count_of_xl_2_is_the_authors_to_the_last_one():
    module = DiT.from_size("DiT-XL/2", num_classes=1000, learn_sigma=True)
    # Their program prints 675,129,632, frozen position table (256 tokens x 1152) included.
    assert count(module, (1, 32, 32, 4)) + 256 * 1152 == 675_129_632


def test_sizes_are_the_twelve_of_the_paper():
    assert len(SIZES) == 12
    for name, options in SIZES.items():
        size, patch = name.removeprefix("DiT-").split("/")
        assert (options["depth"], options["width"]) == SHAPES[size]
        assert options["patch_size"] == int(patch)
        module = DiT.from_size(name, num_classes=1000, depth=1)
        depth = SHAPES[size][0]
        d = SHAPES[size][1]
        block = 18 * d * d + 15 * d
        assert count(module, (1, 32, 32, 4)) == by_hand(name, False) - (depth - 1) * block
    with pytest.raises(ValueError, match="unknown size 'DiT-M/2'; known: DiT-S/2, DiT-S/4"):
        DiT.from_size("DiT-M/2")


def test_initialisation_is_the_authors(jit):
    module = DiT(width=64, depth=1, num_heads=4, num_classes=500, qk_norm="layer")
    params = jit(module.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 3)), 0.0)["params"]
    block = params["block_0"]
    for layer in (params["in"], block["attention"]["qkv"], block["mlp_in"], block["mlp_out"]):
        bound = np.sqrt(6 / sum(layer["kernel"].shape))
        assert 0.95 * bound < np.abs(layer["kernel"]).max() <= bound
    condition = params["condition"]
    normals = [condition["time"][k]["kernel"] for k in ("hidden", "out")]
    for table in (*normals, condition["label"]["table"]["embedding"]):
        assert abs(table.std() - 0.02) < 0.001
    for layer in (block["modulation"], params["modulation"], params["out"]):
        assert not np.any(layer["kernel"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key == "bias":
            assert not np.any(leaf)


# --- patches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [1, 2, 3, 6])
def test_patches_hold_their_pixels_and_come_back(patch):
    x = jnp.arange(2 * 6 * 12 * 3.0).reshape(2, 6, 12, 3)
    tokens = patchify(x, patch)
    for i in range(6 // patch):
        for j in range(12 // patch):
            square = x[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
            token = tokens[:, i * (12 // patch) + j]
            np.testing.assert_array_equal(token, square.reshape(2, -1))
    np.testing.assert_array_equal(unpatchify(tokens, 6, 12, patch), x)


def test_a_patch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="patch_size 4 does not divide the image size 8 x 6"):
        DiT(patch_size=4).init(jax.random.key(0), jnp.zeros((1, 8, 6, 1)), 0.0)


# --- the forward pass -----------------------------------------------------------------------------


def reference(module, variables, x, t, labels):
    """DiT in NumPy, float64, from the paper's equations."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    batch, height, width, channels = x.shape
    d, heads, patch = module.width, module.num_heads, module.patch_size

    def dense(layer, h):
        return h @ layer["kernel"] + layer["bias"]

    def silu(h):
        return h / (1 + np.exp(-h))

    def gelu(h):
        return 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))

    def norm(h, parameters=None, centre=True):
        h = h - h.mean(-1, keepdims=True) if centre else h
        h = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6)
        if parameters is None:
            return h
        return h * parameters["scale"] + parameters.get("bias", 0.0)

    def attention(layer, h):
        q, k, v = np.split(dense(layer["qkv"], h), 3, axis=-1)
        out = np.zeros_like(h)
        for b in range(batch):
            for i in range(heads):
                part = slice(i * d // heads, (i + 1) * d // heads)
                qi, ki, vi = q[b, :, part], k[b, :, part], v[b, :, part]
                if module.qk_norm is not None:
                    centre = module.qk_norm == "layer"
                    qi, ki = norm(qi, layer["q_norm"], centre), norm(ki, layer["k_norm"], centre)
                logits = qi @ ki.T / np.sqrt(d // heads)
                weights = np.exp(logits - logits.max(-1, keepdims=True))
                out[b, :, part] = weights / weights.sum(-1, keepdims=True) @ vi
        return dense(layer["out"], out)

    embedding = ConditionEmbedding(d, 256, module.time_scale, module.num_classes)
    condition = {"params": variables["params"]["condition"]}
    c = silu(np.asarray(embedding.apply(condition, t, labels, batch, False), np.float64))
    rows, columns = height // patch, width // patch
    tokens = np.zeros((batch, rows * columns, patch * patch * channels))
    for i in range(rows):
        for j in range(columns):
            square = x[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
            tokens[:, i * columns + j] = np.reshape(square, (batch, -1))
    h = dense(p["in"], tokens) + np.asarray(sincos_2d(rows, columns, d)).reshape(-1, d)
    for i in range(module.depth):
        block = p[f"block_{i}"]
        m = dense(block["modulation"], c)[:, None].reshape(batch, 1, 6, d)
        a = norm(h) * (1 + m[:, :, 1]) + m[:, :, 0]
        h = h + m[:, :, 2] * attention(block["attention"], a)
        a = norm(h) * (1 + m[:, :, 4]) + m[:, :, 3]
        h = h + m[:, :, 5] * dense(block["mlp_out"], gelu(dense(block["mlp_in"], a)))
    m = dense(p["modulation"], c)[:, None]
    out = dense(p["out"], norm(h) * (1 + m[..., d:]) + m[..., :d])
    image = np.zeros((batch, height, width, out.shape[-1] // patch**2))
    for i in range(rows):
        for j in range(columns):
            square = out[:, i * columns + j].reshape(batch, patch, patch, -1)
            image[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch] = square
    return image


@pytest.mark.parametrize("qk_norm", [None, "rms", "layer"])
def test_forward_is_the_paper_s(qk_norm, random_variables, jit):
    module = DiT(
        patch_size=2, width=8, depth=2, num_heads=2, num_classes=3, qk_norm=qk_norm,
        learn_sigma=True,
    )  # fmt: skip
    x = jax.random.normal(jax.random.key(1), (2, 4, 6, 2))
    t, labels = jnp.array([0.2, 0.9]), jnp.array([2, 3])
    variables = random_variables(module, x, t)
    expected = reference(module, variables, np.asarray(x, np.float64), t, labels)
    apply = jit(module.apply, static_argnames="method")
    prediction, variance = apply(variables, x, t, labels, method="with_variance")
    np.testing.assert_allclose(prediction, expected[..., :2], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(variance, expected[..., 2:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(apply(variables, x, t, labels), prediction, rtol=1e-5, atol=1e-6)


def test_variance_needs_learn_sigma(random_variables):
    module = DiT(width=8, depth=0, num_heads=2)
    x = jnp.zeros((1, 4, 4, 1))
    variables = random_variables(module, x, 0.0)
    with pytest.raises(ValueError, match="made with learn_sigma=False"):
        module.apply(variables, x, 0.0, method="with_variance")


def mean_attention(q, k, v):
    return jnp.broadcast_to(v.mean(axis=1, keepdims=True), v.shape)


def test_attention_can_be_replaced(random_variables, jit):
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 1))
    module = DiT(width=8, depth=1, num_heads=2)
    variables = random_variables(module, x, 0.5)
    plain, other = (
        jit(m.apply) for m in (module, module.clone(attention=mean_attention))
    )
    assert np.abs(other(variables, x, 0.5) - plain(variables, x, 0.5)).max() > 0.01
    # Without queries all logits are equal: attention is then the mean of the values.
    no_queries = jax.tree_util.tree_map_with_path(
        lambda path, a: a.at[..., :8].set(0.0) if path[-2].key == "qkv" else a, variables
    )
    np.testing.assert_allclose(
        other(no_queries, x, 0.5), plain(no_queries, x, 0.5), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "options, match",
    [
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ({"width": 30, "num_heads": 4}, "width 30 must be a multiple of 4 and of num_heads 4"),
        ({"width": 6, "num_heads": 2}, "width 6 must be a multiple of 4"),
        ({"qk_norm": "batch"}, r"one of \[None, 'rms', 'layer'\], got 'batch'"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        DiT(**options)


def test_images_come_in_four_dimensions_and_are_no_condition():
    module = DiT(width=8, depth=0, num_heads=2)
    with pytest.raises(ValueError, match=r"got shape \(4, 4, 1\)"):
        module.init(jax.random.key(0), jnp.zeros((4, 4, 1)), 0.0)
    x = jnp.zeros((1, 4, 4, 1))
    with pytest.raises(ValueError, match=r"keys \['image'\]; this network takes \['label', 'augment'\]"):
        module.init(jax.random.key(0), x, 0.0, {"image": x})
