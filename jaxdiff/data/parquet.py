"""Images in parquet files, as data sets are often published."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxdiff.data.images import check_image_options, read_image
from jaxdiff.data.sources import check_labels, from_bytes


@dataclasses.dataclass(frozen=True, eq=False)
class ParquetSource:
    """Encoded images in memory, decoded when they are asked for; build one with `parquet`.

    Attributes:
      encoded: the column of files (PNG, JPEG, ...), a `pyarrow.ChunkedArray` of bytes.
      size: height and width after the resize.
      channels: 1 (grey) or 3 (RGB).
      crop: "square" or "adm", see `image_folder`.
      label: [n], or None.
      num_classes: labels are below it; None without labels.
      path: where it is from.
    """

    encoded: Any
    size: int
    channels: int
    crop: str
    label: Int[np.ndarray, " n"] | None
    num_classes: int | None
    path: Path

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size, self.size, self.channels)

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Raises ValueError, naming the row, if its image cannot be read."""
        file = io.BytesIO(self.encoded[index].as_py())
        name = f"row {index} of {self.path}"
        x = from_bytes(read_image(file, name, self.size, self.channels, self.crop))
        return {"x": x} if self.label is None else {"x": x, "label": self.label[index]}


def parquet(
    path: str | Path, size: int, key: str = "image", label_key: str | None = "label",
    num_classes: int | None = None, channels: int = 3, crop: str = "square",
) -> ParquetSource:  # fmt: skip
    """Images of a parquet file, or of all those of a folder in sorted order.

    x is [size, size, channels] in [-1, 1], made as by `image_folder`. The columns of encoded images
    and labels are held in memory (mapped from the file where it is not compressed), because a
    parquet file reads in groups of rows: a shuffle, and a run that continues at any example, need
    single ones. For data larger than memory, store them with `write_array_record`. Needs pyarrow,
    the extra `jaxdiff[parquet]`.

    Args:
      path: a .parquet file, or a folder of them.
      size, channels, crop: see `image_folder`.
      key: the column of images: bytes, or records with a field "bytes", as Hugging Face's `datasets`
        writes them.
      label_key: the column of labels, integers; None for data without labels.
      num_classes: labels must be below it; default the largest label + 1.

    Raises:
      ImportError: without pyarrow.
      FileNotFoundError: no such file, or no parquet files in the folder.
      KeyError: a column that is not there (the message lists those that are).
      TypeError: a column of another type.
      ValueError: not a parquet file, no rows, missing values, a label out of range, a bad argument.
        An unreadable image raises ValueError when it is read.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(
            "parquet files need pyarrow: pip install 'jaxdiff[parquet]'"
        ) from error

    check_image_options(size, channels, crop)
    root = Path(path).expanduser()
    files = sorted(root.glob("*.parquet")) if root.is_dir() else [root]
    if not files or not files[0].is_file():
        what = "no .parquet files in" if root.is_dir() else "no such file:"
        raise FileNotFoundError(f"{what} {str(root)!r}")
    wanted = [key] if label_key in (None, key) else [key, label_key]
    tables = []
    for file in files:
        try:
            there = pq.read_schema(file).names
            if absent := [name for name in wanted if name not in there]:
                raise KeyError(f"{str(file)!r}: no column {absent[0]!r}; there are {there}")
            tables.append(pq.read_table(file, columns=wanted, memory_map=True))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{str(file)!r} is not a parquet file: {error}") from error
    images = _column(tables, key, root)
    if pa.types.is_struct(images.type) and images.type.get_field_index("bytes") >= 0:
        images = pa.chunked_array([chunk.field("bytes") for chunk in images.chunks])
    if not (pa.types.is_binary(images.type) or pa.types.is_large_binary(images.type)):
        raise TypeError(f"{str(root)!r}: {key!r} must hold encoded images, got {images.type}")
    if images.null_count:
        raise ValueError(f"{str(root)!r}: {images.null_count} rows have no image")
    label, classes = None, None
    if label_key is not None:
        column = _column(tables, label_key, root)
        if column.null_count:
            raise ValueError(f"{str(root)!r}: {column.null_count} rows have no label")
        name = f"{str(root)!r}: {label_key!r}"
        label, classes = check_labels(column.to_numpy(), name, len(images), num_classes)
    return ParquetSource(images, size, channels, crop, label, classes, root)


def _column(tables: list[Any], key: str, root: Path) -> Any:
    import pyarrow as pa

    chunks = [chunk for table in tables for chunk in table[key].chunks if len(chunk)]
    if not chunks:
        raise ValueError(f"{str(root)!r} has no rows")
    if len({chunk.type for chunk in chunks}) > 1:
        raise TypeError(f"{str(root)!r}: {key!r} has several types, {chunks[0].type} and others")
    return pa.chunked_array(chunks)
