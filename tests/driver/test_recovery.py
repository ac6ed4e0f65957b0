"""Which checkpoint a group whose ranks are all gone begins from, and what becomes of those beyond it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raylight.contract.config import Config
from raylight.contract.messages import Died, Saved
from raylight.contract.requests import Request
from raylight.contract.task import Loaders, Task
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
