"""What a driver may still write once another has taken over its version."""

from __future__ import annotations

from pathlib import Path

import pytest

from raylight.config import Config
from raylight.driver.journal import read_metrics
from raylight.driver.run import Run
from raylight.errors import StorageError
from raylight.messages import EpochMetrics, Message, Notice, Progress, Saved
from raylight.storage.checkpoints import list_checkpoints, raise_fence
from raylight.storage.filesystem import Storage
from raylight.storage.versions import Version, claim_version


@pytest.fixture
def version(tmp_path: Path) -> Version:
    return claim_version(Storage(str(tmp_path)), "run")


def begin(version: Version, attempt: int) -> Run:
    if attempt:
        raise_fence(version.storage, attempt)
    run = Run(version, Config(name="run"), 1, [], [], attempt)
    run.start({})
    return run


def log(run: Run, step: int, value: float) -> None:
    run.handle(0, EpochMetrics("train", 0, step, 0.0, {"loss": value}, frozenset({"loss"}), frozenset()))


def save(run: Run, version: Version, step: int) -> Message:
    directory = f"checkpoints/step-{step:08d}" + (f"-attempt-{run.attempt}" if run.attempt else "")
    file = version.storage.write(f"{directory}/model.pt", [b"weights"])
    return Saved(directory, step, 0, (file,), {}, False, 0.0, 0.0)


def test_a_driver_whose_version_was_taken_over_ends_and_leaves_everything_to_its_successor(version: Version) -> None:
    stale = begin(version, 0)
    log(stale, 1, 1.0)
    successor = begin(version, 1)
    stale.handle(0, save(stale, version, 2))
    stale.wait_for_storage()
    with pytest.raises(StorageError, match="attempt 1 has taken over"):
        stale.handle(0, Notice("the next message"))
    successor.handle(0, save(successor, version, 3))
    log(successor, 2, 2.0)
    stale.close("failed")
    log(successor, 3, 3.0)
    successor.close("finished")
    record = version.read_run()
    assert (record["status"], len(record["attempts"])) == ("finished", 2)
    assert [checkpoint.step for checkpoint in list_checkpoints(version.storage)] == [3]
    assert read_metrics(version.storage)["value"].to_pylist()[-2:] == [2.0, 3.0]


def test_a_driver_that_made_no_checkpoint_since_leaves_the_record_alone_too(version: Version) -> None:
    stale = begin(version, 0)
    log(stale, 1, 1.0)
    successor = begin(version, 1)
    stale.close("interrupted")
    assert version.read_run()["status"] == "running"
    successor.close("finished")
    assert version.read_run()["status"] == "finished"


def test_what_a_rank_logged_is_kept_while_it_accumulates(version: Version) -> None:
    run = begin(version, 0)
    share = {"loss": (("mean", False, True, False, True), [(3.0, 2.0)])}
    run.handle(1, Progress("train", 0, 4, 8, 16, share=share))
    run.handle(1, Progress("train", 0, 4, 9, 18))  # in the middle of a step nothing new counts
    assert run.shares[1] == [(0, share)]
