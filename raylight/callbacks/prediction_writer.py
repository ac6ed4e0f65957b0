"""BasePredictionWriter: predictions that each worker writes itself, instead of sending them to the driver."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from raylight.callbacks.mistake_list import Mistakes
from raylight.user.callback import Callback

if TYPE_CHECKING:
    from raylight.user.module import Module
    from raylight.worker.data.batches import EvaluationBatches
    from raylight.worker.rank import Rank


class BasePredictionWriter(Callback):
    """Override `write_on_batch_end`, `write_on_epoch_end` or both; `write_interval` is "batch", "epoch" or
    "batch_and_epoch".

    Each worker writes what it predicted. A batch's `batch_idx` is its place in the whole data set and so belongs to
    one worker alone; `batch_indices` are the samples in it, as indices into the loader's dataset, None where the data
    has none (a stream, or a sampler without length).
    """

    def __init__(self, write_interval: str = "batch"):
        mistakes = Mistakes(type(self).__name__)
        mistakes.require_choice("write_interval", write_interval, ("batch", "epoch", "batch_and_epoch"))
        mistakes.raise_any()
        self.write_interval = write_interval
        self._orders: list[Any] = []  # each loader's samples, or batches of them, in the order of one process
        self._predictions: list[list[Any]] = []
        self._indices: list[list[list[Any] | None]] = []

    def write_on_batch_end(
        self,
        trainer: Rank,
        module: Module,
        prediction: Any,
        batch_indices: Sequence[Any] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one batch's prediction."""
        raise NotImplementedError(f"{type(self).__name__} must override write_on_batch_end to write each batch")

    def write_on_epoch_end(
        self, trainer: Rank, module: Module, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write this worker's predictions, on the CPU: a list with one for each batch, or a list of such lists where
        there are several loaders. `batch_indices` is always a list of lists, one for each loader."""
        raise NotImplementedError(f"{type(self).__name__} must override write_on_epoch_end to write all batches")

    def on_predict_epoch_start(self, trainer: Rank, module: Module) -> None:
        self._orders = [_find_order(batches) for batches in trainer.evaluation_batches]
        self._predictions = [[] for _ in self._orders]
        self._indices = [[] for _ in self._orders]

    def on_predict_batch_end(
        self, trainer: Rank, module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        indices = _find_samples(trainer.evaluation_batches[dataloader_idx], self._orders[dataloader_idx], batch_idx)
        if self.write_interval != "epoch":
            self.write_on_batch_end(trainer, module, outputs, indices, batch, batch_idx, dataloader_idx)
        if self.write_interval != "batch":
            from raylight.worker.data.transfer import move_to_device

            self._predictions[dataloader_idx].append(move_to_device(outputs, torch.device("cpu")))
            self._indices[dataloader_idx].append(indices)

    def on_predict_epoch_end(self, trainer: Rank, module: Module) -> None:
        predictions, indices = self._predictions, self._indices
        self._orders, self._predictions, self._indices = [], [], []
        if self.write_interval != "batch":
            several = len(predictions) > 1
            self.write_on_epoch_end(trainer, module, predictions if several else predictions[0], indices)


def _find_order(batches: EvaluationBatches) -> Any:
    """The units of the whole sequence; None where the data has no indices."""
    sampling = getattr(batches.source, "sampling", None)
    order = sampling.order(0) if sampling is not None else None
    return order if hasattr(order, "__len__") else None


def _find_samples(batches: EvaluationBatches, order: Any, batch_idx: int) -> list[Any] | None:
    if order is None:
        return None
    source = batches.source
    # a sampler of the user's own that divides the data gives each rank an order of its own
    index = batch_idx // source.world_size if source.is_whole else batch_idx
    units = order[index] if source.are_batches else order[index * source.batch_size : (index + 1) * source.batch_size]
    if isinstance(units, torch.Tensor):
        return units.tolist()
    return list(units) if isinstance(units, (list, tuple, range)) else [units]
