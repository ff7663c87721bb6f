import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.models.embeddings import (
    ConditionEmbedding,
    LabelEmbedding,
    TimeEmbedding,
    check_labels,
    read_cond,
    sincos_2d,
    sinusoidal,
)


@pytest.mark.parametrize("features", [6, 7])
def test_sinusoidal_is_the_formula(features):
    t = np.array([0.0, 0.5, 37.25, -2.0])
    expected = np.zeros((4, features))
    for b in range(4):
        for i in range(3):
            angle = t[b] / 10_000.0 ** (i / 3)
            expected[b, i], expected[b, 3 + i] = np.cos(angle), np.sin(angle)
    np.testing.assert_allclose(sinusoidal(jnp.asarray(t), features), expected, atol=5e-6)
    # With the end point the frequencies go from 1 to exactly 1 / 10,000: 1, 1 / 100, 1 / 10,000.
    cos = np.cos(t[:, None] / np.array([1.0, 100.0, 10_000.0]))
    ends = sinusoidal(jnp.asarray(t), features, endpoint=True)
    np.testing.assert_allclose(ends[:, :3], cos, atol=5e-6)


def test_positions_encode_the_column_then_the_row():
    height, width, features = 3, 5, 12
    expected = np.zeros((height, width, features))
    for row in range(height):
        for column in range(width):
            for i in range(3):
                frequency = 10_000.0 ** (-i / 3)
                waves = [f(p * frequency) for p in (column, row) for f in (np.sin, np.cos)]
                expected[row, column, i::3] = waves
    np.testing.assert_allclose(sincos_2d(height, width, features), expected, atol=1e-6)
    with pytest.raises(ValueError, match="multiple of 4 features, got 6"):
        sincos_2d(2, 2, 6)


def test_time_embedding_is_its_formula_and_keeps_neighbouring_times_apart():
    module = TimeEmbedding(features=4, frequencies=6, time_scale=10.0)
    t = jnp.array([0.3, 0.7])
    variables = module.init(jax.random.key(0), t, 2)
    p = jax.tree.map(np.asarray, variables["params"])
    angles = 10.0 * np.asarray(t)[:, None] / 10_000.0 ** (np.arange(3) / 3)
    h = np.concatenate([np.cos(angles), np.sin(angles)], 1) @ p["hidden"]["kernel"]
    expected = h / (1 + np.exp(-h)) @ p["out"]["kernel"]
    np.testing.assert_allclose(module.apply(variables, t, 2), expected, rtol=1e-4, atol=1e-6)
    # These two times coincide in bfloat16, and an integer time is a float one.
    near = module.apply(variables, jnp.array([999.0, 1000.0]), 2)
    assert np.abs(near[0] - near[1]).max() > 1e-3
    integers = module.apply(variables, jnp.array([999, 1000]), 2)
    np.testing.assert_array_equal(integers, near)
    with pytest.raises(ValueError, match=r"scalar or have shape \(2,\), got \(3,\)"):
        module.apply(variables, jnp.zeros(3), 2)


def test_label_dropout_has_its_rate_and_becomes_the_null_label():
    count, rate, classes = 20_000, 0.3, 5
    module = LabelEmbedding(classes, features=2, label_dropout=rate)
    labels = jnp.arange(count) % classes
    variables = module.init(jax.random.key(0), labels, count, False)
    table = variables["params"]["table"]["embedding"]
    assert table.shape == (classes + 1, 2)
    plain = module.apply(variables, labels, count, False)
    np.testing.assert_array_equal(plain, table[labels])
    out = module.apply(variables, labels, count, True, rngs={"label": jax.random.key(1)})
    dropped = np.all(out == table[classes], axis=1)
    np.testing.assert_array_equal(out, np.where(dropped[:, None], table[classes], plain))
    # 5 standard deviations of a binomial, in all and among each class.
    for group in [slice(None), *(slice(c, None, classes) for c in range(classes))]:
        n = dropped[group].size
        assert abs(dropped[group].mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / n)
    null = module.apply(variables, None, count, False)
    np.testing.assert_array_equal(null, jnp.broadcast_to(table[classes], (count, 2)))


def test_a_scalar_label_is_every_sample_s_label():
    module = LabelEmbedding(3, features=2)
    variables = module.init(jax.random.key(0), 1, 4, False)
    np.testing.assert_array_equal(
        module.apply(variables, 2, 4, False), module.apply(variables, jnp.full(4, 2), 4, False)
    )


