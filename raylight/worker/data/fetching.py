"""From indices to batches: by the user's own DataLoader, or by one indexing call where nothing would be skipped."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate
from torch.utils.data._utils import collate

from raylight.contract.errors import DataError
from raylight.contract.kinds import Batch, Indices, Loader
from raylight.contract.main_module import make_context
from raylight.worker.data.division import Fetched, Step
from raylight.worker.data.random_stream import derive_seed, seed_process


class Request:
    """Indices on their way to a loader worker, which is seeded as it unpacks them.

    So what a dataset or a collate function draws in a loader worker is a function of the batch alone, not of the
    batches that this worker happened to fetch before: an epoch that is entered in its middle sees the same values.
    """

    def __init__(self, units: Indices, seed: int):
        self.units, self.seed = units, seed

    def __reduce__(self) -> tuple[Callable[..., Indices], tuple[Indices, int]]:
        return _receive, (self.units, self.seed)


def _receive(units: Indices, seed: int) -> Indices:
    seed_process(seed)
    return units


class Requests:
    """Stands in for the loader's batch sampler; persistent loader workers ask the same object in every epoch."""

    def __init__(self) -> None:
        self.current: Iterator[Indices] = iter(())

    def __iter__(self) -> Iterator[Indices]:
        return self.current


def copy_loader(loader: DataLoader[Batch], seeds: torch.Generator, **replaced: Any) -> DataLoader[Batch]:
    """The user's loader, of its own class and with all it was given, but for what is replaced.

    `seeds` is where the loader draws the seed of its workers, which it would take from the process otherwise.
    """
    copied = copy.copy(loader)
    # DataLoader refuses to have these set, since an iterator of it might be running; this copy has none yet.
    vars(copied).update(replaced, generator=seeds, _iterator=None, _IterableDataset_len_called=None)
    context = make_context(loader.multiprocessing_context) if loader.num_workers > 0 else None
    if context is not None:
        vars(copied)["_DataLoader__multiprocessing_context"] = context
    if "in_order" in vars(copied):
        vars(copied)["in_order"] = True  # a batch is told apart by its place alone
    return copied


def keeps_torchs_iteration(loader: DataLoader[Batch]) -> bool:
    """Whether a subclass of DataLoader leaves alone how it is iterated: then a batch is what its sampler says."""
    names = ("__iter__", "_get_iterator", "_index_sampler")
    return all(getattr(type(loader), name) is getattr(DataLoader, name) for name in names)


def is_indexed(loader: Loader) -> bool:
    """Whether samples are found by index, so that those of a rank can be fetched without the others."""
    is_map_style = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    return is_map_style and keeps_torchs_iteration(loader)


def with_context(loader: DataLoader[Batch]) -> DataLoader[Batch]:
    """A loader that is iterated as it is; its loader workers find what the script defined."""
    context = make_context(loader.multiprocessing_context) if loader.num_workers > 0 else None
    if context is None:
        return loader
    copied = copy.copy(loader)
    vars(copied).update(_DataLoader__multiprocessing_context=context, _iterator=None)
    return copied


def pins_memory(loader: DataLoader[Batch]) -> bool:
    return loader.pin_memory and torch.accelerator.is_available()


class LoaderFetch:
    """Fetches by the user's DataLoader, its samplers replaced by what this rank is to have."""

    def __init__(self, loader: DataLoader[Batch], rank: int, *seed_parts: int | str):
        self.rank, self.seed_parts = rank, seed_parts
        self.seeds = torch.Generator()
        self.requests = Requests()
        replaced = {"sampler": self.requests}
        if loader.batch_sampler is not None:
            replaced["batch_sampler"] = self.requests
        self.loader = copy_loader(loader, self.seeds, **replaced)

    def fetch(self, steps: Iterable[Step], *epoch: int) -> Iterator[Fetched]:
        waiting: deque[Step] = deque()
        self.requests.current = self._request(steps, waiting, epoch)
        self.seeds.manual_seed(derive_seed(*self.seed_parts, *epoch, self.rank, "loader workers"))
        for data in self.loader:
            yield from _take_empty(waiting)
            if not waiting:
                raise DataError(f"{type(self.loader).__name__} gave more batches than its sampler has")
            yield waiting.popleft(), data
        yield from _take_empty(waiting)
        if waiting:
            raise DataError(f"{type(self.loader).__name__} ended {len(waiting)} batches before its sampler did")

    def _request(self, steps: Iterable[Step], waiting: deque[Step], epoch: tuple[int, ...]) -> Iterator[Indices]:
        in_workers = self.loader.num_workers > 0
        for step in steps:
            waiting.append(step)
            if step.size:
                units = step.units
                if isinstance(units, Tensor):
                    units = units.tolist()
                elif isinstance(units, range):
                    units = list(units)
                yield Request(units, derive_seed(*self.seed_parts, *epoch, step.position)) if in_workers else units


