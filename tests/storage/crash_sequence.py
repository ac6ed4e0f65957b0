"""What crash tests run in a process that dies: saves, commits, retention; and what must hold whenever it died.

As a program it forks a child for each line of its input, "KILL_AT SIZE URI", and prints how that child went.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from raylight.contract.layout import checkpoint_directory
from raylight.storage import checkpoints as store
from raylight.storage.checkpoints import Manifest
from raylight.storage.filesystem import Storage
from raylight.storage.retention import retain
from raylight.storage.versions import Version

LOSSES = {10: 0.5, 20: 0.4, 30: 0.9, 40: 0.3, 50: 0.8}
WORLD_SIZE = 3
EFFECTS = ("open", "write", "fsync", "replace", "link", "unlink", "rmdir", "mkdir")


def content(step: int, rank: int, kind: str, size: int) -> memoryview:
    """At the beginning of a page, as the host buffers of a checkpoint are: so large pieces are written directly."""
    pages = mmap.mmap(-1, size)
    pages[:] = random.Random(f"{step} {rank} {kind}").randbytes(size)
    return memoryview(pages)


def save(version: Storage, step: int, attempt: int, size: int) -> None:
    """What the ranks write, then what the driver does."""
    directory = checkpoint_directory(step, attempt)
    files = []
    for rank in range(WORLD_SIZE):
        for kind in ("model", "training"):
            data = content(step, rank, kind, size)
            name = f"{directory}/{kind}-{rank:05d}-of-{WORLD_SIZE:05d}.pt"
            files.append(version.write(name, [data[: size // 2], data[size // 2 :]]))
    manifest = Manifest(
        step=step,
        epoch=0,
        files=tuple(files),
        attempt=attempt,
        world_size=WORLD_SIZE,
        metrics={"val_loss": LOSSES[step]},
    )
    store.commit(version, directory, manifest)


def save_repeatedly(uri: str, report: Callable[[int], None], size: int = 1000) -> None:
    """Two attempts: the second sweeps what the first left, and goes on. `report` is told each committed step."""
    version = Storage(uri)
    for attempt, steps in enumerate(((10, 20, 30), (40, 50))):
        store.raise_fence(version, attempt)
        store.sweep_leftovers(version)
        Version(0, version, "digits").write_run({"status": "running", "attempts": [{"attempt": attempt}]})
        for step in steps:
            save(version, step, attempt, size)
            report(step)
            for old in retain(store.list_checkpoints(version)):
                store.delete(old)
    Version(0, version, "digits").write_run({"status": "finished", "attempts": [{"attempt": 1}]})


def check(uri: str, reported: int, size: int = 1000) -> None:
    """Raises AssertionError unless what a dead process left is whole, and no older than the step it last reported."""
    version = Storage(uri)
    listed = store.list_checkpoints(version)
    for checkpoint in listed:
        assert store.verify(checkpoint) == [], checkpoint.path
        for rank in range(WORLD_SIZE):
            with checkpoint.open_read(f"model-{rank:05d}-of-{WORLD_SIZE:05d}.pt") as file:
                assert file.read() == content(checkpoint.step, rank, "model", size), checkpoint.path
    newest = store.newest_whole(version)
    assert (newest.step if newest is not None else 0) >= reported, f"{newest} is older than step {reported}"
    best = min((step for step in LOSSES if step <= reported), key=LOSSES.__getitem__, default=None)
    assert best is None or any(it.metrics["val_loss"] <= LOSSES[best] for it in listed), f"the best, {best}, is gone"
    Version(0, version, "digits").read_run()

    store.raise_fence(version, 7)
    store.sweep_leftovers(version)
    after = [checkpoint.name for checkpoint in store.list_checkpoints(version)]
    assert after == [checkpoint.name for checkpoint in listed]
    assert sorted(entry.name for entry in version.list("checkpoints")) == sorted(after), "leftovers are left"


@contextmanager
def hooked_effects(before: Callable[[str, tuple], None]) -> Iterator[None]:
    """`before(name, arguments)` is called ahead of each call that changes something on the disk."""
    real = {name: getattr(os, name) for name in EFFECTS}

    def hook(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if name != "open" or arguments[1] & os.O_CREAT:
                before(name, arguments)
            return real[name](*arguments, **named)

        return call

    for name in EFFECTS:
        setattr(os, name, hook(name))
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(os, name, function)


def die_at(kill_at: int, uri: str, output: int, size: int) -> None:
    """Runs the sequence and is killed ahead of its effect number `kill_at`; writes also in their middle."""
    write, count = os.write, 0

    def before(name: str, arguments: tuple) -> None:
        nonlocal count
        for half_way in (False, True) if name == "write" else (False,):
            count += 1
            if count == kill_at:
                if half_way:
                    write(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)

    with hooked_effects(before):
        save_repeatedly(uri, lambda step: write(output, b"committed %d\n" % step), size)


def main() -> None:
    """KILL_AT 0 means that someone else kills the child. Prints its process id, each step that it reported as
    committed, and the signal that ended it."""
    if "s3" in sys.argv:
        import pyarrow.fs  # noqa: F401  before the fork, so that a child costs milliseconds
    for line in sys.stdin:
        kill_at, size, uri = line.split()
        child = os.fork()
        if child == 0:
            if int(kill_at):
                die_at(int(kill_at), uri, 1, int(size))
            else:
                save_repeatedly(uri, lambda step: os.write(1, b"committed %d\n" % step), int(size))
            os._exit(0)
        os.write(1, b"started %d\n" % child)
        os.write(1, b"ended %d\n" % os.WTERMSIG(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    main()
