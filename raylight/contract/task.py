"""What the driver gives a worker: what to do (`Task`) and where it stands among the others (`Place`)."""

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
    store that rank 0 hosts; `generation` grows by one whenever the process group is made anew."""

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
    """What the caller passed; None where the module or the data module has the loader as a hook."""

    train: Loader = None
    validate: Loader = None
    test: Loader = None
    predict: Loader = None
    data_module: UserObject = None


EpochValues = dict[str, Any]
"""What one rank has logged in an epoch, by name, as worker/metrics/epoch_shares.py folds it."""


@dataclass(frozen=True, slots=True)
class Begin:
    """Every rank starts from the module as it was passed, or from a checkpoint."""


@dataclass(frozen=True, slots=True)
class Rejoin:
    """After a failure: ranks that are left go on from what they kept, and new ones take the places of the dead."""

    carried: tuple[tuple[int, EpochValues], ...] = ()
    """Epoch and logged values of ranks that are gone; rank 0 takes them over."""


@dataclass(frozen=True, slots=True)
class Rescue:
    """Before a run is given up: the ranks that are left save their last whole step, without a group."""


@dataclass(slots=True)
class Task:
    """One `fit`, `validate`, `test` or `predict` of one attempt; the same object for every rank."""

    stage: str
    module: UserObject
    loaders: Loaders
    config: Config
    callbacks: list[UserObject]
    trainer: UserObject
    """What hooks get; in this process the caller's own object."""
    version_path: str
    """What a person would open: the version directory as path or URI."""
    files: Files | None
    """Storage rooted at the version directory; None if nothing is written."""
    seed: int
    mode: Begin | Rejoin | Rescue = Begin()
    checkpoint: SavedState | None = None
    """Where state comes from."""
    lightning_file: str | None = None
    """Where weights come from instead: a file that Lightning has written."""
    weights_only: bool = False
    """Take the weights alone from `checkpoint`."""
    attempt: int = 0
    trained: tuple[int, int] = (0, 0)
    """Steps and epochs behind the weights that are evaluated."""
    returns_module: bool = False
    """Rank 0 sends back what it has trained; the caller is another process."""
    takes_new_options: bool = False
    """Options of optimizers and schedulers that differ from the checkpoint's are the ones that count."""
    returns_predictions: bool = True
    """The caller wants what `predict_step` returned; else no more than one batch of it is held."""
    settings: Settings = field(default_factory=dict)
    """What the caller's process has set globally, as process_settings.read_settings gives it."""
    rng: RNGState | None = None
    """The random numbers of the caller's process; None if it is this one."""
    label: str | None = None
    """What the workers are called in Ray's dashboard."""
    stamp: float | None = None
    """`started_at` of run.json, by which a node finds out whether it sees the driver's storage."""
