"""Damaged files of a version: kept under another name, so that the run can go on without them."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable
from typing import Any, Protocol

logger = logging.getLogger("raylight.storage")


class Files(Protocol):
    """The part of `storage.filesystem.Storage` that is used here."""

    def read_bytes(self, path: str) -> bytes: ...
    def write(self, path: str, chunks: Iterable[Any]) -> Any: ...
    def delete(self, path: str) -> None: ...
    def uri_of(self, path: str) -> str: ...


def set_aside(files: Files, name: str, why: str, lost: str) -> None:
    """Renames a damaged file and warns; `lost` is a sentence on what the run goes on without."""
    aside = f"damaged-{uuid.uuid4().hex[:8]}-{name}"
    files.write(aside, [files.read_bytes(name)])
    files.delete(name)
    logger.warning("%s is damaged: %s. It is now called %s. %s", files.uri_of(name), why.rstrip("."), aside, lost)
