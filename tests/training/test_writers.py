import json
import struct
import sys

import pytest

from jaxdiff.training.writers import JSONLinesWriter, TensorBoardWriter


def test_lines_after_the_resumed_step_and_torn_ones_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 5.0}\n{"step": 2, "loss": 4.0}\n{"step": 3, "los')
    writer = JSONLinesWriter(path, resume=1)
    writer.write(2, {"loss": 3.0})
    # Read before it is closed: a killed run keeps what was written.
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 5.0}, {"step": 2, "loss": 3.0}
    ]  # fmt: skip
    writer.close()


def test_tensorboard_files_hold_the_scalars(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    writer = TensorBoardWriter(tmp_path)
    writer.write(7, {"loss": 0.25, "grad_norm": 2.0})
    writer.close()
    (file,) = tmp_path.iterdir()
    data, found, at = file.read_bytes(), {}, 0
    while at < len(data):  # a TFRecord: length, its CRC, the event, its CRC
        (length,) = struct.unpack("<Q", data[at : at + 8])
        event = Event.FromString(data[at + 12 : at + 12 + length])
        at += 16 + length
        for value in event.summary.value:
            found[value.tag, event.step] = value.simple_value
    assert found == {("loss", 7): 0.25, ("grad_norm", 7): 2.0}


def test_a_missing_tensorboard_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"jaxdiff\[tensorboard\]"):
        TensorBoardWriter(tmp_path)
