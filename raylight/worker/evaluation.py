"""The loops without gradients: validation, test and prediction, exact for any number of workers.

Batch i of the one-process sequence goes to rank i % world_size and nothing is padded, so that every value reduced over
the ranks is the one that a single process would have computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from raylight.contract.messages import Message, Progress, StageFinished, StageStarted
from raylight.worker.data.batches import EvaluationBatches, batch_size_of, move_to_device
from raylight.worker.group.collectives import broadcast_tensors, gather_objects
from raylight.worker.rank import HOOK_PREFIX, Rank, bind_step, interleave, takes_outputs

REPORT_EVERY_S = 0.25
STEPS = {"sanity": "validation_step", "validate": "validation_step", "test": "test_step", "predict": "predict_step"}


def open_evaluation_data(rank: Rank, stage: str) -> None:
    """Finds the loaders of a stage and shards them."""
    config = rank.config
    limit = {
        "validate": config.limit_val_batches, "test": config.limit_test_batches, "predict": config.limit_predict_batches
    }[stage]  # fmt: skip
    if stage == "validate" and config.overfit_batches and rank.fitting:
        limit = config.overfit_batches
    loaders = rank.evaluation_loaders(stage)
    rank.val_dataloaders = loaders
    rank.evaluation_batches = [
        EvaluationBatches(loader, rank=rank.global_rank, world_size=rank.world_size, limit=limit, seed=rank.seed)
        for loader in loaders
    ]
    rank.num_val_batches = [batches.num_batches for batches in rank.evaluation_batches]


def count_evaluation_batches(rank: Rank) -> int | None:
    """Batches over all loaders and ranks; None where one has no length."""
    counts = rank.num_val_batches
    return None if None in counts else sum(count for count in counts if count is not None)


def evaluate(rank: Rank, stage: str, max_batches: float = float("inf")) -> Iterator[Message]:
    """Runs one pass over all loaders of `stage` and leaves what it measured in `rank.evaluation_results`."""
    prefix = HOOK_PREFIX[stage]
    inside_fit = rank.fitting and stage == "validate"
    module = rank.module
    if inside_fit:
        rank.call("on_validation_model_zero_grad") if rank.hooks(
            "on_validation_model_zero_grad"
        ) else module.zero_grad()
    module._remember_modes()
    getattr(module, f"on_{prefix}_model_eval")()
    # DDP lets running statistics drift apart between its broadcasts; all ranks must measure the same module
    broadcast_tensors(module.buffers(), rank.world_size)
    rank.metrics.stage = "validate" if stage == "sanity" else stage
    rank.metrics.hook_is_step = False
    rank.call(f"on_{prefix}_start")
    rank.call(f"on_{prefix}_epoch_start")
    count = count_evaluation_batches(rank)
    total = None if count is None else int(min(count, max_batches * len(rank.num_val_batches)))
    yield StageStarted(stage, rank.current_epoch, rank.global_step, total)
    outputs: list[list[tuple[int, Any]]] = []
    with torch.inference_mode() if rank.config.inference_mode else torch.no_grad():
        for index, batches in enumerate(rank.evaluation_batches):
            kept: list[tuple[int, Any]] = []
            yield from _run_loader(rank, stage, index, batches, max_batches, kept)
            outputs.append(kept)
    rank.metrics.dataloader_idx = None
    yield from _finish(rank, stage, prefix, outputs)
    if stage != "predict":
        getattr(module, f"on_{prefix}_model_train")()


def _run_loader(
    rank: Rank, stage: str, loader_index: int, batches: EvaluationBatches, max_batches: float, kept: list[Any]
) -> Iterator[Message]:
    prefix, module = HOOK_PREFIX[stage], rank.module
    several = len(rank.evaluation_batches) > 1
    step = bind_step(getattr(module, STEPS[stage]), several)
    on_start, on_end = rank.hooks(f"on_{prefix}_batch_start"), rank.hooks(f"on_{prefix}_batch_end")
    keeps = stage == "predict" or _epoch_end_hook(rank, stage) is not None
    arguments = (loader_index,) if several else ()
    metrics, precision = rank.metrics, rank.precision_plugin
    metrics.dataloader_idx = loader_index if several else None
    num_samples, finished, next_report = 0, 0, monotonic() + REPORT_EVERY_S
    for index, batch in batches.iterate():
        if index >= max_batches:
            break
        rank.control.beat = (stage if finished else f"first batch of {stage}", rank.global_step, monotonic())
        metrics.end_step()
        metrics.begin_batch(_size_finder(batch))
        batch = rank.transfer(batch, loader_index)
        for hook in on_start:
            hook(batch, index, *arguments)
        with precision.forward_context():
            output = step(batch, index, loader_index)
        for hook in on_end:
            hook(output, batch, index, *arguments)
        if keeps:
            kept.append((index, _to_cpu(output) if stage == "predict" else output))
        finished += 1
        num_samples += batch_size_of(batch) or 1
        if monotonic() >= next_report:
            yield Progress(stage, rank.current_epoch, rank.global_step, finished, num_samples)
            yield from rank.take_outbox()
            next_report = monotonic() + REPORT_EVERY_S
    yield Progress(stage, rank.current_epoch, rank.global_step, finished, num_samples)


def _finish(rank: Rank, stage: str, prefix: str, outputs: list[list[tuple[int, Any]]]) -> Iterator[Message]:
    hook = _epoch_end_hook(rank, stage)
    if hook is not None:
        gathered = _gather_in_order(rank, outputs) if takes_outputs(hook) else []
        several = len(gathered) > 1
        hook(gathered if several else gathered[0] if gathered else []) if takes_outputs(hook) else hook()
    elif stage != "predict" and rank.overrides(f"{prefix}_epoch_end"):
        getattr(rank.module, f"{prefix}_epoch_end")()
    values = rank.metrics.finish_epoch(rank.metrics.stage, rank.current_epoch, rank.global_step)
    found = [values]
    if rank.hooks(f"on_{prefix}_epoch_end"):
        rank.call(f"on_{prefix}_epoch_end")
        found.append(rank.metrics.finish_epoch(rank.metrics.stage, rank.current_epoch, rank.global_step))
    rank.evaluation_results = [{name: value for part in found for name, value in part.values.items()}]
    if rank.is_global_zero and stage in ("validate", "test"):
        yield from (part for part in found if part.values)
    if stage == "predict":
        rank.evaluation_outputs = outputs
    yield StageFinished(stage, rank.current_epoch, rank.global_step)
    rank.call(f"on_{prefix}_end")
    rank.metrics.end_epoch()
    yield from rank.take_outbox()


def split_by_loader(results: dict[str, float], num_loaders: int) -> list[dict[str, float]]:
    """One dict for each loader, as Lightning returns them: names with a loader's suffix go to that loader alone."""
    split: list[dict[str, float]] = [{} for _ in range(max(num_loaders, 1))]
    for name, value in results.items():
        label, _, index = name.rpartition("/dataloader_idx_")
        for number, part in enumerate(split):
            if not label or number == int(index):
                part[name] = value
    return split


