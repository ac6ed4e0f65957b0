"""What a person sees while trials run; Tune's trials are stand-ins here."""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from raylight.report.sweep_table import TrialRow
from raylight.tuning.watcher import Watcher, estimate_left, shorten


@dataclass
class FakeTrial:
    trial_id: str
    status: str = "RUNNING"
    config: dict[str, Any] = field(default_factory=lambda: {"lr": 0.1})
    last_result: dict[str, Any] = field(default_factory=dict)
    pickled_error_file: Path | None = None
    max_failures: int = 3

    def __str__(self) -> str:
        return f"Net_{self.trial_id}"

    def fail(self, error: Exception, folder: Path) -> None:
        self.pickled_error_file = folder / f"{self.trial_id}.pkl"
        self.pickled_error_file.write_bytes(cloudpickle.dumps(error))

    def report(self, watcher: Watcher, **values: Any) -> None:
        self.last_result = values
        watcher.on_trial_result(0, [self], self, values)


def make_watcher(mode: str = "min", is_shown: bool = True) -> Watcher:
    watcher = Watcher("val_loss", mode, 2, is_shown)
    watcher.setup(total_num_samples=2)
    return watcher


@pytest.mark.parametrize(("mode", "best"), [("min", 0.5), ("max", 2.0)])
def test_the_best_of_a_trial_is_kept(mode: str, best: float) -> None:
    watcher, trial = make_watcher(mode), FakeTrial("a")
    for value in (1.0, 0.5, 2.0, math.nan):
        trial.report(watcher, val_loss=value, epoch=1)
    watcher.on_step_end(0, [trial])
    assert watcher.state is not None
    [row] = watcher.state.rows
    assert (row.name, row.state, row.best) == ("Net_a", "running", best)
    assert math.isnan(row.value)


def test_outside_of_a_terminal_each_trial_that_ends_is_a_line(capsys: pytest.CaptureFixture) -> None:
    watcher, one, two = make_watcher(), FakeTrial("a"), FakeTrial("b", config={"lr": 0.01})
    for trial, loss in ((one, 0.5), (two, 0.25)):
        trial.report(watcher, val_loss=loss, epoch=3, time_total_s=61.0)
        trial.status = "TERMINATED"
        watcher.on_step_end(0, [one, two])
    assert capsys.readouterr().out == (
        "Net_a done in 1:01: val_loss 0.5 (best so far), lr=0.1\n"
        "Net_b done in 1:01: val_loss 0.25 (best so far), lr=0.01\n"
    )


def test_a_failure_is_told_with_its_last_lines(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trial, text = FakeTrial("a"), "\n".join(f"line {n}" for n in range(20))
    trial.fail(RayTaskError("step", "all of Ray's frames", ValueError(text)), tmp_path)
    make_watcher().on_trial_error(0, [trial], trial)
    printed = capsys.readouterr().out
    assert printed.startswith("raylight: Net_a failed: ...\nline 8\n")
    assert printed.endswith("line 19\n")
    assert shorten("one line") == "one line"


def test_what_user_code_raised_is_not_tried_again_and_a_killed_process_is(tmp_path: Path) -> None:
    raised, killed = FakeTrial("a"), FakeTrial("b")
    raised.fail(RayTaskError("step", "", ValueError("no")), tmp_path)
    killed.fail(ActorDiedError(), tmp_path)
    for trial in (raised, killed):
        make_watcher().on_trial_recover(0, [trial], trial)
    assert (raised.max_failures, killed.max_failures) == (0, 3)


def test_with_the_bar_off_nothing_is_printed_and_the_state_is_known(capsys: pytest.CaptureFixture) -> None:
    watcher, trial = make_watcher(is_shown=False), FakeTrial("a", "TERMINATED")
    trial.report(watcher, val_loss=0.5)
    watcher.on_step_end(0, [trial])
    assert capsys.readouterr().out == ""
    assert watcher.state is not None
    assert watcher.state.best is watcher.state.rows[0]


def test_a_sweep_that_was_over_when_it_was_resumed_has_a_state() -> None:
    watcher = pickle.loads(pickle.dumps(make_watcher()))
    watcher.setup(total_num_samples=1)
    watcher.on_experiment_end([FakeTrial("a", "TERMINATED", last_result={"val_loss": 0.5})])
    assert watcher.state is not None
    assert [row.best for row in watcher.state.rows] == [0.5]


def test_what_an_interrupted_sweep_had_still_to_do_is_kept() -> None:
    """Tune calls its trials terminated then."""
    watcher, trial = make_watcher(), FakeTrial("a", "PENDING")
    watcher.on_step_end(0, [trial])
    trial.status = "TERMINATED"
    watcher.on_experiment_end([trial])
    assert watcher.state is not None
    assert watcher.state.rows[0].state == "waiting"


def test_in_a_terminal_there_is_one_table_and_prints_go_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    trial = FakeTrial("a")
    with os.fdopen(slave, "w", buffering=1) as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        watcher = make_watcher()
        trial.report(watcher, val_loss=0.5, epoch=1, time_total_s=2.0)
        watcher.on_step_end(0, [trial])
        assert watcher._drawing is not None
        while not watcher._drawing.printed_above.is_above:
            time.sleep(0.01)
        print("said by the user")
        trial.report(watcher, val_loss=0.25, epoch=2, time_total_s=4.0)
        trial.status = "TERMINATED"
        watcher.on_step_end(0, [trial])
        watcher.close()
        assert sys.stdout is terminal
    written = read_all(master)
    assert "said by the user" in written
    assert "2 trials: 1 waiting, 1 done, best val_loss 0.25 (Net_a)" in written
    last = written.rpartition("trial ")[2]
    assert "Net_a" in last
    assert "Net_a done in" not in written


def read_all(master: int) -> str:
    """What was written to a pseudo-terminal whose other end is closed."""
    written = b""
    with contextlib.suppress(OSError):  # Linux says so at the end
        while chunk := os.read(master, 1 << 16):
            written += chunk
    os.close(master)
    return written.decode()


def test_the_time_left_is_that_of_the_trials_to_come() -> None:
    done, running = TrialRow("a", "done", {}, seconds=10.0), TrialRow("b", "running", {}, seconds=4.0)
    assert estimate_left([running], 4) is None
    assert estimate_left([done, running], 4) == 6.0 + 2 * 10.0
    assert estimate_left([done, running, running], 4) == (6.0 + 6.0 + 10.0) / 2


def test_a_stream_without_a_terminal_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    watcher = make_watcher()
    watcher.on_step_end(0, [FakeTrial("a")])
    watcher.close()
    assert stream.getvalue() == ""
