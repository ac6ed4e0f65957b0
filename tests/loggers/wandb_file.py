"""Reads what W&B keeps offline: records of its own protocol, framed as in LevelDB's log."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK = 32768
FULL, LAST = 1, 4


@dataclass
class Kept:
    """One offline run."""

    folder: Path
    history: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    exit_code: int | None = None

    def values(self, name: str) -> list[Any]:
        return [row[name] for row in self.history if name in row]


def read_offline(save_dir: str | Path) -> Kept:
    """The only run below `save_dir`, which has been finished: its file is whole a moment later."""
    (path,) = Path(save_dir).glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 30
    while (kept := read_file(path)).exit_code is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return kept


def read_file(path: Path) -> Kept:
    from wandb.proto.wandb_internal_pb2 import Record

    kept = Kept(path.parent)
    for data in frames(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            kept.history.append(items(record.history.item))
        elif kind == "config":
            kept.config |= items(record.config.update)
        elif kind == "run":
            kept.config |= items(record.run.config.update)
        elif kind == "summary":
            kept.summary |= items(record.summary.update)
        elif kind == "artifact":
            kept.artifacts.append(record.artifact)
        elif kind == "exit":
            kept.exit_code = record.exit.exit_code
    return kept


def items(found: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in found}


def frames(data: bytes) -> Iterator[bytes]:
    at, whole = 7, b""  # behind the file's header
    while at + 7 <= len(data):
        left = BLOCK - at % BLOCK
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (FULL, LAST):
            yield whole
            whole = b""
