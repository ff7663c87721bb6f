"""Sources against scikit-learn's own arrays, files written here, and malformed input."""

import numpy as np
import pytest
from sklearn import datasets

from jaxdiff import data


def test_digits_are_scikit_learns_images_rescaled():
    source = data.digits("all")
    raw = datasets.load_digits()
    assert (len(source), source.shape, source.num_classes) == (1797, (8, 8, 1), 10)
    example = source[1234]
    np.testing.assert_array_equal((example["x"][..., 0] + 1) * 8, raw.images[1234])
    assert example["label"] == raw.target[1234]
    assert example["x"].dtype == np.float32 and example["label"].dtype == np.int32
    assert source.x.min() == -1 and source.x.max() == 1


def test_digits_split_is_every_fifth_of_each_class():
    everything, train, test = (data.digits(split) for split in ("all", "train", "test"))
    assert (len(train), len(test)) == (1442, 355)
    for digit in range(10):
        images = everything.x[everything.label == digit]
        np.testing.assert_array_equal(test.x[test.label == digit], images[4::5])
        rest = np.delete(images, np.s_[4::5], axis=0)
        np.testing.assert_array_equal(train.x[train.label == digit], rest)


def test_larger_digits_repeat_pixels():
    small, large = data.digits("test"), data.digits("test", size=24)
    assert large.shape == (24, 24, 1)
    blocks = large.x.reshape(len(large), 8, 3, 8, 3, 1)
    pixels = np.broadcast_to(small.x[:, :, None, :, None], blocks.shape)
    np.testing.assert_array_equal(blocks, pixels)


def test_examples_in_memory_cannot_be_overwritten():
    with pytest.raises(ValueError, match="read-only"):
        data.digits("test")[0]["x"][:] = 0


def test_photo_patches_tile_the_photographs():
    size = 61  # 427 = 7 * 61, so whole columns of patches rebuild the height
    source = data.photo_patches(size=size, stride=size)
    photos = datasets.load_sample_images().images
    columns = 640 // size
    assert len(source) == 2 * 7 * columns and source.num_classes == 2
    assert source.shape == source[0]["x"].shape == (size, size, 3)
    for label, photo in enumerate(photos):
        patches = [source[label * 7 * columns + i] for i in range(7 * columns)]
        assert {int(p["label"]) for p in patches} == {label}
        grid = np.stack([p["x"] for p in patches]).reshape(7, columns, size, size, 3)
        rebuilt = grid.swapaxes(1, 2).reshape(7 * size, columns * size, 3)
        np.testing.assert_allclose((rebuilt + 1) * 127.5, photo[:, : columns * size], atol=1e-4)


def test_photo_patches_default_count():
    source = data.photo_patches()
    assert len(source) == 2 * ((427 - 32) // 16 + 1) * ((640 - 32) // 16 + 1) == 1950
    corner = datasets.load_sample_image("china.jpg")[0:32, 16:48]
    np.testing.assert_allclose(source[1]["x"], corner / 127.5 - 1, atol=1e-6)


def test_arrays_round_trip_through_a_file(tmp_path):
    x = np.linspace(-1, 1, 12).reshape(3, 2, 2, 1)
    label = np.array([2, 0, 1], np.int64)
    np.savez(tmp_path / "set.npz", images=x, digit=label)
    source = data.arrays(tmp_path / "set.npz", key="images", label_key="digit")
    assert (len(source), source.shape, source.num_classes) == (3, (2, 2, 1), 3)
    np.testing.assert_array_equal(source[1]["x"], x[1].astype(np.float32))
    assert source[0]["label"] == 2 and source[0]["label"].dtype == np.int32
    unlabelled = data.arrays(tmp_path / "set.npz", key="images", label_key=None)
    assert unlabelled.num_classes is None and set(unlabelled[0]) == {"x"}


def test_arrays_in_memory_bytes_and_unbounded_vectors():
    x = np.array([[0, 255], [51, 102]], np.uint8)
    source = data.arrays({"x": x}, label_key=None)
    np.testing.assert_allclose(source.x, [[-1, 1], [-0.6, -0.2]], atol=1e-6)
    wide = data.arrays({"x": np.array([[-40.0, 7.0]])}, label_key=None, bounds=None)
    assert wide[0]["x"].tolist() == [-40, 7]
    assert x.flags.writeable  # the caller's own array is left alone


def _images(**changes):
    return {"x": np.zeros((4, 2, 2, 1), np.float32), "label": np.array([0, 1, 2, 1])} | changes


def _with(value):
    x = np.zeros((4, 2, 2, 1))
    x[2, 1, 0, 0] = value
    return x


@pytest.mark.parametrize(
    ("table", "options", "error", "message"),
    [
        (_images(x=_with(np.nan)), {}, ValueError, r"1 values are not, the first is nan at \[2, 1"),
        (_images(x=_with(np.inf)), {}, ValueError, r"first is inf at \[2, 1, 0, 0\]"),
        (_images(x=_with(1e39)), {"bounds": None}, ValueError, "finite in float32"),
        (_images(x=_with(1.5)), {}, ValueError, r"within \[-1.0, 1.0\], its range is \[0.0, 1.5\]"),
        (_images(x=_with(-3.0)), {}, ValueError, r"its range is \[-3.0, 0.0\]; rescale"),
        (_images(x=np.zeros((4, 2, 2))), {}, ValueError, r"got shape \[4, 2, 2\]"),
        (_images(x=np.zeros((0, 2))), {}, ValueError, r"no values: its shape is \[0, 2\]"),
        (_images(x=np.zeros((4, 2), np.int64)), {}, TypeError, "float64 or uint8, got int64"),
        (_images(x=np.zeros((4, 2), complex)), {}, TypeError, "got complex128"),
        (_images(label=np.array([0, 1, 7, 1])), {"num_classes": 3}, ValueError, "first is 7 at 2"),
        (_images(label=np.array([0, -1, 2, 1])), {}, ValueError, "0 to 2: 1 are not.* is -1 at 1"),
        (_images(label=np.array([0.0, 1, 2, 1])), {}, TypeError, "integers, got float64"),
        (_images(label=np.array([0, 1])), {}, ValueError, r"shape \[4\] like x, got \[2\]"),
        (_images(), {"key": "image"}, KeyError, r"no array 'image'; there are \['label', 'x'\]"),
        (_images(), {"label_key": "y"}, KeyError, "no array 'y'.*label_key=None"),
    ],
)
def test_bad_arrays_are_named(tmp_path, table, options, error, message):
    with pytest.raises(error, match=message):
        data.arrays(table, **options)
    np.savez(tmp_path / "bad.npz", **table)
    with pytest.raises(error, match=rf"bad\.npz.*{message}"):
        data.arrays(tmp_path / "bad.npz", **options)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*absent\.npz"):
        data.arrays(tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("not an archive")
    np.save(tmp_path / "single.npy", np.zeros((2, 2)))
    np.savez(tmp_path / "whole.npz", x=np.zeros((2, 2)))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:100])
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], dtype=object))
    for name in ("text.npz", "single.npy", "cut.npz", "pickled.npz"):
        with pytest.raises(ValueError, match=rf"{name}' is not an \.npz file"):
            data.arrays(tmp_path / name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: data.digits("valid"), "'train', 'test' or 'all', got 'valid'"),
        (lambda: data.digits(size=12), "multiple of 8, got 12"),
        (lambda: data.digits(size=0), "multiple of 8, got 0"),
        (lambda: data.photo_patches(size=428), "1 to 427 .*got 428"),
        (lambda: data.photo_patches(size=0), "got 0"),
        (lambda: data.photo_patches(stride=0), "stride must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
