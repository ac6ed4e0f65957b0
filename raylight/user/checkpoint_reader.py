"""The seam through which what users subclass comes to checkpoints: storage lies above it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

from raylight.contract.kinds import StateDict, Value

if TYPE_CHECKING:
    from typing import BinaryIO

    import torch

    from raylight.contract.config import FilePath

M = TypeVar("M")
CheckpointPath: TypeAlias = Any
"""A checkpoint's directory or a file in Lightning's format, as path or URI; such a file, opened; or a Checkpoint,
raylight's or Ray Tune's."""
MapLocation: TypeAlias = "str | torch.device | Callable[..., Any] | dict[str, str] | None"
"""As for torch.load."""


class ByteSink(Protocol):
    """A file in the making."""

    def write(self, chunk: bytes | memoryview, /) -> int: ...


class CheckpointReader(ABC):
    """Rebuilds what a user has written from a checkpoint, and opens single files; the arguments of the first two are
    those of `load_from_checkpoint`."""

    @abstractmethod
    def load_module(
        self,
        kind: type[M],
        checkpoint: CheckpointPath,
        map_location: MapLocation,
        hparams_file: FilePath | None,
        strict: bool | None,
        weights_only: bool | None,
        overrides: dict[str, Value],
    ) -> M: ...

    @abstractmethod
    def load_data_module(
        self,
        kind: type[M],
        checkpoint: CheckpointPath,
        map_location: MapLocation,
        hparams_file: FilePath | None,
        weights_only: bool | None,
        overrides: dict[str, Value],
    ) -> M: ...

    @abstractmethod
    def read_file(self, path: FilePath | BinaryIO, map_location: MapLocation, weights_only: bool | None) -> StateDict:
        """The content of a file of torch.save."""

    @abstractmethod
    def open_write(self, path: FilePath) -> AbstractContextManager[ByteSink]:
        """The file appears whole when it closes, or not at all."""

    @abstractmethod
    def remove(self, path: FilePath) -> None: ...


_installed: list[CheckpointReader] = []


def install(reader: CheckpointReader) -> None:
    """Called once, when the package is imported."""
    _installed[:] = [reader]


def checkpoint_reader() -> CheckpointReader:
    return _installed[0]
