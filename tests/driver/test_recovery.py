"""How a run goes on after failures, with a group that notes what it is asked for."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raylight.contract.config import Checkpointing, Config
from raylight.contract.errors import NotEnoughResources, RaylightError, WorkerFailed
from raylight.contract.messages import Died, Failure, Message, Notice, PeerLost, Progress, Saved, StageStarted
from raylight.contract.requests import Request
from raylight.contract.task import Loaders, Rejoin, Rescue, Task
from raylight.driver import recovery as recovery_module
from raylight.driver.driver import Driver
from raylight.driver.group import Group, Messages
from raylight.driver.recovery import Recovery
from raylight.driver.watch import Watch
from raylight.storage.filesystem import Storage
from raylight.storage.versions import claim_version


class OneRank(Group):
    """One rank, for which another process is always found."""

    can_recover, world_size = True, 1
    task: Task

    def replace(self, rank: int, timeout_s: float = 60.0) -> int:
        return rank

    def run(self, task: Task) -> Messages:
        return iter(())

    def request(self, request: Request) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def halt(self) -> None: ...
    def wait(self) -> None: ...

    def rejoin(self, task: Task) -> Messages:
        self.task = task
        return iter(())


def save(driver: Driver, step: int) -> None:
    directory = f"checkpoints/step-{step:08d}"
    file = driver.version.storage.write(f"{directory}/model.pt", [b"weights"])
    driver.handle(0, Saved(directory, step, 0, (file,), {}, False, 0.0, 0.0))
    driver.wait_for_storage()


def lose_all(driver: Driver) -> Any:
    """The checkpoint that the next generation begins from."""
    config, group = driver.config, OneRank()
    task = Task("fit", None, Loaders(), config, [], None, driver.version.path, driver.version.storage, seed=0)
    recovery = Recovery(config, group, driver, task, Watch(config, group, driver, "fit"))
    assert list(recovery.go_on({0: Died("killed")})) == []
    return group.task.checkpoint


def test_a_run_that_passed_over_a_damaged_checkpoint_keeps_those_that_it_makes_next(tmp_path: Path) -> None:
    driver = Driver(claim_version(Storage(str(tmp_path)), "run"), Config(name="run"), 1, [], [])
    driver.start({})
    save(driver, 20)
    driver.shelf.pin([driver.shelf.last.path])
    save(driver, 30)
    driver.shelf.pin([])
    Path(driver.shelf.last.path, "model.pt").write_bytes(b"damaged")
    begun = lose_all(driver)
    assert begun.step == driver.shelf.last.step == 20
    save(driver, 25)
    assert driver.shelf.last.step == 25
    assert [kept.step for kept in driver.shelf.checkpoints] == [20, 25]  # that which it began from is never deleted
    driver.close("finished")


def test_so_does_one_that_is_resumed(tmp_path: Path) -> None:
    version = claim_version(Storage(str(tmp_path)), "run")
    before = Driver(version, Config(name="run"), 1, [], [])
    before.start({})
    save(before, 20)
    before.shelf.pin([before.shelf.last.path])
    save(before, 30)
    resumed = Driver(version, Config(name="run"), 1, [], [], attempt=1, protected=before.shelf.checkpoints[0].path)
    resumed.redo_from(20)
    assert [kept.step for kept in resumed.shelf.checkpoints] == [20]


# ---- ranks that are left


class Ranks(Group):
    """Several ranks. `refused` find no room; `recruits` wait to be adopted."""

    can_recover = True

    def __init__(self, count: int, refused: Iterable[int] = (), recruits: int = 0, error: Exception | None = None):
        self.count, self.refused, self.recruits, self.error = count, set(refused), recruits, error
        self.done: list[Any] = []
        self.tasks: list[Task] = []
        self.answers: list[tuple[int, Message]] = []
        """What ranks say in the next generation."""

    @property
    def world_size(self) -> int:
        return self.count

    @property
    def exception(self) -> Exception | None:
        return self.error

    @property
    def num_recruits(self) -> int:
        return self.recruits

    def replace(self, rank: int, timeout_s: float = 60.0) -> int | None:
        self.done.append(("replace", rank, 0.0 <= timeout_s <= 5.0))
        return None if rank in self.refused else rank

    def drop(self, ranks: Iterable[int]) -> None:
        self.done.append(("drop", list(ranks)))
        self.count -= len(self.done[-1][1])

    def adopt(self, most: int) -> int:
        joined = min(self.recruits, max(0, most - self.count))
        self.recruits, self.count = self.recruits - joined, self.count + joined
        return joined

    def rejoin(self, task: Task) -> Messages:
        self.tasks.append(task)
        answers, self.answers = self.answers, []
        return iter(answers)

    def request(self, request: Request) -> None:
        self.done.append(request)

    def run(self, task: Task) -> Messages:
        return iter(())

    def recruit_up_to(self, count: int) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def halt(self) -> None: ...
    def wait(self) -> None: ...


class Heard:
    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []

    def handle(self, rank: int, message: Message) -> None:
        if isinstance(message, Notice):
            self.said.append((message.level, message.text))


class Setting:
    """A run of two ranks that stands at step 5."""

    def __init__(self, group: Ranks, path: Path | None = None, stage: str = "fit", **config: Any):
        options = {"name": "run", "num_workers": group.count, "replacement_timeout_s": 5.0}
        self.group, self.config, self.heard = group, Config(**{**options, **config}), Heard()
        version = claim_version(Storage(str(path)), "run") if path is not None else None
        self.driver = Driver(version, self.config, group.count, [self.heard], [])
        self.driver.start({})
        for rank in range(group.count):
            share = {"loss": (("mean", False, True, False, True), [(float(rank), 1.0)])}
            self.driver.handle(rank, Progress("train", 0, 5, 5, 10, share=share))
        self.task = Task(stage, None, Loaders(), self.config, [], None, "", None, seed=0)
        self.watch = Watch(self.config, group, self.driver, stage)
        self.recovery = Recovery(self.config, group, self.driver, self.task, self.watch)

    def fail(self, failures: dict[int, Any]) -> list[Any]:
        for rank, failure in failures.items():
            self.driver.handle(rank, failure)
        self.driver.outcome.take_failures()
        return list(self.recovery.go_on(failures))

    def end(self, failures: dict[int, Any]) -> BaseException:
        with pytest.raises(BaseException) as caught:
            self.fail(failures)
        return caught.value


@pytest.fixture(autouse=True)
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was waited before each attempt."""
    waits: list[float] = []
    monkeypatch.setattr(recovery_module, "time", SimpleNamespace(sleep=waits.append, monotonic=time.monotonic))
    return waits


