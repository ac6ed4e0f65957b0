"""Watcher: shows the trials of Ray Tune to the person at the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import cloudpickle
from ray import tune
from ray.exceptions import RayTaskError
from ray.tune.experiment import Trial

from raylight.contract.errors import RaylightError
from raylight.report.console import find_place
from raylight.report.drawing import Drawing
from raylight.report.summary import format_seconds
from raylight.report.sweep_table import SweepState, TrialRow, describe, format_number, format_setting, render

LINE_INTERVAL_S = 15.0
_STATES = {
    Trial.PENDING: "waiting", Trial.RUNNING: "running", Trial.PAUSED: "paused", Trial.TERMINATED: "done",
    Trial.ERROR: "failed",
}  # fmt: skip


class Watcher(tune.Callback):
    """A live table in a terminal or notebook, a line for each trial that ends elsewhere. Is pickled into the sweep's
    folder, without what draws."""

    def __init__(self, metric: str, mode: str, total: int, is_shown: bool = True):
        self.metric, self.mode, self.total, self.is_shown = metric, mode, total, is_shown
        self._forget()

    def _forget(self) -> None:
        self._began = time.monotonic()
        self._best: dict[str, float] = {}
        self._told: set[str] = set()
        self._next_line = self._began + LINE_INTERVAL_S
        self._place = ""
        self._drawing: Drawing | None = None
        self.state: SweepState | None = None

    def __getstate__(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("metric", "mode", "total", "is_shown")}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._forget()

    # ---- what Tune calls

    def setup(
        self, stop: object = None, num_samples: object = None, total_num_samples: int | None = None, **info: object
    ) -> None:
        self.total = total_num_samples or self.total
        self._place = find_place(sys.stdout)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, object], **info: object
    ) -> None:
        value = result.get(self.metric)
        if isinstance(value, (int, float)) and value == value:
            before = self._best.get(trial.trial_id, value)
            self._best[trial.trial_id] = min(before, value) if self.mode == "min" else max(before, value)

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        """A trial whose process was killed is worth another try; one that raised would do so again."""
        if isinstance(read_error(trial), (RayTaskError, RaylightError)):
            trial.max_failures = 0

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        error = read_error(trial)
        error = getattr(error, "cause", None) or error
        print(f"raylight: {trial} failed: {shorten(str(error))}", flush=True)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: object) -> None:
        self.state = self._look(trials)
        if not self.is_shown:
            return
        if self._place != "plain":
            self._draw()
        else:
            self._print_lines(trials, self.state)

    def on_experiment_end(self, trials: list[Trial], **info: object) -> None:
        if self.state is None:  # no step was made: a sweep is resumed that was over
            self.state = self._look(trials)
        self.close()

    def close(self) -> None:
        """Leaves the terminal as it was."""
        drawing, self._drawing = self._drawing, None
        if drawing is not None:
            drawing.stop()

    # ---- what it looks like

    def _look(self, trials: Sequence[Trial]) -> SweepState:
        rows = [self._row(trial) for trial in trials]
        total = max(self.total, len(rows))
        elapsed_s = time.monotonic() - self._began
        return SweepState(rows, total, self.metric, self.mode, elapsed_s, estimate_left(rows, total))

    def _row(self, trial: Trial) -> TrialRow:
        result = trial.last_result or {}
        value = result.get(self.metric)
        # Of trials that an earlier process finished, the value of the best checkpoint.
        best = self._best.get(trial.trial_id, result.get(f"best_{self.metric}", value))
        seconds = float(result.get("time_total_s", 0.0))
        return TrialRow(str(trial), _STATES[trial.status], trial.config, value, best, result.get("epoch"), seconds)

    def _draw(self) -> None:
        if self._drawing is None:
            self._drawing = Drawing(self._place, sys.stdout, self._render)
        self._drawing.update()

    def _render(self, width: int, ascii_only: bool) -> Any:
        assert self.state is not None
        return render(self.state, width, ascii_only)

    def _print_lines(self, trials: Sequence[Trial], state: SweepState) -> None:
        for row, trial in zip(state.rows, trials, strict=True):
            if row.state in ("done", "failed") and trial.trial_id not in self._told:
                self._told.add(trial.trial_id)
                settings = ", ".join(f"{name}={format_setting(value)}" for name, value in row.config.items())
                mark = " (best so far)" if row is state.best else ""
                print(
                    f"{row.name} {row.state} in {format_seconds(row.seconds)}: {self.metric} "
                    f"{format_number(row.value)}{mark}, {settings}", flush=True,
                )  # fmt: skip
        now = time.monotonic()
        if now > self._next_line:
            self._next_line = now + LINE_INTERVAL_S
            print(describe(state), flush=True)


def read_error(trial: Trial) -> BaseException | None:
    """The error that ended the trial just now. Tune itself reads it from storage, to which it comes a while later."""
    if trial.pickled_error_file is None:
        return trial.get_error()
    with open(trial.pickled_error_file, "rb") as file:
        return cloudpickle.load(file)


def shorten(text: str, most: int = 12) -> str:
    """The last lines of a long text: those of a traceback that name the error."""
    lines = text.strip().splitlines()
    return "\n".join(lines if len(lines) <= most else ["...", *lines[-most:]])


def estimate_left(rows: Sequence[TrialRow], total: int) -> float | None:
    """Seconds until all trials are done, if those to come take as long as those that are. None: none is done yet."""
    done = [row.seconds for row in rows if row.state in ("done", "failed") and row.seconds]
    if not done:
        return None
    mean = sum(done) / len(done)
    running = [row for row in rows if row.state == "running"]
    begun = [max(mean - row.seconds, 0.0) for row in rows if row.state in ("running", "paused")]
    num_new = total - len(rows) + sum(row.state == "waiting" for row in rows)
    return (sum(begun) + num_new * mean) / max(len(running), 1)
