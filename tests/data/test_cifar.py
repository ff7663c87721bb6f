"""CIFAR-10 from files written here in both of its site's formats, and from damaged ones."""

import pickle

import numpy as np
import pytest

from jaxdiff import data
from jaxdiff.data import cifar

COUNT, PIXELS = 20, 3072


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """Files of 20 images; the published ones have 10,000, in 30,730,000 bytes."""
    assert cifar._PER_FILE * (1 + cifar._PIXELS) == 30_730_000
    monkeypatch.setattr(cifar, "_PER_FILE", COUNT)


@pytest.fixture(scope="module")
def records():
    rng = np.random.default_rng(0)
    planes = rng.integers(0, 256, (COUNT, PIXELS), np.uint8)
    return planes, rng.integers(0, 10, COUNT).astype(np.uint8)


def write_binary(file, planes, label):
    file.parent.mkdir(parents=True, exist_ok=True)
    np.concatenate([label[:, None], planes], axis=1).tofile(file)


def pickled(planes, label):
    """As Python 2 wrote it: bytes for names, protocol 2, NumPy before its own version 2."""
    batch = {b"batch_label": b"testing batch 1 of 1", b"labels": label.tolist(), b"data": planes}
    raw = pickle.dumps(batch, protocol=2)
    return raw.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def test_both_versions_give_the_same_images(tmp_path, records):
    planes, label = records
    write_binary(tmp_path / "cifar-10-batches-bin" / "test_batch.bin", planes, label)
    python = tmp_path / "python"
    python.mkdir()
    (python / "test_batch").write_bytes(pickled(planes, label))
    assert b"numpy.core" in (python / "test_batch").read_bytes()
    for path in (tmp_path, tmp_path / "cifar-10-batches-bin", python):
        source = data.cifar10(path, split="test")
        assert (len(source), source.shape, source.num_classes) == (COUNT, (32, 32, 3), 10)
        example = source[17]
        # Planes of red, green and blue, in rows.
        expected = np.stack([planes[17].reshape(3, 32, 32)[c] for c in range(3)], axis=-1)
        np.testing.assert_allclose((example["x"] + 1) * 127.5, expected, atol=1e-4)
        assert example["x"].dtype == np.float32
        assert example["label"] == label[17] and example["label"].dtype == np.int32
    with pytest.raises(ValueError, match="read-only"):
        source.images[0] = 0


def test_the_training_set_is_five_files_in_order(tmp_path, records):
    planes, label = records
    for i in range(1, 6):
        file = tmp_path / f"data_batch_{i}.bin"
        if i in (1, 2):
            write_binary(file, planes, (label + i) % 10)
        else:
            file.hardlink_to(tmp_path / "data_batch_1.bin")
    source = data.cifar10(tmp_path)
    assert len(source) == 5 * COUNT
    np.testing.assert_array_equal(source.label[COUNT : 2 * COUNT], (label + 2) % 10)
    np.testing.assert_array_equal(source.label[4 * COUNT :], (label + 1) % 10)
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"incomplete: no such file .*data_batch_4\.bin"):
        data.cifar10(tmp_path)


def test_an_absent_set_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        data.cifar10(tmp_path / "nowhere")
    for words in ("nowhere", "cifar-10-binary.tar.gz", "www.cs.toronto.edu/~kriz/cifar.html"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="'train' or 'test', got 'valid'"):
        data.cifar10(tmp_path, "valid")


class Harmful:
    def __reduce__(self):
        return print, ("a pickle ran this",)


def test_damaged_files_are_named(tmp_path, records, capsys):
    planes, label = records
    binary, python = tmp_path / "bin" / "test_batch.bin", tmp_path / "py" / "test_batch"
    python.parent.mkdir()

    def refuses(path, match):
        with pytest.raises(ValueError, match=match):
            data.cifar10(path.parent, "test")

    write_binary(binary, planes[:-1], label[:-1])
    refuses(binary, r"test_batch\.bin' is damaged: it must have 61460 bytes, got 58387")
    label = label.copy()
    label[5:7] = 11, 0
    write_binary(binary, planes, label)
    refuses(binary, "labels must be 0 to 9, got 0 to 11")
    python.write_bytes(pickled(planes, label))
    refuses(python, "labels must be 0 to 9, got 0 to 11")
    python.write_bytes(pickled(planes, label)[:1000])
    refuses(python, "test_batch' is damaged")
    python.write_bytes(pickled(planes[:, :-1], label))
    refuses(python, r"must hold bytes \[20, 3072\] and 20 labels, got uint8 \[20, 3071\]")
    python.write_bytes(pickle.dumps({b"data": Harmful(), b"labels": []}))
    refuses(python, "it asks for builtins.print, which no array needs")
    python.write_bytes(pickle.dumps([1, 2]))
    refuses(python, "is damaged")
    assert "a pickle ran this" not in capsys.readouterr().out
