"""The fence of a version: once a newer attempt has begun, an older one can commit nothing.

A worker group that was cut off, or a driver that was thought dead, may wake up and go on. Whoever starts an attempt
gets its number N from `claim_attempt`, and calls `raise_fence(version, N)` first. It writes `fence.json` with N, then
lists what is committed by then and writes that in too. `commit` reads the fence before and after it writes a manifest,
so an older attempt either sees the fence and reports nothing, or its checkpoint is in the list; what is not in the list
is passed over by every reader.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from raylight.contract.errors import MissingFile, StorageError, Superseded
from raylight.storage.filesystem import Storage
from raylight.storage.json_text import to_json
from raylight.storage.local_files import HIDDEN_PREFIX

FENCE_FILE = "fence.json"


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
    content = _read_json(version, FENCE_FILE)
    committed = content.get("committed")
    return Fence(int(content.get("attempt", 0)), None if committed is None else frozenset(committed))


def newest_attempt(version: Storage) -> int:
    """The newest attempt that the fence or `run.json` names; 0 where neither does."""
    fence, run = version.map(lambda name: _read_json(version, name), (FENCE_FILE, "run.json"))
    attempts = run.get("attempts") or []
    named = [it.get("attempt", index) if isinstance(it, dict) else index for index, it in enumerate(attempts)]
    return max(int(attempt) for attempt in [fence.get("attempt", 0), *named])


def claim_attempt(version: Storage) -> int:
    """A number above those of all attempts that have begun; of several callers no two get the same one."""
    attempt = newest_attempt(version) + 1
    while not version.create_exclusive(f"{HIDDEN_PREFIX}attempts/{attempt}", b"claimed\n"):
        attempt += 1
    return attempt


def check_attempt(version: Storage, attempt: int) -> None:
    """Raises Superseded where a newer attempt has begun."""
    newest = newest_attempt(version)
    if newest > attempt:
        raise Superseded(
            f"attempt {attempt} of {version.uri} commits nothing any more: attempt {newest} has taken over.\n"
            "This process was cut off or thought dead; it can be stopped."
        )


def _read_json(version: Storage, name: str) -> dict[str, Any]:
    try:
        content = json.loads(version.read_bytes(name))
    except MissingFile:
        return {}
    except ValueError as error:
        raise StorageError(f"{version.uri_of(name)} is no JSON ({error}). Delete it if nothing runs there.") from error
    return content if isinstance(content, dict) else {}
