"""What to do after a failure: a pure function of what failed, how often, and what is left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raylight.errors import WorkerFailed
from raylight.messages import Died, Failure, PeerLost

if TYPE_CHECKING:
    from raylight.driver.run import Run

Failed = Failure | Died | PeerLost


def first_cause(failures: list[tuple[int, Failed]], run: Run) -> WorkerFailed:
    """The failure that the others followed from, as the error that the user reads."""
    rank, cause = min(enumerate(failures), key=lambda item: (_order(item[1][1]), item[0]))[1]
    followed = len(failures) - 1
    node = run.outcome.nodes[rank].node if rank in run.outcome.nodes else "unknown node"
    step = cause.step if not isinstance(cause, Died) else run.step
    log = f"{run.version.path}/logs/rank-{rank}.log" if run.version is not None else None
    lines = [f"rank {rank} on {node} failed at step {step} (attempt {run.attempt + 1})."]
    if isinstance(cause, Failure):
        lines.append(cause.traceback)
    else:
        lines.append(f"The process is gone: {cause.reason}")
    if followed:
        lines.append(f"{followed} other rank{'s' if followed > 1 else ''} failed because of it.")
    if log is not None:
        lines.append(f"Log: {log}")
    if run.last is not None:
        lines.append(f"Resume with: raylight.fit(..., name={run.config.name!r}, resume='last')")
    error = WorkerFailed("\n".join(lines), rank=rank, node=node, step=step, attempt=run.attempt, log=log)
    if isinstance(cause, Failure) and cause.cause is not None:
        error.cause = cause.load_cause()
    return error


def _order(failure: Failed) -> int:
    """A user's exception explains more than a dead process, and that more than a broken collective."""
    if isinstance(failure, Failure):
        return 0
    return 1 if isinstance(failure, Died) else 2