def _take_empty(waiting: deque[Step]) -> Iterator[Fetched]:
    while waiting and not waiting[0].size:
        yield waiting.popleft(), None


class Rows:
    """A batch of an in-memory TensorDataset by one indexing call for each tensor: what the loader would give, sooner.

    Found by `find_rows` only where no code of the user's would be skipped.
    """

    def __init__(self, dataset: Dataset[Batch], pins: bool):
        self.selections: list[Tensor] = []  # of nested Subsets, outermost first
        self.pins = pins
        while isinstance(dataset, Subset):
            self.selections.append(torch.as_tensor(dataset.indices, dtype=torch.int64))
            dataset = dataset.dataset
        assert isinstance(dataset, TensorDataset)
        self.tensors = dataset.tensors

    def place(self, order: Indices) -> Indices:
        """Rows of the tensors for an epoch's order; None where the order holds something else than whole numbers."""
        if isinstance(order, list):
            if not all(type(index) is int for index in order):
                return None
            order = torch.tensor(order, dtype=torch.int64)
        elif not isinstance(order, (range, Tensor)):
            return None
        for selection in self.selections:
            order = selection[torch.arange(order.start, order.stop) if isinstance(order, range) else order]
        if isinstance(order, Tensor):
            if len(order) and order.min() < 0:
                order = torch.where(order < 0, order + len(self.tensors[0]), order)
            order = order.to(self.tensors[0].device)
        return order

    def fetch(self, steps: Iterable[Step]) -> Iterator[Fetched]:
        tensors, pins = self.tensors, self.pins
        for step in steps:
            rows = step[0]
            if type(rows) is Tensor:
                data = [tensor.index_select(0, rows) for tensor in tensors]
            else:
                # A copy, not a view: code that changes its batch in place must not change the dataset.
                data = [tensor[rows.start : rows.stop].clone() for tensor in tensors]
            if pins:
                data = [tensor.pin_memory() for tensor in data]
            yield step, data if step[1] else None


def find_rows(loader: DataLoader[Batch]) -> Rows | None:
    """The fast way to the batches of `loader`, where it gives exactly what the slow one gives."""
    changed = collate.default_collate_fn_map
    plain = (
        loader.num_workers == 0
        and type(loader.batch_sampler) is torch.utils.data.BatchSampler
        and keeps_torchs_iteration(loader)
        and loader.collate_fn is default_collate
        and changed.get(Tensor) is collate.collate_tensor_fn
        and tuple not in changed
    )
    if not plain or not _is_plain_dataset(loader.dataset):
        return None
    return Rows(loader.dataset, pins=pins_memory(loader))


def _is_plain_dataset(dataset: Dataset[Batch]) -> bool:
    while type(dataset) is Subset:
        try:
            indices = torch.as_tensor(dataset.indices)
        except (TypeError, ValueError, RuntimeError):
            return False
        if indices.ndim != 1 or indices.is_floating_point() or indices.dtype == torch.bool:
            return False
        dataset = dataset.dataset
    if type(dataset) is not TensorDataset or "__getitems__" in vars(dataset):
        return False
    device = dataset.tensors[0].device
    return all(
        type(tensor) is Tensor
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and tensor.device == device
        and not (tensor.requires_grad or tensor.is_nested or tensor.is_conj() or tensor.is_neg())
        for tensor in dataset.tensors
    )
