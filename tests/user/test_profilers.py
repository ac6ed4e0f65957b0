"""Profilers: what they measure, and what a run shows of it."""

from __future__ import annotations

import contextlib
import json
import pstats
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import raylight
from raylight.contract.errors import InvalidArguments
from raylight.user import profilers
from raylight.user.profilers import (
    AdvancedProfiler,
    Measured,
    PassThroughProfiler,
    Profiler,
    PyTorchProfiler,
    Section,
    SimpleProfiler,
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(profilers, "perf_counter", clock)
    return clock


def rows_of(text: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in text.splitlines()}


def test_sections_count_their_own_time_alone_and_add_up(clock: Clock) -> None:
    profiler = SimpleProfiler()
    for _ in range(2):
        with profiler.profile("validation"):
            clock.now += 3
            with profiler.profile("hooks"):
                clock.now += 1
        profiler.step()
    clock.now += 10
    profiler.teardown(None)
    sections = profiler.measured.sections
    assert {name: section.seconds for name, section in sections.items()} == {"hooks": 2.0, "validation": 6.0}
    assert profiler.recorded_durations == {"hooks": [1.0, 1.0], "validation": [4.0, 4.0]}
    rows = rows_of(profiler.summary())
    assert list(rows) == ["section", "validation", "hooks", "other", "18.000"]
    assert rows["validation"] == ["6.000", "3000.000", "3000.000", "2", "21.4", "%"]
    assert rows["other"] == ["10.000", "71.4", "%"]
    assert "2 steps, 0.1 steps/s" in profiler.summary()


def test_what_comes_once_is_in_no_mean_and_no_share(clock: Clock) -> None:
    profiler = SimpleProfiler()
    for seconds in (100, 1, 1, 1):  # the first imports something
        with profiler.profile("training_step"):
            clock.now += seconds
        with profiler.profile("data"):
            clock.now += 1
    profiler.teardown(None)
    rows = rows_of(profiler.summary())
    assert rows["training_step"] == ["103.000", "1000.000", "100000.000", "4", "50.0", "%"]
    assert rows["data"] == ["4.000", "1000.000", "1000.000", "4", "50.0", "%"]


def test_an_exception_closes_its_section_and_misuse_is_an_error(clock: Clock) -> None:
    profiler = SimpleProfiler()
    with contextlib.suppress(ZeroDivisionError), profiler.profile("forward"):
        clock.now += 1
        raise ZeroDivisionError
    assert profiler.measured.sections["forward"].seconds == 1.0
    with pytest.raises(ValueError, match="has not begun"):
        profiler.stop("forward")
    profiler.start("forward")
    with pytest.raises(ValueError, match="begun already"):
        profiler.start("forward")


def test_ranks_stand_in_one_table() -> None:
    ranks = [Measured({"data": Section(2, 1.0 + rank, 0.5)}, 10.0, 2) for rank in range(3)]
    text = SimpleProfiler().summarize(ranks)
    assert text.splitlines()[0].split()[:3] == ["section", "rank", "seconds"]
    assert [line.split()[1:3] for line in text.splitlines() if line.startswith("data")] == [
        ["0", "1.000"], ["1", "2.000"], ["2", "3.000"],
    ]  # fmt: skip
    many = [Measured({"data": Section(1, float(abs(rank - 5)), 0.0)}, 10.0, 2) for rank in range(20)]
    shown = [line.split()[1] for line in SimpleProfiler().summarize(many).splitlines() if line.startswith("data")]
    assert shown == ["5", "19"]


def test_a_shorter_table_and_a_file(tmp_path: Path, clock: Clock) -> None:
    profiler = SimpleProfiler(dirpath=tmp_path / "new", filename="times", extended=False)
    profiler.setup("fit", 1)
    with profiler.profile("data"):
        clock.now += 2
    assert profiler.describe() == f"profile: {tmp_path / 'new'}/fit-times-1.txt"
    assert (tmp_path / "new/fit-times-1.txt").read_text().splitlines()[0].split() == [
        "section", "seconds", "mean,", "ms", "first,", "ms",
    ]  # fmt: skip


class Net(raylight.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        with self.trainer.profiler.profile("loss of mine"):
            return slow_square(self.layer(batch)).mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        time.sleep(0.02)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def slow_square(x: Tensor) -> Tensor:
    return x * x


def run(tmp_path: Path, profiler: Any, **arguments: Any) -> raylight.Trainer:
    given = {"num_workers": 0, "max_epochs": 2, "logger": False, "enable_model_summary": False, "checkpoint": False}
    trainer = raylight.Trainer(storage_path=str(tmp_path), profiler=profiler, **(given | arguments))
    loader = DataLoader(torch.randn(24, 4), batch_size=4)
    trainer.fit(Net(), loader, loader)
    return trainer


def test_simple_in_a_run_shows_validation_and_sections_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = run(tmp_path, "simple", num_sanity_val_steps=1)
    assert isinstance(trainer.profiler, SimpleProfiler)
    sections = trainer.profiler.measured.sections
    assert sections["loss of mine"].count == sections["training_step"].count == sections["backward"].count == 12
    assert sections["validation_step"].count == 2 * 6 + 1
    assert sections["validation_step"].seconds >= 13 * 0.02
    assert trainer.profiler.measured.num_steps == 12
    total_s = trainer.profiler.measured.total_s
    assert sum(section.seconds for section in sections.values()) <= total_s
    output = capsys.readouterr()
    assert "validation_step" in output.out + output.err
    results = raylight.Trainer(num_workers=0, profiler="simple", storage_path=str(tmp_path), logger=False)
    results.validate(Net(), DataLoader(torch.randn(8, 4), batch_size=4))
    assert results.profiler.measured.sections["validation_step"].count == 2


def test_advanced_names_the_functions_of_each_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profiler = AdvancedProfiler(dirpath=tmp_path / "stats", dump_stats=True)
    run(tmp_path, profiler)
    text = profiler.summary()
    mine = text[text.index("Profile stats for: loss of mine") :]
    assert "slow_square" in mine[: mine.index("Profile stats", 5) if "Profile stats" in mine[5:] else None]
    dumped = pstats.Stats(str(tmp_path / "stats/fit-loss_of_mine.prof"))
    assert any(name == "slow_square" for _, _, name in dumped.stats)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="has not begun"):
        profiler.stop("data")


def test_pytorch_writes_a_trace_with_the_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = run(tmp_path, "pytorch")
    profiler = trainer.profiler
    assert isinstance(profiler, PyTorchProfiler)
    assert profiler.trace_path is not None
    assert Path(profiler.trace_path).parent == Path(str(trainer.log_dir))
    events = json.loads(Path(profiler.trace_path).read_text())["traceEvents"]
    names = [event.get("name") for event in events if event.get("ph") == "X"]
    assert names.count("training_step") == 3
    assert "Linear: layer" in names
    assert "aten::" in profiler.summary()
    assert not trainer.lightning_module.layer._forward_hooks


def test_pytorch_says_when_a_run_was_too_short(tmp_path: Path) -> None:
    profiler = PyTorchProfiler(dirpath=tmp_path)
    run(tmp_path, profiler, max_steps=1)
    assert profiler.summary() == "No trace: no step of the schedule was recorded; 1 were made"


def test_a_profiler_of_ones_own_and_lightnings(tmp_path: Path) -> None:
    class Own(Profiler):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def start(self, action_name: str) -> None:
            self.seen.append(action_name)

        def stop(self, action_name: str) -> None:
            assert action_name in self.seen

    own = Own()
    assert run(tmp_path, own).profiler is own
    assert own.seen.count("training_step") == 12
    import pytorch_lightning.profilers

    theirs = pytorch_lightning.profilers.SimpleProfiler()
    run(tmp_path, theirs)
    assert len(theirs.recorded_durations["training_step"]) == 12


def test_no_profiler_and_a_wrong_name(tmp_path: Path) -> None:
    assert isinstance(run(tmp_path, None).profiler, PassThroughProfiler)
    for wrong in ("fast", SimpleProfiler, 3):
        with pytest.raises(InvalidArguments, match="profiler must be 'simple', 'advanced', 'pytorch'"):
            raylight.Trainer(profiler=wrong)  # type: ignore[arg-type]


def test_a_run_that_fails_leaves_no_profiler_running(tmp_path: Path) -> None:
    profiler = PyTorchProfiler(dirpath=tmp_path)

    class Broken(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            raise RuntimeError("broken")

    trainer = raylight.Trainer(
        num_workers=0, storage_path=str(tmp_path), profiler=profiler, max_restarts=0, logger=False
    )
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(Broken(), DataLoader(torch.randn(8, 4), batch_size=4))
    assert profiler._run is None


def test_two_workers_stand_in_one_table(
    tmp_path: Path, ray_cluster: object, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, "simple", num_workers=2, use_gpu=False)
    output = capsys.readouterr()
    lines = [line for line in (output.out + output.err).splitlines() if "validation_step" in line]
    assert [line.split("validation_step")[1].split()[0] for line in lines] == ["0", "1"]
