"""The seam through which `load_from_checkpoint` reads checkpoints: storage lies above what users subclass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from raylight.contract.kinds import Value

if TYPE_CHECKING:
    import torch

M = TypeVar("M")
CheckpointPath: TypeAlias = Any
"""A checkpoint's directory, as path or URI; a Checkpoint, raylight's or Ray Tune's; or a Lightning file's path."""
MapLocation: TypeAlias = "str | torch.device | Callable[..., Any] | dict[str, str] | None"
"""As for torch.load."""


class CheckpointReader(ABC):
    """Rebuilds what a user has written from a checkpoint; the arguments are those of `load_from_checkpoint`."""

    @abstractmethod
    def load_module(
        self,
        kind: type[M],
        checkpoint: CheckpointPath,
        map_location: MapLocation,
        strict: bool | None,
        overrides: dict[str, Value],
    ) -> M: ...

    @abstractmethod
    def load_data_module(self, kind: type[M], checkpoint: CheckpointPath, overrides: dict[str, Value]) -> M: ...


_installed: list[CheckpointReader] = []


def install(reader: CheckpointReader) -> None:
    """Called once, when the package is imported."""
    _installed[:] = [reader]


def checkpoint_reader() -> CheckpointReader:
    return _installed[0]
