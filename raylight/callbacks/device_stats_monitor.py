"""DeviceStatsMonitor: load and memory of the device and the machine, in the log."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from raylight.callbacks.log_step import is_log_step
from raylight.contract.kinds import Batch, Output
from raylight.user.callback import Callback

if TYPE_CHECKING:
    from raylight.contract.config import Config
    from raylight.user.module import Module
    from raylight.user.trainer_names import TrainerNames


class DeviceStatsMonitor(Callback):
    """Logs the state of rank 0's device before and after every `log_every_n_steps`-th batch of each stage.

    On a GPU these are the counters of torch's allocator (`torch.cuda.memory_stats`, bytes and counts; no device sync).
    CPU values are those of the whole machine in percent: `cpu_percent` (since the last time it was read),
    `cpu_vm_percent` (memory in use), `cpu_swap_percent`, and on a system without /proc instead of these
    `cpu_load_percent`, the load average over the number of CPUs. `cpu_stats`: None logs them if the device is the
    CPU, True always, False never. Names read "DeviceStatsMonitor.on_train_batch_end/cpu_percent".
    """

    def __init__(self, cpu_stats: bool | None = None):
        self.cpu_stats = cpu_stats
        self._processor_time: tuple[int, int] | None = None
        self._logged: dict[str, int] = {}  # by hook: with accumulation several batches belong to one step

    def _find_mistakes(self, config: Config) -> list[str]:
        if config.logger is not False or config.fast_dev_run:
            return []
        return ["DeviceStatsMonitor has nowhere to log to with logger=False; remove one of them."]

    def setup(self, trainer: TrainerNames, module: Module, stage: str) -> None:
        self._logged = {}
        self._processor_time = _read_processor_time()  # the first value is that of the time since now

    def on_train_batch_start(self, trainer: TrainerNames, module: Module, batch: Batch, batch_idx: int) -> None:
        self._log(trainer, "on_train_batch_start", trainer.global_step + 1)

    def on_train_batch_end(
        self, trainer: TrainerNames, module: Module, outputs: Output, batch: Batch, batch_idx: int
    ) -> None:
        self._log(trainer, "on_train_batch_end", trainer.global_step)

    def on_validation_batch_start(
        self, trainer: TrainerNames, module: Module, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._log(trainer, "on_validation_batch_start", batch_idx + 1)

    def on_validation_batch_end(
        self,
        trainer: TrainerNames,
        module: Module,
        outputs: Output,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._log(trainer, "on_validation_batch_end", batch_idx + 1)

    def on_test_batch_start(
        self, trainer: TrainerNames, module: Module, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._log(trainer, "on_test_batch_start", batch_idx + 1)

    def on_test_batch_end(
        self,
        trainer: TrainerNames,
        module: Module,
        outputs: Output,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._log(trainer, "on_test_batch_end", batch_idx + 1)

    def _log(self, trainer: TrainerNames, hook: str, count: int) -> None:
        if not trainer.logger or not trainer.is_global_zero or trainer.sanity_checking:
            return
        if not is_log_step(trainer, count) or (trainer.training and self._logged.get(hook) == count):
            return
        self._logged[hook] = count
        values = read_gpu_stats(trainer.device) if trainer.device.type == "cuda" else {}
        if self.cpu_stats or (self.cpu_stats is None and trainer.device.type == "cpu"):
            values |= self._read_cpu_stats()
        if values:
            step = count if trainer.training else trainer.global_step
            prefix = f"{type(self).__qualname__}.{hook}"
            for logger in trainer.loggers:
                logger.log_metrics({f"{prefix}/{name}": value for name, value in values.items()}, step=step)

    def _read_cpu_stats(self) -> dict[str, float]:
        before, self._processor_time = self._processor_time, _read_processor_time()
        if before is None or self._processor_time is None:
            return {"cpu_load_percent": 100.0 * os.getloadavg()[0] / (os.cpu_count() or 1)}
        busy, total = (now - then for now, then in zip(self._processor_time, before, strict=True))
        memory = _read_memory()
        return {
            # the kernel counts hundredths of a second: none may have passed
            "cpu_percent": 100.0 * busy / total if total else 0.0,
            "cpu_vm_percent": _used_percent(memory["MemTotal"], memory["MemAvailable"]),
            "cpu_swap_percent": _used_percent(memory["SwapTotal"], memory["SwapFree"]),
        }


def read_gpu_stats(device: torch.device) -> dict[str, float]:
    """The counters of torch's allocator on a GPU, by torch's names."""
    return {name: float(value) for name, value in torch.cuda.memory_stats(device).items()}


def _read_processor_time() -> tuple[int, int] | None:
    """(busy, all) time of all processors since the machine started, in the kernel's ticks; None without /proc."""
    try:
        with open("/proc/stat") as file:
            # user nice system idle iowait irq softirq steal; guest time is part of user and nice already
            ticks = [int(field) for field in file.readline().split()[1:9]]
    except OSError:
        return None
    idle = ticks[3] + ticks[4]
    return sum(ticks) - idle, sum(ticks)


def _read_memory() -> dict[str, int]:
    with open("/proc/meminfo") as file:
        return {line.split(":")[0]: int(line.split()[1]) for line in file}


def _used_percent(total: int, free: int) -> float:
    return 100.0 * (total - free) / total if total else 0.0
