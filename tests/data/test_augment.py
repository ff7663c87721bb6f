"""EDM's augmentation against its authors' code, waves that are known everywhere, and its rates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_edm import golden

from jaxdiff.data import Augmentation
from jaxdiff.data.augment import _warped

EVERY = Augmentation(probability=0.6, x_flip=1.0, translate_int=1.0)
NUMBERS = ("x_flip", "y_flip", "translate_int", "scale", "rotate", "anisotropy", "translate")


@pytest.fixture(scope="module")
def apply():
    return jax.jit(EVERY.apply)


def test_images_and_labels_are_the_authors(apply):
    given = golden("augment")
    drawn = {name: given[name].astype(np.float32) for name in NUMBERS}
    assert all(np.any(drawn[name]) for name in NUMBERS)
    images = given["images"].transpose(0, 2, 3, 1).astype(np.float32)
    result, labels = apply(drawn, images)
    assert labels.shape == (6, EVERY.label_dim)
    np.testing.assert_allclose(labels, given["labels"], atol=1e-6)
    expected = given["result"].transpose(0, 2, 3, 1)
    assert np.sum(np.abs(expected - images).max(axis=(1, 2, 3)) > 0.1) >= 5  # nearly all deformed
    np.testing.assert_allclose(result, expected, atol=3e-5)


def test_a_wave_moves_as_its_formula_says(apply):
    """f(x, y) about the centre becomes f(M (x, y)): scaled, turned, stretched and moved by hand."""
    height, width = 16, 12
    y, x = np.meshgrid(np.arange(height) - 7.5, np.arange(width) - 5.5, indexing="ij")

    def wave(x, y):
        return np.cos(0.25 * x - 0.2 * y + 0.3)

    images = np.broadcast_to(wave(x, y)[None, ..., None], (6, height, width, 3))
    drawn = {name: np.zeros((6, 2) if name in ("translate_int", "anisotropy", "translate") else 6,
                            np.float32) for name in NUMBERS}  # fmt: skip
    drawn["scale"][0] = 1.0
    drawn["rotate"][1] = 0.4
    drawn["anisotropy"][2] = 1.0, 0.5
    drawn["translate"][3] = 0.8, -0.4
    drawn["x_flip"][4] = 1.0
    result, _ = apply(drawn, images.astype(np.float32))
    scale = 2**0.2
    cos, sin = np.cos(0.4), np.sin(0.4)
    # Coordinates along and across the direction (cos r, -sin r) of the stretch, y pointing down.
    along = np.cos(0.5) * x - np.sin(0.5) * y
    across = np.sin(0.5) * x + np.cos(0.5) * y
    along, across = along / scale, across * scale
    expected = [
        wave(x / scale, y / scale),
        wave(cos * x - sin * y, sin * x + cos * y),
        wave(np.cos(0.5) * along + np.sin(0.5) * across,
             -np.sin(0.5) * along + np.cos(0.5) * across),
        wave(x - 0.8 * 0.125 * width, y + 0.4 * 0.125 * height),
        wave(-x, y),
        wave(x, y),
    ]  # fmt: skip
    inside = np.s_[5:-5, 4:-4]  # what is not a reflection at the edge
    for got, wanted in zip(result, expected, strict=True):
        np.testing.assert_allclose(got[..., 0][inside], wanted[inside], atol=0.03)
    np.testing.assert_array_equal(result[5], images[5].astype(np.float32))


def test_up_and_down_again_is_exact():
    image = np.random.default_rng(0).uniform(-1, 1, (8, 6, 2)).astype(np.float32)
    np.testing.assert_allclose(jax.jit(_warped)(image, jnp.eye(3)), image, atol=2e-6)


@pytest.fixture(scope="module")
def many():
    """(the pipeline of the paper with shifts, drawing for 20,000 keys, the keys)"""
    pipe = Augmentation(probability=0.12, translate_int=1.0)
    return pipe, jax.jit(pipe.draw), jax.random.split(jax.random.key(0), 20_000)


def test_an_image_is_decided_by_its_key(apply, many):
    _, draw, keys = many
    order = np.random.default_rng(1).permutation(len(keys))
    whole, permuted = draw(keys), draw(keys[order])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[order], b), whole, permuted)
    images = np.random.default_rng(1).uniform(-1, 1, (6, 16, 12, 3)).astype(np.float32)
    busy = np.argsort(-sum(np.any(a.reshape(len(a), -1), 1) for a in map(np.asarray, whole.values())))
    some = jax.tree.map(lambda a: a[busy[:6]], whole)
    order = np.array([4, 2, 0, 5, 1, 3])
    turned = apply(jax.tree.map(lambda a: a[order], some), images[order])
    for one, other in zip(apply(some, images), turned):
        np.testing.assert_allclose(other, one[order], atol=1e-5)


def test_rates_and_laws_of_what_is_drawn(many):
    pipe, draw, keys = many
    count, rate = len(keys), pipe.probability
    drawn = jax.tree.map(np.asarray, draw(keys))
    assert set(drawn) == set(NUMBERS) and pipe.label_dim == 11

    def near(value, expected, std, count=count):
        assert abs(value - expected) < 4 * std / np.sqrt(count)

    near(drawn["x_flip"].mean(), 0.5, 0.5)  # every image
    near(drawn["y_flip"].mean(), 0.5 * rate, 0.25)
    applied = {n: drawn[n].reshape(count, -1)[:, 0] != 0 for n in NUMBERS}
    for name in ("translate_int", "scale", "rotate", "anisotropy", "translate"):
        near(applied[name].mean(), rate, np.sqrt(rate * (1 - rate)))
    near((applied["scale"] & applied["rotate"]).mean(), rate**2, rate)
    some = count * rate
    for name in ("scale", "translate"):
        values = drawn[name][applied[name]]
        near(values.mean(), 0, 1, some)
        near(values.std(), 1, 1, some)
    for name, largest in (("rotate", np.pi), ("translate_int", 1.0)):
        values = drawn[name][applied[name]]
        assert np.abs(values).max() <= largest
        near(values.std(), largest / np.sqrt(3), largest, some)
    turned = drawn["anisotropy"][applied["anisotropy"]][:, 1] != 0
    near(turned.mean(), 0.5, 0.5, some)
    # What is drawn for one does not depend on which others there are.
    alone = Augmentation(rate, x_flip=0, y_flip=0, scale=0, anisotropy=0, translate=0)
    np.testing.assert_array_equal(jax.jit(alone.draw)(keys)["rotate"], drawn["rotate"])
    assert (alone.label_dim, Augmentation(0.12).label_dim, Augmentation().label_dim) == (2, 9, 0)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"probability must be in \[0, 1\], got 1.5"):
        Augmentation(probability=1.5)
    with pytest.raises(ValueError, match="scale_std must be at least 0, got -0.1"):
        Augmentation(scale_std=-0.1)
    with pytest.raises(ValueError, match=r"at least 2 x 2 pixels, got shape \(3, 8\)"):
        Augmentation(probability=0.1)(jax.random.split(jax.random.key(0), 3), jnp.zeros((3, 8)))
