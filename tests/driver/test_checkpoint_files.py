"""CheckpointFiles alone: what becomes of orders, in which order, and where their checkpoint is lost."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from raylight.contract.errors import StorageError
from raylight.contract.messages import FileDropped, FileOrder, FileOrders, FileWanted, LinkWanted
from raylight.driver.checkpoint_files import CheckpointFiles, FileMaker, link
from raylight.storage.checkpoints import Checkpoint, Manifest
from raylight.storage.filesystem import Storage


class Maker(FileMaker):
    """Writes the step of the checkpoint; waits until it may."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.may.set()
        self.did: list[str] = []

    def write(self, checkpoint: Checkpoint, wanted: FileWanted) -> list[str]:
        assert self.may.wait(30)
        if "broken" in wanted.path:
            raise StorageError("the disk is full")
        self.did.append(f"write {Path(wanted.path).name} of {checkpoint.step}")
        Path(wanted.path).write_text(str(checkpoint.step))
        return ["conf"]

    def remove(self, path: str) -> None:
        self.did.append(f"drop {Path(path).name}")


class Desk:
    def __init__(self, folder: Path) -> None:
        self.folder, self.maker, self.said = folder, Maker(), []
        self.retained: list[set[str]] = []
        self.told: list[FileWanted] = []
        self.files = CheckpointFiles(
            self.maker, self.said.append, lambda: self.retained.append(self.files.needed), self.told.append
        )

    def order(self, step: int, *orders: FileOrder, committed: bool = False) -> None:
        message = FileOrders(f"checkpoints/step-{step:08d}", step, orders)
        self.files.add(message, checkpoint(step) if committed else None)

    def want(self, name: str) -> FileWanted:
        return FileWanted(str(self.folder / name), False, 0)

    def drop(self, name: str) -> FileDropped:
        return FileDropped(str(self.folder / name))


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(Storage(f"/run/version_0/checkpoints/step-{step:08d}"), Manifest(step, 0, ()))


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.maker.may.set()
    made.files.close()


def test_orders_wait_for_their_checkpoint_and_keep_it(desk):
    desk.order(1, desk.want("a"), desk.drop("z"))
    assert (desk.files.needed, desk.maker.did) == ({"step-00000001"}, [])
    assert desk.files.wanted_of("checkpoints/step-00000001") == (desk.want("a"),)
    desk.maker.may.clear()
    desk.files.note_commit(checkpoint(1))
    assert desk.files.needed == {"step-00000001"}
    desk.maker.may.set()
    desk.files.wait()
    assert desk.maker.did == ["write a of 1", "drop z"]
    assert (desk.files.needed, desk.retained) == (set(), [set()])


def test_of_a_checkpoint_that_is_there_they_are_made_at_once(desk):
    desk.order(1, desk.want("a"), committed=True)
    desk.files.wait()
    assert desk.maker.did == ["write a of 1"]


def test_what_is_dropped_by_then_is_not_written(desk):
    desk.maker.may.clear()
    desk.order(1, desk.want("a"), committed=True)
    desk.order(2, desk.want("b"), LinkWanted(str(desk.folder / "last"), str(desk.folder / "b")), committed=True)
    desk.order(3, desk.want("c"), desk.drop("b"), committed=True)
    desk.maker.may.set()
    desk.files.wait()
    assert desk.maker.did == ["write a of 1", "write c of 3", "drop b"]
    assert not os.path.lexists(desk.folder / "last")


@pytest.mark.parametrize("newest", ["c", "broken"])
def test_the_file_before_stays_until_the_one_that_counts_is_there(desk, newest):
    desk.maker.may.clear()
    desk.order(1, desk.want("a"), committed=True)
    desk.order(2, desk.want("b"), desk.drop("a"), committed=True)
    desk.order(3, desk.want(newest), desk.drop("b"), committed=True)
    desk.maker.may.set()
    desk.files.wait()
    assert desk.maker.did == ["write a of 1"] + ["write c of 3", "drop b", "drop a"] * (newest == "c")


def test_a_write_that_fails_costs_the_rest_of_its_orders(desk):
    desk.order(1, desk.want("broken"), desk.drop("z"), committed=True)
    desk.order(2, desk.want("b"), committed=True)
    desk.files.wait()
    assert desk.maker.did == ["write b of 2"]
    assert desk.told == [desk.want("b")]
    assert "broken was not written: " in desk.said[0]
    assert "the disk is full" in desk.said[0]
    assert "z stays, because" in desk.said[1]
    assert desk.files.needed == set()


LOSSES: list[Callable[[CheckpointFiles], None]] = [
    lambda files: files.note_lost("checkpoints/step-00000001"),
    lambda files: files.note_lost(),
]


@pytest.mark.parametrize("lose", LOSSES)
def test_of_a_lost_checkpoint_the_next_one_has_to_do_and_the_person_knows(desk, lose):
    desk.order(1, desk.want("a"), desk.drop("z"))
    lose(desk.files)
    desk.order(3, desk.want("b"))
    desk.maker.may.clear()
    desk.files.note_commit(checkpoint(3))
    assert desk.files.needed == {"step-00000003"}
    desk.maker.may.set()
    desk.files.wait()
    assert desk.maker.did == ["write a of 3", "drop z", "write b of 3"]
    assert desk.said[0] == f"the state of step 1 is lost; that of step 3 goes to {desk.folder / 'a'}"


def test_what_is_trained_again_is_asked_for_again(desk):
    desk.order(1, desk.want("a"))
    desk.order(5, desk.want("b"))
    desk.files.redo_from(2)
    desk.files.note_commit(checkpoint(3))
    desk.files.wait()
    assert desk.maker.did == ["write a of 3"]


def test_a_checkpoint_that_comes_after_all_is_the_right_one(desk):
    desk.order(1, desk.want("a"))
    desk.files.note_lost()
    desk.files.note_commit(checkpoint(1))
    desk.files.wait()
    assert (desk.maker.did, [text for text in desk.said if "lost" in text]) == (["write a of 1"], [])


def test_an_older_state_is_not_put_into_a_newer_file(desk):
    desk.order(9, desk.want("a"))
    desk.files.note_lost()
    desk.files.note_commit(checkpoint(6))
    desk.files.wait()
    assert desk.maker.did == []
    desk.files.note_commit(checkpoint(9))
    desk.files.wait()
    assert desk.maker.did == ["write a of 9"]


def test_at_the_end_those_without_a_checkpoint_are_named(desk):
    desk.order(1, desk.want("a"), LinkWanted("last", "a"))
    desk.files.close()
    assert desk.said[0] == f"{desk.folder / 'a'} was not written: there is no checkpoint of step 1"
    assert desk.said[1].startswith("last was not written")


def test_what_a_file_cannot_hold_is_told_once(desk):
    for step in (1, 2):
        desk.order(step, desk.want("a"), committed=True)
    desk.files.wait()
    assert [text for text in desk.said if "does not hold conf" in text] == desk.said


def test_a_link_takes_the_place_of_a_file_and_not_of_a_folder(tmp_path):
    (tmp_path / "a.ckpt").write_text("a")
    (tmp_path / "last.ckpt").write_text("old")
    (tmp_path / "folder.ckpt").mkdir()
    for _ in range(2):
        link(str(tmp_path / "last.ckpt"), str(tmp_path / "a.ckpt"))
    assert os.readlink(tmp_path / "last.ckpt") == "a.ckpt"
    with pytest.raises(StorageError, match="is a folder"):
        link(str(tmp_path / "folder.ckpt"), str(tmp_path / "a.ckpt"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "folder.ckpt", "last.ckpt"]
