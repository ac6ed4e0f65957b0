"""Out of memory: what was asked, what was there, and the batch that would have fit."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from raylight.worker.worker import Worker

_ASKED = re.compile(r"[Tt]ried to allocate (\d+(?:\.\d+)?) ?(bytes|[KMGT]i?B)")
_UNITS = {"b": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_HEADROOM = 0.9  # of what is there: allocators lose some to fragments


@dataclass(frozen=True, slots=True)
class Shortage:
    """Bytes of one device, as an allocation failed."""

    asked: int
    total: int
    held: int
    """By this process, when it failed."""
    kept: int
    """Of that, by what does not grow with the batch: weights, gradients, optimizer state."""

    def largest_batch(self, batch_size: int) -> int:
        """How many samples would have fit, as far as memory grows with them."""
        grown = self.held - self.kept + self.asked
        room = self.total * _HEADROOM - self.kept
        return max(0, int(batch_size * room / grown)) if grown > 0 else 0


_MESSAGES = ("DefaultCPUAllocator", "out of memory", "CUDNN_STATUS_NOT_SUPPORTED", "CUDNN_STATUS_ALLOC_FAILED")
"""In a RuntimeError's text."""


def is_out_of_memory(error: BaseException) -> bool:
    error = getattr(error, "cause", None) or error  # of a worker: its text names more than the error
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)
    )


def advise(worker: Worker, batch_size: int, error: BaseException) -> tuple[str, ...]:
    """What to do about an error that is one of memory; nothing about others. `batch_size`: of the batch in hand, else
    0."""
    if not is_out_of_memory(error):
        return ()
    shortage = _measure(worker, _read_asked(str(error)))
    facts = f"Out of memory on {worker.device}: {_text(shortage.asked)} more were asked for, {_text(shortage.held)} of "
    facts += f"{_text(shortage.total)} were in use, {_text(shortage.kept)} of them by weights, gradients and optimizer."
    if not batch_size or worker.stage != "train":
        return (facts,)
    fitting = min(shortage.largest_batch(batch_size), batch_size - 1)
    if fitting < 1:
        return (facts, "No batch would have fit: take a smaller model, a lower precision, or more workers with fsdp.")
    steps = -(-batch_size // fitting)
    return (
        facts,
        f"Of this batch of {batch_size} samples about {fitting} would have fit: batch_size={fitting} with "
        f"accumulate_grad_batches={steps * worker.data.accumulate} keeps the effective batch about the same.",
    )


def _read_asked(text: str) -> int:
    found = _ASKED.search(text)
    return int(float(found[1]) * _UNITS[found[2][0]]) if found is not None else 0


def _measure(worker: Worker, asked: int) -> Shortage:
    tensors: list[torch.Tensor] = list(worker.module.parameters())
    tensors += [p.grad for p in worker.module.parameters() if p.grad is not None]
    tensors += worker.optimizers.state_tensors
    kept = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if worker.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(worker.device)
        # What the error has set free is counted as held: it was, when it failed.
        held = max(torch.cuda.max_memory_allocated(worker.device), total - free)
        return Shortage(asked, total, held, kept)
    total, available = _read_main_memory()
    return Shortage(asked, total, total - available, max(kept, total - available))


def _read_main_memory() -> tuple[int, int]:
    facts = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE))
    return int(facts.get("MemTotal", 0)) << 10, int(facts.get("MemAvailable", 0)) << 10


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def _text(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.0f} MiB"