LOST, DEAD = PeerLost(5, "closed"), Died("killed")
BROKEN = Failure("KeyError", "x", "Traceback of mine", 5, "train", None, notes=("do this",))
PERMANENT = Failure("KeyError", "x", "Traceback of mine", 5, "train", None, is_permanent=True)


def test_a_dead_rank_is_replaced_and_its_values_go_to_the_first(tmp_path: Path, slept: list[float]) -> None:
    run = Setting(Ranks(2), tmp_path)
    assert run.fail({0: LOST, 1: DEAD}) == []
    assert run.group.done == [("replace", 1, True)]
    (task,) = run.group.tasks
    assert isinstance(task.mode, Rejoin)
    assert [(epoch, values["loss"][1]) for epoch, values in task.mode.carried] == [(0, [(1.0, 1.0)])]
    assert task.checkpoint is None
    assert run.heard.said == [("warning", "rank 1 failed at step 5 (killed); the run goes on")]
    assert slept == [0.0]
    (restart,) = run.driver.version.read_run()["restarts"]
    assert (restart["step"], restart["world_size"], restart["reason"]) == (5, 2, "killed")
    run.driver.close("finished")


def test_where_an_exception_was_raised_all_ranks_are_left_and_its_advice_is_told() -> None:
    run = Setting(Ranks(2))
    run.fail({0: BROKEN, 1: LOST})
    assert run.group.done == []
    assert run.group.tasks[0].mode == Rejoin()
    assert run.heard.said == [("warning", "rank 0 failed at step 5 (KeyError: x); the run goes on\ndo this")]


def test_a_failure_without_progress_waits_before_it_is_tried_again(slept: list[float]) -> None:
    run = Setting(Ranks(2))
    for _ in range(3):
        run.fail({0: LOST, 1: DEAD})
    assert slept == [0.0, 1.0, 2.0]
    assert run.recovery.history.causes == ["killed"] * 3


