from __future__ import annotations

import csv

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
