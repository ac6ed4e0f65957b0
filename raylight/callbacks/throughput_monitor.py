"""ThroughputMonitor: batches, samples, items and floating point operations a second, in the log."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from raylight.callbacks.log_step import is_log_step
from raylight.callbacks.mistake_list import Mistakes
from raylight.contract.kinds import Batch, Output
from raylight.contract.plain_numbers import to_python
from raylight.user.callback import Callback

if TYPE_CHECKING:
    from raylight.contract.config import Config
    from raylight.user.module import Module
    from raylight.user.trainer_names import TrainerNames

# Peak dense operations a second by device and by type of number: ("32-true" without TF32, TF32, 16 bit); NVIDIA's data
# sheets, whose figures with sparsity are halved here.
PEAK_FLOPS: dict[str, tuple[float, float, float]] = {
    "H200": (67e12, 494.7e12, 989.4e12),
    "H100 PCIe": (51e12, 378e12, 756e12),
    "H100 NVL": (60e12, 417.5e12, 835e12),
    "H100": (67e12, 494.7e12, 989.4e12),
    "A100": (19.5e12, 156e12, 312e12),
    "A10": (31.2e12, 62.5e12, 125e12),
    "L40S": (91.6e12, 183e12, 362e12),
    "L4": (30.3e12, 60e12, 121e12),
    "T4": (8.1e12, 8.1e12, 65e12),
    "V100": (15.7e12, 15.7e12, 125e12),
}


class Reading(NamedTuple):
    """The clock and the counters of one stage at one moment; counters grow from the stage's start."""

    seconds: float
    batches: int
    samples: int
    lengths: int
    flops: float


@dataclass
class StageCounts:
    """The work of one stage on this rank since it began."""

    began: float
    readings: deque[Reading] = field(default_factory=deque)
    batches: int = 0
    samples: int = 0
    lengths: int = 0
    flops: float = 0.0

    def take_reading(self, window: int) -> Reading:
        """Note the counters; those that are more than `window` batches older are forgotten, but for the last one."""
        now = Reading(time.perf_counter() - self.began, self.batches, self.samples, self.lengths, self.flops)
        self.readings.append(now)
        while len(self.readings) > 2 and now.batches - self.readings[1].batches >= window:
            self.readings.popleft()
        return now


