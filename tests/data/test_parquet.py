"""Images in parquet files written here, and malformed ones."""

import io
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jaxdiff import data


def png(value, size=(6, 4)):
    file = io.BytesIO()
    Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8)).save(file, "png")
    return file.getvalue()


def write(path, images, labels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images, "label": labels}), path, **options)


def test_images_of_one_file_and_of_many(tmp_path):
    values = [0, 51, 102, 255]
    records = [{"bytes": png(v), "path": f"{v}.png"} for v in values]
    write(tmp_path / "many" / "0.parquet", records[:3], [2, 0, 1], row_group_size=2)
    write(tmp_path / "many" / "1.parquet", records[3:], [2])
    write(tmp_path / "one.parquet", pa.array([png(v) for v in values], pa.binary()), [2, 0, 1, 2])
    for path in (tmp_path / "many", tmp_path / "one.parquet"):
        source = data.parquet(path, size=2)
        assert (len(source), source.shape, source.num_classes) == (4, (2, 2, 3), 3)
        for index in (3, 0, 2, 1):
            example = source[index]
            np.testing.assert_allclose(example["x"], values[index] / 127.5 - 1, atol=1e-6)
            assert example["label"] == [2, 0, 1, 2][index]
        batch = next(data.loader(source, 4, seed=0, threads=2))
        np.testing.assert_allclose(np.sort(batch["x"][:, 0, 0, 0]), [-1, -0.6, -0.2, 1], atol=1e-6)
    plain = data.parquet(tmp_path / "many", size=3, label_key=None, channels=1, crop="adm")
    assert plain.num_classes is None and set(plain[0]) == {"x"} and plain[0]["x"].shape == (3, 3, 1)


def test_bad_files_are_named(tmp_path):
    images = pa.array([png(0), png(1)], pa.binary())

    def refuses(error, match, path="bad.parquet", **options):
        with pytest.raises(error, match=match):
            data.parquet(tmp_path / path, **{"size": 2, **options})[1]

    refuses(FileNotFoundError, r"no such file: .*bad\.parquet")
    (tmp_path / "empty").mkdir()
    refuses(FileNotFoundError, r"no \.parquet files in .*empty", path="empty")
    (tmp_path / "bad.parquet").write_text("not a table")
    refuses(ValueError, r"bad\.parquet' is not a parquet file")
    write(tmp_path / "bad.parquet", images, [0, 1])
    refuses(KeyError, r"no column 'img'; there are \['image', 'label'\]", key="img")
    refuses(TypeError, "'label' must hold encoded images, got int64", key="label")
    refuses(TypeError, "'image' must be integers, got object", label_key="image")
    refuses(ValueError, "from 0 to 0: 1 are not, the first is 1 at 1", num_classes=1)
    refuses(ValueError, "size must be at least 1, got 0", size=0)
    write(tmp_path / "bad.parquet", images, [0, None])
    refuses(ValueError, "1 rows have no label")
    write(tmp_path / "bad.parquet", pa.array([png(0), None], pa.binary()), [0, 1])
    refuses(ValueError, "1 rows have no image")
    write(tmp_path / "bad.parquet", pa.array([png(0), b"nothing"], pa.binary()), [0, 1])
    refuses(ValueError, r"cannot read the image 'row 1 of .*bad\.parquet")
    write(tmp_path / "bad.parquet", images[:0], pa.array([], pa.int64()))
    refuses(ValueError, r"bad\.parquet' has no rows")


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxdiff\[parquet\]'"):
        data.parquet(tmp_path / "x.parquet", size=2)
