"""Failures of storage: which are worth another try, how long to wait, and what advice to give."""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from raylight.contract.errors import MissingFile, StorageError
from raylight.storage.outage import Outage

logger = logging.getLogger("raylight.storage")
TOLD_S = 5.0  # the end of a shorter outage is not worth a line
SLOW_TRY_S = 0.5
Result = TypeVar("Result")

# Answers that a second request cannot change, by the names that pyarrow gives them.
_FINAL = (
    "ACCESS_DENIED",
    "NO_SUCH_BUCKET",
    "INVALID_ACCESS_KEY_ID",
    "SIGNATURE_DOES_NOT_MATCH",
    "INVALID_CLIENT_TOKEN_ID",
    "UNRECOGNIZED_CLIENT",
    "MISSING_AUTHENTICATION",
    "EXPIRED_TOKEN",
    "HTTP status 301",
    "HTTP status 400",
    "HTTP status 401",
    "HTTP status 403",
)
_CREDENTIALS = (
    "Check the credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, an instance role, or for other stores theirs) "
    "and that they may read, list, write and delete there."
)
_ADVICE_BY_NAME = {
    "NO_SUCH_BUCKET": "The bucket does not exist there: create it, or correct its name or the endpoint_override.",
    "ACCESS_DENIED": _CREDENTIALS,
    "HTTP status 403": _CREDENTIALS,
    "INVALID_ACCESS_KEY_ID": _CREDENTIALS,
    "SIGNATURE_DOES_NOT_MATCH": _CREDENTIALS,
    "EXPIRED_TOKEN": _CREDENTIALS,
    "HTTP status 301": "The bucket is in another region: add ?region=... to the URI.",
    "NETWORK_CONNECTION": "Check the network and the endpoint_override of the URI.",
}
_DISK_FULL = "Free some space or choose another storage_path; what was committed before is untouched."
_PERMISSION = "Choose a storage_path that this user may write to, or change the permissions of that folder."
_ADVICE_BY_ERRNO = {
    errno.ENOSPC: _DISK_FULL,
    errno.EDQUOT: _DISK_FULL,
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: _PERMISSION,
    errno.ENOTDIR: "A part of that path is a file, not a folder: choose another storage_path.",
    errno.ENAMETOOLONG: "Choose a shorter name or storage_path.",
}
_OTHER_ADVICE = "Check that the storage is there and can be reached from this machine."


@dataclass(frozen=True, slots=True)
class Backoff:
    """The number of tries of a remote call, and the waits in between.

    The defaults ride out an outage of about half a minute, then give up. Waits grow by `factor` up to `longest_s` and
    are shortened at random by up to half, so that the workers of a run do not come back all at the same moment.
    """

    num_attempts: int = 10
    first_s: float = 0.1
    longest_s: float = 15.0
    factor: float = 2.0

    @property
    def longest_whole_s(self) -> float:
        """The sum of an operation's waits, at most."""
        return sum(min(self.longest_s, self.first_s * self.factor**n) for n in range(self.num_attempts - 1))

    def delay_s(self, num_failures: int) -> float:
        longest = min(self.longest_s, self.first_s * self.factor ** (num_failures - 1))
        return longest * random.uniform(0.5, 1.0)


def is_worth_retrying(error: OSError) -> bool:
    if isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)):
        return False
    if error.errno in _ADVICE_BY_ERRNO:
        return False
    return not any(name in str(error) for name in _FINAL)


def retry(
    operation: Callable[[], Result],
    backoff: Backoff,
    what: str,
    where: str,
    outage: Outage | None = None,
    answers: Callable[[], bool] = lambda: False,
) -> Result:
    """Calls `operation` until it succeeds; raises StorageError after the last try, and at once if tries are in vain.

    All operations on one store share its `outage`: they wait for its end together, not one after the other, and it is
    logged once. `answers` says whether the store answers anything at all.
    """
    outage = outage or Outage()
    if not outage.may_try():
        assert outage.error is not None
        raise explain(outage.error, what, where, note=" (not tried again yet: nothing answers there)")
    started = time.monotonic()
    failures = 0
    while True:
        tried = time.monotonic()
        try:
            result = operation()
        except OSError as error:
            failures += 1
            if not is_worth_retrying(error):
                _note_answer(outage, where)
                raise explain(error, what, where, failures, time.monotonic() - started) from error
            if outage.note_failure(error) and failures < backoff.num_attempts:
                logger.warning(
                    "could not %s %s: %s; it is tried again for up to %.0f s",
                    what, where, reason(error), backoff.longest_whole_s,
                )  # fmt: skip
            if failures >= backoff.num_attempts or outage.is_given_up:
                note_if_given_up(outage, backoff, where, time.monotonic() - tried, answers)
                raise explain(error, what, where, failures, time.monotonic() - started) from error
        else:
            _note_answer(outage, where)
            return result
        outage.wait(backoff.delay_s(failures))


def note_if_given_up(outage: Outage, backoff: Backoff, where: str, took_s: float, answers: Callable[[], bool]) -> None:
    """Gives the store up if nothing else answers either, after an operation's last try, which took `took_s`. A try that
    is refused at once costs nothing; one that has to time out is not made for every file."""
    if not outage.is_given_up and answers():
        return
    if outage.give_up(min(backoff.longest_s, 2 * took_s) if took_s > SLOW_TRY_S else 0.0) and outage.lasted_s >= TOLD_S:
        logger.warning("nothing has answered at %s for %.0f s: raylight no longer waits for it", where, outage.lasted_s)


def _note_answer(outage: Outage, where: str) -> None:
    lasted_s = outage.note_answer()
    if lasted_s >= TOLD_S:
        logger.warning("%s answers again, after %.0f s", where, lasted_s)


def reason(error: OSError) -> str:
    """The error in one line, without pyarrow's additions for its own developers."""
    text = error.strerror if type(error).__module__ == "builtins" and error.strerror else str(error)
    return text.split(". Detail:")[0].splitlines()[0].rstrip(": .") if text else type(error).__name__


def explain(
    error: OSError, what: str, where: str, num_attempts: int = 1, seconds: float = 0.0, note: str = ""
) -> StorageError:
    """The error that the caller raises: the failure, its place, and what to do."""
    if isinstance(error, FileNotFoundError):
        return MissingFile(f"could not {what} {where}: it is not there.")
    tried = f" ({num_attempts} tries in {seconds:.0f} s)" if num_attempts > 1 else note
    return StorageError(f"could not {what} {where}: {reason(error)}{tried}.\n{_advice(error)}")


def _advice(error: OSError) -> str:
    if error.errno in _ADVICE_BY_ERRNO:
        return _ADVICE_BY_ERRNO[error.errno]
    return next((advice for name, advice in _ADVICE_BY_NAME.items() if name in str(error)), _OTHER_ADVICE)
