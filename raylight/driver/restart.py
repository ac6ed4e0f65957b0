"""Decides how a run goes on after a failure: a pure function of what failed, how often, and what is left."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from raylight.contract.errors import WorkerFailed, WorkerHung
from raylight.contract.layout import log_file
from raylight.contract.messages import ENDING, RECOVERY, Died, Failure
from raylight.driver.driver import Driver
from raylight.driver.outcome import Failed

BACKOFF_S = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # before the n-th attempt in a row that made no progress


class Action(Enum):
    RECOVER = auto()
    """The ranks that are left go on, and the dead are replaced."""
    RESTART = auto()
    """All ranks begin again from the newest checkpoint."""
    GIVE_UP = auto()
    """The caller gets the error."""


@dataclass(frozen=True, slots=True)
class Decision:
    """How the run goes on, and why."""

    action: Action
    reason: str
    delay_s: float = 0.0
    is_charged: bool = True
    """Whether it uses up one of `max_restarts`; losing a node does not."""


@dataclass(slots=True)
class History:
    """The failures so far in this fit."""

    num_charged: int = 0
    num_restarts: int = 0
    last: tuple[str, str, int] | None = None  # kind, text and step of the newest failure
    num_without_progress: int = 0
    last_step: int = -1
    causes: list[str] = field(default_factory=list)

    def note(self, cause: Failed, step: int, decision: Decision) -> None:
        self.last = identify(cause, step)
        self.num_without_progress = self.num_without_progress + 1 if step <= self.last_step else 0
        self.last_step = step
        self.causes.append(decision.reason)
        if decision.action is not Action.GIVE_UP:
            self.num_restarts += 1
            self.num_charged += decision.is_charged


def identify(cause: Failed, step: int) -> tuple[str, str, int]:
    """Two failures are the same if these are equal."""
    if isinstance(cause, Failure):
        return cause.kind, cause.text, cause.step
    return "a hang" if _is_hang(cause) else type(cause).__name__, "", _step_of(cause, step)


def _step_of(cause: Failed, step: int) -> int:
    return step if cause.step is None else cause.step


def _is_hang(cause: Failed) -> bool:
    return isinstance(cause, Died) and cause.stacks is not None


def decide(
    failures: dict[int, Failed], world_size: int, step: int, stage: str, max_restarts: int, history: History
) -> Decision:
    """`failures`: the newest of each rank that did not finish; `step`: the furthest that was reported."""
    cause = failures[find_first(failures)]
    if stage != "fit":
        return Decision(Action.GIVE_UP, f"{stage} is not restarted")
    if isinstance(cause, Failure):
        if cause.is_permanent or cause.stage == "setup":
            return Decision(Action.GIVE_UP, "the same would happen again")
        if cause.stage == ENDING:
            return Decision(Action.GIVE_UP, "training had ended, and its last checkpoint is not affected")
        if history.last == identify(cause, step):
            return Decision(Action.GIVE_UP, f"{cause.kind} came twice at step {cause.step}")
    if _is_hang(cause) and history.last == identify(cause, step):
        return Decision(Action.GIVE_UP, f"a rank hung twice at step {_step_of(cause, step)}")
    is_charged = not (isinstance(cause, Died) and cause.node_lost)
    if is_charged and history.num_charged >= max_restarts:
        return Decision(Action.GIVE_UP, f"max_restarts={max_restarts} is used up")
    alike = history.num_without_progress + 1 if step <= history.last_step else 0
    delay_s = BACKOFF_S[min(alike, len(BACKOFF_S) - 1)]
    num_dead = sum(isinstance(failure, Died) for failure in failures.values())
    action = Action.RECOVER if num_dead < world_size else Action.RESTART
    return Decision(action, _say(cause), delay_s, is_charged)


def _say(cause: Failed) -> str:
    """One line; of an exception its kind too, since many, as MemoryError, have no text."""
    text = cause.text if isinstance(cause, Failure) else cause.reason
    line = next((line for line in text.splitlines() if line.strip()), "")
    kind = cause.kind if isinstance(cause, Failure) else ""
    return ": ".join(part for part in (kind, line) if part) or type(cause).__name__


def find_first(failures: dict[int, Failed]) -> int:
    """The rank whose failure the others followed from: a user's exception explains more than a dead process, and that
    more than a broken collective."""

    def order(rank: int) -> tuple[bool, bool, bool, int]:
        failure = failures[rank]
        return not isinstance(failure, Failure), not _is_hang(failure), not isinstance(failure, Died), rank

    return min(failures, key=order)


def is_of_recovery(failures: dict[int, Failed]) -> bool:
    """Whether they came while another failure was handled, so that this one is what they followed from."""
    first = failures[find_first(failures)]
    return isinstance(first, Failure) and first.stage in (RECOVERY, "setup")


def make_error(
    failures: dict[int, Failed], driver: Driver, reason: str, later: dict[int, Failed] | None = None
) -> WorkerFailed:
    """The failure that the others followed from, as the error that the user reads; `later` are those that came while
    it was handled."""
    rank = find_first(failures)
    cause = failures[rank]
    node = driver.outcome.node_of(rank)
    step = _step_of(cause, driver.step) if isinstance(cause, Failure | Died) else driver.step
    files = driver.version.storage if driver.version is not None else None
    log = files.uri_of(log_file(rank)) if files is not None and driver.world_size > 1 else None
    lines = [f"rank {rank} on {node} failed at step {step} (attempt {driver.attempt + 1}; {reason})."]
    lines.append(cause.traceback if isinstance(cause, Failure) else f"The process is gone: {cause.reason}")
    lines += cause.notes if isinstance(cause, Failure) else []
    second = later[find_first(later)] if later else None
    if later and isinstance(second, Failure) and identify(second, 0)[:2] != identify(cause, 0)[:2]:
        lines.append(f"While this was handled, rank {find_first(later)} raised:\n{second.traceback}")
        lines += second.notes
    followed = len(failures) - 1
    if followed:
        lines.append(f"{followed} other rank{'s' if followed > 1 else ''} stopped because of it.")
    if log is not None:
        lines.append(f"Log: {log}")
    if isinstance(cause, Failure) and cause.evidence is not None and files is not None:
        lines.append(f"Run that step again: raylight replay {files.argument_of(cause.evidence)}")
    if driver.shelf.last is not None:
        call, resume = ("sweep", True) if driver.record.is_of_trial else ("fit", "last")
        lines.append(f"Resume with: raylight.{call}(..., name={driver.config.name!r}, resume={resume!r})")
    stacks = cause.stacks if isinstance(cause, Died) else None
    if stacks is not None:
        lines.append(stacks)
    kind = WorkerFailed if stacks is None else WorkerHung
    raised = cause if isinstance(cause, Failure) else second  # a process that is gone has raised nothing
    raised_here = raised.load_cause() if isinstance(raised, Failure) else None
    text = "\n".join(lines)
    return kind(text, rank=rank, node=node, step=step, attempt=driver.attempt, cause=raised_here, log=log)
