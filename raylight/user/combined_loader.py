"""CombinedLoader: several loaders as one, and which values stand for several loaders."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from typing import Literal, Self, get_args

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Batch, Loader, Value

_END = object()
Mode = Literal["min_size", "max_size_cycle", "max_size", "sequential"]
Limit = int | float
NumberedBatch = tuple[Batch, int, int]
"""A batch, its index, and that of its loader."""


class CombinedLoader(Iterable[NumberedBatch]):
    """Loaders in a dict, a list or a tuple, nested at will, that give batches of the same structure.

    "min_size" ends with the shortest; "max_size_cycle" ends with the longest, while shorter ones begin again;
    "max_size" ends with the longest and gives None in place of a batch of one that has ended; "sequential" gives the
    batches of one loader after the other. Iterated by itself it gives `(batch, batch_idx, dataloader_idx)`. A fit
    takes all modes but "sequential", an evaluation takes all, and a prediction "sequential" alone.
    """

    def __init__(self, iterables: Loader, mode: Mode = "min_size"):
        if mode not in get_args(Mode):
            raise InvalidArguments(f"CombinedLoader: mode={mode!r} must be one of {', '.join(get_args(Mode))}")
        self._iterables, self._mode = iterables, mode
        self._flattened = flatten_loaders(iterables)
        self._limits: list[Limit] | None = None
        self._iterator: Iterator[NumberedBatch] | None = None

    @property
    def iterables(self) -> Loader:
        """The loaders as they were given."""
        return self._iterables

    @property
    def mode(self) -> Mode:
        """How they are combined."""
        return self._mode

    @property
    def flattened(self) -> list[Loader]:
        """The loaders in a row. A list of as many others takes their places."""
        return self._flattened

    @flattened.setter
    def flattened(self, loaders: list[Loader]) -> None:
        self._check_count("loaders", loaders)
        self._iterables, self._flattened = rebuild(self._iterables, loaders), list(loaders)

    @property
    def limits(self) -> list[Limit] | None:
        """The most batches that each loader gives; None: no limit. One number holds for all."""
        return self._limits

    @limits.setter
    def limits(self, limits: Limit | list[Limit] | None) -> None:
        if isinstance(limits, (int, float)):
            limits = [limits] * len(self._flattened)
        elif limits is not None:
            self._check_count("limits", limits)
        self._limits = limits

    @property
    def sampler(self) -> Value:
        """The samplers of the loaders, in their structure."""
        return self._collect("sampler")

    @property
    def batch_sampler(self) -> Value:
        """The batch samplers of the loaders, in their structure."""
        return self._collect("batch_sampler")

    def _collect(self, name: str) -> Value:
        return rebuild(self._iterables, [getattr(loader, name, None) for loader in self._flattened])

    def _check_count(self, what: str, values: Sequence[object]) -> None:
        if len(values) != len(self._flattened):
            raise InvalidArguments(f"CombinedLoader has {len(self._flattened)} loaders, and {len(values)} {what} came")

    def __len__(self) -> int:
        lengths = [min(_length(loader), limit) for loader, limit in self._limited()]
        if self._mode == "sequential":
            length = sum(lengths)
        else:
            length = min(lengths, default=0) if self._mode == "min_size" else max(lengths, default=0)
        if math.isinf(length):
            raise TypeError(f"this CombinedLoader has no length in mode {self._mode!r}: a loader in it has none")
        return int(length)

    def __iter__(self) -> Self:
        self._iterator = self._run()
        return self

    def __next__(self) -> NumberedBatch:
        if self._iterator is None:
            raise TypeError("call iter(combined_loader) first")
        return next(self._iterator)

    def reset(self) -> None:
        """Ends an iteration, and the processes of loaders that keep theirs."""
        self._iterator = None
        for loader in self._flattened:
            if isinstance(loader, DataLoader):
                loader._iterator = None

    def __getstate__(self) -> dict[str, Value]:
        return {**self.__dict__, "_iterator": None}

    def _limited(self) -> list[tuple[Loader, float]]:
        limits: Sequence[float] = self._limits if self._limits is not None else [math.inf] * len(self._flattened)
        return list(zip(self._flattened, limits, strict=True))

    def _begin(self, number: int) -> Iterator[Batch]:
        loader, limit = self._limited()[number]
        return islice(loader, None if math.isinf(limit) else int(limit))

    def _run(self) -> Iterator[NumberedBatch]:
        numbers = range(len(self._flattened))
        if self._mode == "sequential":
            for number in numbers:
                for index, batch in enumerate(self._begin(number)):
                    yield batch, index, number
            return
        unread = [self._begin(number) for number in numbers]
        has_ended = [False] * len(unread)
        for index in count() if unread else ():
            batches = [next(batches, _END) for batches in unread]
            for number, batch in enumerate(batches):
                if batch is not _END:
                    continue
                has_ended[number] = True
                if self._mode == "min_size" or all(has_ended):
                    return
                if self._mode == "max_size_cycle":
                    unread[number] = self._begin(number)
                    batches[number] = next(unread[number], _END)
            yield rebuild(self._iterables, (None if batch is _END else batch for batch in batches)), index, 0


def is_collection_of_loaders(loader: Loader) -> bool:
    """A dict of loaders, or a list or tuple of them, as opposed to a list of batches or of numbers, which is a loader
    itself."""
    if type(loader) not in (list, tuple, dict) or not loader:
        return False
    return isinstance(loader, dict) or all(_is_loader(item) for item in loader)


def _is_loader(item: Loader) -> bool:
    if isinstance(item, (DataLoader, CombinedLoader)):
        return True
    if isinstance(item, (list, tuple, dict)):  # of plain numbers it is one, of tensors it is a batch
        values = item.values() if isinstance(item, dict) else item
        return bool(item) and all(isinstance(value, (int, float)) or _is_loader(value) for value in values)
    return hasattr(item, "__iter__") and not isinstance(item, (Tensor, np.ndarray, str, bytes))


def flatten_loaders(loaders: Loader) -> list[Loader]:
    """The loaders of a collection, nested ones too; one that is none is the only one."""
    if not is_collection_of_loaders(loaders):
        return [loaders]
    parts = loaders.values() if isinstance(loaders, dict) else loaders
    return [leaf for part in parts for leaf in flatten_loaders(part)]


def rebuild(loaders: Loader, values: Iterable[Value]) -> Value:
    """`values`, one for each of `flatten_loaders`, in the structure of the collection."""
    return _rebuild(loaders, iter(values))


def _rebuild(loaders: Loader, values: Iterator[Value]) -> Value:
    if not is_collection_of_loaders(loaders):
        return next(values)
    if isinstance(loaders, dict):
        return {name: _rebuild(part, values) for name, part in loaders.items()}
    return type(loaders)(_rebuild(part, values) for part in loaders)


def _length(loader: Loader) -> float:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return math.inf


def say_wrong_mode(loader: Loader, stage: str) -> str:
    """Why `stage` does not take a CombinedLoader of this mode; empty where it does."""
    if not isinstance(loader, CombinedLoader):
        return ""
    if stage == "fit" and loader.mode == "sequential":
        return (
            'a fit takes no CombinedLoader in the mode "sequential", as each step has a batch of every loader: choose '
            '"min_size", "max_size" or "max_size_cycle"'
        )
    if stage == "predict" and loader.mode != "sequential":
        return f'predict takes a CombinedLoader in the mode "sequential" alone; this one has {loader.mode!r}'
    return ""
