"""The counters of a rank, and what is read from them."""

from __future__ import annotations

import pytest

from raylight.worker.progress import Progress


def test_a_fresh_rank_stands_at_the_start():
    progress = Progress()
    assert progress.is_at_start
    assert progress.has_stepped
    assert not progress.is_validated
    assert progress.state_dict() == {
        "current_epoch": 0, "global_step": 0, "batch_idx": 0, "num_batches_seen": 0, "position": 0,
        "validated_at": -1, "step_before": 0, "steps_ahead": 0,
    }  # fmt: skip


@pytest.mark.parametrize("change", [{"global_step": 1}, {"current_epoch": 1}, {"batch_idx": 1}])
def test_whatever_has_been_done_it_is_no_longer_at_the_start(change):
    assert not Progress(**change).is_at_start


def test_batches_windows_and_epochs():
    progress = Progress()
    for index in range(3):
        progress.finish_step()
        progress.finish_window(progress.global_step - 1)
        progress.finish_batch(index)
    progress.note_position(24)
    assert (progress.global_step, progress.batch_idx, progress.num_batches_seen) == (3, 3, 3)
    assert (progress.step_before, progress.position) == (2, 24)
    progress.finish_epoch()
    assert (progress.current_epoch, progress.batch_idx, progress.position, progress.num_batches_seen) == (1, 0, 0, 3)
    progress.finish_batch(0)
    progress.finish_batch(1)
    progress.take_back(2)
    assert (progress.batch_idx, progress.num_batches_seen) == (0, 3)
    progress.enter_epoch_at(5)
    assert progress.batch_idx == 5


def test_whether_the_newest_batch_made_a_step():
    progress = Progress()
    progress.finish_batch(0)
    assert not progress.has_stepped
    progress.finish_step()
    assert progress.has_stepped
    progress.finish_window(progress.global_step)
    assert not progress.has_stepped
    progress.finish_step()
    progress.note_steps_ahead(1)
    assert progress.steps_ahead == 1
    progress.note_steps_ahead(0)
    assert progress.steps_ahead == 2
    assert not progress.has_stepped
    progress.skip_step()
    assert progress.steps_ahead == 1
    progress.forget_steps_ahead()
    assert progress.steps_ahead == 0
    assert progress.has_stepped


@pytest.mark.parametrize(
    ("before", "after", "every", "expected"),
    [(2, 3, 3, True), (3, 4, 3, False), (1, 4, 3, True), (3, 3, 3, False), (0, 1, 1, True), (5, 6, 4, False)],
)
def test_a_multiple_may_be_passed_and_not_hit(before, after, every, expected):
    assert Progress(global_step=after, step_before=before).crosses(every) is expected


def test_a_validation_holds_for_the_batch_that_it_came_after():
    progress = Progress(num_batches_seen=4)
    progress.finish_validation()
    assert progress.is_validated
    progress.finish_batch(4)
    assert not progress.is_validated


def test_where_an_evaluation_stands():
    progress = Progress()
    progress.stand_at(12, 3)
    assert (progress.global_step, progress.current_epoch, progress.batch_idx) == (12, 3, 0)
    progress.stand_at(12, 3, 4)
    assert progress.batch_idx == 4


def test_the_state_goes_through_a_checkpoint_and_older_ones_lack_the_newer_counters():
    progress = Progress(2, 9, 1, 19, 8, 18, 7, 1)
    again = Progress()
    again.load_state_dict(progress.state_dict())
    assert again == progress
    older = {name: value for name, value in progress.state_dict().items() if not name.startswith("step")}
    again.load_state_dict(older)
    assert (again.step_before, again.steps_ahead) == (8, 0)
    again.load_state_dict({**older, "global_step": 0})
    assert again.step_before == 0