@pytest.mark.parametrize("labels", [[0, -1], [0, 4], [0, 400]])
def test_traced_labels_out_of_range_are_nan_and_concrete_ones_an_error(labels):
    module = LabelEmbedding(3, features=2)
    variables = module.init(jax.random.key(0), None, 2, False)
    out = jax.jit(lambda v, y: module.apply(v, y, 2, False))(variables, jnp.array(labels))
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).all()
    with pytest.raises(ValueError, match=rf"0 to 3 \(3 is the null label\), got {labels[1]}"):
        module.apply(variables, jnp.array(labels), 2, False)


def test_check_labels():
    check_labels(np.array([0, 2]), 2, 3, null=False)
    check_labels(3, 2, 3, null=True)
    with pytest.raises(ValueError, match="0 to 2, got 3"):
        check_labels(3, 2, 3, null=False)
    with pytest.raises(ValueError, match=r"shape \(2,\), got \(3,\)"):
        check_labels(np.zeros(3, int), 2, 3, null=False)
    with pytest.raises(ValueError, match="must be integers, got float32"):
        check_labels(jnp.zeros(2), 2, 3, null=False)


def test_without_a_null_label_labels_are_needed():
    module = LabelEmbedding(3, features=2, label_dropout=0.0)
    with pytest.raises(ValueError, match="3 classes and, with label_dropout=0, no null label"):
        module.init(jax.random.key(0), None, 2, False)


def test_condition_embedding_adds_time_and_label():
    module = ConditionEmbedding(features=4, num_classes=3)
    args = (0.5, jnp.array([0, 3]), 2, False)
    variables = module.init(jax.random.key(0), *args)
    time = TimeEmbedding(4).apply({"params": variables["params"]["time"]}, 0.5, 2)
    label = variables["params"]["label"]["table"]["embedding"][jnp.array([0, 3])]
    np.testing.assert_allclose(module.apply(variables, *args), time + label, rtol=1e-6)
    with pytest.raises(ValueError, match="made with num_classes=None"):
        ConditionEmbedding(features=4).init(jax.random.key(0), *args)


def test_an_augmentation_is_added_to_the_sinusoids_and_absent_is_zero():
    module = ConditionEmbedding(features=4, frequencies=6, augment_dim=2)
    made = module.init(jax.random.key(0), 0.5, None, 3, False)["params"]["time"]
    assert not np.any(made["augment"]["linear"]["kernel"]) and set(made["augment"]["linear"]) == {
        "kernel"
    }
    kernel = np.random.default_rng(0).standard_normal((2, 6)).astype(np.float32)
    params = {"time": made | {"augment": {"linear": {"kernel": jnp.asarray(kernel)}}}}
    labels = np.array([[1.0, -2.0], [0.0, 0.0], [0.5, 0.0]], np.float32)
    out = module.apply({"params": params}, 0.5, None, 3, False, labels)
    waves = np.asarray(sinusoidal(jnp.full(3, 500.0), 6)) + labels @ kernel
    hidden = waves @ made["hidden"]["kernel"] + made["hidden"]["bias"]
    hidden = hidden / (1 + np.exp(-hidden))
    np.testing.assert_allclose(out, hidden @ made["out"]["kernel"] + made["out"]["bias"], rtol=1e-4)
    absent = module.apply({"params": params}, 0.5, None, 3, False)
    np.testing.assert_allclose(absent, np.broadcast_to(out[1], (3, 4)), rtol=1e-5)
    with pytest.raises(ValueError, match=r"must have shape \(3, 2\), got \(3, 9\)"):
        module.apply({"params": params}, 0.5, None, 3, False, np.zeros((3, 9)))
    with pytest.raises(ValueError, match="network with augment_dim=0"):
        module.clone(augment_dim=0).apply({"params": params}, 0.5, None, 3, False, labels)


def test_read_cond():
    labels = np.arange(3)
    assert read_cond(None) == {}
    assert read_cond(labels) == {"label": labels}
    assert read_cond({"label": labels, "image": None}, ("label", "image")) == {"label": labels}
    with pytest.raises(ValueError, match=r"\['text'\]; this network takes \['label'\]"):
        read_cond({"text": labels})
