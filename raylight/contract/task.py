"""A worker's orders from the driver: its work (`Task`) and its place among the others (`Place`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, TypeAlias

from raylight.contract.kinds import Loader

if TYPE_CHECKING:
    from raylight.contract.config import Config
    from raylight.contract.messages import SavedFile
    from raylight.contract.process_settings import Settings
    from raylight.contract.seeding import RNGState

Chunk = bytes | bytearray | memoryview


UserObject: TypeAlias = Any
"""An object of a class that the user may subclass: contract lies below those classes."""


class Files(Protocol):
    """The part of `storage.filesystem.Storage` that a worker uses; paths are relative to its root."""

    def write(self, path: str, chunks: Iterable[Chunk]) -> SavedFile: ...
    def open_write(self, path: str) -> Any: ...  # context manager: write(chunk), then .saved after a clean exit
    def open_read(self, path: str) -> BinaryIO: ...
    def local_path(self, path: str) -> str | None: ...  # where the bytes lie on this machine, if they do
    def exists(self, path: str) -> bool: ...
    def argument_of(self, path: str) -> str: ...  # for a shell
    def local_spare(self) -> Any: ...  # of this machine: a last checkpoint's .files, and .commit(saved, seed) -> URI
    def local_directory(self) -> Any: ...  # of this machine, at .path, for files that grow: .copy() and .close() store


class SavedState(Protocol):
    """A committed checkpoint as a worker sees it; file paths are relative to the checkpoint."""

    @property
    def path(self) -> str: ...
    @property
    def file_names(self) -> tuple[str, ...]: ...
    def open_read(self, name: str) -> BinaryIO: ...
    def local_path(self, name: str) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Place:
    """One worker among all. Ranks of a node are consecutive; `store_host` and `store_port` name the rendezvous
    store that rank 0 hosts; `generation` grows by one with each new process group."""

    rank: int = 0
    local_rank: int = 0
    node_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    num_nodes: int = 1
    node: str = "localhost"
    store_host: str = "127.0.0.1"
    store_port: int = 0
    device: str = "cpu"
    generation: int = 0


@dataclass(slots=True)
class Loaders:
    """The loaders that the caller passed; None if the module or the data module makes the loader in a hook."""

    train: Loader = None
    validate: Loader = None
    test: Loader = None
    predict: Loader = None
    data_module: UserObject = None


EpochValues = dict[str, Any]
"""The values that one rank has logged in an epoch, by name, as worker/metrics/epoch_shares.py folds it."""


@dataclass(frozen=True, slots=True)
class Begin:
    """Every rank starts from the module as it was passed, or from a checkpoint."""


@dataclass(frozen=True, slots=True)
class Rejoin:
    """After a failure: surviving ranks go on from the state they kept, and new ones take the places of the dead."""

    carried: tuple[tuple[int, EpochValues], ...] = ()
    """Epoch and logged values of ranks that are gone; rank 0 takes them over."""


@dataclass(frozen=True, slots=True)
class Rescue:
    """Before a run is given up: the surviving ranks save their last whole step, without a group."""


@dataclass(frozen=True, slots=True)
class LoggerView:
    """One of the run's loggers, as hooks see it."""

    logger: UserObject = None
    """Itself, where hooks run in its process; else None, and what follows says what can be read of it."""
    is_open: bool = True
    """Its `experiment` could be opened."""
    kind: bytes = b""
    """Its class, pickled."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Its attributes that are plain values."""
    experiment_names: frozenset[str] | None = None
    """What its experiment has; None: anything."""
    experiment_facts: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Task:
    """One `fit`, `validate`, `test` or `predict` of one attempt; the same object for every rank."""

    stage: str
    module: UserObject
    loaders: Loaders
    config: Config
    callbacks: list[UserObject]
    trainer: UserObject
    """The `trainer` of hooks; in this process the caller's own object."""
    version_path: str
    """The version directory as a person would open it: path or URI."""
    files: Files | None
    """Storage rooted at the version directory; None if nothing is written."""
    seed: int
    loggers: tuple[LoggerView, ...] = ()
    mode: Begin | Rejoin | Rescue = Begin()
    checkpoint: SavedState | None = None
    """Where state comes from."""
    file: str | bytes | None = None
    """Where state comes from instead: a file in Lightning's format, by path or URI, or its bytes."""
    runs_code: bool = False
    """Objects that only running code from the checkpoint rebuilds are wanted, too."""
    weights_only: bool = False
    """Take the weights alone from `checkpoint`."""
    attempt: int = 0
    trained: tuple[int, int] = (0, 0)
    """Steps and epochs that the evaluated weights were trained for."""
    returns_module: bool = False
    """Rank 0 sends back what it has trained; the caller is another process."""
    takes_new_options: bool = False
    """Options of optimizers and schedulers that differ from the checkpoint's are the ones that count."""
    returns_predictions: bool = True
    """The caller wants what `predict_step` returned; else no more than one batch of it is held."""
    settings: Settings = field(default_factory=dict)
    """Global settings of the caller's process, as process_settings.read_settings returns them."""
    rng: RNGState | None = None
    """The random numbers of the caller's process; None if it is this one."""
    label: str | None = None
    """The name of the workers in Ray's dashboard."""
    stamp: float | None = None
    """`started_at` of run.json, by which a node finds out whether it sees the driver's storage."""
