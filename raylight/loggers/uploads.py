"""Uploads: which checkpoints a logger with `log_model` sends to its service, and when."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from raylight.contract.kinds import Value
from raylight.contract.plain_numbers import to_python

LogModel = Literal["all"] | bool
CALLBACK_FACTS = ("monitor", "mode", "save_last", "save_top_k", "save_weights_only")


@dataclass(frozen=True)
class Upload:
    """One checkpoint: a file, or a directory with a manifest, as path or URI."""

    path: str
    score: float | None
    is_best: bool
    facts: dict[str, Value] = field(default_factory=dict)
    """How checkpoints were chosen."""

    @property
    def name(self) -> str:
        return self.path.partition("?")[0].rstrip("/").rpartition("/")[2]

    @property
    def aliases(self) -> list[str]:
        return ["latest", "best"] if self.is_best else ["latest"]

    @property
    def metadata(self) -> dict[str, Value]:
        return {"score": self.score, "original_filename": self.name, **self.facts}

    @contextlib.contextmanager
    def local(self) -> Iterator[str]:
        """Its path on this machine; one on remote storage is fetched for as long as that lasts."""
        if os.path.exists(self.path):
            yield self.path
            return
        folder = tempfile.mkdtemp(prefix="raylight-")
        try:
            yield _fetch(self.path, os.path.join(folder, self.name))
        finally:
            shutil.rmtree(folder)


class Uploads:
    """`"all"`: each checkpoint as it is saved; True: those that are kept at the end, or each if all are kept; False:
    none. A checkpoint is given once, and again if its file has changed."""

    def __init__(self, log_model: LogModel):
        self.log_model = log_model
        self._done: dict[str, float] = {}  # by path: when the file was last changed
        self._waiting: dict[str, Value] = {}  # the newest of each callback

    def take_saved(self, callback: Value) -> list[Upload]:
        """Those to send now that `callback`, a ModelCheckpoint or like one, has saved."""
        if self.log_model == "all" or (self.log_model and callback.save_top_k == -1):
            return self._scan(callback)
        if self.log_model:
            self._waiting[getattr(callback, "state_key", "")] = callback
        return []

    def take_rest(self) -> list[Upload]:
        """Those to send at the end of the run."""
        waiting, self._waiting = self._waiting, {}
        return [upload for callback in waiting.values() for upload in self._scan(callback)]

    def _scan(self, callback: Value) -> list[Upload]:
        best = getattr(callback, "best_model_path", "")
        found = {
            getattr(callback, "last_model_path", ""): getattr(callback, "current_score", None),
            **dict(getattr(callback, "best_k_models", {})),
            best: getattr(callback, "best_model_score", None),
        }
        facts = {name: getattr(callback, name) for name in CALLBACK_FACTS if hasattr(callback, name)}
        fresh = []
        for path, score in found.items():
            changed = _changed(path) if path else None
            if changed is not None and self._done.get(path) != changed:
                self._done[path] = changed
                fresh.append((changed, Upload(path, to_python(score), path == best, {"ModelCheckpoint": facts})))
        return [upload for _, upload in sorted(fresh, key=lambda one: one[0])]


def _changed(path: str) -> float | None:
    """When the checkpoint was written; None if it is not there (any more)."""
    if "://" in path:
        return 0.0
    return Path(path).stat().st_mtime if os.path.exists(path) else None


def _fetch(source: str, target: str) -> str:
    from raylight.storage.filesystem import Storage

    files = Storage(source)
    for entry in files.walk():
        path = os.path.join(target, entry.name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with files.open_read(entry.name) as there, open(path, "wb") as here:
            shutil.copyfileobj(there, here)
    return target
