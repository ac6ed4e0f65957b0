"""When a run validates, saves and ends, as tables over the counters of a rank."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch

import raylight as pl
from raylight.contract.config import Checkpointing
from raylight.contract.errors import InvalidArguments
from raylight.contract.messages import Notice
from raylight.contract.task import Place, Rejoin
from raylight.storage.filesystem import Storage
from raylight.worker.schedule import AT_EPOCH_END, NEVER, ON_REQUEST, Schedule
from tests.worker.ranks import make_worker


class Net(pl.Module):
    def validation_step(self, batch): ...


class Sized:
    def __init__(self, count: int):
        self.count = count

    def __iter__(self):
        return iter([torch.ones(2, 1)] * self.count)


class Counted(Sized):
    def __len__(self):
        return self.count


def make(
    train: Any = None, validate: Any = None, module: Any = None, place: Place | None = None, is_open: bool = True,
    **arguments: Any,
) -> Schedule:  # fmt: skip
    loaders = {"validate": Counted(4) if validate is None else validate}
    train = Counted(6) if train is None else train
    worker = make_worker(module or Net(), train, place, loaders=loaders, **arguments)
    if is_open:
        worker.open_training_data()
    return Schedule(worker)


def stand(schedule: Schedule, **counters: int) -> Schedule:
    """At these counters; of a run that has made a step a batch where nothing else is said."""
    for name, value in counters.items():
        setattr(schedule.worker.progress, name, value)
    return schedule


# ---- the end


@pytest.mark.parametrize(
    ("config", "counters", "expected"),
    [
        ({}, {"current_epoch": 1000}, False),
        ({"max_epochs": -1}, {"current_epoch": 1000}, False),
        ({"max_epochs": 2}, {"current_epoch": 1}, False),
        ({"max_epochs": 2}, {"current_epoch": 2}, True),
        ({"max_epochs": 2}, {"current_epoch": 3}, True),
        ({"max_steps": 5}, {"global_step": 4}, False),
        ({"max_steps": 5}, {"global_step": 5}, True),
        ({"max_steps": 5}, {"global_step": 6}, True),
        ({"max_steps": 0}, {}, True),
    ],
)
def test_limits_of_a_run(config, counters, expected):
    schedule = stand(make(**config), **counters)
    assert schedule.is_finished() is expected
    assert schedule.stops_in_epoch() is (expected and "max_steps" in config)


@pytest.mark.parametrize(
    ("config", "counters", "may_stop"),
    [
        ({}, {}, True),
        ({"min_steps": 5}, {"global_step": 4}, False),
        ({"min_steps": 5}, {"global_step": 5}, True),
        ({"min_epochs": 2}, {"current_epoch": 1}, False),
        ({"min_epochs": 2}, {"current_epoch": 2}, True),
        ({"min_epochs": 1, "min_steps": 5}, {"current_epoch": 1}, False),
    ],
)
def test_should_stop_counts_once_the_minimum_is_reached(config, counters, may_stop):
    schedule = stand(make(**config), **counters)
    assert not schedule.is_finished()
    assert not schedule.stops_in_epoch()
    schedule.worker.request_stop()
    assert schedule.is_finished() is schedule.stops_in_epoch() is may_stop
    schedule.worker.end_as(True, "interrupted")  # which waits for no minimum
    assert schedule.is_finished()
    assert schedule.stops_in_epoch()


def test_an_interrupted_run_ends():
    schedule = make()
    schedule.worker.end_as(False, "interrupted")
    assert schedule.is_finished()
    assert not schedule.stops_in_epoch()


def test_without_a_batch_there_is_nothing_to_train():
    assert make(limit_train_batches=0).is_finished()


def test_an_epoch_is_whole_once_all_its_batches_are_done():
    assert stand(make(), batch_idx=3).is_epoch_whole()
    for batch_idx, expected in ((5, False), (6, True), (7, True)):
        schedule = stand(make(max_steps=3), batch_idx=batch_idx, global_step=3)
        assert schedule.is_epoch_whole() is expected
    schedule = make(Sized(6))
    assert schedule.is_epoch_whole()
    schedule.worker.request_stop()
    assert not schedule.is_epoch_whole()


# ---- checkpoints


def begin_saving(schedule: Schedule, path: Any, saved_at: int = -1, is_requested: bool = False) -> Schedule:
    saving = schedule.worker.saving
    saving.begin(Storage(str(path)), 0, 1)
    saving.note_saved(saved_at)
    if is_requested:
        saving.request()
    return schedule


def test_a_run_without_checkpoints_saves_nothing(tmp_path):
    for schedule in (make(checkpoint=Checkpointing(every_n_steps=1)), begin_saving(make(), tmp_path)):
        stand(schedule, global_step=1, num_batches_seen=1).worker.saving.request()
        assert not schedule.saves_after_step(0)
        assert not schedule.saves_after_epoch()
    assert not make().must_save()
    assert not make().saves_after_validation()


@pytest.mark.parametrize(
    ("every", "before", "step", "saved_at", "window", "is_requested", "expected"),
    [
        (3, 2, 3, -1, 0, False, True),
        (3, 3, 4, -1, 0, False, False),
        (3, 2, 3, -1, 1, False, False),
        (3, 2, 3, 3, 0, False, False),
        (3, 3, 4, -1, 0, True, True),
        (3, 3, 4, -1, 1, True, False),
        (None, 2, 3, -1, 0, False, False),
        (None, 2, 3, -1, 0, True, True),
    ],
)
def test_checkpoints_after_a_step(every, before, step, saved_at, window, is_requested, expected, tmp_path):
    schedule = begin_saving(make(checkpoint=Checkpointing(every_n_steps=every)), tmp_path, saved_at, is_requested)
    stand(schedule, step_before=before, global_step=step, num_batches_seen=step)
    assert schedule.saves_after_step(window) is expected


@pytest.mark.parametrize(
    ("options", "epoch", "saved_at", "is_requested", "expected"),
    [
        ({}, 1, -1, False, True),
        ({}, 2, 6, False, True),
        ({"every_n_epochs": 2}, 1, -1, False, False),
        ({"every_n_epochs": 2}, 2, -1, False, True),
        ({"every_n_epochs": 2}, 1, -1, True, True),
        ({"every_n_steps": 6}, 1, -1, False, True),
        ({"every_n_steps": 6}, 1, 6, False, False),
        ({"every_n_steps": 4}, 1, -1, False, False),
        ({"every_s": 1.0}, 1, -1, False, False),
    ],
)
def test_checkpoints_after_an_epoch(options, epoch, saved_at, is_requested, expected, tmp_path):
    schedule = begin_saving(make(checkpoint=Checkpointing(**options)), tmp_path, saved_at, is_requested)
    stand(schedule, current_epoch=epoch, step_before=5, global_step=6, num_batches_seen=6)
    assert schedule.saves_after_epoch() is expected


@pytest.mark.parametrize(
    ("options", "validated_at", "step", "expected"),
    [
        ({}, 6, 6, True),
        ({}, 5, 6, False),
        ({"every_n_steps": 2}, -1, 6, False),
        ({"every_n_steps": 2, "keep_best": -1}, -1, 6, True),
        ({"every_n_steps": 2, "keep_last": -1}, -1, 6, True),
        ({"every_n_steps": 2, "keep_last": -1}, -1, 7, False),
        ({"keep_last": -1}, -1, 6, False),
    ],
)
def test_checkpoints_that_no_other_can_stand_for(options, validated_at, step, expected):
    schedule = make(checkpoint=Checkpointing(**options))
    stand(schedule, validated_at=validated_at, step_before=step - 1, global_step=step, num_batches_seen=6)
    assert schedule.must_save() is expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, True), ({"every_n_steps": 1}, False), ({"every_n_epochs": 1}, False), ({"every_s": 1.0}, False)],
)
def test_with_no_interval_a_validation_makes_a_checkpoint(options, expected):
    assert make(checkpoint=Checkpointing(**options)).saves_after_validation() is expected


# ---- validation


@pytest.mark.parametrize(
    ("config", "train", "expected"),
    [
        ({}, Counted(6), 6),
        ({"val_check_interval": 0.5}, Counted(6), 3),
        ({"val_check_interval": 0.1}, Counted(6), 1),
        ({"val_check_interval": 4}, Counted(6), 4),
        ({"val_check_interval": 6}, Counted(6), 6),
        ({"val_check_interval": 9, "check_val_every_n_epoch": None}, Counted(6), 9),
        ({"val_check_interval": 9}, Sized(6), 9),
        ({"val_check_interval": timedelta(hours=1)}, Counted(6), ON_REQUEST),
        ({}, Sized(6), AT_EPOCH_END),
        ({"limit_val_batches": 0}, Counted(6), NEVER),
    ],
)
def test_batches_from_one_validation_to_the_next(config, train, expected):
    assert make(train, **config).val_every == expected


def test_without_anything_to_validate_with_it_never_validates():
    assert make(module=pl.Module()).val_every == NEVER
    assert make(validate=[]).val_every == NEVER


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"val_check_interval": 7}, "val_check_interval=7 is more than the 6 batches of an epoch, so that"),
        ({"val_check_interval": 0.5, "train": Sized(6)}, "val_check_interval=0.5 is a fraction of an epoch"),
    ],
)
def test_an_interval_that_never_comes_is_an_error(config, said):
    with pytest.raises(InvalidArguments, match=said):
        make(**config)


def test_of_a_run_that_goes_on_with_others_it_is_told():
    place = Place(rank=0, world_size=2)
    schedule = make(place=place, task={"mode": Rejoin()}, val_check_interval=6, use_distributed_sampler=True)
    assert schedule.val_every == 6
    (notice,) = schedule.worker.outbox.take()
    assert isinstance(notice, Notice)
    assert "is more than the 3 batches of an epoch for each of 2 workers, so that" in notice.text


@pytest.mark.parametrize(
    ("config", "counters", "last", "expected"),
    [
        ({}, {"batch_idx": 6}, True, True),
        ({}, {"batch_idx": 6}, False, False),
        ({"val_check_interval": 1}, {"batch_idx": 4}, False, True),
        ({"val_check_interval": 0.5}, {"batch_idx": 3}, False, True),
        ({"val_check_interval": 0.5}, {"batch_idx": 4}, True, False),
        ({"val_check_interval": 4}, {"batch_idx": 4, "num_batches_seen": 10}, False, True),
        ({"val_check_interval": 4, "check_val_every_n_epoch": None}, {"num_batches_seen": 10}, False, False),
        ({"val_check_interval": 4, "check_val_every_n_epoch": None}, {"num_batches_seen": 8}, False, True),
        ({"check_val_every_n_epoch": 2}, {"current_epoch": 0}, True, False),
        ({"check_val_every_n_epoch": 2}, {"current_epoch": 1}, True, True),
        ({"val_check_interval": 3, "check_val_every_n_epoch": 2}, {"batch_idx": 3}, True, False),
        ({"train": Sized(6)}, {"batch_idx": 6}, True, False),
        ({"limit_val_batches": 0}, {"batch_idx": 6}, True, False),
    ],
)
def test_validation_after_a_batch(config, counters, last, expected):
    assert stand(make(**config), **counters).validates_after_batch(last) is expected


def test_validation_by_the_clock_waits_for_the_driver():
    schedule = make(val_check_interval=timedelta(hours=1), check_val_every_n_epoch=2)
    assert not stand(schedule, current_epoch=1).validates_after_batch(True)
    schedule.worker.request_validation()
    assert schedule.validates_after_batch(False)
    assert not stand(schedule, current_epoch=2).validates_after_batch(False)
    assert not schedule.validates_after_epoch()
    other = make(limit_val_batches=0)
    other.worker.request_validation()
    assert not other.validates_after_batch(True)


def test_an_epoch_of_unknown_length_is_validated_at_its_end():
    schedule = make(Sized(6), check_val_every_n_epoch=2)
    assert not schedule.validates_after_epoch()
    assert stand(schedule, current_epoch=1).validates_after_epoch()
    assert not stand(make(), current_epoch=1).validates_after_epoch()


@pytest.mark.parametrize(
    ("every", "epoch", "opened_in", "expected"),
    [(0, 2, 0, False), (2, 0, 0, False), (2, 1, 0, False), (2, 2, 0, True), (1, 1, 0, True), (1, 1, 1, False)],
)
def test_loaders_are_reloaded_every_n_epochs(every, epoch, opened_in, expected):
    assert stand(make(reload_dataloaders_every_n_epochs=every), current_epoch=epoch).reloads(opened_in) is expected


@pytest.mark.parametrize(
    ("config", "counters", "said"),
    [
        ({"check_val_every_n_epoch": 3}, {"current_epoch": 2}, "check_val_every_n_epoch=3, and 2 whole epochs were trained"),  # noqa: E501
        ({"check_val_every_n_epoch": 1}, {"current_epoch": 1}, "the run ended after 5 batches"),
        ({"val_check_interval": 9, "train": Sized(6)}, {"current_epoch": 1}, "there were fewer batches in each epoch"),
        ({"val_check_interval": 9, "check_val_every_n_epoch": None}, {}, "there were fewer batches in all"),
        ({"val_check_interval": 0.5, "check_val_every_n_epoch": None}, {}, "the run ended after 5 batches"),
        ({}, {"validated_at": 0, "current_epoch": 1}, None),
        ({"limit_val_batches": 0}, {"current_epoch": 1}, None),
        ({}, {"num_batches_seen": 0}, None),
    ],
)  # fmt: skip
def test_a_run_that_never_validated_says_why(config, counters, said):
    schedule = stand(make(**config), **{"num_batches_seen": 5, **counters})
    schedule.say_never_validated()
    notices = [notice.text for notice in schedule.worker.outbox.take()]
    assert len(notices) == (said is not None)
    assert said is None or (notices[0].startswith("validation never ran: ") and notices[0].endswith(said))


def test_a_run_that_was_cut_short_does_not():
    schedule = stand(make(), num_batches_seen=5)
    schedule.worker.end_as(True, "stopped")
    schedule.say_never_validated()
    assert schedule.worker.outbox.take() == []
