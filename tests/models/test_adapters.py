import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import counted
from flax import nnx

import jaxdiff as jd
from jaxdiff.models import MLP, from_linen, from_nnx, skip_blocks


class Scaled(nn.Module):
    """A network with the least signature: no cond, no train."""

    @nn.compact
    def __call__(self, x, t):
        return self.param("scale", nn.initializers.ones, (x.shape[-1],)) * x * t


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs)
        self.table = nnx.Embed(4, 3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, t, cond=None):
        y = self.dropout(self.linear(x)) * t
        return y if cond is None else y + self.table(cond)


X = jax.random.normal(jax.random.key(0), (4, 3))
LABELS = jnp.array([0, 1, 2, 3])


@pytest.fixture
def mlp(random_variables):
    module = MLP(width=8, depth=1, num_classes=3)
    return module, random_variables(module, X, 0.5)


def test_linen_denoiser_is_the_module(mlp):
    module, variables = mlp
    denoiser = from_linen(module, variables, "v")
    assert denoiser.prediction == "v" and denoiser.params is variables
    np.testing.assert_array_equal(
        denoiser(X, 0.5, 0.8, 0.6, LABELS), module.apply(variables, X, 0.5, LABELS)
    )
    np.testing.assert_array_equal(denoiser(X, 0.5, 0.8, 0.6), module.apply(variables, X, 0.5))
    v, x0 = denoiser(X, 0.5, 0.8, 0.6), denoiser.predict("x0", X, 0.5, 0.8, 0.6)
    np.testing.assert_allclose(x0, 0.8 * X - 0.6 * v, rtol=1e-5, atol=1e-6)


def test_linen_module_may_take_neither_cond_nor_train():
    denoiser = from_linen(
        Scaled(), {"params": {"scale": jnp.array([1.0, 2.0, 3.0])}},
        time=lambda t, alpha, sigma: 1000 * t + sigma,
    )  # fmt: skip
    expected = X * 500.6 * np.array([1, 2, 3])
    np.testing.assert_allclose(denoiser(X, 0.5, 0.8, 0.6), expected, rtol=1e-6)


def test_training_mode_takes_its_keys_along(mlp):
    module, variables = mlp
    module = module.clone(dropout=0.5)
    rngs = {"dropout": jax.random.key(1), "label": jax.random.key(2)}
    denoiser = from_linen(module, variables, train=True, rngs=rngs)
    np.testing.assert_array_equal(
        denoiser(X, 0.5, 0.8, 0.6, LABELS),
        module.apply(variables, X, 0.5, LABELS, train=True, rngs=rngs),
    )
    with pytest.raises(ValueError, match="rate of 0.5 needs a key"):
        from_linen(module, variables, train=True)(X, 0.5, 0.8, 0.6, LABELS)


def test_sampling_runs_the_module_and_new_parameters_compile_nothing(mlp):
    module, variables = mlp
    process = jd.processes.vp_linear()
    tableau = jd.solvers.build("ddim", jd.grids.uniform(process, 3))
    by_hand = jd.Denoiser(lambda x, t, cond: module.apply(variables, x, t, cond))
    expected = jd.sample(by_hand, tableau, X, cond=LABELS)
    run = lambda m, v: jd.sample(from_linen(m, v), tableau, X, cond=LABELS)  # noqa: E731
    np.testing.assert_allclose(run(module, variables), expected, rtol=1e-5, atol=1e-6)
    other = jax.tree.map(lambda a: 0.5 * a, variables)
    same_module = MLP(width=8, depth=1, num_classes=3)
    with counted() as compiled:
        out = run(same_module, other)
    assert compiled == []
    assert np.abs(out - expected).max() > 1e-3


def test_nnx_denoiser_is_the_model_and_new_parameters_compile_nothing():
    model = Layer(nnx.Rngs(0))
    model.eval()
    denoiser = from_nnx(model, "x0")
    assert denoiser.prediction == "x0"
    for cond in (None, LABELS):
        expected = model(X, 0.5) if cond is None else model(X, 0.5, cond)
        np.testing.assert_allclose(denoiser(X, 0.5, 0.8, 0.6, cond), expected, rtol=1e-6)
    process = jd.processes.vp_linear()
    tableau = jd.solvers.build("ddim", jd.grids.uniform(process, 3))
    first = jd.sample(denoiser, tableau, X, cond=LABELS)
    other = Layer(nnx.Rngs(1))
    other.eval()
    with counted() as compiled:
        out = jd.sample(from_nnx(other, "x0"), tableau, X, cond=LABELS)
    assert compiled == []
    assert np.abs(out - first).max() > 1e-3


def test_gradients_pass_through_an_nnx_denoiser():
    model = Layer(nnx.Rngs(0))
    model.eval()

    def loss(denoiser):
        return jnp.sum(denoiser(X, 0.5, 0.8, 0.6, LABELS))

    grad = jax.grad(loss, allow_int=True)(from_nnx(model))
    expected = 0.5 * np.broadcast_to(np.asarray(X.sum(0))[:, None], (3, 3))
    np.testing.assert_allclose(grad.params["linear"]["kernel"][...], expected, rtol=1e-5)


def test_parts_go_into_preconditioning(mlp):
    module, variables = mlp
    plain = from_linen(module, variables)
    denoiser = jd.precondition(plain.fn, sigma_data=0.5, params=plain.params)
    sigma = 2.0
    size = np.sqrt(0.25 + sigma**2)
    raw = module.apply(variables, X / size, np.float32(np.log(sigma) / 4))
    expected = 0.25 / size**2 * X + sigma * 0.5 / size * raw
    np.testing.assert_allclose(denoiser(X, sigma, 1.0, sigma), expected, rtol=1e-4, atol=1e-5)


