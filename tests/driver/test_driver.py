"""What a driver writes: also beside another that has taken over its version, and where storage fails."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import pytest

from raylight.contract.config import Config
from raylight.contract.errors import StorageError
from raylight.contract.messages import (
    EpochMetrics,
    Hyperparameters,
    Message,
    Notice,
    Progress,
    Saved,
    StepMetrics,
    StepRow,
    StepValue,
)
from raylight.driver.driver import Driver
from raylight.driver.journal import read_metrics
from raylight.driver.logger_feed import Logger
from raylight.loggers import CSVLogger
from raylight.loggers.opening import make_loggers
from raylight.storage.checkpoints import Checkpoint, list_checkpoints, raise_fence
from raylight.storage.filesystem import Storage
from raylight.storage.versions import Version, claim_version


@pytest.fixture
def version(tmp_path: Path) -> Version:
    return claim_version(Storage(str(tmp_path)), "run")


class Listener:
    """A sink that keeps what the driver itself has to say."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def handle(self, rank: int, message: Message) -> None:
        if isinstance(message, Notice):
            self.said.append(message.text)


def begin(version: Version, attempt: int, world_size: int = 1, loggers: Sequence[Logger] = ()) -> Driver:
    if attempt:
        raise_fence(version.storage, attempt)
    run = Driver(version, Config(name="run"), world_size, [listener := Listener()], loggers, attempt)
    listeners[run] = listener
    run.start({})
    return run


listeners: WeakKeyDictionary[Driver, Listener] = WeakKeyDictionary()


def heard(run: Driver) -> list[str]:
    return listeners[run].said


def log(run: Driver, step: int, value: float) -> None:
    run.handle(0, EpochMetrics("train", 0, step, 0.0, {"loss": value}, frozenset({"loss"}), frozenset()))


def save(run: Driver, version: Version, step: int, rank: int = 0, world_size: int = 1) -> Message:
    directory = f"checkpoints/step-{step:08d}" + (f"-attempt-{run.attempt}" if run.attempt else "")
    file = version.storage.write(f"{directory}/model-{rank:05d}-of-{world_size:05d}.pt", [b"weights"])
    return Saved(directory, step, 0, (file,), {}, False, 0.0, 0.0, world_size)


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
    assert run.departed_values.read(1) == [(0, share)]


def test_a_logger_that_cannot_write_hyperparameters_costs_a_warning(version: Version) -> None:
    Path(version.path, "hparams.yaml").mkdir()
    run = begin(version, 0, loggers=make_loggers(CSVLogger(), version.storage))
    run.handle(0, Hyperparameters({"lr": 0.1}))
    run.close("finished")
    assert version.read_run()["hyperparameters"] == {"lr": 0.1}
    [said] = heard(run)
    assert said.startswith("CSVLogger could not log the hyperparameters: could not write ")


# ---- checkpoints of a group that has changed


@pytest.mark.parametrize("rank", [0, 1])  # the survivor's rank before it became rank 0
def test_a_share_for_a_larger_group_is_no_checkpoint_of_the_one_that_is_left(version: Version, rank: int) -> None:
    run = begin(version, 0, world_size=2)
    run.begin_generation(1, "a worker died")
    run.handle(0, save(run, version, 5, rank, world_size=2))
    run.wait_for_storage()
    assert list_checkpoints(version.storage) == []
    assert not run.shelf.is_waiting
    assert [text for text in heard(run) if "the checkpoint of step 5 is lost" in text]
    run.handle(0, save(run, version, 6))
    run.wait_for_storage()
    assert [checkpoint.step for checkpoint in list_checkpoints(version.storage)] == [6]


def test_the_loss_of_a_checkpoint_is_told_once_however_many_ranks_are_left(version: Version) -> None:
    run = begin(version, 0, world_size=3)
    run.begin_generation(2, "a worker died")
    for rank in range(2):
        run.handle(rank, save(run, version, 5, rank, world_size=3))
    assert len(heard(run)) == 1


def test_the_shares_of_a_smaller_group_are_whole_by_themselves(version: Version) -> None:
    run = begin(version, 0, world_size=2)
    run.begin_generation(3, "one joined")
    run.handle(0, save(run, version, 6, 0, world_size=3))
    run.handle(0, save(run, version, 5, 0, world_size=2))
    run.handle(1, save(run, version, 5, 1, world_size=2))
    run.wait_for_storage()
    (checkpoint,) = list_checkpoints(version.storage)
    assert (checkpoint.step, checkpoint.manifest.world_size, len(checkpoint.file_names)) == (5, 2, 2)


def test_shares_for_groups_of_different_size_make_no_checkpoint_together(version: Version) -> None:
    run = begin(version, 0, world_size=2)
    run.begin_generation(3, "one joined")
    run.handle(0, save(run, version, 5, 0, world_size=3))
    run.handle(1, save(run, version, 5, 1, world_size=2))
    run.handle(2, save(run, version, 5, 2, world_size=3))
    run.wait_for_storage()
    assert list_checkpoints(version.storage) == []


