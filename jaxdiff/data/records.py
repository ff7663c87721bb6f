"""array_record files: any source written to disk once, and read back in any order."""

import dataclasses
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grain
import numpy as np
from tqdm import tqdm

from jaxdiff.data.loader import Source
from jaxdiff.data.sources import from_bytes
from jaxdiff.files import write_text

_ABOUT = "dataset.json"
_DTYPES = ("uint8", "float16", "float32")
_LABEL = np.dtype("<i4")
_AHEAD = 256


@dataclasses.dataclass(frozen=True, eq=False)
class RecordSource:
    """Examples of array_record files, read when they are asked for; build with `array_record`.

    Attributes:
      records: grain's source of the undecoded examples.
      shape: of one x.
      dtype: of x in the files: "uint8", "float16" or "float32".
      num_classes: labels are below it; None without labels.
      path: the folder.
    """

    records: grain.sources.ArrayRecordDataSource
    shape: tuple[int, ...]
    dtype: str
    num_classes: int | None
    path: Path

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Raises ValueError, naming the record, if it is damaged."""
        where = f"record {index} of {str(self.path)!r} is damaged"
        try:
            record = self.records[index]
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(f"{where}: {error}") from error
        stored = np.dtype(self.dtype).newbyteorder("<")
        start = 0 if self.num_classes is None else _LABEL.itemsize
        expected = start + math.prod(self.shape) * stored.itemsize
        if len(record) != expected:
            raise ValueError(f"{where}: it must have {expected} bytes, got {len(record)}")
        x = np.frombuffer(record, stored, offset=start).reshape(self.shape)
        example = {"x": from_bytes(x) if self.dtype == "uint8" else x.astype(np.float32)}
        if self.num_classes is None:
            return example
        label = np.frombuffer(record, _LABEL, count=1)[0].astype(np.int32)
        if not 0 <= label < self.num_classes:
            raise ValueError(f"{where}: its label must be below {self.num_classes}, got {label}")
        return example | {"label": label}


def write_array_record(
    path: str | Path, source: Source, dtype: str = "uint8", shards: int = 1, threads: int = 8,
    progress: bool = True,
) -> None:  # fmt: skip
    """Write the examples of a source, in its order, to array_record files that train faster.

        write_array_record("data/imagenet64", jaxdiff.data.imagenet("ILSVRC2012/train", 64))

    A record is the label (int32, little-endian; left out in data without labels) and the values of
    x (little-endian, last axis fastest), nothing else. dataset.json says how many there are, their
    shape, their dtype and the number of classes; it is written last, so a folder without it is
    incomplete. The files are data-00000-of-00004.array_record and so on, in order.

    Args:
      path: a folder, new or empty.
      source: any source, see `jaxdiff.data.sources`.
      dtype: "uint8" stores round(127.5 (x + 1)), exact for images read from bytes; "float16"
        (latents) or "float32" store x.
      shards: files to write, at most one an example.
      threads: threads that read the source, at least 1; decoding images uses as many processors.
      progress: show a bar.

    Raises FileExistsError for a folder that holds anything; ValueError for a bad dtype or number of
    shards or threads, and for x outside [-1, 1] with "uint8", or not finite in `dtype`.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    folder, count = Path(path).expanduser(), len(source)
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {list(_DTYPES)}, got {dtype!r}")
    if not 1 <= shards <= count:
        raise ValueError(f"shards must be from 1 to {count}, the examples, got {shards}")
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"the folder {str(folder)!r} is not empty")
    folder.mkdir(parents=True, exist_ok=True)
    edges = [count * i // shards for i in range(shards + 1)]
    bar = tqdm(total=count, unit="example", disable=not progress)
    for shard, (start, stop) in enumerate(zip(edges, edges[1:])):
        file = folder / f"data-{shard:05d}-of-{shards:05d}.array_record"
        writer = ArrayRecordWriter(str(file), "group_size:1")  # random access to single records
        try:
            for record in _records(source, range(start, stop), dtype, threads):
                writer.write(record)
                bar.update()
        finally:
            writer.close()
    bar.close()
    about = {
        "count": count, "shape": list(source.shape), "dtype": dtype,
        "num_classes": source.num_classes, "shards": shards,
    }  # fmt: skip
    write_text(folder / _ABOUT, json.dumps(about) + "\n")


def _records(source: Source, indices: range, dtype: str, threads: int) -> Iterator[bytes]:
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(indices), _AHEAD):  # few at a time: a writer may be slower
            some = indices[start : start + _AHEAD]
            yield from pool.map(lambda index: _encoded(source, index, dtype), some)


def _encoded(source: Source, index: int, dtype: str) -> bytes:
    example = source[index]
    x = np.asarray(example["x"])
    if x.shape != tuple(source.shape):
        raise ValueError(f"example {index} has shape {list(x.shape)}, not {list(source.shape)}")
    if dtype == "uint8":
        if not (x.min() >= -1 and x.max() <= 1):
            raise ValueError(
                f"example {index} must be within [-1, 1] to be stored as bytes, its range is "
                f"[{x.min()}, {x.max()}]; use the dtype 'float16' or 'float32'"
            )
        x = np.round(127.5 * (x + 1.0))
    with np.errstate(over="ignore"):
        stored = x.astype(np.dtype(dtype).newbyteorder("<"))
    if not np.all(np.isfinite(stored)):
        raise ValueError(f"example {index} is not finite in {dtype}")
    label = b"" if source.num_classes is None else np.asarray(example["label"], _LABEL).tobytes()
    return label + stored.tobytes()


def array_record(path: str | Path) -> RecordSource:
    """Examples written by `write_array_record`, in any order: x float32, labels if there are.

    Bytes become value / 127.5 - 1. Read through `grain.sources.ArrayRecordDataSource`, from as many
    threads as one likes.

    Raises FileNotFoundError, saying how to make it, if there is no such data set; ValueError for a
    damaged one: a file missing or unreadable, or another number of examples than was written. A
    damaged record raises ValueError when it is read.
    """
    folder = Path(path).expanduser()
    if not (folder / _ABOUT).is_file():
        raise FileNotFoundError(
            f"no data set in {str(folder)!r} (no {_ABOUT}): make one of any source with "
            "jaxdiff.data.write_array_record; see its docstring, and the configuration's header for "
            "what to download"
        )
    about = _read_about(folder / _ABOUT)
    names = [
        f"data-{i:05d}-of-{about['shards']:05d}.array_record" for i in range(about["shards"])
    ]
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{str(folder)!r} is incomplete: no file {absent[0]!r}")
    try:
        records = grain.sources.ArrayRecordDataSource([str(folder / name) for name in names])
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"{str(folder)!r} is damaged: {error}") from error
    if len(records) != about["count"]:
        raise ValueError(
            f"{str(folder)!r} is damaged: {about['count']} examples were written, it has "
            f"{len(records)}"
        )
    shape = tuple(about["shape"])
    return RecordSource(records, shape, about["dtype"], about["num_classes"], folder)


def _read_about(file: Path) -> dict[str, Any]:
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        known = about["dtype"] in _DTYPES and all(type(n) is int for n in about["shape"])
        counted = type(about["count"]) is int and type(about["shards"]) is int
        if not (known and counted and (about["num_classes"] is None or about["num_classes"] > 0)):
            raise ValueError(f"unknown values: {about}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(file)!r} is damaged: {error!r}") from error
    return about
