"""Messages of a worker to the driver: plain, small, picklable values, yielded by the loop of each rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from raylight.contract.kinds import Value
from raylight.contract.user_error import unpack

Values = dict[str, float]


@dataclass(frozen=True, slots=True)
class Started:
    """The rank is alive and about to call the user's code."""

    node: str
    pid: int
    device: str


@dataclass(frozen=True, slots=True)
class StageStarted:
    """A loop over data begins. `num_batches` counts all ranks' batches in evaluation and one rank's steps in
    training; None if the data has no length."""

    stage: str  # "sanity", "train", "validate", "test", "predict"
    epoch: int
    step: int
    num_batches: int | None


@dataclass(frozen=True, slots=True)
class StageFinished:
    stage: str
    epoch: int
    step: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Sent a few times a second at most. `num_samples` counts this rank's samples since the stage began,
    `batch` its finished batches; `values` are the newest that were logged with `prog_bar=True`; `data_wait_s` are the
    seconds of training in which this rank has waited for batches; `share` is what it has logged so far in the epoch of
    training, for the rank that takes over should it die (see worker/metrics/epoch_shares.py)."""

    stage: str
    epoch: int
    step: int
    batch: int
    num_samples: int
    values: Values = field(default_factory=dict)
    data_wait_s: float = 0.0
    share: dict[str, Value] = field(default_factory=dict)


# A thousand ranks send tens of thousands of these a second; a tuple is unpickled in a third of a dataclass's time.
class StepValue(NamedTuple):
    """One rank's value of one name at one step; ranks are merged by `reduce` ("mean", "sum", "min", "max")."""

    value: float
    weight: float
    reduce: str


class StepRow(NamedTuple):
    step: int
    epoch: int
    time: float  # seconds since 1970
    values: dict[str, StepValue]


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """Step values of one rank since its last such message. Every rank sends the same steps."""

    rows: tuple[StepRow, ...]


@dataclass(frozen=True, slots=True)
class EpochMetrics:
    """Epoch values, already reduced over all ranks and so sent by rank 0 alone."""

    stage: str
    epoch: int
    step: int
    time: float
    values: Values  # callback_metrics: all of them
    logged: frozenset[str]  # names that go to loggers and to the table
    shown: frozenset[str]  # names that go to the progress bar
    of_last_step: frozenset[str] = frozenset()
    """Names whose value is that of the epoch's last step: loggers had them at every `log_every_n_steps`."""
    logger: int | None = None
    """The one logger of the run that they are for; None: all."""


class Item(NamedTuple):
    """In the path of a `LoggerCall`: what stands in brackets."""

    key: Value


@dataclass(frozen=True, slots=True)
class LoggerCall:
    """What a hook on a worker has called on one of the run's loggers: `path` are the names from the logger to the
    method, `arguments` the pickled positional and named ones."""

    logger: int
    path: tuple[str | Item, ...]
    arguments: bytes


@dataclass(frozen=True, slots=True)
class SavedFile:
    """One file of a checkpoint: its path relative to the checkpoint's directory, size in bytes, and digest
    as "algorithm:hex"."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Saved:
    """This rank's share of a checkpoint is on storage. The driver commits it when all ranks have said so."""

    directory: str  # relative to the version, e.g. "checkpoints/step-00001200"
    step: int
    epoch: int
    files: tuple[SavedFile, ...]
    metrics: Values
    weights_only: bool
    stall_s: float  # how long training stood still for the snapshot
    write_s: float
    world_size: int = 1  # of the group whose checkpoint it is, which may have changed since
    carried: dict[str, int] = field(default_factory=dict)
    """The metrics that were measured with the weights of an earlier step, and that step."""


@dataclass(frozen=True, slots=True)
class SaveFailed:
    """This rank could not write its share; training goes on. `is_torn`: user code wrote into what was being copied,
    and the next snapshot, taken in one piece, will be whole."""

    directory: str
    step: int
    reason: str
    is_torn: bool = False


@dataclass(frozen=True, slots=True)
class FileWanted:
    """A ModelCheckpoint wants one file with the state of a checkpoint; it has decided in this epoch."""

    path: str
    weights_only: bool
    epoch: int
    state: tuple[str, dict[str, Value]] | None = None
    """Key and state of that callback, which knows of this file; None: as the checkpoint has it."""