class Holder(nn.Module):
    array: jax.Array

    @nn.compact
    def __call__(self, x, t):
        return x * self.array


def test_what_is_not_a_module_is_refused(mlp):
    module, variables = mlp
    with pytest.raises(TypeError, match="expected a Linen module, got Layer"):
        from_linen(Layer(nnx.Rngs(0)), variables)
    with pytest.raises(TypeError, match="expected an NNX module, got MLP"):
        from_nnx(module)
    with pytest.raises(TypeError, match="Holder cannot be hashed"):
        from_linen(Holder(jnp.ones(3)), {"params": {}})
    with pytest.raises(ValueError, match=r"the variables .*, got \['block_0', 'condition', 'in'"):
        from_linen(module, variables["params"])
    with pytest.raises(ValueError, match="the variables .*, got list"):
        from_linen(module, [])


# --- skipped blocks -------------------------------------------------------------------------------

MASKED = MLP(width=8, depth=2, num_classes=3)
VP = jd.processes.vp_linear()
TABLE = jd.solvers.ddim(jd.grids.uniform(VP, 3))


@pytest.fixture
def masked(random_variables):
    variables = random_variables(MASKED, X, 0.5)
    return variables, from_linen(MASKED, variables)


def test_each_row_of_a_sampler_has_its_own_mask(masked):
    """The path, by hand from the network and DDIM's formula; new masks compile nothing."""
    variables, denoiser = masked
    keep = jnp.array([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    path = jd.sample(skip_blocks(denoiser, keep, TABLE), TABLE, X, cond=LABELS, save="trajectory")
    grid = jd.grids.uniform(VP, 3)
    x = X
    for i in range(3):
        eps = MASKED.apply(variables, x, grid.t[i], LABELS, keep=keep[i])
        x0 = (x - grid.sigma[i] * eps) / grid.alpha[i]
        x = grid.alpha[i + 1] * x0 + grid.sigma[i + 1] * eps
        np.testing.assert_allclose(path[i + 1], x, rtol=1e-4, atol=1e-4)
    other = np.ones((3, 2))
    with counted() as compiled:
        jd.sample(skip_blocks(denoiser, other, TABLE), TABLE, X, cond=LABELS, save="trajectory")
    assert compiled == []


def test_a_mask_of_ones_is_the_denoiser_and_of_zeros_the_path_around_the_blocks(masked):
    variables, denoiser = masked
    whole = skip_blocks(denoiser, np.ones((3, 2)), TABLE)(X, 0.5, 0.8, 0.6, LABELS)
    np.testing.assert_allclose(whole, denoiser(X, 0.5, 0.8, 0.6, LABELS), rtol=1e-6)
    none = skip_blocks(denoiser, np.zeros((3, 2)), TABLE)(X, 0.5, 0.8, 0.6, LABELS)
    first, last = (variables["params"][name] for name in ("in", "out"))
    h = jax.nn.silu(X @ first["kernel"] + first["bias"])
    np.testing.assert_allclose(none, h @ last["kernel"] + last["bias"], rtol=1e-5, atol=1e-6)


def test_masks_go_by_the_networks_own_time_and_by_sample(masked):
    """Of the row whose time is nearest; through guidance; with a time of one's own."""
    variables, _ = masked
    denoiser = from_linen(MASKED, variables, time=minus_lambda)
    keep = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    skipping = skip_blocks(denoiser, keep, TABLE)
    level = TABLE.t[1] + 0.01, TABLE.alpha[1] * 0.99, TABLE.sigma[1] * 1.01
    t = minus_lambda(*level)
    null = MASKED.apply(variables, X, t, jnp.full(4, 3), keep=keep[1])
    with_label = MASKED.apply(variables, X, t, LABELS, keep=keep[1])
    guided = jd.guidance.classifier_free(skipping, 2.0, 3)(X, *level, LABELS)
    np.testing.assert_allclose(guided, null + 2 * (with_label - null), rtol=1e-4, atol=1e-5)
    each = skipping(X, *(np.array([a[i] for i in (0, 2, 1, 0)]) for a in levels(TABLE)), LABELS)
    for b, i in enumerate((0, 2, 1, 0)):
        alone = MASKED.apply(variables, X[b : b + 1], minus_lambda(*(a[i] for a in levels(TABLE))),
                             LABELS[b : b + 1], keep=keep[i])  # fmt: skip
        np.testing.assert_allclose(each[b : b + 1], alone, rtol=1e-4, atol=1e-5)


def levels(table):
    return table.t, table.alpha, table.sigma


def minus_lambda(t, alpha, sigma):
    return jnp.log(sigma / alpha)


def test_masks_that_do_not_fit_are_refused(masked):
    _, denoiser = masked
    with pytest.raises(ValueError, match=r"\[rows, blocks\] with 3 rows, got shape \(2, 2\)"):
        skip_blocks(denoiser, np.ones((2, 2)), TABLE)
    with pytest.raises(ValueError, match=r"keep must be \[2\]"):
        jd.sample(skip_blocks(denoiser, np.ones((3, 5)), TABLE), TABLE, X)
    with pytest.raises(ValueError, match="label"):
        jd.sample(skip_blocks(denoiser, np.ones((3, 2)), TABLE), TABLE, X, cond=np.array([9] * 4))
    scaled = from_linen(Scaled(), {"params": {"scale": jnp.ones(3)}})
    for wrong in (jd.clip_x0(denoiser), scaled, denoiser.fn):
        with pytest.raises(TypeError, match="takes the network's own denoiser"):
            skip_blocks(wrong, np.ones((3, 2)), TABLE)
