"""Sources: random access to examples, `source[i] -> {"x": ..., "label": ...}`.

A source has a length, `shape` (of one x, without the batch), `num_classes` (None when it has no
labels) and integer indexing; any object with these works in `jaxdiff.data.loader` and in
`grain.MapDataset.source`. x is float32, images are [height, width, channels] in [-1, 1]; label is
an int32 scalar in 0 .. num_classes - 1.
"""

import dataclasses
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8

_DIGIT_SIZE = 8


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
    """Examples held in memory; build one with `arrays`, which checks them.

    Attributes:
      x: every example, [n, ...].
      label: every label, [n], or None.
      num_classes: labels are below it; None without labels.
    """

    x: Float[np.ndarray, "n ..."]
    label: Int[np.ndarray, " n"] | None = None
    num_classes: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape[1:]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        example = {"x": self.x[index]}
        return example if self.label is None else example | {"label": self.label[index]}


@dataclasses.dataclass(frozen=True, eq=False)
class PatchSource:
    """Square patches of 8-bit images, cut when they are asked for.

    Attributes:
      images: the images, [height, width, channels].
      corners: (image, top, left) of each patch.
      size: height and width of a patch.
    """

    images: tuple[UInt8[np.ndarray, "height width channels"], ...]
    corners: tuple[tuple[int, int, int], ...]
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size, self.size, self.images[0].shape[-1])

    @property
    def num_classes(self) -> int:
        return len(self.images)

    def __len__(self) -> int:
        return len(self.corners)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        image, top, left = self.corners[index]
        patch = self.images[image][top : top + self.size, left : left + self.size]
        return {"x": from_bytes(patch), "label": np.int32(image)}


def digits(split: str = "train", size: int = _DIGIT_SIZE) -> ArraySource:
    """scikit-learn's 1,797 real handwritten digits: x [size, size, 1] in [-1, 1], labels 0 to 9.

    Grey levels 0 to 16 become level / 8 - 1. The split is a rule, not a random draw: going through
    scikit-learn's order, every fifth image of each class (the fifth, the tenth, ...) is "test",
    the others are "train", so both hold every class in its own proportion.

    Args:
      split: "train" (1,442 images), "test" (355) or "all" (1,797, in scikit-learn's order).
      size: a multiple of 8; above 8 each pixel becomes a square of size / 8 equal pixels.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits (UCI, 1998); these are
    the images of its test set, by 13 writers.
    """
    from sklearn import datasets  # here, because importing it takes about a second

    if split not in ("train", "test", "all"):
        raise ValueError(f"split must be 'train', 'test' or 'all', got {split!r}")
    if size < _DIGIT_SIZE or size % _DIGIT_SIZE:
        raise ValueError(f"size must be a positive multiple of {_DIGIT_SIZE}, got {size}")
    images, label = datasets.load_digits(return_X_y=True)
    label = label.astype(np.int32)
    rank = np.zeros(len(label), np.int64)  # position among the images of the same class
    for digit in range(10):
        rank[label == digit] = np.arange(np.sum(label == digit))
    is_test = rank % 5 == 4
    keep = {"train": ~is_test, "test": is_test, "all": np.full(len(label), True)}[split]
    x = (images[keep] / 8 - 1).astype(np.float32).reshape(-1, _DIGIT_SIZE, _DIGIT_SIZE, 1)
    scale = size // _DIGIT_SIZE
    x = x.repeat(scale, axis=1).repeat(scale, axis=2)
    return _frozen(x, label[keep], 10)


def photo_patches(size: int = 32, stride: int = 16) -> PatchSource:
    """Colour patches of scikit-learn's two photographs (427 x 640): x [size, size, 3] in [-1, 1].

    Patches start every `stride` pixels, row by row, first in the temple ("china.jpg", label 0),
    then in the flower ("flower.jpg", label 1): 975 of each at the defaults. Bytes become
    value / 127.5 - 1.

    Args:
      size: height and width of a patch, 1 to 427.
      stride: pixels between neighbouring patches, at least 1; below `size` patches overlap.
    """
    from sklearn import datasets  # here, because importing it takes about a second

    images = tuple(datasets.load_sample_images().images)
    limit = min(min(image.shape[:2]) for image in images)
    if not 1 <= size <= limit:
        raise ValueError(f"size must be from 1 to {limit} (the photographs' height), got {size}")
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    corners = tuple(
        (number, top, left)
        for number, image in enumerate(images)
        for top in range(0, image.shape[0] - size + 1, stride)
        for left in range(0, image.shape[1] - size + 1, stride)
    )
    return PatchSource(images, corners, size)


