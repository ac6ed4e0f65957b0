"""Which checkpoints a shelf keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raylight.contract.config import Checkpointing
from raylight.contract.messages import Saved, SaveFailed
from raylight.driver.shelf import Shelf
from raylight.storage.filesystem import Storage


class Kept:
    """A shelf, and the warnings of it."""

    def __init__(self, folder: Path, source: str | None = None, **options: Any):
        self.files, self.said = Storage(str(folder)), []
        self.shelf = Shelf(self.files, Checkpointing(**options), 0, self.said.append, source)

    def save(self, step: int, **metrics: float) -> str:
        directory = f"checkpoints/step-{step:08d}"
        file = self.files.write(f"{directory}/model.pt", [b"weights"])
        shares = self.shelf.add(0, Saved(directory, step, 0, (file,), metrics, False, 0.0, 0.0), world_size=1)
        assert shares is not None
        self.shelf.commit(shares, seed=7)
        self.shelf.retain()
        return self.shelf.last.path

    @property
    def steps(self) -> list[int]:
        return [checkpoint.step for checkpoint in self.shelf.checkpoints]


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path)


def test_one_that_is_not_needed_any_more_goes(kept: Kept):
    kept.save(1)
    kept.save(2)
    assert kept.steps == [2]
    assert kept.shelf.last.manifest.seed == 7


def test_pinned_ones_stay_until_others_are_pinned(kept: Kept):
    kept.shelf.pin([kept.save(1)])
    kept.save(2)
    assert kept.steps == [1, 2]
    kept.shelf.pin([])
    kept.save(3)
    assert kept.steps == [3]


def test_the_source_stays_whatever_is_pinned(tmp_path: Path):
    source = Kept(tmp_path).save(1)
    kept = Kept(tmp_path, source)
    pinned = kept.save(2)
    kept.shelf.pin([pinned])
    kept.save(3)
    assert kept.steps == [1, 2, 3]


def test_after_a_recovery_the_new_source_stays_and_what_others_have_learnt_of(tmp_path: Path):
    source = Kept(tmp_path).save(1)
    kept = Kept(tmp_path, source)
    kept.shelf.pin([kept.save(2)])
    kept.save(3)
    kept.shelf.start_from(kept.shelf.last)
    kept.save(4)
    assert kept.steps == [2, 3, 4]


def test_a_share_for_more_ranks_than_are_left_is_given_up_with_one_warning(kept: Kept):
    for rank in range(2):
        assert kept.shelf.add(rank, Saved("checkpoints/a", 5, 0, (), {}, False, 0.0, 0.0, world_size=3), 2) is None
    assert not kept.shelf.is_waiting
    assert len(kept.said) == 1


def share(step: int, rank: int, world_size: int = 2) -> Saved:
    """Of a rank whose files, values and durations differ from those of the others."""
    directory = f"checkpoints/step-{step:08d}"
    return Saved(directory, step, 3, (f"file-{rank}",), {"loss": float(rank)}, True, 0.0, 0.0, world_size)


def test_a_checkpoint_is_whole_once_all_ranks_have_brought_their_share(kept: Kept):
    second, first = share(5, 1), share(5, 0)
    assert kept.shelf.add(1, second, world_size=2) is None
    assert kept.shelf.is_waiting
    assert kept.shelf.add(0, first, world_size=2) == {1: second, 0: first}
    assert not kept.shelf.is_waiting
    assert kept.said == []


def test_what_the_manifest_says_is_what_the_first_rank_has_said(tmp_path: Path):
    kept = Kept(tmp_path)
    files = {rank: kept.files.write(f"checkpoints/step-00000005/{rank}.pt", [b"w" * rank]) for rank in (0, 1)}
    for rank in (1, 0):
        shares = kept.shelf.add(rank, replace(share(5, rank), files=(files[rank],)), world_size=2)
    kept.shelf.commit(shares, seed=3)
    manifest = kept.shelf.last.manifest
    assert (manifest.step, manifest.epoch, manifest.attempt, manifest.world_size) == (5, 3, 0, 2)
    assert (manifest.metrics, manifest.weights_only, manifest.seed) == ({"loss": 0.0}, True, 3)
    assert [(file.path, file.size) for file in manifest.files] == [("0.pt", 0), ("1.pt", 1)]


@pytest.mark.parametrize(("is_ending", "end"), [(True, "Earlier checkpoints"), (False, "Training goes on; earlier")])
def test_a_share_that_was_not_written_is_told_and_its_checkpoint_is_not_waited_for(kept: Kept, is_ending, end):
    kept.shelf.add(0, share(5, 0), world_size=2)
    kept.shelf.drop_failed(1, SaveFailed("checkpoints/step-00000005", 5, "disk full."), is_ending)
    assert not kept.shelf.is_waiting
    (said,) = kept.said
    assert said.startswith("rank 1 could not write its share of the checkpoint of step 5: disk full. " + end)
    assert kept.shelf.add(1, share(5, 1), world_size=2) is None  # the other share is gone


def test_a_failed_share_of_one_checkpoint_leaves_others_alone(kept: Kept):
    kept.shelf.add(0, share(5, 0), world_size=2)
    kept.shelf.drop_failed(1, SaveFailed("checkpoints/step-00000004", 4, "disk full"), False)
    assert kept.shelf.is_waiting


def test_a_new_generation_waits_for_no_share_of_the_last(kept: Kept):
    kept.shelf.add(0, share(5, 0), world_size=2)
    kept.shelf.begin_generation()
    assert not kept.shelf.is_waiting
    assert kept.shelf.add(1, share(5, 1), world_size=2) is None


def test_each_lost_checkpoint_is_told_with_how_many_began_it(kept: Kept):
    for step in (5, 6):
        assert kept.shelf.add(0, share(step, 0, world_size=3), world_size=2) is None
    assert ["step 5 is lost: 3 workers" in kept.said[0], "step 6 is lost" in kept.said[1]] == [True, True]
    assert "and 2 are left" in kept.said[0]


def test_the_best_and_the_last_stay(tmp_path: Path):
    kept = Kept(tmp_path, monitor="loss", mode="min")
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 5.0)):
        kept.save(step, loss=loss)
    assert kept.steps == [2, 4]
    assert (kept.shelf.best.step, kept.shelf.last.step) == (2, 4)


def test_one_that_is_written_again_takes_the_place_of_itself(tmp_path: Path):
    kept = Kept(tmp_path, keep_last=-1)
    for _ in range(2):
        kept.save(1)
    assert kept.steps == [1]


def test_those_beyond_a_step_count_for_nothing_and_stay_on_storage(tmp_path: Path):
    kept = Kept(tmp_path, keep_last=-1)
    for step in (1, 2, 3):
        kept.save(step)
    kept.shelf.add(0, share(4, 0), world_size=2)
    kept.shelf.redo_from(2)
    assert (kept.steps, kept.shelf.is_waiting) == ([1, 2], False)
    kept.shelf.list_again()
    assert kept.steps == [1, 2, 3]


def test_a_run_that_writes_nothing_has_none():
    shelf = Shelf(None, Checkpointing(), 0, print)
    shelf.list_again()
    assert (shelf.checkpoints, shelf.best, shelf.last, shelf.is_waiting) == ([], None, None, False)
