"""What a rank remembers of the checkpoints that it makes."""

from __future__ import annotations

from raylight.contract.messages import Notice
from raylight.storage.filesystem import Storage
from raylight.worker.checkpoint.saving import Saving
from raylight.worker.outbox import Outbox


class Writer:
    """Stands for the snapshots of a rank."""

    has_failed = True

    def __init__(self, is_whole: bool = True):
        self.is_whole = is_whole
        self.closed_after: list[float] = []

    def wait(self) -> bool:
        return self.is_whole

    def poll(self):
        return iter(["saved"])

    def close(self, timeout_s: float):
        self.closed_after.append(timeout_s)
        return iter(["saved last"])


def test_a_run_without_checkpoints_has_nothing_to_wait_for():
    saving = Saving()
    assert (saving.saved_at, saving.is_requested, saving.has_failed) == (-1, False, False)
    assert saving.finish_copying() is True
    assert saving.poll() == saving.close(1.0) == []
    saving.move(1, 2)
    assert saving.snapshots is None


def test_what_has_become_of_snapshots():
    saving = Saving()
    saving.snapshots = writer = Writer()  # type: ignore[assignment]
    assert saving.has_failed
    assert saving.finish_copying()
    assert saving.poll() == ["saved"]
    assert saving.close(5.0) == ["saved last"]
    assert writer.closed_after == [5.0]
    saving.snapshots = Writer(is_whole=False)  # type: ignore[assignment]
    assert not saving.finish_copying()


def test_it_begins_and_moves_with_its_rank(tmp_path):
    saving = Saving()
    saving.begin(Storage(str(tmp_path)), 3, 4)
    assert saving.snapshots is not None
    assert (saving.snapshots.rank, saving.snapshots.world_size) == (3, 4)
    assert not saving.has_failed
    saving.move(1, 2)
    assert (saving.snapshots.rank, saving.snapshots.world_size) == (1, 2)


def test_a_request_holds_until_it_is_met_or_dropped():
    saving = Saving()
    saving.request()
    assert saving.is_requested
    saving.drop_request()
    assert not saving.is_requested
    saving.request()
    saving.note_saved(12)
    assert (saving.saved_at, saving.is_requested) == (12, False)


def test_hyperparameters_that_cannot_be_held_are_named_once():
    saving, outbox = Saving(), Outbox()
    saving.name_unsaved({"net": "a function"}, outbox)
    (notice,) = outbox.take()
    assert isinstance(notice, Notice)
    assert notice.text.startswith("hyperparameter 'net' is not in the checkpoints, which cannot hold it: a function.")
    saving.name_unsaved({"net": "a function", "path": "a file"}, outbox)
    assert ["'path'" in notice.text for notice in outbox.take()] == [True]


def test_of_checkpoints_that_are_left_out_the_first_is_named():
    saving, outbox = Saving(), Outbox()
    saving.say_left_out(7, outbox)
    saving.say_left_out(8, outbox)
    (notice,) = outbox.take()
    assert notice.level == "warning"
    assert notice.text.startswith("the checkpoint of step 7 is left out")
