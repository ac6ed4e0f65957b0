"""The tables before and after a run."""

from __future__ import annotations

import math

import pytest
import torch

from raylight.driver.result import Result
from raylight.report.summary import (
    format_results,
    format_seconds,
    format_table,
    format_value,
    format_values,
    summarize_model,
    summarize_result,
)


def test_numbers_are_aligned_right_and_texts_left():
    assert format_table(["name", "n"], [["a", "1"], ["bcdef", "1,000"]], ["sum", "1,001"]).splitlines() == [
        "  name        n",
        " ───────────────",
        "  a           1",
        "  bcdef   1,000",
        " ───────────────",
        "  sum     1,001",
    ]


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.BatchNorm1d(20))
        self.head = torch.nn.Linear(20, 10, bias=False)
        self.tied = torch.nn.Linear(20, 10, bias=False)
        self.tied.weight = self.head.weight
        self.scale = torch.nn.Parameter(torch.ones(3))
        self.body[0].requires_grad_(False)


def test_the_model_table_counts_parameters_trainable_ones_and_bytes():
    rows = [line.split() for line in summarize_model(Net()).splitlines() if "─" not in line]
    assert rows[1:] == [
        ["body", "Sequential", "260", "40", "0.00"],
        ["head", "Linear", "200", "200", "0.00"],
        ["tied", "Linear", "200", "200", "0.00"],
        ["Parameter", "3", "3", "0.00"],
        ["total", "Net", "463", "243", "0.00"],  # what is tied counts once
    ]
    big = torch.nn.Sequential(torch.nn.Linear(1000, 1000, bias=False))
    assert summarize_model(big).splitlines()[-1].split()[-3:] == ["1,000,000", "1,000,000", "4.00"]
    assert summarize_model(big.half()).splitlines()[-1].split()[-1] == "2.00"


def test_lazy_layers_are_not_counted_yet():
    table = summarize_model(torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.ReLU()))
    assert table.splitlines()[2].split() == ["0", "LazyLinear", "?", "?", "?"]


def test_a_module_of_many_layers_stays_readable():
    table = summarize_model(torch.nn.Sequential(*[torch.nn.Linear(1, 1) for _ in range(100)]))
    assert "… 60 more" in table
    assert len(table.splitlines()) < 50
    assert "200" in table.splitlines()[-1]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123456, "0.12346"), (1.0, "1"), (1200.0, "1,200"), (1e-7, "1e-07"), (math.nan, "nan"), (math.inf, "inf"),
     (123456.789, "1.2346e+05"), (1e30, "1e+30"), (-0.5, "-0.5")],
)  # fmt: skip
def test_values(value, text):
    assert format_value(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (61, "1:01"), (3599.6, "1:00:00"), (90061, "25:01:01")])
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text


def result(**changes) -> Result:
    values = {
        "status": "finished", "metrics": {"val_loss": 0.25}, "path": "/runs/my run/version_0", "best_checkpoint": None,
        "last_checkpoint": None, "checkpoints": [], "num_steps": 1200, "num_epochs": 3,
    }  # fmt: skip
    return Result(**{**values, **changes})


def test_the_summary_says_what_came_out_and_how_to_look_at_it():
    text = summarize_result(result(goodput={"compute": 8.0, "data": 2.0, "other": 0.0}, num_restarts=2), seconds=75.0)
    assert format_values({"val_loss": 0.25}) in text
    assert "finished after 3 epochs, 1,200 steps in 1:15, 2 restarts" in text
    assert "compute 80%, data 20%" in text
    assert "other" not in text
    assert "tensorboard --logdir '/runs/my run/version_0'" in text
    assert "best checkpoint" not in text


def test_the_summary_of_a_run_that_wrote_nothing():
    text = summarize_result(result(path=None, metrics={}))
    assert text == "finished after 3 epochs, 1,200 steps"
    assert "tensorboard" not in summarize_result(result(), with_tensorboard=False)


def test_results_of_several_loaders_are_columns():
    rows = format_results("test", [{"acc": 0.5, "a": 1.0}, {"acc": 0.75}]).splitlines()
    assert rows[0].split() == ["metric", "test", "0", "test", "1"]
    assert [row.split() for row in rows[2:]] == [["acc", "0.5", "0.75"], ["a", "1"]]
    assert format_results("test", [{"acc": 0.5}]).splitlines()[0].split() == ["metric", "test"]
