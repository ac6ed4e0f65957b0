"""Faults by position: this rank, at this step, at this point of it, once."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import torch

import raylight as pl

POINTS = ("data", "forward", "backward", "collective", "optimizer", "after_step", "validation", "snapshot", "epoch_end")
KINDS = ("kill", "exit", "exception", "hang", "memory", "driver")


class Injected(RuntimeError):
    """Raised by FailAt(kind="exception")."""


class FailAt(pl.Callback):
    """Fails rank `rank` in the step after `step` finished ones, at `point`. `once`: the marker file in `folder` keeps
    a replacement, or the same rank in its second try, from failing again; with `times` it does so many times."""

    def __init__(self, rank: int, step: int, point: str, kind: str, folder: Path, times: int = 1):
        assert point in POINTS
        assert kind in KINDS
        self.rank, self.step, self.point, self.kind, self.times = rank, step, point, kind, times
        self.folder, self.driver = str(folder), os.getpid()

    def _reach(self, point: str, trainer: Any) -> None:
        if point != self.point or trainer.global_rank != self.rank or trainer.global_step < self.step:
            return
        for number in range(self.times):
            try:
                marker = f"{self.folder}/{self.rank}-{self.step}-{self.point}-{self.kind}-{number}"
                os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            self._fail()

    def _fail(self) -> None:
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == "driver":
            os.kill(self.driver, signal.SIGKILL)
            threading.Event().wait()  # until Ray ends this process, because its driver is gone
        elif self.kind == "exit":
            os._exit(3)
        elif self.kind == "exception":
            raise Injected(f"at {self.point}")
        elif self.kind == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB (simulated)")
        else:
            threading.Event().wait()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self._reach("data", trainer)

    def on_before_backward(self, trainer: Any, module: Any, loss: torch.Tensor) -> None:
        self._reach("forward", trainer)
        if self.point == "collective":  # while the first gradients are on their way to the other ranks
            parameter = next(p for p in module.parameters() if p.requires_grad)
            handle = parameter.register_hook(lambda grad: (handle.remove(), self._reach("collective", trainer))[1])

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        self._reach("backward", trainer)

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self._reach("optimizer", trainer)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._reach("after_step", trainer)

    def on_validation_batch_start(
        self, trainer: Any, module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.sanity_checking:
            self._reach("validation", trainer)

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        self._reach("snapshot", trainer)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self._reach("epoch_end", trainer)
