from __future__ import annotations

import csv
import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from raylight.report.csv_file import CsvFile


def read(path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_rows_with_new_names_get_columns(tmp_path):
    path = str(tmp_path / "metrics.csv")
    file = CsvFile(path)
    file.append([{"loss": 1.0, "step": 1}])
    file.append([{"loss": 0.5, "step": 2}])
    file.append([{"val, loss": 0.25, "step": 2}, {"ä": 1.0, "step": 2}])
    assert read(path) == [
        {"loss": "1.0", "step": "1", "val, loss": "", "ä": ""},
        {"loss": "0.5", "step": "2", "val, loss": "", "ä": ""},
        {"loss": "", "step": "2", "val, loss": "0.25", "ä": ""},
        {"loss": "", "step": "2", "val, loss": "", "ä": "1.0"},
    ]


def test_a_file_that_is_there_goes_on(tmp_path):
    path = str(tmp_path / "metrics.csv")
    CsvFile(path).append([{"loss": 1.0, "step": 1}])
    CsvFile(path).append([{"step": 2, "loss": 2.0}])
    assert read(path) == [{"loss": "1.0", "step": "1"}, {"loss": "2.0", "step": "2"}]


def test_steps_that_are_redone_are_there_once(tmp_path):
    path = str(tmp_path / "metrics.csv")
    file = CsvFile(path)
    file.append([{"loss": float(step), "step": step} for step in (1, 2, 3)])
    file.append([{"loss": 4.0, "step": 4}, 2, {"loss": 30.0, "step": 3}])
    assert [row["loss"] for row in read(path)] == ["1.0", "2.0", "30.0"]
    file.append([0])
    assert read(path) == []
    file.append([{"loss": 5.0, "step": 1}])
    assert [row["loss"] for row in read(path)] == ["5.0"]


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """No file of this process can grow beyond that; a write that crosses it is cut and then refused."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def no_replacing() -> Iterator[None]:
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        yield


BATCHES = [
    [{"loss": 1.0, "step": 1}],
    [{"loss": 0.5, "step": 2}, {"loss": 0.25, "step": 3}],
    [{"val_loss": 4.0, "step": 3}],
    [2, {"loss": 0.12345678901234567, "step": 3}],
]


@pytest.mark.parametrize(
    ("fault", "failing"), [("write", 0), ("write", 1), ("write", 2), ("write", 3), ("replace", 0), ("replace", 2)]
)
def test_rows_whose_write_failed_can_be_offered_again(tmp_path, fault, failing):
    undisturbed, path = tmp_path / "undisturbed.csv", tmp_path / "metrics.csv"
    whole, file = CsvFile(str(undisturbed)), CsvFile(str(path))
    for number, rows in enumerate(BATCHES):
        before = path.read_bytes() if path.exists() else None
        if number == failing:
            with pytest.raises(OSError), room_for(len(before or b"") + 1) if fault == "write" else no_replacing():
                file.append(rows)
            assert (path.read_bytes() if path.exists() else None) == before
            assert not list(tmp_path.glob("*.partial"))
        file.append(rows)
        whole.append(rows)
    assert path.read_bytes() == undisturbed.read_bytes()