def gather_outputs(rank: Rank, outputs: list[Any]) -> list[Any]:
    """A training epoch's outputs of all ranks, in dataset order, on this rank's device."""
    if rank.world_size == 1:
        return outputs
    shares = gather_objects(_to_cpu(outputs), rank.world_size)
    return move_to_device(interleave(shares), rank.device)


def _gather_in_order(rank: Rank, outputs: list[list[tuple[int, Any]]]) -> list[list[Any]]:
    """Each loader's outputs of all ranks, in the order of its batches."""
    if rank.world_size > 1:
        shares = gather_objects(_to_cpu(outputs), rank.world_size)
        outputs = [
            sorted((pair for share in shares for pair in share[index]), key=lambda pair: pair[0])
            for index in range(len(outputs))
        ]
        outputs = move_to_device(outputs, rank.device)
    return [[output for _, output in loader] for loader in outputs]


def _epoch_end_hook(rank: Rank, stage: str) -> Callable[..., Any] | None:
    """The user's `..._epoch_end(outputs)`, where there is one that takes outputs."""
    name = f"{HOOK_PREFIX[stage]}_epoch_end"
    if stage == "predict" or not rank.overrides(name):
        return None
    hook = getattr(rank.module, name)
    return hook if takes_outputs(hook) else None


def _size_finder(batch: Any) -> Callable[[], int | None]:
    return lambda: batch_size_of(batch)


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    return move_to_device(value, torch.device("cpu"))
