"""TensorBoard's event files: what is in them, and what is said without tensorboardX."""

import math
import struct
import sys

import pytest

from gradxform.lab.report.tensorboard import events


def read(file):
    """The (name, step, value) of all scalars, from the records' protocol buffers."""
    from tensorboardX.proto.event_pb2 import Event

    content, found, at = file.read_bytes(), [], 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)  # then its checksum, 4 bytes
        event = Event.FromString(content[at + 12 : at + 12 + length])
        found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
        at += 16 + length
    return found


def test_every_finite_number_is_there(tmp_path):
    with events(tmp_path) as on_row:
        on_row("adam", {"epoch": 1, "step": 10, "cost": 0.5})
        on_row("adam", {"epoch": 2, "step": 20, "cost": math.nan})
        on_row("../sgd", {"epoch": 1, "step": 10, "cost": 0.25})
    files = {file.parent: read(file) for file in tmp_path.glob("*/*tfevents*")}
    assert [folder.parent for folder in files] == [tmp_path, tmp_path]
    adam, sgd = (files[folder] for folder in sorted(files, reverse=True))
    assert sorted(adam) == [("cost", 10, 0.5), ("epoch", 10, 1), ("epoch", 20, 2)]
    assert sorted(sgd) == [("cost", 10, 0.25), ("epoch", 10, 1)]


def test_without_tensorboardx(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with (
        pytest.raises(ModuleNotFoundError, match=r"needs tensorboardX: pip install"),
        events(tmp_path / "none"),
    ):
        pass
    assert not any(tmp_path.iterdir())
