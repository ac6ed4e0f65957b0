"""The fence of a version: once a newer attempt has begun, an older one can commit nothing.

A worker group that was cut off, or a driver that was thought dead, may wake up and go on. Whoever starts an attempt
gets its number N from `claim_attempt`, and calls `raise_fence(version, N)` first. It writes `fence.json` with N, then
lists what is committed by then and adds that list. `commit` reads the fence before and after it writes a manifest, so
an older attempt either sees the fence and reports nothing, or its checkpoint is in the list. Readers skip checkpoints
of older attempts that are not in the list.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from raylight.contract.errors import MissingFile, Superseded
from raylight.contract.layout import FENCE_FILE, RUN_FILE
from raylight.storage.damage import set_aside
from raylight.storage.filesystem import Storage
from raylight.storage.json_text import parse_object, to_json
from raylight.storage.local_files import HIDDEN_PREFIX

logger = logging.getLogger("raylight.storage")
ATTEMPTS = f"{HIDDEN_PREFIX}attempts"
_LOST = "Checkpoints that a replaced attempt committed late can no longer be recognised."


@dataclass(frozen=True, slots=True)
class Fence:
    """`attempt` is the newest that has begun; `committed` holds the folders that older ones had committed by then, None
    while they are being listed."""

    attempt: int = 0
    committed: frozenset[str] | None = None

    def allows(self, attempt: int, directory: str) -> bool:
        return attempt >= self.attempt or self.committed is None or directory in self.committed


def write_fence(version: Storage, fence: Fence) -> None:
    committed = None if fence.committed is None else sorted(fence.committed)
    version.write(FENCE_FILE, [to_json({"attempt": fence.attempt, "committed": committed})])


def read_fence(version: Storage) -> Fence:
    """The fence of a version. If the file is damaged, the newest attempt is known from its claim, and the list is
    lost."""
    try:
        return _parse_fence(version)
    except ValueError as error:
        logger.warning("%s is damaged: %s. %s", version.uri_of(FENCE_FILE), error, _LOST)
        return Fence(_newest_claim(version), None)


def set_aside_damaged_fence(version: Storage) -> None:
    """Replaces a damaged fence.json. Call it before the version goes on."""
    try:
        _parse_fence(version)
    except ValueError as error:
        set_aside(version, FENCE_FILE, str(error), _LOST)
        write_fence(version, Fence(_newest_claim(version), None))


def _parse_fence(version: Storage) -> Fence:
    """The fence as stored. Raises ValueError if the file is damaged."""
    try:
        content = parse_object(version.read_bytes(FENCE_FILE))
    except MissingFile:
        return Fence()
    attempt, committed = content.get("attempt", 0), content.get("committed")
    is_list = committed is None or (isinstance(committed, list) and all(isinstance(it, str) for it in committed))
    if not _is_number(attempt) or not is_list:
        raise ValueError("an entry is missing or of the wrong kind")
    return Fence(attempt, None if committed is None else frozenset(committed))


def newest_attempt(version: Storage) -> int:
    """The newest attempt that the fence or `run.json` names; 0 if neither does."""
    readers = (lambda: read_fence(version).attempt, lambda: _newest_recorded(version))
    return max(version.map(lambda read: read(), readers))


def _newest_recorded(version: Storage) -> int:
    """The newest attempt in run.json. No warning for a damaged one: those who read more of it give it."""
    try:
        attempts = parse_object(version.read_bytes(RUN_FILE)).get("attempts") or []
    except MissingFile:
        return 0
    except ValueError:
        return _newest_claim(version)
    if not isinstance(attempts, list):
        return _newest_claim(version)
    named = [it.get("attempt", index) if isinstance(it, dict) else index for index, it in enumerate(attempts)]
    return max((attempt for attempt in named if _is_number(attempt)), default=0)


def _newest_claim(version: Storage) -> int:
    return max((int(entry.name) for entry in version.list(ATTEMPTS) if entry.name.isdecimal()), default=0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 1 << 31


def claim_attempt(version: Storage) -> int:
    """A number above those of all attempts that have begun; no two callers get the same one."""
    attempt = newest_attempt(version) + 1
    while not version.create_exclusive(f"{ATTEMPTS}/{attempt}", b"claimed\n"):
        attempt += 1
    return attempt


def check_attempt(version: Storage, attempt: int) -> None:
    """Raises Superseded if a newer attempt has begun."""
    newest = newest_attempt(version)
    if newest > attempt:
        raise Superseded(
            f"attempt {attempt} of {version.uri} commits nothing any more: attempt {newest} has taken over.\n"
            "This process was cut off or thought dead; it can be stopped."
        )