def arrays(
    data: str | Path | Mapping[str, np.ndarray],
    key: str = "x",
    label_key: str | None = "label",
    num_classes: int | None = None,
    bounds: tuple[float, float] | None = (-1.0, 1.0),
) -> ArraySource:
    """Examples of an `.npz` file, or of a mapping of arrays, checked and held in memory.

    Args:
      data: path of an `.npz` file, or a mapping from names to arrays.
      key: name of the examples: [n, dim] or [n, height, width, channels], floating (cast to
        float32, finite, within `bounds`) or uint8 (mapped to value / 127.5 - 1).
      label_key: name of the labels, integers [n]; None for data without labels.
      num_classes: labels must be below it; default the largest label + 1.
      bounds: smallest and largest value accepted in x; None accepts any finite value.

    Raises:
      FileNotFoundError: no such file.
      KeyError: a name that is not in the data (the message lists those that are).
      TypeError: wrong dtype.
      ValueError: not an `.npz` file, wrong shape, no examples, NaN or infinity, value or label out
        of range.
    """
    where, table = ("the arrays", data) if isinstance(data, Mapping) else _load_npz(data)
    wanted = [key] if label_key is None else [key, label_key]
    for name in wanted:
        if name not in table:
            hint = "" if name == key else "; pass label_key=None for data without labels"
            raise KeyError(f"{where}: no array {name!r}; there are {sorted(table)}{hint}")
    x = _checked_examples(np.asarray(table[key]), f"{where}: {key!r}", bounds)
    if label_key is None:
        return _frozen(x)
    label = np.asarray(table[label_key])
    return _frozen(x, *check_labels(label, f"{where}: {label_key!r}", len(x), num_classes))


def from_bytes(image: UInt8[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """value / 127.5 - 1, in float32."""
    return image.astype(np.float32) / 127.5 - 1


def _frozen(
    x: np.ndarray, label: np.ndarray | None = None, num_classes: int | None = None
) -> ArraySource:
    # Examples are views: a consumer that writes into one must not change the data.
    for array in (x, label):
        if array is not None:
            array.flags.writeable = False
    return ArraySource(x, label, num_classes)


def _load_npz(path: str | Path) -> tuple[str, dict[str, np.ndarray]]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {str(file)!r}")
    try:
        with np.load(file, allow_pickle=False) as archive:
            return str(file), dict(archive)
    except (AttributeError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{str(file)!r} is not an .npz file of numeric arrays: {error}") from error


def _checked_examples(
    x: np.ndarray, name: str, bounds: tuple[float, float] | None
) -> Float[np.ndarray, "n ..."]:
    if x.ndim not in (2, 4):
        raise ValueError(
            f"{name} must be [n, dim] or [n, height, width, channels], got shape {list(x.shape)}"
        )
    if x.size == 0:
        raise ValueError(f"{name} has no values: its shape is {list(x.shape)}")
    if x.dtype == np.uint8:
        return from_bytes(x)
    if x.dtype not in (np.float16, np.float32, np.float64):
        raise TypeError(f"{name} must be float16, float32, float64 or uint8, got {x.dtype}")
    with np.errstate(over="ignore"):  # what overflows float32 is reported as infinite below
        x = x.astype(np.float32)
    bad = np.argwhere(~np.isfinite(x))
    if len(bad):
        at = bad[0].tolist()
        raise ValueError(
            f"{name} must be finite in float32: {len(bad)} values are not, the first is "
            f"{x[tuple(at)]} at {at}"
        )
    if bounds is not None and (x.min() < bounds[0] or x.max() > bounds[1]):
        raise ValueError(
            f"{name} must be within {list(bounds)}, its range is [{x.min()}, {x.max()}]; rescale "
            "it, or pass bounds=None"
        )
    return x


def check_labels(
    label: np.ndarray, name: str, count: int, num_classes: int | None
) -> tuple[Int[np.ndarray, " n"], int]:
    """(labels as int32, number of classes); raises, naming them, if they are not 0 to n - 1."""
    if not np.issubdtype(label.dtype, np.integer):
        raise TypeError(f"{name} must be integers, got {label.dtype}")
    if label.shape != (count,):
        raise ValueError(f"{name} must have shape [{count}] like x, got {list(label.shape)}")
    classes = int(label.max()) + 1 if num_classes is None else num_classes
    bad = np.flatnonzero((label < 0) | (label >= classes))
    if len(bad):
        raise ValueError(
            f"{name} must be from 0 to {classes - 1}: {len(bad)} are not, the first is "
            f"{label[bad[0]]} at {bad[0]}"
        )
    return label.astype(np.int32), classes