@pytest.mark.parametrize(("failures", "lost_s"), [({0: LOST, 1: DEAD}, 0.0), ({0: DEAD, 1: DEAD}, 10.0)])
def test_the_time_of_a_recovery_and_of_what_is_made_again_is_counted(failures, lost_s) -> None:
    run, now = Setting(Ranks(2)), [time.monotonic()]
    run.driver.goodput_clock.clock = lambda: now[0]
    for failed in (failures, None):
        run.driver.handle(0, StageStarted("train", 0, 5, 10))
        now[0] += 10.0
        if failed:
            run.fail(failed)
            now[0] += 3.0
    goodput = run.driver.goodput
    assert (goodput["recovery"], goodput["lost_work"]) == (pytest.approx(3.0), pytest.approx(lost_s))
    assert goodput["compute"] == pytest.approx(20.0 - lost_s)


def test_a_budget_that_is_used_up_ends_the_run() -> None:
    run = Setting(Ranks(2), max_restarts=1)
    run.fail({0: LOST, 1: DEAD})
    error = run.end({0: LOST, 1: DEAD})
    assert isinstance(error, WorkerFailed)
    assert "max_restarts=1 is used up" in str(error)


def test_a_group_that_cannot_recover_ends_the_run() -> None:
    group = Ranks(2)
    group.can_recover = False
    error = Setting(group).end({0: LOST, 1: DEAD})
    assert "max_restarts=0 is used up" in str(error)
    assert [type(task.mode) for task in group.tasks] == [Rescue]


def test_an_elastic_group_goes_on_without_those_for_whom_there_is_no_room() -> None:
    run = Setting(Ranks(3, refused=[1]), num_workers=(2, 3))
    run.fail({0: DEAD, 1: DEAD, 2: LOST})
    assert run.group.done == [("replace", 0, True), ("replace", 1, True), ("drop", [1])]
    assert run.driver.world_size == 2
    assert [text for level, text in run.heard.said if "training goes on with 2" in text and level == "warning"]
    carried = [values["loss"][1][0][0] for _, values in run.group.tasks[0].mode.carried]
    assert carried == [0.0, 1.0]
    ((_, values),) = run.driver.departed_values.read(1)
    assert values["loss"][1] == [(2.0, 1.0)]  # it moved up


@pytest.mark.parametrize(
    ("config", "refused", "parts"),
    [
        ({}, [1], ["rank 1 died", "2 of num_workers=3 are left", "within replacement_timeout_s=5:"]),
        ({}, [0, 1], ["ranks 0, 1 died", "1 of num_workers=3 are left", "name='run'"]),
        ({"num_workers": (2, 3)}, [0, 1], ["1 of num_workers=(2, 3) are left"]),
    ],
)
def test_where_too_few_are_left_the_run_ends_with_what_is_missing(config, refused, parts) -> None:
    run = Setting(Ranks(3, refused=refused), **{"num_workers": 3, "checkpoint": Checkpointing(), **config})
    error = run.end({0: DEAD, 1: DEAD, 2: LOST})
    assert isinstance(error, NotEnoughResources)
    assert [part for part in parts if part not in str(error)] == []
    assert run.group.done[-1] == ("drop", [0, 1])  # and the last saves what it has
    assert [type(task.mode) for task in run.group.tasks] == [Rescue]


# ---- the end of a run


def test_before_a_run_is_given_up_those_that_are_left_save_their_last_step(tmp_path: Path) -> None:
    run = Setting(Ranks(2), tmp_path)
    run.group.answers = [(0, Failure("OSError", "full", "Traceback of saving", 5, "train", None))]
    error = run.end({0: PERMANENT, 1: DEAD})
    assert run.group.done == [("drop", [1])]
    assert [type(task.mode) for task in run.group.tasks] == [Rescue]
    assert "the same would happen again" in str(error)
    assert run.heard.said == [("warning", "rank 0 could not save its last step:\nTraceback of saving")]


@pytest.mark.parametrize(
    ("failures", "stage", "checkpoint"),
    [
        ({0: PERMANENT, 1: LOST}, "test", Checkpointing()),
        ({0: PERMANENT, 1: LOST}, "fit", None),
        ({0: PERMANENT, 1: LOST}, "fit", Checkpointing(on_exception=False)),
        ({0: DEAD, 1: DEAD}, "test", Checkpointing()),
    ],
)
def test_where_there_is_nothing_to_save_nobody_is_asked_to(failures, stage, checkpoint) -> None:
    run = Setting(Ranks(2), stage=stage, checkpoint=checkpoint)
    assert isinstance(run.end(failures), WorkerFailed)
    assert run.group.tasks == []
    assert run.group.done == []


