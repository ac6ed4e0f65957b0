"""The manifest of a checkpoint: which files belong to it, and what their bytes must be."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from raylight import __version__
from raylight.contract.errors import CheckpointCorrupt
from raylight.contract.messages import FileWanted, SavedFile
from raylight.storage.digests import ALGORITHM, digest_of
from raylight.storage.json_text import parse_object, plain
from raylight.storage.record_kinds import LATEST_S

FORMAT = 1
_FIELDS = {"digest", "format", "raylight", "step", "epoch", "attempt", "world_size", "weights_only", "time", "metrics"}
_FIELDS |= {"files", "carried", "seed", "wanted"}
_FILE_FIELDS = {"path", "size", "digest"}
_warned: set[str] = set()  # fields that this process has warned of
logger = logging.getLogger("raylight.storage")
_BLANK_DIGEST = f"{ALGORITHM}:{'0' * 32}"


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of `manifest.json`. File paths are relative to the checkpoint's folder and cannot leave it."""

    step: int
    epoch: int
    files: tuple[SavedFile, ...]
    attempt: int = 0
    world_size: int = 1
    metrics: Mapping[str, float] = field(default_factory=dict)
    weights_only: bool = False
    carried: Mapping[str, int] = field(default_factory=dict)
    """Metrics that were measured with the weights of an earlier step, and that step."""
    time: float = field(default_factory=time.time)
    """Seconds since 1970."""
    wanted: tuple[FileWanted, ...] = ()
    """Single files that were to be made of it; a run that goes on from it makes those that are missing."""
    seed: int | None = None
    """The run's seed: a run that has lost its record goes on with the same order of samples."""
    raylight: str = __version__
    format: int = FORMAT

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def with_paths_relative_to(self, directory: str) -> Manifest:
        prefix = directory.rstrip("/") + "/"
        files = tuple(replace(file, path=file.path.removeprefix(prefix)) for file in self.files)
        return replace(self, files=files)

    def to_bytes(self) -> bytes:
        """JSON that holds the digest of its own bytes, taken with zeros in the digest's place."""
        for file in self.files:
            check_inside(file.path)
        content = {
            "format": self.format,
            "digest": _BLANK_DIGEST,
            "raylight": self.raylight,
            "step": self.step,
            "epoch": self.epoch,
            "attempt": self.attempt,
            "world_size": self.world_size,
            "weights_only": self.weights_only,
            "time": self.time,
            **({} if self.seed is None else {"seed": self.seed}),
            "metrics": plain(self.metrics),
            "carried": dict(self.carried),
            **({"wanted": [_describe(file) for file in self.wanted]} if self.wanted else {}),
            "files": [{"path": file.path, "size": file.size, "digest": file.digest} for file in self.files],
        }
        blank = (json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()
        return blank.replace(_BLANK_DIGEST.encode(), digest_of(blank).encode(), 1)

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """The manifest in these bytes. Raises CheckpointCorrupt with the problem."""
        content = _parse(data)
        if content["format"] != FORMAT:
            raise CheckpointCorrupt(
                f"it has format {content['format']!r}, written by raylight {content.get('raylight')}; raylight "
                f"{__version__} reads format {FORMAT}. Update raylight."
            )
        _warn_of_unknown(content)
        try:
            return cls(
                step=int(content["step"]),
                epoch=int(content["epoch"]),
                files=tuple(SavedFile(str(it["path"]), int(it["size"]), str(it["digest"])) for it in content["files"]),
                attempt=int(content["attempt"]),
                world_size=int(content["world_size"]),
                metrics={name: float(value) for name, value in content["metrics"].items()},
                weights_only=bool(content["weights_only"]),
                carried={name: int(step) for name, step in content.get("carried", {}).items()},
                time=float(content["time"]),
                wanted=tuple(
                    FileWanted(str(it["path"]), bool(it["weights_only"]), int(it["epoch"]))
                    for it in content.get("wanted", [])
                ),
                seed=None if content.get("seed") is None else int(content["seed"]),
                raylight=str(content["raylight"]),
            )._checked()
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CheckpointCorrupt(f"an entry is missing or of the wrong kind ({error!r})") from error

    def _checked(self) -> Manifest:
        counts = [self.seed or 0, self.step, self.epoch, self.attempt, self.world_size]
        counts += [file.size for file in self.files]
        if not all(0 <= count < 1 << 63 for count in counts) or not abs(self.time) < LATEST_S:
            raise CheckpointCorrupt("a number in it is out of range")
        for path, number in Counter(file.path for file in self.files).items():
            check_inside(path)
            if number > 1:
                raise CheckpointCorrupt(f"the file {path!r} is listed {number} times")
        return self


def _describe(file: FileWanted) -> dict[str, str | bool | int]:
    return {"path": file.path, "weights_only": file.weights_only, "epoch": file.epoch}


def check_inside(path: str) -> None:
    """Raises CheckpointCorrupt for a path that is not plainly inside the folder, on any operating system."""
    parts = path.split("/")
    if not path or any(part in ("", ".", "..") for part in parts) or any(mark in path for mark in ("\\", ":", "\0")):
        raise CheckpointCorrupt(f"the path {path!r} leaves the checkpoint's folder")


def _warn_of_unknown(content: dict[str, Any]) -> None:
    files = content.get("files")
    inside = {name for it in files if isinstance(it, dict) for name in it} if isinstance(files, list) else set()
    unknown = (set(content) - _FIELDS) | {f"files[...].{name}" for name in inside - _FILE_FIELDS}
    if unknown and (new := unknown - _warned):
        _warned.update(new)
        logger.warning(
            "a manifest written by raylight %s has fields that raylight %s does not know and ignores: %s",
            content.get("raylight"), __version__, ", ".join(sorted(new)),
        )  # fmt: skip


def _parse(data: bytes) -> dict[str, Any]:
    try:
        content = parse_object(data)
    except ValueError as error:
        raise CheckpointCorrupt(str(error)) from error
    if "format" not in content:
        raise CheckpointCorrupt("it has no format number")
    digest = content.get("digest")
    if not isinstance(digest, str) or not digest.isascii() or len(digest) != len(_BLANK_DIGEST):
        raise CheckpointCorrupt("it has no digest of itself")
    blank = data.replace(digest.encode(), _BLANK_DIGEST.encode(), 1)
    if digest_of(blank) != digest:
        raise CheckpointCorrupt("its bytes are not those that were written")
    return content
