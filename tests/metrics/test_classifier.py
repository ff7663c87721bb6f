"""The digit classifier, and what is measured with it."""

import jax
import numpy as np
import pytest

from jaxdiff import data, metrics


@pytest.fixture(scope="module")
def classifier():
    return metrics.digit_classifier()


def test_accuracy_on_unseen_digits(classifier):
    test = data.digits("test")
    assert metrics.conditional_accuracy(classifier, test.x, test.label) >= 0.97


def test_training_is_deterministic_in_any_precision(classifier, x64):
    again = metrics.digit_classifier.__wrapped__()
    assert again is not classifier and metrics.digit_classifier() is classifier
    for first, second in zip(
        jax.tree.leaves(classifier.params), jax.tree.leaves(again.params), strict=True
    ):
        np.testing.assert_array_equal(first, second)


def test_features_are_what_the_last_layer_reads(classifier):
    x = data.digits("test").x[:20]
    last = classifier.params["params"]["Dense_2"]
    features, logits = classifier.features(x), classifier.logits(x)
    assert features.shape == (20, 64)
    np.testing.assert_allclose(features @ last["kernel"] + last["bias"], logits, atol=1e-4)
    np.testing.assert_array_equal(classifier.predict(x), np.argmax(logits, axis=1))


def test_larger_digits_are_averaged_down(classifier):
    small, large = data.digits("test").x[:5], data.digits("test", size=24).x[:5]
    np.testing.assert_allclose(classifier.logits(large), classifier.logits(small), atol=1e-4)


def test_conditional_accuracy_counts_agreement(classifier):
    test = data.digits("test")
    right = classifier.predict(test.x) == test.label
    x, label = test.x[right][:40], test.label[right][:40].copy()
    assert metrics.conditional_accuracy(classifier, x, label) == 1.0
    label[:10] = (label[:10] + 1) % 10
    assert metrics.conditional_accuracy(classifier, x, label) == 0.75


def test_floor_is_the_distance_between_random_halves(classifier):
    features = classifier.features(data.digits("all").x)
    rng = np.random.default_rng(123)
    halves, quarters = [], []
    for _ in range(20):
        order = rng.permutation(1797)
        halves.append(metrics.frechet_distance(features[order[:898]], features[order[898:]]))
        quarters.append(metrics.frechet_distance(features[order[:449]], features[order[449:898]]))
    # The 20 draws of either side leave about 5% of noise.
    floor = metrics.real_floor(classifier)
    np.testing.assert_allclose(floor, np.mean(halves), rtol=0.15)
    # Twice as large for half the samples: the law by which it is scaled, and what is measured.
    scaled = metrics.real_floor(classifier, 449, 449)
    np.testing.assert_allclose(scaled, floor * (2 / 449) / (1 / 898 + 1 / 899), rtol=1e-12)
    np.testing.assert_allclose(scaled, np.mean(quarters), rtol=0.15)


def test_floor_separates_copies_from_damaged_digits(classifier):
    x = data.digits("all").x
    features = classifier.features(x)
    rng = np.random.default_rng(0)
    copies = x[rng.integers(0, 1797, 5000)]
    damaged = np.clip(copies + 0.4 * rng.standard_normal(copies.shape), -1, 1)
    floor = metrics.real_floor(classifier, 5000, 1797)
    assert metrics.frechet_distance(classifier.features(copies), features) < 0.5 * floor
    assert metrics.frechet_distance(classifier.features(damaged), features) > 3 * floor


_IMAGES = np.zeros((2, 8, 8, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.predict(_IMAGES[0]), r"got shape \[8, 8, 1\]"),
        (lambda c: c.features(np.zeros((2, 12, 12, 1))), r"multiple of 8, got shape \[2, 12, 12"),
        (lambda c: c.logits(np.zeros((2, 8, 16, 1))), r"got shape \[2, 8, 16, 1\]"),
        (lambda c: c.logits(np.zeros((2, 8, 8, 3))), r"got shape \[2, 8, 8, 3\]"),
        (lambda c: c.logits(_IMAGES[:0]), r"got shape \[0, 8, 8, 1\]"),
        (lambda c: c.logits(_IMAGES + np.nan), "2 of 2 are not, the first is number 0"),
        (lambda c: metrics.conditional_accuracy(c, _IMAGES, [1, 10]), r"0 to 9, got 10 \(1 out"),
        (lambda c: metrics.conditional_accuracy(c, _IMAGES, [-1, 1]), "0 to 9, got -1"),
        (lambda c: metrics.conditional_accuracy(c, _IMAGES, [1]), r"each of 2 samples, got \(1,\)"),
        (lambda c: metrics.digit_classifier(-1), "seed must be at least 0, got -1"),
        (lambda c: metrics.real_floor(c, n=1), "at least 2, splits 1, got 1, 899 and 20"),
        (lambda c: metrics.real_floor(c, splits=0), "got 898, 899 and 0"),
    ],
)
def test_bad_input_is_named(classifier, call, message):
    with pytest.raises(ValueError, match=message):
        call(classifier)


def test_labels_must_be_integers(classifier):
    with pytest.raises(TypeError, match="labels must be integers, got dtype float64"):
        metrics.conditional_accuracy(classifier, _IMAGES, [1.0, 2.0])