def test_where_nobody_is_left_there_is_no_rescue() -> None:
    run = Setting(Ranks(2), max_restarts=0)
    assert isinstance(run.end({0: DEAD, 1: DEAD}), WorkerFailed)
    assert run.group.tasks == []


def test_what_failed_in_a_recovery_is_told_beside_what_it_followed_from() -> None:
    run = Setting(Ranks(2))
    run.fail({0: LOST, 1: BROKEN})
    later = Failure("OSError", "gone", "Traceback of the second", 5, "recovery", None, is_permanent=True)
    text = str(run.end({0: later, 1: LOST}))
    assert text.startswith("rank 1 on unknown node failed at step 5")
    assert "While this was handled, rank 0 raised:\nTraceback of the second" in text


def test_the_next_failure_in_training_stands_for_itself() -> None:
    run = Setting(Ranks(2))
    run.fail({0: LOST, 1: BROKEN})
    text = str(run.end({0: PERMANENT, 1: LOST}))
    assert text.startswith("rank 0 on unknown node failed")
    assert "While" not in text


@pytest.mark.parametrize(
    ("raised", "kinds"),
    [(ValueError("mine"), (WorkerFailed, ValueError)), (NotEnoughResources("no room"), (NotEnoughResources,))],
)
def test_what_was_raised_in_this_process_is_what_the_caller_catches(raised, kinds) -> None:
    error = Setting(Ranks(1, error=raised)).end({0: PERMANENT})
    assert all(isinstance(error, kind) for kind in kinds)
    assert (error is raised) == isinstance(raised, RaylightError)


def test_what_raises_while_a_failure_is_handled_is_told_beside_it() -> None:
    run = Setting(Ranks(2))

    def replace(rank: int, timeout_s: float = 60.0) -> int:
        raise OSError("the network is gone")

    run.group.replace = replace
    error = run.end({0: LOST, 1: DEAD})
    assert "it could not be handled" in str(error)
    assert "killed" in str(error)
    assert any("the network is gone" in note for note in error.__notes__)


# ---- other workers at a step boundary


def regroup(group: Ranks, leaving: Iterable[int] = (), most: int = 3) -> Setting:
    run = Setting(group, num_workers=(1, most))
    run.watch.is_regrouping, run.watch.leaving = True, list(leaving)
    run.fail(dict.fromkeys(range(group.count), LOST))
    return run


def test_those_that_wait_join() -> None:
    run = regroup(Ranks(2, recruits=1))
    assert (run.driver.world_size, run.group.done) == (3, [])
    assert run.heard.said == [("info", "training goes on with 3 workers: 1 joined")]
    assert run.group.tasks[0].mode == Rejoin()
    assert not run.watch.is_regrouping


def test_those_whose_nodes_go_leave_and_others_join() -> None:
    run = regroup(Ranks(2, recruits=1), leaving=[0])
    assert (run.driver.world_size, run.group.done) == (2, [("drop", [0])])
    assert run.heard.said == [("info", "training goes on with 2 workers: 1 joined, 1 left with their nodes")]
    assert [values["loss"][1] for _, values in run.group.tasks[0].mode.carried] == [[(0.0, 1.0)]]


def test_no_more_leave_than_others_wait() -> None:
    run = regroup(Ranks(3, recruits=1), leaving=[0, 1])
    assert run.group.done == [("drop", [0])]
    assert run.driver.world_size == 3


def test_a_failure_at_a_regrouping_is_handled_as_one() -> None:
    run = Setting(Ranks(2, recruits=1), num_workers=(1, 3))
    run.watch.is_regrouping = True
    run.fail({0: LOST, 1: DEAD})
    assert run.group.done == [("replace", 1, True)]
    assert run.driver.world_size == 3  # who waits joins all the same


def test_a_checkpoint_that_lacks_the_share_of_a_rank_that_is_gone_is_made_once_more(tmp_path: Path) -> None:
    run = Setting(Ranks(2), tmp_path)
    run.driver.handle(0, Saved("checkpoints/step-00000005", 5, 0, (), {}, False, 0.0, 0.0, world_size=2))
    run.fail({0: LOST, 1: DEAD})
    assert run.group.done[-1] == Request.SAVE
    assert not run.driver.shelf.is_waiting
    run.fail({0: LOST, 1: DEAD})
    assert run.group.done.count(Request.SAVE) == 1
    run.driver.close("finished")
