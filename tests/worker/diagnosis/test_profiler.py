"""Profilers: sections that add up, a table, and a trace file."""

from __future__ import annotations

import contextlib
import gzip
import json
from pathlib import Path

import pytest
import torch

from raylight.contract.errors import InvalidArguments
from raylight.worker.diagnosis import profiler as profiler_module
from raylight.worker.diagnosis.profiler import SimpleProfiler, make_profiler


class Clock:
    """A clock that stands still until it is moved."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(profiler_module, "perf_counter", clock)
    return clock


def test_no_profiler_and_a_wrong_name() -> None:
    assert make_profiler(None) is None
    with pytest.raises(InvalidArguments, match='profiler=\'fast\'; allowed are "simple" and "torch"'):
        make_profiler("fast")


def test_sections_count_their_own_time_alone_and_add_up(clock: Clock) -> None:
    profiler = make_profiler("simple")
    assert isinstance(profiler, SimpleProfiler)
    profiler.start()
    for _ in range(2):
        with profiler.section("validation"):
            clock.now += 3
            with profiler.section("hooks"):
                clock.now += 1
            with profiler.section("hooks"):
                clock.now += 1
        profiler.step()
    clock.now += 10
    profiler.stop()
    assert profiler.seconds == {"hooks": 4.0, "validation": 6.0}
    assert profiler.counts == {"hooks": 4, "validation": 2}
    assert profiler.total_s == 20.0
    rows = {line.split()[0]: line.split()[1:] for line in profiler.summary().splitlines()}
    assert list(rows) == ["section", "validation", "hooks", "other", "20.000"]
    assert rows["validation"] == ["2", "6.000", "3000.000", "30.0", "%"]
    assert rows["hooks"] == ["4", "4.000", "1000.000", "20.0", "%"]
    assert rows["other"] == ["10.000", "50.0", "%"]
    assert "2 steps, 0.1 steps/s" in profiler.summary()


def test_an_exception_closes_its_section(clock: Clock) -> None:
    profiler = SimpleProfiler()
    profiler.start()
    with contextlib.suppress(ZeroDivisionError), profiler.section("forward"):
        clock.now += 1
        raise ZeroDivisionError
    with profiler.section("forward"):
        clock.now += 1
    profiler.stop()
    assert profiler.seconds == {"forward": 2.0}


def test_an_unused_profiler_has_a_summary() -> None:
    assert "0 steps" in SimpleProfiler().summary()


def test_torch_profiler_writes_the_steps_of_its_schedule(tmp_path: Path) -> None:
    path = tmp_path / "new" / "trace.json.gz"
    profiler = make_profiler("torch", trace_path=str(path), wait=1, warmup=1, active=2)
    assert profiler is not None
    profiler.start()
    for step in range(6):
        with profiler.section("forward"):
            torch.ones(4) @ torch.ones(4)
        profiler.step()
        assert path.exists() == (step >= 3)
    profiler.stop()
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "forward" and event.get("ph") == "X" for event in events) == 2
    assert "aten::" in profiler.summary()
    assert str(path) in profiler.summary()


def test_torch_profiler_says_when_a_run_was_too_short(tmp_path: Path) -> None:
    profiler = make_profiler("torch", trace_path=str(tmp_path / "trace.json"))
    assert profiler is not None
    profiler.start()
    profiler.step()
    profiler.stop()
    assert profiler.summary() == "No trace: steps are recorded from number 3 on; 1 were made"
    assert not list(tmp_path.iterdir())