def test_an_old_checkpoint_that_cannot_be_deleted_costs_no_new_one(
    version: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, where a file that somebody reads leaves its folder busy."""

    def refuse(checkpoint: Checkpoint) -> None:
        raise StorageError(f"could not delete {checkpoint.path}: Device or resource busy")

    monkeypatch.setattr("raylight.storage.checkpoints.delete", refuse)
    run = begin(version, 0)
    for step in (1, 2, 3):
        run.handle(0, save(run, version, step))
        run.wait_for_storage()
    assert run.shelf.last.step == 3
    assert not [text for text in heard(run) if "is lost" in text]
    assert len([text for text in heard(run) if "stays on storage" in text]) == 2


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("checkpoints.commit", "the checkpoint of step 1 is lost"),
        ("checkpoints.delete", "a checkpoint that is not needed any more stays on storage"),
        ("versions.Version.write_run", "run.json could not be written"),
    ],
)
def test_whatever_a_file_system_of_the_users_raises_is_told_at_once_and_ends_nothing(
    version: Version, monkeypatch: pytest.MonkeyPatch, broken: str, said: str
) -> None:
    def fail(*arguments: object) -> None:
        raise ValueError("mine")

    run = begin(version, 0)
    monkeypatch.setattr(f"raylight.storage.{broken}", fail)
    for step in (1, 2):
        run.handle(0, save(run, version, step))
        run.wait_for_storage()
    assert f"{said}: ValueError: mine" in heard(run)
    run.close("finished")


def test_values_may_be_logged_while_the_record_is_written(version: Version) -> None:
    class Number:
        ndim = 0

        def item(self) -> float:
            name = f"logged meanwhile {len(run.callback_metrics)}"
            run.metrics.take_over({name: 2.0})
            run.record.add_hyperparameters({name: 2.0})
            return 1.0

    run = begin(version, 0)
    run.metrics.take_over({"loss": Number()})
    run.record.add_hyperparameters({"lr": 1.0})
    run.write_record()
    assert heard(run) == []
    record = version.read_run()
    assert record["metrics"]["loss"] == record["hyperparameters"]["lr"] == 1.0


# ---- values before a checkpoint


def test_what_was_measured_before_a_checkpoint_is_on_storage_when_it_is(version: Version) -> None:
    run = begin(version, 0, world_size=2)
    for step in (1, 2, 3):
        for rank in range(2):
            row = StepRow(step, 0, 0.0, {"loss": StepValue(float(step + rank), 1.0, "mean")})
            run.handle(rank, StepMetrics((row,)))
        if step == 2:
            run.handle(0, save(run, version, 2, 0, world_size=2))
            run.handle(1, save(run, version, 2, 1, world_size=2))
            run.wait_for_storage()  # and here the driver is killed
    written = read_metrics(version.storage)
    assert list_checkpoints(version.storage)[0].step == 2
    assert (written["step"].to_pylist()[:2], written["value"].to_pylist()[:2]) == ([1, 2], [1.5, 2.5])
    run.close("failed")


def test_where_values_cannot_be_written_the_checkpoint_is_made_all_the_same(
    version: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(version, 0)
    log(run, 1, 1.0)
    Path(version.path, "metrics-00000.parquet").mkdir()
    run.handle(0, save(run, version, 2))
    run.wait_for_storage()
    assert [checkpoint.step for checkpoint in list_checkpoints(version.storage)] == [2]
    assert "values before a checkpoint are not on storage yet" in heard(run)[0]


def test_a_version_that_is_deleted_meanwhile_is_said_once_and_its_checkpoints_count_no_more(version: Version) -> None:
    run = begin(version, 0)
    run.handle(0, save(run, version, 1))
    run.wait_for_storage()
    shutil.rmtree(version.path)
    for step in (2, 3):
        run.handle(0, save(run, version, step))
        run.wait_for_storage()
    run.close("finished")
    assert [text for text in heard(run) if "was deleted while the run went on" in text] == heard(run)
    assert len(heard(run)) == 1
    assert [kept.step for kept in run.shelf.checkpoints] == [3]  # of those made since, the newest
    assert version.read_run()["status"] == "finished"


def test_a_run_that_makes_no_checkpoint_says_so_at_its_end(version: Version) -> None:
    run = begin(version, 0)
    shutil.rmtree(version.path)
    run.close("finished")
    assert "was deleted" in heard(run)[0]
    assert version.read_run()["status"] == "finished"


def test_a_deleted_version_that_another_run_has_claimed_is_left_to_it(version: Version) -> None:
    run = begin(version, 0)
    shutil.rmtree(version.path)
    another = begin(claim_version(Storage(str(Path(version.path).parents[1])), "run"), 0)
    assert another.version.path == version.path
    run.handle(0, save(run, version, 1))
    run.wait_for_storage()
    run.close("finished")
    assert "another has begun in it" in heard(run)[0]
    assert version.read_run()["status"] == "running"


def test_a_row_that_comes_after_the_end_of_its_epoch_replaces_no_newer_value(version: Version) -> None:
    run = begin(version, 0, world_size=2)
    row = StepMetrics((StepRow(50, 0, 0.0, {"loss": StepValue(1.0, 1.0, "mean")}),))
    run.handle(0, row)
    values = {"loss": 7.0, "val_loss": 2.0}
    run.handle(0, EpochMetrics("train", 0, 53, 0.0, values, frozenset(), frozenset(), frozenset({"loss"})))
    run.handle(1, row)
    assert run.callback_metrics == values
    assert run.logged_metrics == {"loss": 7.0}
    run.close("finished")
    assert read_metrics(version.storage)["value"].to_pylist() == [1.0]
