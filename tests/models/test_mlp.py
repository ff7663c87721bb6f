import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.models import MLP
from jaxdiff.models.embeddings import ConditionEmbedding


@pytest.mark.parametrize("residual", [True, False])
def test_forward_is_its_formula(residual, random_variables):
    module = MLP(width=6, depth=2, residual=residual, num_classes=2)
    x, t, labels = jnp.array([[0.3, -1.0], [2.0, 0.5]]), jnp.array([0.2, 0.8]), jnp.array([1, 2])
    variables = random_variables(module, x, t)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])

    def dense(layer, h):
        return h @ layer["kernel"] + layer["bias"]

    def silu(h):
        return h / (1 + np.exp(-h))

    embedding = ConditionEmbedding(6, 6, num_classes=2)
    c = embedding.apply({"params": variables["params"]["condition"]}, t, labels, 2, False)
    h = dense(p["in"], np.asarray(x))
    for i in range(2):
        block = p[f"block_{i}"]
        modulation = dense(block["modulation"], silu(np.asarray(c)))
        scale, shift = modulation[:, :6], modulation[:, 6:]
        y = dense(block["out"], silu(dense(block["hidden"], silu(h)) * (1 + scale) + shift))
        h = h + y if residual else y
    expected = dense(p["out"], silu(h))
    out = module.apply(variables, x, t, labels)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(module.apply(variables, x, t, {"label": labels}), out)


def test_parameter_count_by_hand():
    width, depth, dim, classes = 32, 3, 5, 7
    module = MLP(width=width, depth=depth, num_classes=classes)
    made = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, dim)), 0.0)
    square = width * width + width
    expected = (
        (dim * width + width)
        + 2 * square  # the time's two layers
        + (classes + 1) * width
        + depth * 4 * square  # hidden, out, and a modulation of twice the width
        + (width * dim + dim)
    )
    assert sum(a.size for a in jax.tree.leaves(made)) == expected


def test_images_are_refused():
    with pytest.raises(ValueError, match=r"x must be \[batch, dim\], got shape \(1, 4, 4, 1\)"):
        MLP().init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)), 0.0)


def test_masks_of_samples_and_of_no_residual(random_variables):
    module = MLP(width=6, depth=2)
    x, t = jnp.array([[0.3, -1.0], [2.0, 0.5]]), jnp.array([0.2, 0.8])
    variables = random_variables(module, x, t)
    keep = jnp.array([[1.0, 0.0], [0.25, 1.0]])
    out = module.apply(variables, x, t, keep=keep)
    for i in range(2):
        alone = module.apply(variables, x[i : i + 1], t[i : i + 1], keep=keep[i])
        np.testing.assert_allclose(out[i : i + 1], alone, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="keep needs residual=True"):
        MLP(width=6, depth=2, residual=False).apply(variables, x, t, keep=keep)