@dataclass(frozen=True, slots=True)
class LinkWanted:
    """A link at `path` to a file that was wanted before."""

    path: str
    target: str


@dataclass(frozen=True, slots=True)
class FileDropped:
    """A file that better or newer ones have taken the place of."""

    path: str


FileOrder = FileWanted | LinkWanted | FileDropped


@dataclass(frozen=True, slots=True)
class FileOrders:
    """What the ModelCheckpoints of a run want, in this order, once the checkpoint in `directory` is committed."""

    directory: str
    step: int
    orders: tuple[FileOrder, ...]


@dataclass(frozen=True, slots=True)
class Output:
    """Text that the rank printed."""

    text: str


@dataclass(frozen=True, slots=True)
class Notice:
    """A sentence to show to the person once. `level` is "info" or "warning"."""

    text: str
    level: str = "info"


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """The values that `save_hyperparameters` collected, for run.json and loggers; sent by rank 0."""

    values: dict[str, Value]
    logged: dict[str, Value] | None = None
    """Those that loggers get; None: all."""


RECOVERY = "recovery"
"""The stage of a failure that came before the ranks had met again after another."""
ENDING = "ending"
"""Of one that came when all steps were made and saved: in on_train_end, on_fit_end or teardown."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception ended this rank. `traceback` has the user's own frames first; `cause` is the
    exception itself, packed by `user_error.pack`."""

    kind: str
    text: str
    traceback: str
    step: int
    stage: str
    cause: bytes | None
    is_permanent: bool = False
    """User code or arguments get it wrong the same way every time, so that trying again would only hide it."""
    evidence: str | None = None
    """The file that `raylight replay` reads, relative to the version."""
    notes: tuple[str, ...] = ()
    """Advice for the person: what to do about it."""

    def load_cause(self) -> BaseException | None:
        """The exception itself; None if it was not sent, or if its class cannot be imported here."""
        return unpack(self.cause) if self.cause is not None else None


@dataclass(frozen=True, slots=True)
class PeerLost:
    """A collective broke because another rank is gone; this rank keeps its state and waits for a new group."""

    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class Died:
    """The process of a rank is gone; sent by the launcher, not by the worker."""

    reason: str
    node_lost: bool = False
    step: int | None = None
    """Its last step, if known."""
    stacks: str | None = None
    """If it was ended because it hung: the Python stack of every rank."""


@dataclass(frozen=True, slots=True)
class Paused:
    """The rank has paused on request; its unfinished writes are on storage, and their messages were sent before."""

    step: int


@dataclass(frozen=True, slots=True)
class FilesAwaited:
    """All steps are made and saved; before its last hooks the rank waits for the files that were wanted."""

    step: int


@dataclass(frozen=True, slots=True)
class Trained:
    """The new state of the caller's own objects after a fit on workers, as far as it can be sent."""

    weights: dict[str, Value]
    """The state dict, on the CPU."""
    objects: bytes
    """Attributes of module, callbacks, data module and trainer, as worker/returned.py packs them."""
    facts: dict[str, Value]
    """The trainer's attributes after the run, by the names of `Record`."""


BatchOutputs = list[list[tuple[int, Any]]]
"""For each loader, pairs of a batch's index and what the step returned for it."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The rank has completed its task."""

    status: str
    """"finished", "stopped" or "interrupted"."""
    step: int
    epoch: int
    seconds: Values = field(default_factory=dict)
    """How this rank's time was spent, by activity."""
    trained: Trained | None = None
    """Of rank 0 after a fit in another process."""
    results: tuple[Values, ...] = ()
    """Of rank 0 after `validate` and `test`: the metrics of each loader."""
    outputs: BatchOutputs = field(default_factory=list)
    """Of every rank after `predict`."""


Message = (
    Started | StageStarted | StageFinished | Progress | StepMetrics | EpochMetrics | LoggerCall | Saved | SaveFailed
    | FileOrders | Output | Notice | Hyperparameters | Failure | PeerLost | Died | Paused | FilesAwaited
    | Finished
)  # fmt: skip
