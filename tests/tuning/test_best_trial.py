"""What is printed when a sweep is over; the line that trains the best again is in test_recipe.py."""

from __future__ import annotations

import pytest

from raylight.report.sweep_table import SweepState, TrialRow
from raylight.tuning.best_trial import summarize

ROWS = [TrialRow("Net_0", "done", {"lr": 0.1}, 0.5, 0.4, 3, 20.0), TrialRow("Net_1", "failed", {"lr": 0.2})]
STATE = SweepState(ROWS, 2, "val_loss", "min", 75.0, None)
LAST = {"val_loss": 0.5, "epoch": 3, "best_checkpoint": "/runs/it/version_0/checkpoints/step-00000020"}


def test_the_best_and_the_commands_to_go_on_with_are_told() -> None:
    assert summarize(STATE, LAST, "raylight.fit(...)", "/runs/it", "/runs/it/sweep_0/sweep.html").splitlines() == [
        "2 trials in 1:15: 1 done, 1 failed",
        "best             val_loss 0.5 at epoch 3",
        "train it again   raylight.fit(...)",
        "best checkpoint  /runs/it/version_0/checkpoints/step-00000020",
        "picture          /runs/it/sweep_0/sweep.html",
        "list trials      raylight runs /runs/it --metric val_loss --mode min",
        "compare them     tensorboard --logdir /runs/it",
    ]


@pytest.mark.parametrize(("state", "total"), [("waiting", 2), ("running", 2), ("done", 3)])
def test_a_sweep_that_was_interrupted_says_how_it_goes_on(state: str, total: int) -> None:
    rows = [ROWS[0], TrialRow("Net_1", state, {})]
    printed = summarize(SweepState(rows, total, "val_loss", "min", 75.0, None), LAST, "", "/runs/it", "page")
    assert "go on            the same call with resume=True" in printed


def test_a_checkpoint_that_is_better_than_the_end_is_told() -> None:
    printed = summarize(STATE, LAST | {"best_val_loss": 0.4}, "", "/runs/it", "page")
    assert "val_loss 0.5 at epoch 3, 0.4 in its best checkpoint" in printed


def test_where_no_trial_has_a_result_there_is_no_best() -> None:
    assert summarize(STATE, None, "", "/runs/it", "page").splitlines()[1].startswith("picture")
