"""Going on after a failure, or with other workers: what restart.py decides is done here."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from raylight.contract.config import Config
from raylight.contract.errors import NotEnoughResources, RaylightError, WorkerFailed
from raylight.contract.messages import Died, Failure, PeerLost
from raylight.contract.requests import Request
from raylight.contract.task import Rejoin, Rescue, Task
from raylight.contract.user_error import beside, describe_beside, with_users_class
from raylight.driver.group import Group, Messages
from raylight.driver.restart import Decision, History, decide, find_first, is_of_recovery, make_error
from raylight.driver.run import Run
from raylight.driver.watch import Watch
from raylight.storage.checkpoints import newest_whole


class Recovery:
    """The generations of one run's group after the first."""

    def __init__(self, config: Config, group: Group, driver: Run, task: Task, watch: Watch):
        self.config, self.group, self.driver, self.task, self.watch = config, group, driver, task, watch
        self.history = History()
        self.carried: list[tuple[int, dict[str, Any]]] = []
        """Epoch and what was logged in it, of ranks that are gone."""
        self.handled: dict[int, Any] = {}
        """The newest failures that came in training, and not while others were handled."""
        self.most = max(watch.most, group.world_size)

    def go_on(self, failures: dict[int, Any]) -> Messages:
        """The messages of the next generation: of the ranks that are left and their new peers, or, where nobody is
        left, of ranks that begin from the newest checkpoint. Raises where the run cannot go on."""
        another = self.driver.take_logger_error()
        if another is None:
            try:
                messages = self._go_on(failures)
                another = self.driver.take_logger_error()
                if another is None:
                    return messages
            except RaylightError as known:
                self._note(known, self.driver.take_logger_error())
                raise
            except Exception as raised:
                another = raised
        error = self._make_error(failures, Decision("give up", "it could not be handled"))
        with beside(error, "saving a last checkpoint"):
            self._rescue([rank for rank, failure in failures.items() if isinstance(failure, Died)])
        self._note(error, another)
        raise error from None

    def _note(self, error: BaseException, another: Exception | None) -> None:
        """As of a logger of the user's, which hears of the failure in this process."""
        if another is not None:
            error.add_note(describe_beside("going on", another))

    def _go_on(self, failures: dict[int, Any]) -> Messages:
        self.driver.wait_for_storage()
        if self.watch.is_regrouping and all(isinstance(failure, PeerLost) for failure in failures.values()):
            return self._regroup(_furthest(failures, self.driver.step))
        group, driver = self.group, self.driver
        limit = self.config.max_restarts if group.can_recover else 0
        decision = decide(failures, group.world_size, driver.step, self.task.stage, limit, self.history)
        first = find_first(failures)
        self.history.note(failures[first], driver.step, decision)
        dead = [rank for rank, failure in failures.items() if isinstance(failure, Died)]
        if not is_of_recovery(failures):
            self.handled = failures
        if decision.action == "give up":
            error = self._make_error(failures, decision)
            with beside(error, "saving a last checkpoint"):
                self._rescue(dead)
            raise error
        lines = [f"rank {first} failed at step {driver.step} ({decision.reason}); the run goes on"]
        driver.tell("\n".join([*lines, *getattr(failures[first], "notes", ())]), "warning")
        driver.ledger.note_failure(loses_work=decision.action == "restart")
        time.sleep(decision.delay_s)
        self._replace(dead)
        return self._begin(
            decision.reason, decision.action == "restart", dead, last_step=_furthest(failures, driver.step)
        )

    def _replace(self, dead: list[int]) -> None:
        """Other processes for the ranks that are lost; an elastic group goes on without those that find no room."""
        group, config = self.group, self.config
        self._take_shares(dead)
        deadline = time.monotonic() + config.replacement_timeout_s
        missing = [rank for rank in dead if group.replace(rank, max(0.0, deadline - time.monotonic())) is None]
        if not missing:
            return
        fewest = config.num_workers[0] if isinstance(config.num_workers, tuple) else group.world_size
        left = group.world_size - len(missing)
        if left < fewest:
            self._rescue(dead)
            ranks = ", ".join(map(str, missing))
            raise NotEnoughResources(
                f"{'rank' if len(missing) == 1 else 'ranks'} {ranks} died and no other worker found room within "
                f"replacement_timeout_s={config.replacement_timeout_s:g}: {left} of num_workers={config.num_workers} "
                "are left. num_workers=(min, max) goes on with fewer. "
                f"Resume with: raylight.fit(..., name={config.name!r}, resume='last')"
            )
        self._drop(missing)
        self.driver.tell(
            f"no room for another worker within replacement_timeout_s={config.replacement_timeout_s:g}: training goes "
            f"on with {left}, and takes on more when there is room", "warning",
        )  # fmt: skip

    def _regroup(self, last_step: int) -> Messages:
        """At a step boundary that all ranks have reached: those on nodes that go leave, and those that wait join."""
        group, driver = self.group, self.driver
        leaving = self.watch.leaving[: group.num_recruits]
        is_all_new = len(leaving) == group.world_size
        if is_all_new:
            self._rescue([])
            driver.is_ending = False
        if leaving:
            self._take_shares(leaving)
            self._drop(leaving)
        joined = group.adopt(self.most)
        parts = [f"{joined} joined"] + ([f"{len(leaving)} left with their nodes"] if leaving else [])
        driver.tell(f"training goes on with {group.world_size} workers: {', '.join(parts)}")
        driver.ledger.note_failure(loses_work=False)
        return self._begin(", ".join(parts), is_all_new, leaving, last_step)

    def _begin(self, reason: str, from_checkpoint: bool, gone: list[int], last_step: int) -> Messages:
        group, driver, task = self.group, self.driver, self.task
        if driver.saved:  # a checkpoint that lacks the share of a rank that is gone
            group.request(Request.SAVE)
        group.adopt(self.most)
        driver.begin_generation(group.world_size, reason, gone, None if from_checkpoint else last_step)
        if from_checkpoint:
            checkpoint = newest_whole(driver.version.storage, resumable=True) if driver.version is not None else None
            driver.redo_from(checkpoint.step if checkpoint is not None else 0)
            driver.protected = {checkpoint.path} if checkpoint is not None else driver.protected
            task = replace(task, checkpoint=checkpoint or task.checkpoint, weights_only=False)
        self.watch.begin()
        carried, self.carried = self.carried, []
        if from_checkpoint:  # which holds what all ranks had logged
            carried = []
            driver.shares.clear()
        elif carried:
            driver.shares[0] = driver.shares.get(0, []) + carried
        return group.rejoin(replace(task, mode=Rejoin(tuple(carried))))

    def _take_shares(self, gone: list[int]) -> None:
        for rank in gone:
            self.carried += self.driver.shares.pop(rank, [])

    def _drop(self, ranks: list[int]) -> None:
        left = [rank for rank in range(self.group.world_size) if rank not in ranks]
        self.group.drop(ranks)
        shares = self.driver.shares
        self.driver.shares = {new: shares[old] for new, old in enumerate(left) if old in shares}

    def _rescue(self, dead: list[int]) -> None:
        """Before the run is given up, the ranks that are left save the last whole step."""
        group, driver, options = self.group, self.driver, self.config.checkpoint
        if self.task.stage != "fit" or options is None or not options.on_exception or len(dead) == group.world_size:
            return
        if dead:
            group.drop(dead)
        driver.is_ending = True
        driver.begin_generation(group.world_size, "a last checkpoint")
        for rank, message in group.rejoin(replace(self.task, mode=Rescue())):
            driver.handle(rank, message)
        for rank, failure in driver.outcome.take_failures().items():
            if isinstance(failure, Failure):
                driver.tell(f"rank {rank} could not save its last step:\n{failure.traceback}", "warning")

    def _make_error(self, failures: dict[int, Any], decision: Decision) -> BaseException:
        if self.handled and self.handled is not failures:
            error = make_error(self.handled, self.driver, decision.reason, later=failures)
        else:
            error = make_error(failures, self.driver, decision.reason)
        cause = self.group.exception or error.cause
        if cause is None:
            return error
        is_own = type(cause).__module__ == RaylightError.__module__  # and says all by itself
        return cause if is_own and not isinstance(cause, WorkerFailed) else with_users_class(error, cause)


def _furthest(failures: dict[int, Any], step: int) -> int:
    """The step after which the ranks that are left go on; `step` where none has said."""
    return max((it.step for it in failures.values() if not isinstance(it, Died)), default=step)
