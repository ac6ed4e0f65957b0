"""Recovery: goes on after a failure, or with other workers, as restart.py decides."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from raylight.contract.config import Config
from raylight.contract.errors import NotEnoughResources, RaylightError, WorkerFailed
from raylight.contract.messages import Died, Failure, PeerLost
from raylight.contract.requests import Request
from raylight.contract.task import Rejoin, Rescue, Task
from raylight.contract.user_error import beside, describe_beside, with_users_class
from raylight.driver.driver import Driver
from raylight.driver.group import Group, Messages
from raylight.driver.outcome import Failed
from raylight.driver.restart import Action, Decision, History, decide, find_first, is_of_recovery, make_error
from raylight.driver.watch import Watch
from raylight.storage.checkpoints import newest_whole


class Recovery:
    """The generations of one run's group after the first."""

    def __init__(self, config: Config, group: Group, driver: Driver, task: Task, watch: Watch):
        self.config, self.group, self.driver, self.task, self.watch = config, group, driver, task, watch
        self.history = History()
        self.handled: dict[int, Failed] = {}
        """The newest failures that came in training, and not while others were handled."""
        self.most = max(watch.most, group.world_size)

    def go_on(self, failures: dict[int, Failed]) -> Messages:
        """The messages of the next generation: of the ranks that are left and their new peers, or, if nobody is left,
        of ranks that begin from the newest checkpoint. Raises if the run cannot go on."""
        with self._ending_on_errors(failures):
            group, driver = self.group, self.driver
            driver.wait_for_storage()
            last_step = _furthest(failures, driver.step)
            if self.watch.is_regrouping and all(isinstance(failure, PeerLost) for failure in failures.values()):
                return self._regroup(last_step)
            limit = self.config.max_restarts if group.can_recover else 0
            decision = decide(failures, group.world_size, driver.step, self.task.stage, limit, self.history)
            first, dead = find_first(failures), _find_dead(failures)
            self.history.note(failures[first], driver.step, decision)
            if not is_of_recovery(failures):
                self.handled = failures
            if decision.action is Action.GIVE_UP:
                raise self._end(failures, decision)
            lines = [f"rank {first} failed at step {driver.step} ({decision.reason}); the run goes on"]
            driver.tell("\n".join([*lines, *getattr(failures[first], "notes", ())]), "warning")
            driver.goodput_clock.note_failure(loses_work=decision.action is Action.RESTART)
            time.sleep(decision.delay_s)
            driver.departed_values.depart(dead)
            deadline = time.monotonic() + self.config.replacement_timeout_s
            missing = [rank for rank in dead if group.replace(rank, max(0.0, deadline - time.monotonic())) is None]
            if missing:
                self._go_on_without(missing, dead)
            return self._begin(decision.reason, decision.action is Action.RESTART, dead, last_step)

    @contextmanager
    def _ending_on_errors(self, failures: dict[int, Failed]) -> Iterator[None]:
        """Ends the run with the error of its failure if going on raises."""
        try:
            yield
        except RaylightError:
            raise
        except Exception as raised:
            error = self._end(failures, Decision(Action.GIVE_UP, "it could not be handled"))
            error.add_note(describe_beside("going on", raised))
            raise error from None

    def _end(self, failures: dict[int, Failed], decision: Decision) -> BaseException:
        """The error of a run that is given up, whose last whole step is saved."""
        error = self._make_error(failures, decision)
        with beside(error, "saving a last checkpoint"):
            self._rescue(_find_dead(failures))
        return error

    def _go_on_without(self, missing: list[int], dead: list[int]) -> None:
        """For these of the dead there is no room: an elastic group shrinks, any other cannot go on."""
        group, config = self.group, self.config
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
        if leaving:
            self.driver.departed_values.depart(leaving)
            self._drop(leaving)
        joined = group.adopt(self.most)
        parts = [f"{joined} joined"] + ([f"{len(leaving)} left with their nodes"] if leaving else [])
        driver.tell(f"training goes on with {group.world_size} workers: {', '.join(parts)}")
        driver.goodput_clock.note_failure(loses_work=False)
        return self._begin(", ".join(parts), is_all_new, leaving, last_step)

    def _begin(self, reason: str, from_checkpoint: bool, gone: list[int], last_step: int) -> Messages:
        group, driver, task = self.group, self.driver, self.task
        if driver.shelf.is_waiting:  # a checkpoint that lacks the share of a rank that is gone
            group.request(Request.SAVE)
        group.adopt(self.most)
        driver.begin_generation(group.world_size, reason, gone, None if from_checkpoint else last_step)
        if from_checkpoint:
            checkpoint = newest_whole(driver.version.storage, resumable=True) if driver.version is not None else None
            driver.redo_from(checkpoint.step if checkpoint is not None else 0)
            if checkpoint is not None:
                driver.shelf.start_from(checkpoint)
            is_own = checkpoint is not None  # made by this very run, which may run what it has pickled
            task = replace(
                task, checkpoint=checkpoint or task.checkpoint, weights_only=False, runs_code=is_own or task.runs_code
            )
        self.watch.begin()
        if from_checkpoint:
            driver.departed_values.clear()
        return group.rejoin(replace(task, mode=Rejoin(driver.departed_values.hand_over())))

    def _drop(self, ranks: list[int]) -> None:
        left = [rank for rank in range(self.group.world_size) if rank not in ranks]
        self.group.drop(ranks)
        self.driver.departed_values.renumber(left)

    def _rescue(self, dead: list[int]) -> None:
        """Before the run is given up, the ranks that are left save the last whole step."""
        group, driver, options = self.group, self.driver, self.config.checkpoint
        if self.task.stage != "fit" or options is None or not options.on_exception or len(dead) == group.world_size:
            return
        if dead:
            group.drop(dead)
        driver.begin_generation(group.world_size, "a last checkpoint", is_ending=True)
        for rank, message in group.rejoin(replace(self.task, mode=Rescue())):
            driver.handle(rank, message)
        for rank, failure in driver.outcome.take_failures().items():
            if isinstance(failure, Failure):
                driver.tell(f"rank {rank} could not save its last step:\n{failure.traceback}", "warning")

    def _make_error(self, failures: dict[int, Failed], decision: Decision) -> BaseException:
        if self.handled and self.handled is not failures:
            error = make_error(self.handled, self.driver, decision.reason, later=failures)
        else:
            error = make_error(failures, self.driver, decision.reason)
        cause = self.group.exception or error.cause
        if cause is None:
            return error
        is_own = type(cause).__module__ == RaylightError.__module__  # and says all by itself
        return cause if is_own and not isinstance(cause, WorkerFailed) else with_users_class(error, cause)


def _find_dead(failures: dict[int, Failed]) -> list[int]:
    return [rank for rank, failure in failures.items() if isinstance(failure, Died)]


def _furthest(failures: dict[int, Failed], step: int) -> int:
    """The step after which the ranks that are left go on; `step` if none has said."""
    return max((it.step for it in failures.values() if not isinstance(it, Died)), default=step)