class ThroughputMonitor(Callback):
    """Logs "train/device/samples_per_sec" and the like every `log_every_n_steps`; other stages at their end.

    `batch_size_fn(batch)` counts the samples of a batch, `length_fn(batch)` its items (tokens, for example). If the
    module has `flops_per_batch`, the operations a second are logged too, and as `device/mfu` their share of what the
    device can do at best, if that is known or given as `available_flops`. Rates are over the last `window_size`
    batches, or since the last log if that is longer ago; time in validation does not count as training's. Rates
    without "device" are over all ranks, with rank 0's standing for each. On a GPU each log waits for the device once.
    """

    def __init__(
        self,
        batch_size_fn: Callable[[Batch], int],
        length_fn: Callable[[Batch], int] | None = None,
        *,
        window_size: int = 100,
        separator: str = "/",
        available_flops: float | None = None,
    ):
        mistakes = Mistakes("ThroughputMonitor")
        mistakes.require(callable(batch_size_fn), f"batch_size_fn={batch_size_fn!r} must be a function of a batch.")
        mistakes.require(
            length_fn is None or callable(length_fn), f"length_fn={length_fn!r} must be a function of a batch or None."
        )
        mistakes.require_count("window_size", window_size, 2)
        mistakes.raise_any()
        self.batch_size_fn = batch_size_fn
        self.length_fn = length_fn
        self.window_size = to_python(window_size)
        self.separator = separator
        self.available_flops = available_flops
        self._counts: dict[str, StageCounts] = {}
        self._logged_step = 0
        self._validation_began = 0.0

    def _find_mistakes(self, config: Config) -> list[str]:
        if config.logger is not False or config.fast_dev_run:
            return []
        return ["ThroughputMonitor has nowhere to log to with logger=False; remove one of them."]

    def setup(self, trainer: TrainerNames, module: Module, stage: str) -> None:
        if self.available_flops is None:
            self.available_flops = find_peak_flops(trainer.device, trainer.config.precision)

    def on_train_start(self, trainer: TrainerNames, module: Module) -> None:
        self._start("train")

    def on_train_batch_end(
        self, trainer: TrainerNames, module: Module, outputs: Output, batch: Batch, batch_idx: int
    ) -> None:
        self._count("train", module, batch)
        step = trainer.global_step
        # a step that accumulates is complete with its last batch
        if step != self._logged_step and is_log_step(trainer, step):
            self._logged_step = step
            self._log(trainer, "train")

    def on_validation_start(self, trainer: TrainerNames, module: Module) -> None:
        self._validation_began = time.perf_counter()
        self._start("validate")

    def on_validation_batch_end(
        self,
        trainer: TrainerNames,
        module: Module,
        outputs: Output,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._count("validate", module, batch)

    def on_validation_end(self, trainer: TrainerNames, module: Module) -> None:
        if trainer.sanity_checking:
            return
        self._log(trainer, "validate")
        if "train" in self._counts:
            self._counts["train"].began += time.perf_counter() - self._validation_began

    def on_test_start(self, trainer: TrainerNames, module: Module) -> None:
        self._start("test")

    def on_test_batch_end(
        self,
        trainer: TrainerNames,
        module: Module,
        outputs: Output,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._count("test", module, batch)

    def on_test_end(self, trainer: TrainerNames, module: Module) -> None:
        self._log(trainer, "test")

    def on_predict_start(self, trainer: TrainerNames, module: Module) -> None:
        self._start("predict")

    def on_predict_batch_end(
        self,
        trainer: TrainerNames,
        module: Module,
        outputs: Output,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._count("predict", module, batch)

    def on_predict_end(self, trainer: TrainerNames, module: Module) -> None:
        self._log(trainer, "predict")

    def _start(self, stage: str) -> None:
        self._counts[stage] = StageCounts(began=time.perf_counter())
        self._counts[stage].take_reading(self.window_size)

    @torch.no_grad()  # the functions may touch tensors that ask for gradients
    def _count(self, stage: str, module: Module, batch: Batch) -> None:
        counts = self._counts[stage]
        counts.batches += 1
        counts.samples += self.batch_size_fn(batch)
        counts.lengths += self.length_fn(batch) if self.length_fn is not None else 0
        counts.flops += getattr(module, "flops_per_batch", 0)

    def _log(self, trainer: TrainerNames, stage: str) -> None:
        if not (trainer.logger and trainer.is_global_zero and trainer.config.log_every_n_steps):
            return
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)  # else the clock would measure the queueing of the work
        counts = self._counts[stage]
        now = counts.take_reading(self.window_size)
        values = self._compute(counts.readings[0], now, trainer.world_size)
        named = {f"{stage}{self.separator}{name}": value for name, value in values.items()}
        for logger in trainer.loggers:
            logger.log_metrics(named, step=trainer.global_step)

    def _compute(self, then: Reading, now: Reading, world_size: int) -> dict[str, float]:
        values: dict[str, float] = {"time": now.seconds, "batches": now.batches, "samples": now.samples}
        if self.length_fn is not None:
            values["lengths"] = now.lengths
        passed = now.seconds - then.seconds
        if passed <= 0 or now.batches == then.batches:
            return values
        rates = {
            "batches_per_sec": (now.batches - then.batches) / passed,
            "samples_per_sec": (now.samples - then.samples) / passed,
        }
        if self.length_fn is not None:
            rates["items_per_sec"] = (now.lengths - then.lengths) / passed
        if now.flops > then.flops:
            rates["flops_per_sec"] = (now.flops - then.flops) / passed
        device = f"device{self.separator}"
        values |= {device + name: rate for name, rate in rates.items()}
        if world_size > 1:
            values |= {name: rate * world_size for name, rate in rates.items()}
        if self.available_flops and "flops_per_sec" in rates:
            values[f"{device}mfu"] = rates["flops_per_sec"] / self.available_flops
        return values


def find_peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense operations a second that a GPU can do at best in this precision; None if that is not known."""
    if device.type != "cuda" or precision.startswith("64"):
        return None
    name = f" {torch.cuda.get_device_name(device).replace('-', ' ')} "
    peaks = next((peaks for model, peaks in PEAK_FLOPS.items() if f" {model} " in name), None)
    if peaks is None:
        return None
    if not precision.startswith("32"):
        return peaks[2]
    return peaks[0] if torch.get_float32_matmul_precision() == "highest" else peaks[1]
