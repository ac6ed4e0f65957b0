"""The power fails at every point of a save: what was not synced may be lost, in any combination."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.storage import crash_sequence

NUM_OUTCOMES = 4


@dataclass
class File:
    data: bytes = b""
    synced: bytes = b""


@dataclass
class Folder:
    """Names as programs see them, and as they are on the disk since the folder was last synced."""

    names: dict[str, File | Folder] = field(default_factory=dict)
    synced: dict[str, File | Folder] = field(default_factory=dict)


class Disk:
    """Follows what was done under a folder, and can say what a power cut may leave of it."""

    def __init__(self) -> None:
        self._top = Folder()

    def do(self, effect: str, path: Path, argument: Any) -> None:
        names = self._folder(path.parent).names
        if effect == "mkdir":
            names[path.name] = Folder()
        elif effect == "open":
            names[path.name] = File()
        elif effect == "write":
            names[path.name].data += argument
        elif effect == "fsync":
            self._sync(path)
        elif effect == "replace":
            self._folder(argument.parent).names[argument.name] = names.pop(path.name)
        elif effect in ("unlink", "rmdir"):
            del names[path.name]
        else:
            raise AssertionError(f"the simulated disk knows no {effect}")

    def _sync(self, path: Path) -> None:
        synced = self._top if path == Path() else self._folder(path.parent).names[path.name]
        if isinstance(synced, Folder):
            synced.synced = dict(synced.names)
        else:
            synced.synced = synced.data

    def _folder(self, path: Path) -> Folder:
        folder = self._top
        for part in path.parts:
            folder = folder.names[part]
        return folder

    def leave(self, target: Path, chance: random.Random) -> None:
        """Writes what a power cut may leave: of each change that was not synced either side, of data any part."""
        _leave(self._top, target, chance)


def _leave(folder: Folder, target: Path, chance: random.Random) -> None:
    target.mkdir()
    for name in sorted(folder.names.keys() | folder.synced.keys()):
        kept = chance.choice((folder.names, folder.synced)).get(name)
        if isinstance(kept, Folder):
            _leave(kept, target / name, chance)
        elif kept is not None:
            lost = chance.randint(0, len(kept.data) - len(kept.synced))
            (target / name).write_bytes(kept.data[: len(kept.data) - lost])


def trace_saves(root: Path) -> list[tuple[str, Path, Any]]:
    """What saving does to the disk, in order, paths relative to `root`; and ("report", Path(), step)."""
    trace: list[tuple[str, Path, Any]] = []

    def path_of(place: int | str) -> Path:
        return Path(os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else place).relative_to(root)

    def note(effect: str, arguments: tuple) -> None:
        argument = arguments[1] if len(arguments) > 1 else None
        if effect == "write":
            argument = bytes(argument)
        elif effect == "replace":
            argument = path_of(argument)
        trace.append((effect, path_of(arguments[0]), argument))

    with crash_sequence.hooked_effects(note):
        crash_sequence.save_repeatedly(str(root), lambda step: trace.append(("report", Path(), step)))
    return trace


def cut_power(folder: Path, stride: int) -> int:
    """Lets the power fail ahead of every `stride`-th effect, and returns how many effects there are."""
    root = folder / "live"
    root.mkdir()
    trace = trace_saves(root)
    disk, chance, reported = Disk(), random.Random(0), 0
    for number, (effect, path, argument) in enumerate(trace):
        for outcome in range(NUM_OUTCOMES if number % stride == 0 else 0):
            left = folder / f"left-{number}-{outcome}"
            disk.leave(left, chance)
            crash_sequence.check(str(left), reported)
            shutil.rmtree(left)
        if effect == "report":
            reported = argument
        else:
            disk.do(effect, path, argument)
    return len(trace)


def test_power_cuts_leave_whole_checkpoints(memory_path: Path) -> None:
    assert cut_power(memory_path, stride=5) > 250


@pytest.mark.soak
def test_power_cuts_at_every_effect_leave_whole_checkpoints(memory_path: Path) -> None:
    assert cut_power(memory_path, stride=1) > 250
