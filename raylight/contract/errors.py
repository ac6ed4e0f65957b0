"""Every exception that users of raylight can meet."""

from __future__ import annotations


class RaylightError(Exception):
    """The root of all errors that raylight raises on purpose."""


class MisconfigurationException(RaylightError):
    """Lightning's name for what a user asked for and cannot have: `except` with it catches InvalidArguments and
    NotEnoughResources."""


class SIGTERMException(SystemExit):
    """Lightning's name for the end of a run by SIGTERM. raylight never raises it: it ends the step, saves, and returns
    a Result with the status "interrupted"."""


class InvalidArguments(MisconfigurationException, ValueError):
    """Arguments that cannot work; `mistakes` lists everything that is wrong, not just the first thing."""

    def __init__(self, mistakes: list[str] | str):
        self.mistakes = [mistakes] if isinstance(mistakes, str) else list(mistakes)
        if len(self.mistakes) == 1:
            text = self.mistakes[0]
        else:
            text = f"{len(self.mistakes)} mistakes:\n" + "\n".join(f"  - {line}" for line in self.mistakes)
        super().__init__(text)

    def __reduce__(self) -> tuple:
        return type(self), (self.mistakes,)


class WorkerFailed(RaylightError):
    """A worker raised or died, and the run could not go on.

    If user code raised, the error is an instance of its class too (`user_error.with_users_class`), so that
    `except ValueError` catches it. `cause` is that exception itself, or None if it could not be sent; `log` is
    the path of the failed rank's log, or None if there is none.
    """

    def __init__(
        self,
        text: str,
        *,
        rank: int = 0,
        node: str = "",
        step: int = 0,
        attempt: int = 0,
        cause: BaseException | None = None,
        log: str | None = None,
    ):
        super().__init__(text)
        self.rank, self.node, self.step, self.attempt, self.cause, self.log = rank, node, step, attempt, cause, log

    def __reduce__(self) -> tuple:
        details = {name: getattr(self, name) for name in ("rank", "node", "step", "attempt", "cause", "log")}
        return _rebuild_worker_failed, (type(self), str(self), details)


def _rebuild_worker_failed(kind: type[WorkerFailed], text: str, details: dict) -> WorkerFailed:
    return kind(text, **details)


class WorkerHung(WorkerFailed):
    """A worker made no progress for `hang_timeout_s`; the text holds the Python stack of every rank."""


class CheckpointCorrupt(RaylightError):
    """A checkpoint is incomplete, or its bytes are not those that were written."""


class CheckpointMismatch(RaylightError):
    """A whole checkpoint does not fit the module; the text lists missing, unexpected and misshapen keys."""


class StorageError(RaylightError):
    """Storage did not do what was asked, after all retries."""


class MissingFile(StorageError, FileNotFoundError):
    """A file that was to be read is not on storage."""


class Superseded(StorageError):
    """A newer attempt has taken over the version, so that this one writes nothing more there."""


class ClusterError(RaylightError):
    """The Ray cluster cannot be used as it is; the text names the nodes and says what to change."""


class NotEnoughResources(MisconfigurationException):
    """More workers, GPUs or CPUs were asked for than there are; the text says what would fit."""


class DataError(RaylightError):
    """A dataset or a loader gave something that cannot be trained on."""
