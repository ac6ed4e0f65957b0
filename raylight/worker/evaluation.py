"""The loops without gradients: validation, test and prediction, exact for any number of workers.

Batch i of the one-process sequence goes to rank i % world_size and nothing is padded, so that every value reduced over
the ranks is the one that a single process would have computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from time import monotonic

import torch
from torch import Tensor

from raylight.contract.kinds import Hook, Output
from raylight.contract.messages import Message, Progress, StageFinished, StageStarted
from raylight.user.transfer import batch_size_of, move_to_device
from raylight.worker.data.evaluation_batches import EvaluationBatches
from raylight.worker.diagnosis.sections import Sections
from raylight.worker.group.collectives import broadcast_tensors, gather_objects
from raylight.worker.hooks import bind_step, takes_outputs
from raylight.worker.step.lazy_layers import shaped
from raylight.worker.worker import Worker

REPORT_EVERY_S = 0.25
PREFIXES = {"sanity": "validation", "validate": "validation", "test": "test", "predict": "predict"}
"""What the hooks of a stage begin with."""

Outputs = list[list[tuple[int, Output]]]
"""For each loader, pairs of a batch's index and what the step returned for it."""


@dataclass
class EvaluationResult:
    """What one pass over all loaders of a stage has measured."""

    values: dict[str, float] = field(default_factory=dict)
    """Equal on all ranks."""
    outputs: Outputs = field(default_factory=list)
    """This rank's, in prediction."""
    num_loaders: int = 0


def evaluate(
    worker: Worker, stage: str, max_batches: float = float("inf")
) -> Generator[Message, None, EvaluationResult]:
    """Runs one pass over all loaders of `stage`, whose data is open."""
    prefix, module, hooks, progress = PREFIXES[stage], worker.module, worker.hooks, worker.progress
    data = worker.evaluation_data["validate" if stage == "sanity" else stage]
    worker.metrics.enter("validate" if stage == "sanity" else stage)
    module._remember_modes()
    getattr(module, f"on_{prefix}_model_eval")()
    # DDP lets running statistics drift apart between its broadcasts; all ranks must measure the same module
    broadcast_tensors(shaped(module.buffers()), worker.world_size)
    hooks.call(f"on_{prefix}_start")
    hooks.call(f"on_{prefix}_epoch_start")
    total = None if data.total is None else int(min(data.total, max_batches * len(data.batches)))
    yield StageStarted(stage, progress.current_epoch, progress.global_step, total)
    outputs: Outputs = []
    with _without_gradients(worker):
        for index in range(len(data.batches)):
            kept: list[tuple[int, Output]] = []
            yield from _run_loader(worker, stage, index, data.batches, max_batches, kept)
            outputs.append(kept)
    worker.metrics.enter_loader(None)
    values = yield from _finish(worker, stage, prefix, outputs)
    if stage != "predict":
        getattr(module, f"on_{prefix}_model_train")()
    return EvaluationResult(values, outputs if stage == "predict" else [], len(data.batches))


def _without_gradients(worker: Worker) -> AbstractContextManager[None]:
    """Inside a fit never `inference_mode`: training could not use what a validation made, such as the parameters of a
    lazy layer or a cached table, and `torch.enable_grad` would do nothing."""
    return torch.inference_mode() if worker.config.inference_mode and not worker.is_fitting else torch.no_grad()


def _run_loader(
    worker: Worker, stage: str, loader_index: int, loaders: list[EvaluationBatches], max_batches: float,
    kept: list[tuple[int, Output]],
) -> Iterator[Message]:  # fmt: skip
    prefix, module, progress = PREFIXES[stage], worker.module, worker.progress
    several = len(loaders) > 1
    step = bind_step(getattr(module, f"{prefix}_step"), several)
    batches = loaders[loader_index].iterate()
    if worker.config.profiler is not None:
        sections = Sections(worker.profiler)
        step, batches = sections.around(f"{prefix}_step", step), sections.around_items(f"{prefix} data", batches, False)
    on_start, on_end = worker.hooks.of(f"on_{prefix}_batch_start"), worker.hooks.of(f"on_{prefix}_batch_end")
    returns = stage == "predict" and worker.task.returns_predictions
    keeps = returns or _epoch_end_hook(worker, stage) is not None
    arguments = (loader_index,) if several else ()
    metrics, precision = worker.metrics, worker.precision
    metrics.enter_loader(loader_index if several else None)
    num_samples, finished, next_report = 0, 0, monotonic() + REPORT_EVERY_S
    for index, batch, size in batches:
        if index >= max_batches:
            break
        worker.control.show_life(stage if finished else f"first batch of {stage}", progress.global_step)
        metrics.end_step()
        metrics.begin_batch(partial(batch_size_of, batch) if size is None else size, index)
        batch = worker.transfer(batch, loader_index)
        for hook in on_start:
            hook(batch, index, *arguments)
        with precision.forward_context():
            output = step(batch, index, loader_index)
        if returns and output is None and not finished:
            worker.warn_once("predict_step returned None, and so the predictions hold None")
        for hook in on_end:
            hook(output, batch, index, *arguments)
        if keeps:
            kept.append((index, _to_cpu(output) if stage == "predict" else output))
        finished += 1
        num_samples += (batch_size_of(batch) or 1) if size is None else size
        batch = output = None  # or two of each would be held while the next is made
        if monotonic() >= next_report:
            yield Progress(stage, progress.current_epoch, progress.global_step, finished, num_samples)
            yield from worker.outbox.take()
            next_report = monotonic() + REPORT_EVERY_S
    yield Progress(stage, progress.current_epoch, progress.global_step, finished, num_samples)


