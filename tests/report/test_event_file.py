"""TensorBoard's own reader understands what is written without it."""

from __future__ import annotations

import errno
import math
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from raylight.report.event_file import EventFile


def read(path: str) -> list[Event]:
    """RawEventFileLoader checks both checksums of every record."""
    return [Event.FromString(record) for record in RawEventFileLoader(path).Load()]


def scalars(event: Event) -> dict[str, float]:
    return {value.tag: value.simple_value for value in event.summary.value}


def test_rows_of_many_shapes_keep_values_and_order(tmp_path):
    rng = random.Random(0)
    names = ["train_loss", "val/acc", "größe", "x" * 300, "epoch"]
    rows = [
        (
            {name: rng.uniform(-1e3, 1e3) for name in rng.sample(names, rng.randint(1, len(names)))},
            rng.choice([0, 1, 127, 128, 16383, 16384, 2**31, 2**40]),
            1.7e9 + index / 8,
        )
        for index in range(500)
    ]
    file = EventFile(str(tmp_path))
    for start in range(0, len(rows), 50):
        file.append(rows[start : start + 50])
    file.close()
    first, *events = read(file.path)
    assert first.file_version == "brain.Event:2"
    assert [(event.step, event.wall_time) for event in events] == [row[1:] for row in rows]
    for event, (values, _, _) in zip(events, rows, strict=True):
        assert scalars(event) == {name: float(np.float32(value)) for name, value in values.items()}
        assert list(scalars(event)) == list(values)


def test_scalars_are_the_bytes_that_protobuf_writes(tmp_path):
    file = EventFile(str(tmp_path))
    file.append([({"a": 0.5, "b": -2.0}, 300, 1.7e9)])
    value = [Summary.Value(tag="a", simple_value=0.5), Summary.Value(tag="b", simple_value=-2.0)]
    expected = Event(wall_time=1.7e9, step=300, summary=Summary(value=value)).SerializeToString()
    assert list(RawEventFileLoader(file.path).Load())[1] == expected


def test_values_that_are_not_finite_or_too_large(tmp_path):
    file = EventFile(str(tmp_path))
    file.append([({"nan": math.nan, "inf": math.inf, "large": 1e300, "small": -1e300}, 1, 0.0)])
    values = scalars(read(file.path)[1])
    assert math.isnan(values["nan"])
    assert (values["inf"], values["large"], values["small"]) == (math.inf, math.inf, -math.inf)


def test_scalars_and_other_events_keep_their_order(tmp_path):
    file = EventFile(str(tmp_path))
    other = Event(step=7, wall_time=2.0).SerializeToString()
    file.append([({"a": 1.0}, 1, 1.0), lambda: other, ({"a": 2.0}, 2, 3.0)])
    assert [event.step for event in read(file.path)[1:]] == [1, 7, 2]


def test_two_files_of_one_directory_have_two_names(tmp_path):
    assert EventFile(str(tmp_path)).path != EventFile(str(tmp_path)).path


def test_a_full_disk_leaves_whole_records_and_the_rest_can_be_offered_again(tmp_path, monkeypatch):
    file = EventFile(str(tmp_path))
    file.append([({"a": 1.0}, 1, 1.0)])
    write = os.write

    def write_a_little(descriptor: int, data: memoryview) -> int:
        if len(data) < 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:20])

    monkeypatch.setattr(os, "write", write_a_little)
    with pytest.raises(OSError, match="No space"):
        file.append([({"a": 2.0}, 2, 2.0)])
    monkeypatch.undo()
    assert [event.step for event in read(file.path)[1:]] == [1]
    file.append([({"a": 2.0}, 2, 2.0)])
    assert [event.step for event in read(file.path)[1:]] == [1, 2]


def test_writing_imports_neither_tensorboard_nor_protobuf(tmp_path):
    code = f"""
import sys
from raylight.report.event_file import EventFile
EventFile({str(tmp_path)!r}).append([({{"a": 1.0}}, 1, 1.0)])
assert not [name for name in sys.modules if name.startswith(("tensorboard", "google", "torch"))], sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
