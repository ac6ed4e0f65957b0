"""BasePredictionWriter: predictions that each worker writes itself, instead of sending them to the driver."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from raylight.callbacks.mistake_list import Mistakes
from raylight.contract.kinds import Batch, Output
from raylight.user.callback import Callback
from raylight.user.transfer import move_to_device

if TYPE_CHECKING:
    from raylight.user.module import Module
    from raylight.user.trainer_names import TrainerNames


Sample: TypeAlias = Any
"""An index into the loader's dataset, as its sampler yields them."""


class WriteInterval(StrEnum):
    """When predictions are written."""

    BATCH = "batch"
    EPOCH = "epoch"
    BATCH_AND_EPOCH = "batch_and_epoch"

    @property
    def on_batch(self) -> bool:
        """Whether each batch is written."""
        return self is not WriteInterval.EPOCH

    @property
    def on_epoch(self) -> bool:
        """Whether all batches together are written."""
        return self is not WriteInterval.BATCH


class BasePredictionWriter(Callback):
    """Override `write_on_batch_end`, `write_on_epoch_end` or both; `write_interval` is "batch", "epoch" or
    "batch_and_epoch".

    Each worker writes what it predicted. A batch's `batch_idx` is its place in the whole data set and so belongs to
    one worker alone; `batch_indices` are the samples in it, as indices into the loader's dataset, None if the data
    has none (a stream, or a sampler without length).
    """

    def __init__(self, write_interval: str = "batch"):
        mistakes = Mistakes(type(self).__name__)
        mistakes.require_choice("write_interval", write_interval, [str(interval) for interval in WriteInterval])
        mistakes.raise_any()
        self.interval = WriteInterval(write_interval)
        self._orders: list[Sample] = []  # each loader's samples, or batches of them, in the order of one process
        self._predictions: list[list[Output]] = []
        self._indices: list[list[list[Sample] | None]] = []

    def write_on_batch_end(
        self,
        trainer: TrainerNames,
        module: Module,
        prediction: Output,
        batch_indices: Sequence[Sample] | None,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one batch's prediction."""
        raise NotImplementedError(f"{type(self).__name__} must override write_on_batch_end to write each batch")

    def write_on_epoch_end(
        self, trainer: TrainerNames, module: Module, predictions: Sequence[Output], batch_indices: Sequence[Sample]
    ) -> None:
        """Write this worker's predictions, on the CPU: a list with one for each batch, or a list of such lists if
        there are several loaders. `batch_indices` is always a list of lists, one for each loader."""
        raise NotImplementedError(f"{type(self).__name__} must override write_on_epoch_end to write all batches")

    def on_predict_epoch_start(self, trainer: TrainerNames, module: Module) -> None:
        self._predictions = [[] for _ in trainer.num_predict_batches]
        self._indices = [[] for _ in trainer.num_predict_batches]

    def on_predict_batch_end(
        self,
        trainer: TrainerNames,
        module: Module,
        outputs: Output,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        indices = trainer.find_samples(dataloader_idx, batch_idx)
        if self.interval.on_batch:
            self.write_on_batch_end(trainer, module, outputs, indices, batch, batch_idx, dataloader_idx)
        if self.interval.on_epoch:
            self._predictions[dataloader_idx].append(move_to_device(outputs, torch.device("cpu")))
            self._indices[dataloader_idx].append(indices)

    def on_predict_epoch_end(self, trainer: TrainerNames, module: Module) -> None:
        predictions, indices = self._predictions, self._indices
        self._predictions, self._indices = [], []
        if self.interval.on_epoch:
            several = len(predictions) > 1
            self.write_on_epoch_end(trainer, module, predictions if several else predictions[0], indices)
