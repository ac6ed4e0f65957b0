"""The table and the page of a sweep."""

from __future__ import annotations

import io
import math
from html.parser import HTMLParser

import pytest
from rich.console import Console

from raylight.report.sweep_page import make_axis, make_page, varied_names
from raylight.report.sweep_table import MAX_ROWS, SweepState, TrialRow, choose_rows, describe, render


def make_state(rows: list[TrialRow], total: int = 0, mode: str = "min", left_s: float | None = None) -> SweepState:
    return SweepState(rows, total or len(rows), "val_loss", mode, 75.0, left_s)


ROWS = [
    TrialRow("Net_0", "done", {"lr": 0.001, "act": "relu"}, 0.5, 0.4, 3, 20.0),
    TrialRow("Net_1", "running", {"lr": 0.1, "act": "tanh"}, 0.25, 0.2, 2, 10.0),
    TrialRow("Net_2", "failed", {"lr": 0.01, "act": "relu"}, math.nan, math.nan, 1, 5.0),
    TrialRow("Net_3", "waiting", {"lr": 0.03, "act": "gelu"}),
]


def print_table(state: SweepState, width: int = 120, ascii_only: bool = False) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(render(state, width, ascii_only))
    return stream.getvalue()


def test_the_line_counts_trials_and_names_the_best() -> None:
    line = describe(make_state(ROWS, total=6, left_s=125.0))
    assert line == (
        "6 trials: 1 running, 3 waiting, 1 done, 1 failed, best val_loss 0.2 (Net_1), 1:15, about 2:05 left"
    )


def test_the_best_follows_the_mode_and_leaves_out_what_is_no_number() -> None:
    assert make_state(ROWS).best is ROWS[1]
    assert make_state(ROWS, mode="max").best is ROWS[0]
    assert make_state(ROWS[2:]).best is None


def test_the_table_has_a_row_for_each_trial_with_its_settings() -> None:
    printed = print_table(make_state(ROWS))
    header, *rows = [line.split() for line in printed.splitlines()[2:] if line.strip("─ ")]
    assert header == ["trial", "state", "epoch", "val_loss", "best", "time", "lr", "act"]
    assert rows[1] == ["Net_1", "running", "2", "0.25", "0.2", "0:10", "0.1", "tanh"]
    assert rows[3] == ["Net_3", "waiting", "-", "-", "-", "0:00", "0.03", "gelu"]


def test_a_terminal_without_unicode_gets_ascii() -> None:
    print_table(make_state(ROWS), ascii_only=True).encode("ascii")


def test_of_many_trials_those_that_run_and_the_best_are_shown() -> None:
    rows = [TrialRow(f"Net_{n}", "done", {}, 1.0 / (n + 1), 1.0 / (n + 1), 1, 1.0) for n in range(40)]
    rows.append(TrialRow("Net_40", "running", {}, 9.0, 9.0, 1, 1.0))
    shown = choose_rows(make_state(rows))
    assert len(shown) == MAX_ROWS
    assert [row.name for row in shown[:3]] == ["Net_39", "Net_40", "Net_38"]
    assert "and 25 more" in print_table(make_state(rows))


class Checker(HTMLParser):
    """Counts elements, and holds that each is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_draws_each_trial_that_has_a_value() -> None:
    page = make_page(make_state(ROWS), "digits <sweep>")
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.counts["polyline"] == 2
    assert checker.counts["circle"] == 4  # two trials, two hyperparameters
    assert checker.counts["tr"] == 1 + len(ROWS)
    assert "digits &lt;sweep&gt;" in page
    assert "http" not in page  # nothing is loaded from elsewhere


def test_a_page_of_trials_without_results_is_a_table() -> None:
    page = make_page(make_state(ROWS[2:]), "nothing yet")
    assert "<svg" not in page
    assert page.count("<tr>") == 3


def test_only_what_varies_has_an_axis() -> None:
    rows = [TrialRow(f"Net_{n}", "done", {"lr": n, "depth": 3}, 1.0, 1.0) for n in range(3)]
    assert varied_names(rows) == ["lr"]


@pytest.mark.parametrize(
    ("values", "places", "title"),
    [
        ([1, 2, 3], [0.0, 0.5, 1.0], "x"),
        ([1e-4, 1e-2, 1.0], [0.0, 0.5, 1.0], "x (log)"),
        ([0.001, 0.2, 0.3, 0.5], [0.0, 199 / 499, 299 / 499, 1.0], "x"),
        ([5, 5], [0.5, 0.5], "x"),
        (["b", "a"], [0.75, 0.25], "x"),
        ([True, False], [0.75, 0.25], "x"),
        ([None, 0.5], [0.25, 0.75], "x"),
    ],
)
def test_an_axis_places_numbers_by_size_and_all_else_by_name(values: list, places: list[float], title: str) -> None:
    axis = make_axis("x", values)
    assert [axis.place(value) for value in values] == pytest.approx(places)
    assert axis.title == title


def test_few_numbers_are_all_named_at_the_axis() -> None:
    assert [label for label, _ in make_axis("x", [32, 64, 128, 64]).ticks] == ["32", "64", "128"]
    assert [label for label, _ in make_axis("x", [1, 2, 3, 4, 5]).ticks] == ["1", "3", "5"]
    assert [label for label, _ in make_axis("x", [1e-4, 1e-2, 1.0]).ticks] == ["0.0001", "0.01", "1"]
