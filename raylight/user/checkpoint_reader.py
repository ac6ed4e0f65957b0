"""Where `load_from_checkpoint` finds what reads checkpoints: that needs storage, and lies above what users subclass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeVar

M = TypeVar("M")


class CheckpointReader(ABC):
    """Rebuilds what a user has written from a checkpoint; the arguments are those of `load_from_checkpoint`."""

    @abstractmethod
    def load_module(
        self, kind: type[M], checkpoint: Any, map_location: Any, strict: bool | None, overrides: dict[str, Any]
    ) -> M: ...

    @abstractmethod
    def load_data_module(self, kind: type[M], checkpoint: Any, overrides: dict[str, Any]) -> M: ...


_installed: list[CheckpointReader] = []


def install(reader: CheckpointReader) -> None:
    """Called once, when the package is imported."""
    _installed[:] = [reader]


def checkpoint_reader() -> CheckpointReader:
    return _installed[0]