def _finish(worker: Worker, stage: str, prefix: str, outputs: Outputs) -> Generator[Message, None, dict[str, float]]:
    hook, metrics, progress = _epoch_end_hook(worker, stage), worker.metrics, worker.progress
    if hook is not None:
        gathered = _gather_in_order(worker, outputs)
        hook(gathered if len(gathered) > 1 else gathered[0] if gathered else [])
    elif stage != "predict" and worker.hooks.overrides(f"{prefix}_epoch_end"):
        getattr(worker.module, f"{prefix}_epoch_end")()
    found = [metrics.finish_epoch(metrics.stage, progress.current_epoch, progress.global_step)]
    if worker.hooks.of(f"on_{prefix}_epoch_end"):
        worker.hooks.call(f"on_{prefix}_epoch_end")
        found.append(metrics.finish_epoch(metrics.stage, progress.current_epoch, progress.global_step))
    if worker.is_first and stage in ("validate", "test"):
        yield from (part for part in found if part.values)
    yield StageFinished(stage, progress.current_epoch, progress.global_step)
    metrics.enter("")
    worker.hooks.call(f"on_{prefix}_end")
    metrics.end_epoch()
    yield from worker.outbox.take()
    return {name: value for part in found for name, value in part.values.items()}


def split_by_loader(results: dict[str, float], num_loaders: int) -> list[dict[str, float]]:
    """One dict for each loader, as Lightning returns them: names with a loader's suffix go to that loader alone."""
    split: list[dict[str, float]] = [{} for _ in range(max(num_loaders, 1))]
    for name, value in results.items():
        label, _, index = name.rpartition("/dataloader_idx_")
        for number, part in enumerate(split):
            if not label or number == int(index):
                part[name] = value
    return split


def gather_outputs(worker: Worker, outputs: list[Output]) -> list[Output]:
    """A training epoch's outputs of all ranks, in dataset order, on this rank's device."""
    if worker.world_size == 1:
        return outputs
    shares = gather_objects(_to_cpu(outputs), worker.world_size)
    moved: list[Output] = move_to_device(interleave(shares), worker.device)
    return moved


def _gather_in_order(worker: Worker, outputs: Outputs) -> list[list[Output]]:
    """Each loader's outputs of all ranks, in the order of its batches."""
    if worker.world_size > 1:
        shares = gather_objects(_to_cpu(outputs), worker.world_size)
        outputs = [
            sorted((pair for share in shares for pair in share[index]), key=lambda pair: pair[0])
            for index in range(len(outputs))
        ]
        outputs = move_to_device(outputs, worker.device)
    return [[output for _, output in loader] for loader in outputs]


def _epoch_end_hook(worker: Worker, stage: str) -> Hook | None:
    """The user's `..._epoch_end(outputs)`, where there is one that takes outputs."""
    name = f"{PREFIXES[stage]}_epoch_end"
    if stage == "predict" or not worker.hooks.overrides(name):
        return None
    hook = getattr(worker.module, name)
    return hook if takes_outputs(hook) else None


def _to_cpu(value: Output) -> Output:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    return move_to_device(value, torch.device("cpu"))


def interleave(shares: list[list[Output]]) -> list[Output]:
    """Items of all ranks in dataset order, if rank r holds every world_size-th from r on."""
    missing = object()
    rounds = itertools.zip_longest(*shares, fillvalue=missing)
    return [item for turn in rounds for item in turn if item is not missing]
