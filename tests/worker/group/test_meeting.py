"""Ranks that meet after a failure: all have the state of the furthest one, and what each has logged counts once."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import raylight as pl
from raylight.contract.config import Checkpointing
from raylight.contract.layout import MANIFEST_FILE
from raylight.contract.messages import EpochMetrics, Failure, Message, Notice, StepMetrics
from raylight.contract.task import Place, Rejoin, Rescue
from raylight.storage.filesystem import Storage
from raylight.worker import loop
from raylight.worker.checkpoint.state import State
from raylight.worker.group import rejoin
from raylight.worker.group.control import Control
from tests.worker.nets import Line, make_loader
from tests.worker.ranks import in_group, make_task, run_ranks, run_task

NUM_STEPS = 4
"""An epoch of two ranks: 16 samples in batches of two. Step n has the samples 4n to 4n + 3, half on each rank."""


class Count(pl.Callback):
    """Counts its batches, as callbacks with a state do."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


class Breaking(Line):
    """Breaks once, at a point of the step after `step`; notes what it is given from a checkpoint."""

    def __init__(self, point: str = "", step: int = 1):
        super().__init__()
        self.point, self.step, self.loaded = point, step, []

    def reach(self, point: str) -> None:
        if point == self.point and self.global_step == self.step:
            self.point = ""
            raise KeyError("broken")

    def training_step(self, batch):
        self.reach("forward")
        return super().training_step(batch)

    def on_before_optimizer_step(self, optimizer):
        self.reach("optimizer")

    def on_load_checkpoint(self, checkpoint):
        self.loaded.append(checkpoint["global_step"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.5)


def summarize(found: list[Message], module: Breaking, callback: Count) -> dict[str, Any]:
    finished, rows = found[-1], [row for m in found if isinstance(m, StepMetrics) for row in m.rows]
    return {
        "end": (type(finished).__name__, getattr(finished, "status", ""), finished.step),
        "text": getattr(finished, "text", ""),
        "weight": round(module.weight.item(), 4),
        "trained": module.trained,
        "loaded": module.loaded,
        "count": callback.count,
        "rows": {row.step: row.values["loss_step"].value for row in rows},
        "epochs": [(m.epoch, m.step, m.values["loss"]) for m in found if isinstance(m, EpochMetrics)],
    }


def live_twice(
    place: Place, point: str, failing: tuple[int, ...] = (1,), replaced: tuple[int, ...] = (),
    carried: tuple[Any, ...] = (), **config: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Both generations of a rank. Those in `failing` break at `point`, those in `replaced` have a new process next."""
    loop.REPORT_EVERY_S = 0.0
    control, callback = Control(), Count()
    module = Breaking(point if place.rank in failing else "")
    options: dict[str, Any] = {"max_epochs": 1, "log_every_n_steps": 1, **config}
    found = run_task(make_task(module, make_loader(16), callbacks=[callback], **options), place, control)
    before = summarize(found, module, callback)
    if place.rank in replaced:
        control, callback, module = Control(), Count(), Breaking()
    else:
        control.resume()
    task = make_task(module, make_loader(16), callbacks=[callback], **options)
    task.mode = Rejoin(carried)
    found = run_task(task, replace(place, generation=1), control)
    return [before, summarize(found, module, callback)]


def train_through() -> dict[str, Any]:
    """One process with a batch twice as large, in which nothing breaks."""
    module, callback = Breaking(), Count()
    task = make_task(module, make_loader(16, 4), callbacks=[callback], max_epochs=1, log_every_n_steps=1)
    return summarize(run_task(task), module, callback)


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return train_through()


def check_whole(found: list[list[dict[str, Any]]], whole: dict[str, Any]) -> None:
    """After the second generation all is as if nothing had broken."""
    for _, after in found:
        assert after["text"] == ""
        assert after["end"] == ("Finished", "finished", NUM_STEPS)
        assert (after["weight"], after["count"]) == (whole["weight"], whole["count"])
    assert found[0][1]["epochs"] == whole["epochs"] == [(0, NUM_STEPS, 7.5)]
    rows = [before["rows"] | after["rows"] for before, after in found]
    assert rows == [{step: 4.0 * step - 3.5 + 2 * rank for step in range(1, NUM_STEPS + 1)} for rank in (0, 1)]


def test_ranks_that_stand_at_one_step_go_on_from_it(whole):
    found = run_ranks(live_twice, "forward")
    check_whole(found, whole)
    assert [after["loaded"] for _, after in found] == [[], []]


@pytest.mark.parametrize("log_every_n_steps", [1, 2])
def test_a_step_that_broke_on_one_rank_and_was_made_on_the_other_counts_on_both(log_every_n_steps, whole):
    found = run_ranks(live_with_rows, log_every_n_steps)
    for (before, after), step in zip(found, (2, 1), strict=True):
        assert before["end"][2] == step  # the first rank has made the step that the other has not
        assert after["loaded"] == [2]  # hooks of both, since they may ask each other
    if log_every_n_steps == 1:
        check_whole(found, whole)
    rows = [sorted(before["rows"] | after["rows"]) for before, after in found]
    assert rows == [list(range(log_every_n_steps, NUM_STEPS + 1, log_every_n_steps))] * 2


def live_with_rows(place: Place, log_every_n_steps: int) -> list[dict[str, Any]]:
    return live_twice(place, "optimizer", log_every_n_steps=log_every_n_steps)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_replacement_has_the_state_of_the_one_that_is_left(rank, whole):
    found = run_ranks(live_with_replacement, rank)
    for number, (before, after) in enumerate(found):
        assert (before["end"][2], after["end"]) == (1, ("Finished", "finished", NUM_STEPS))
        assert (after["weight"], after["count"], after["loaded"]) == (whole["weight"], whole["count"], [1])
        assert sorted(after["rows"]) == [2, 3, 4]
        assert after["trained"][-3:] == [4.0 * step + 2 * number for step in (1, 2, 3)]
    lost = 0.5 + 2 * rank  # what it had logged in its first step
    assert found[0][1]["epochs"][0][2] == pytest.approx((NUM_STEPS * 2 * 7.5 - lost) / (NUM_STEPS * 2 - 1))


def live_with_replacement(place: Place, rank: int) -> list[dict[str, Any]]:
    return live_twice(place, "forward", (rank,), (rank,))


def test_what_one_that_is_gone_had_logged_in_this_epoch_is_carried_by_the_first(whole):
    found = run_ranks(live_with_share)
    assert [its[1]["epochs"] for its in found] == [whole["epochs"], []]


def live_with_share(place: Place) -> list[dict[str, Any]]:
    flags = ("mean", True, True, True, True)
    shares = ((0, {"loss": (flags, [(2.5 * 2.0, 2.0)])}), (3, {"loss": (flags, [(1e6, 2.0)])}))  # of another epoch, too
    return live_twice(place, "forward", (1,), (1,), carried=shares)


def test_where_nobody_has_a_state_all_begin(whole):
    found = run_ranks(live_without_state)
    for _, after in found:
        assert (after["end"], after["weight"]) == (whole["end"], whole["weight"])
        assert after["loaded"] == []


def live_without_state(place: Place) -> list[dict[str, Any]]:
    return live_twice(place, "forward", (0, 1), (0, 1))


def test_a_replacement_ends_where_the_one_that_is_left_was_asked_to():
    found = run_ranks(end_early)
    assert found == [("Finished", "stopped", 1)] * 2


def end_early(place: Place) -> tuple[str, str, int]:
    control, module = Control(), Breaking("forward" if place.rank else "")
    run_task(make_task(module, make_loader(16), max_epochs=1), place, control)
    if place.rank:
        control, module = Control(), Breaking()
    else:
        control.resume()
        control.kept.worker.end_as(True, "stopped")
    task = make_task(module, make_loader(16), max_epochs=1, task={"mode": Rejoin()})
    found = run_task(task, replace(place, generation=1), control)
    return type(found[-1]).__name__, getattr(found[-1], "status", found[-1]), found[-1].step


def test_ranks_whose_states_are_all_lost_say_so():
    found = run_ranks(lose_state)
    assert [(kind, stage) for kind, stage, _ in found] == [("CheckpointMismatch", "recovery")] * 2
    assert all("because of this" in text for _, _, text in found)


def lose_state(place: Place) -> tuple[str, str, str]:
    control, module = Control(), Breaking("forward")
    run_task(make_task(module, make_loader(16), max_epochs=1), place, control)
    control.resume()
    control.kept.lose("because of this")
    task = make_task(module, make_loader(16), max_epochs=1, task={"mode": Rejoin()})
    failure = run_task(task, replace(place, generation=1), control)[-1]
    assert isinstance(failure, Failure), failure
    return failure.kind, failure.stage, failure.text


# ---- state through the group


def share_states(place: Place) -> list[tuple[Any, list[int]]]:
    """From each of both ranks, with three bounds of the pieces."""
    sizes, broadcast = [], dist.broadcast

    def note(tensor, **arguments):
        if tensor.dtype != torch.uint8:  # what is pickled goes this way too
            sizes.append(tensor.numel() * tensor.element_size())
        return broadcast(tensor, **arguments)

    dist.broadcast, found = note, []
    for source, limit in itertools.product((0, 1), (1 << 20, 36, 1)):
        rejoin.CHUNK_BYTES = limit
        sizes.clear()
        found.append((share_state(place, source), list(sizes)))
    return found


def share_state(place: Place, source: int) -> tuple[Any, ...]:
    values = [torch.arange(6.0).reshape(2, 3), torch.arange(4), torch.full((3,), 7.0), torch.tensor(2.0)]
    weight = torch.nn.Parameter(values[0])
    mine = State({"a": weight, "b": values[1]}, {"loop": {"x": 3}, "optimizers": [values[2]]}, {"ends": (True, "")})
    mine.module = {"extra": (values[3], "text")}
    got = rejoin.broadcast_state(mine if place.rank == source else None, place.world_size, source)
    parts = (got.model["a"], got.model["b"], got.replicated["optimizers"][0], got.module["extra"][0])
    rest = (got.replicated["loop"], got.own["ends"], got.module["extra"][1])
    return [(part.tolist(), str(part.dtype)) for part in parts], rest, got is mine


def test_a_state_reaches_all_ranks_in_pieces_of_bounded_size():
    for rank, found in enumerate(in_group(share_states)):
        assert [sizes for _, sizes in found] == [[40, 32], [36, 32, 4], [24, 32, 12, 4]] * 2
        for number, (state, _) in enumerate(found):
            assert state[0] == [
                ([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], "torch.float32"), ([0, 1, 2, 3], "torch.int64"),
                ([7.0, 7.0, 7.0], "torch.float32"), (2.0, "torch.float32"),
            ]  # fmt: skip
            assert state[1:] == (({"x": 3}, (True, ""), "text"), rank == number // 3)


def test_one_rank_alone_keeps_its_state_as_it_is():
    state = State({"weight": torch.ones(1)})
    assert rejoin.broadcast_state(state, 1, 0) is state


# ---- before a run is given up


def break_off(path: Any, place: Place | None = None, **options: Any) -> tuple[Any, Control]:
    """A task whose first step is made and whose second broke."""
    control = Control()
    files = {"files": Storage(str(path)), "checkpoint": Checkpointing(), **options}
    task = make_task(Breaking("forward"), make_loader(8), max_epochs=1, log_every_n_steps=1, **files)
    task.mode = Rejoin()  # a single rank of any number
    run_task(task, place, control)
    return task, control


def rescue(task: Any, control: Control) -> list[Message]:
    return run_task(replace(task, mode=Rescue()), Place(), control)[1:]


def test_a_rescued_rank_writes_under_its_new_number(tmp_path):
    task, control = break_off(tmp_path, Place(rank=1, world_size=1))
    (saved,) = rescue(task, control)
    assert (saved.step, saved.world_size) == (1, 1)
    assert "module.pt" in [file.path for file in saved.files]  # which the first alone writes
    assert all((tmp_path / saved.directory / file.path).exists() for file in saved.files)


def test_a_state_that_is_on_storage_is_not_saved_again(tmp_path):
    task, control = break_off(tmp_path)
    task.files.write(f"checkpoints/step-00000001/{MANIFEST_FILE}", [b"{}"])
    assert rescue(task, control) == []


def test_a_state_that_is_lost_or_has_no_storage_is_not_saved(tmp_path):
    task, control = break_off(tmp_path)
    control.kept.lose("by a hook")
    assert rescue(task, control) == []
    assert rescue(*break_off(tmp_path, files=None)) == []


def test_a_device_that_is_lost_takes_the_rows_that_it_holds(tmp_path, monkeypatch):
    worker = break_off(tmp_path)[1].kept.worker

    def fail():
        raise RuntimeError("device lost")

    monkeypatch.setattr(worker.metrics, "drain", fail)
    (said,) = rejoin.drain_rows(worker)
    assert isinstance(said, Notice)
    assert (said.level, "device lost" in said.text) == ("warning", True)


def test_only_rows_that_there_are_come_out(tmp_path):
    assert list(rejoin.drain_rows(break_off(tmp_path)[1].kept.worker)) == []
