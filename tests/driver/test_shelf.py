"""Which checkpoints a shelf keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from raylight.contract.config import Checkpointing
from raylight.contract.messages import Saved
from raylight.driver.shelf import Shelf
from raylight.storage.filesystem import Storage


class Kept:
    """A shelf, and the warnings of it."""

    def __init__(self, folder: Path, source: str | None = None):
        self.files, self.said = Storage(str(folder)), []
        self.shelf = Shelf(self.files, Checkpointing(), 0, self.said.append, source)

    def save(self, step: int) -> str:
        directory = f"checkpoints/step-{step:08d}"
        file = self.files.write(f"{directory}/model.pt", [b"weights"])
        shares = self.shelf.add(0, Saved(directory, step, 0, (file,), {}, False, 0.0, 0.0), world_size=1)
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
