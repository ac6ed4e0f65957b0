"""CheckpointIO: how a single checkpoint file is written, read and deleted. A plugin of the trainer may replace it."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from raylight.contract.kinds import StateDict, Value
from raylight.user.checkpoint_reader import checkpoint_reader

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import BinaryIO

    from raylight.contract.config import FilePath
    from raylight.user.checkpoint_reader import ByteSink, MapLocation


class CheckpointIO(ABC):
    """Subclass it and pass an object of it in `plugins=[...]`: all single checkpoint files go through it. Native
    checkpoints, which are directories, do not."""

    @abstractmethod
    def save_checkpoint(self, checkpoint: StateDict, path: FilePath, storage_options: Value = None) -> None:
        """Writes the file. Rank 0 alone calls it."""

    @abstractmethod
    def load_checkpoint(
        self, path: FilePath, map_location: MapLocation = None, weights_only: bool | None = None
    ) -> StateDict:
        """Returns what `save_checkpoint` was given."""

    @abstractmethod
    def remove_checkpoint(self, path: FilePath) -> None:
        """Deletes the file."""

    def teardown(self) -> None:  # noqa: B027  (most have nothing to release)
        """Releases what the object holds, after a run."""


class TorchCheckpointIO(CheckpointIO):
    """Files of `torch.save`, at a path or a URI of pyarrow.fs; written whole or not at all."""

    def save_checkpoint(self, checkpoint: StateDict, path: FilePath, storage_options: Value = None) -> None:
        """`storage_options` is not supported, as in Lightning."""
        if storage_options is not None:
            raise TypeError(
                f"{type(self).__name__}.save_checkpoint takes no storage_options: name the place by a URI, such as "
                "s3://bucket/x.ckpt?region=eu-central-1, or pass a CheckpointIO of your own in plugins=[...]"
            )
        with checkpoint_reader().open_write(path) as file:
            sink = _Sink(file)
            try:
                torch.save(checkpoint, sink)  # type: ignore[arg-type]
            except Exception as error:
                raise sink.error or error from None  # torch tells what broke in its archive, not why

    def load_checkpoint(
        self, path: FilePath | BinaryIO, map_location: MapLocation = None, weights_only: bool | None = None
    ) -> StateDict:
        """Nothing of the file is run unless `weights_only` is False. Raises CheckpointCorrupt."""
        return checkpoint_reader().read_file(path, map_location, weights_only)

    def remove_checkpoint(self, path: FilePath) -> None:
        checkpoint_reader().remove(path)


def find_checkpoint_io(plugins: Iterable[Value]) -> CheckpointIO:
    """The one among a trainer's plugins, else one that writes by torch.save. A class that was written for Lightning's
    interface is one too."""
    return find_plugged_io(plugins) or TorchCheckpointIO()


def find_plugged_io(plugins: Iterable[Value]) -> CheckpointIO | None:
    return next((plugin for plugin in plugins if is_checkpoint_io(plugin)), None)


def is_checkpoint_io(plugin: Value) -> bool:
    names = ("save_checkpoint", "load_checkpoint", "remove_checkpoint")
    return all(callable(getattr(plugin, name, None)) for name in names)


def load_through(
    plugin: CheckpointIO, path: FilePath, map_location: MapLocation, weights_only: bool | None
) -> StateDict:
    """`load_checkpoint`, with those of the arguments that the plugin takes."""
    arguments: dict[str, Value] = {"map_location": map_location, "weights_only": weights_only}
    parameters = inspect.signature(plugin.load_checkpoint).parameters.values()
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    names = {parameter.name for parameter in parameters}
    taken = {name: value for name, value in arguments.items() if takes_all or name in names}
    return dict(plugin.load_checkpoint(path, **taken))


class _Sink:
    """What torch.save writes to; keeps the error of storage."""

    def __init__(self, file: ByteSink):
        self.file = file
        self.error: Exception | None = None

    def write(self, data: bytes | memoryview) -> int:
        try:
            self.file.write(data)
        except Exception as error:
            self.error = error
            raise
        return len(memoryview(data))

    def flush(self) -> None: ...
