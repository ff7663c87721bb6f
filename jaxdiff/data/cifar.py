"""CIFAR-10 from the files of its own site."""

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from jaxdiff.data.sources import from_bytes

_SIDE, _CLASSES, _PER_FILE = 32, 10, 10_000
_PIXELS = 3 * _SIDE * _SIDE
_FOLDERS = {"": "cifar-10-batches-py", ".bin": "cifar-10-batches-bin"}  # by the files' suffix
_FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}


@dataclasses.dataclass(frozen=True, eq=False)
class CIFAR10:
    """CIFAR-10 in memory, a byte a value; build one with `cifar10`.

    Attributes:
      images: red, green, blue, [n, 32, 32, 3].
      label: [n].
    """

    images: UInt8[np.ndarray, "n 32 32 3"]
    label: Int[np.ndarray, " n"]

    shape = (_SIDE, _SIDE, 3)
    num_classes = _CLASSES

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"x": from_bytes(self.images[index]), "label": self.label[index]}


def cifar10(path: str | Path, split: str = "train") -> CIFAR10:
    """CIFAR-10: x [32, 32, 3] in [-1, 1], labels 0 (airplane) to 9 (truck); 50,000 or 10,000.

    Reads the site's binary version (records of a label and 3,072 bytes) or its Python version,
    whose pickles are read with nothing allowed in them but NumPy arrays. Bytes become
    value / 127.5 - 1. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009).

    Args:
      path: the folder of the files, or the one it was unpacked in.
      split: "train" or "test".

    Raises:
      FileNotFoundError: no such files; the message says where to get them.
      ValueError: a bad split, or a file that is damaged: of another size, with labels above 9 or
        with anything but arrays in it.
    """
    if split not in _FILES:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    folder, suffix = _find(Path(path).expanduser(), split)
    read = _read_binary if suffix else _read_pickle
    parts = [read(folder / f"{name}{suffix}") for name in _FILES[split]]
    planes, label = (np.concatenate(part) for part in zip(*parts))
    images = planes.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
    images, label = np.ascontiguousarray(images), label.astype(np.int32)
    images.flags.writeable = label.flags.writeable = False
    return CIFAR10(images, label)


def _find(path: Path, split: str) -> tuple[Path, str]:
    """(the folder of the files, their suffix)."""
    missing = []
    for suffix, name in _FOLDERS.items():
        for folder in (path, path / name):
            absent = [n for n in _FILES[split] if not (folder / f"{n}{suffix}").is_file()]
            if not absent:
                return folder, suffix
            if len(absent) < len(_FILES[split]):
                missing.append(str(folder / f"{absent[0]}{suffix}"))
    if missing:
        raise FileNotFoundError(f"CIFAR-10 is incomplete: no such file {missing[0]!r}")
    raise FileNotFoundError(
        f"no CIFAR-10 in {str(path)!r}: download cifar-10-binary.tar.gz (or "
        "cifar-10-python.tar.gz) from https://www.cs.toronto.edu/~kriz/cifar.html and unpack it "
        f"there: tar -xzf cifar-10-binary.tar.gz -C {path}"
    )


def _read_binary(file: Path) -> tuple[np.ndarray, np.ndarray]:
    raw = np.fromfile(file, np.uint8)
    if raw.size != _PER_FILE * (1 + _PIXELS):
        raise ValueError(
            f"{str(file)!r} is damaged: it must have {_PER_FILE * (1 + _PIXELS)} bytes, got "
            f"{raw.size}"
        )
    records = raw.reshape(_PER_FILE, 1 + _PIXELS)
    return records[:, 1:], _checked(records[:, 0], file)


def _read_pickle(file: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with file.open("rb") as stream:
            batch = _OnlyArrays(stream, encoding="bytes").load()
        planes, label = batch[b"data"], np.asarray(batch[b"labels"])
        well_formed = planes.shape == (_PER_FILE, _PIXELS) and planes.dtype == np.uint8
        if not well_formed or label.shape != (_PER_FILE,) or label.dtype.kind not in "iu":
            raise ValueError(
                f"it must hold bytes [{_PER_FILE}, {_PIXELS}] and {_PER_FILE} labels, got "
                f"{planes.dtype} {list(planes.shape)} and {list(label.shape)}"
            )
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{str(file)!r} is damaged: {error}") from error
    return planes, _checked(label, file)


def _checked(label: np.ndarray, file: Path) -> np.ndarray:
    if label.min() < 0 or label.max() >= _CLASSES:
        raise ValueError(
            f"{str(file)!r} is damaged: labels must be 0 to {_CLASSES - 1}, got {label.min()} to "
            f"{label.max()}"
        )
    return label


class _OnlyArrays(pickle.Unpickler):
    """An unpickler that makes NumPy arrays and plain containers, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]  # it moved with NumPy 2
        if (module, name) == ("_codecs", "encode"):  # Python 3 writes bytes so in old protocols
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
