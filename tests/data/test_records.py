"""array_record data sets: written from any source, read in any order, damaged ones refused."""

import json

import numpy as np
import pytest

from jaxdiff import data


@pytest.fixture
def latents():
    rng = np.random.default_rng(0)
    table = {"x": 3 * rng.standard_normal((11, 4, 4, 2)), "label": rng.integers(0, 5, 11)}
    return data.arrays(table, num_classes=5, bounds=None)


def write(path, source, **options):
    data.write_array_record(path, source, progress=False, **options)
    return data.array_record(path)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("float16", 2.0**-11)])
def test_latents_come_back_in_their_order(tmp_path, latents, dtype, error):
    source = write(tmp_path / "set", latents, dtype=dtype, shards=3)
    assert (len(source), source.shape, source.num_classes) == (11, (4, 4, 2), 5)
    for index in (10, 0, 4, 3, 4):
        example = source[index]
        assert example["x"].dtype == np.float32 and example["label"].dtype == np.int32
        assert example["label"] == latents.label[index]
        np.testing.assert_allclose(example["x"], latents.x[index], rtol=error)
    names = sorted(file.name for file in (tmp_path / "set").glob("*.array_record"))
    assert names == [f"data-0000{i}-of-00003.array_record" for i in range(3)]


def test_images_are_stored_as_their_bytes(tmp_path):
    photos = data.photo_patches(size=8, stride=120)
    source = write(tmp_path / "set", photos)
    for index in range(len(photos)):
        np.testing.assert_array_equal(source[index]["x"], photos[index]["x"])
        assert source[index]["label"] == photos[index]["label"]
    assert len(source.records[0]) == 4 + 8 * 8 * 3


def test_data_without_labels_have_records_without_labels(tmp_path):
    plain = data.arrays({"x": np.linspace(-1, 1, 6).reshape(3, 2)}, label_key=None)
    source = write(tmp_path / "set", plain, dtype="float32")
    assert source.num_classes is None and set(source[2]) == {"x"}
    np.testing.assert_array_equal(source[2]["x"], plain.x[2])
    assert len(source.records[0]) == 2 * 4


def test_the_loader_resumes_exactly_and_splits_over_processes(tmp_path, latents):
    source = write(tmp_path / "set", latents, dtype="float32", shards=2)
    expected = [next(iterator)["x"] for iterator in [data.loader(latents, 4, 7)] for _ in range(6)]
    stream = data.loader(source, 4, 7, threads=2)
    for batch in expected[:3]:
        np.testing.assert_array_equal(next(stream)["x"], batch)
    halves = [data.loader(source, 4, 7, rows=rows) for rows in ([0, 1], [2, 3])]
    for half in halves:
        half.set_state(stream.get_state())
    for batch in expected[3:]:
        np.testing.assert_array_equal(np.concatenate([next(h)["x"] for h in halves]), batch)


def test_what_cannot_be_stored_is_refused(tmp_path, latents):
    def refuses(error, match, source=latents, **options):
        with pytest.raises(error, match=match):
            write(tmp_path / "bad", source, **options)
        for file in (tmp_path / "bad").glob("*"):
            file.unlink()

    refuses(ValueError, r"must be one of \['uint8', 'float16', 'float32'\], got 'int8'", dtype="int8")
    refuses(ValueError, "shards must be from 1 to 11, the examples, got 12", shards=12)
    refuses(ValueError, "threads must be at least 1, got 0", dtype="float32", threads=0)
    refuses(ValueError, r"example 0 must be within \[-1, 1\] to be stored as bytes")
    wide = data.arrays({"x": np.array([[1.0], [7e4]])}, label_key=None, bounds=None)
    refuses(ValueError, "example 1 is not finite in float16", wide, dtype="float16")
    assert not (tmp_path / "bad" / "dataset.json").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(FileExistsError, match="full' is not empty"):
        write(tmp_path / "full", latents, dtype="float32")


def test_damaged_and_absent_sets_are_named(tmp_path, latents):
    with pytest.raises(FileNotFoundError, match=r"no data set in .*nowhere'.*write_array_record"):
        data.array_record(tmp_path / "nowhere")
    folder = tmp_path / "set"
    write(folder, latents, dtype="float32", shards=2)
    about = json.loads((folder / "dataset.json").read_text())

    def refuses(match, **changes):
        (folder / "dataset.json").write_text(json.dumps(about | changes))
        with pytest.raises(ValueError, match=match):
            data.array_record(folder)[0]

    refuses("record 0 of .* must have 100 bytes, got 132", shape=[4, 3, 2])
    refuses("12 examples were written, it has 11", count=12)
    refuses("incomplete: no file 'data-00000-of-00003", shards=3)
    refuses("dataset.json' is damaged", dtype="int8")
    refuses("its label must be below 1, got", num_classes=1)
    (folder / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match="dataset.json' is damaged"):
        data.array_record(folder)
    (folder / "dataset.json").write_text(json.dumps(about))
    shard = folder / "data-00001-of-00002.array_record"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="set' is damaged"):
        source = data.array_record(folder)
        [source[i] for i in range(len(source))]
