"""Where a run stands, as Lightning's files say it: `loops`, the progress of each of its loops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from raylight.contract.errors import CheckpointCorrupt
from raylight.contract.kinds import StateDict, Value
from raylight.worker.progress import Progress

_EPOCH_LOOP, _AUTOMATIC = "epoch_loop", "epoch_loop.automatic_optimization"
_MANUAL = "epoch_loop.manual_optimization"


@dataclass(frozen=True, slots=True)
class Standing:
    """A place in a run, in the words that both sides share."""

    epochs: int
    """Finished ones; one whose last hooks are running counts."""
    batches: int
    """Finished ones of the epoch in hand; one whose last hooks are running counts."""
    batches_seen: int
    """Finished ones of the run."""
    steps: int
    """Optimizer steps."""
    is_in_batch: bool = False
    """The hooks at the end of the newest batch are running."""
    is_in_epoch_end: bool = False
    """The hooks at the end of the newest epoch are running."""
    is_last_batch: bool = False
    """The newest batch was the last of its epoch, whose end is still to come."""
    stepped: bool = True
    """The newest batch made an optimizer step."""


def standing_of(progress: Progress, num_batches: int | None) -> Standing:
    """Between two batches, where native checkpoints are made."""
    is_last = 0 < progress.batch_idx == num_batches
    return Standing(
        progress.current_epoch, progress.batch_idx, progress.num_batches_seen, progress.global_step,
        is_last_batch=is_last,
    )  # fmt: skip


def write_loops(at: Standing, automatic: bool) -> StateDict:
    """`automatic`: the loop steps the optimizer, and not the module."""
    steps = _counted(at.steps, at.steps if at.batches else 0)
    none = _counted(0, 0)
    logged = at.steps if automatic else at.batches_seen
    return {
        "fit_loop": {
            "state_dict": {},
            "epoch_loop.state_dict": {"_batches_that_stepped": logged - (at.is_in_batch and at.stepped)},
            "epoch_loop.batch_progress": _batch_progress(at),
            "epoch_loop.scheduler_progress": none,
            f"{_AUTOMATIC}.state_dict": {},
            f"{_AUTOMATIC}.optim_progress": {
                "optimizer": {
                    "step": steps if automatic else none,
                    "zero_grad": _with(steps, "started") if automatic else _counted(0, 0, "started"),
                }
            },
            f"{_MANUAL}.state_dict": {},
            f"{_MANUAL}.optim_step_progress": none if automatic else steps,
            "epoch_loop.val_loop.state_dict": {},
            "epoch_loop.val_loop.batch_progress": {**_counted(0, 0, "started", "processed"), "is_last_batch": False},
            "epoch_progress": _epoch_progress(at),
        },
        "validate_loop": _evaluation_loop({"is_last_batch": False}),
        "test_loop": _evaluation_loop({"is_last_batch": False}),
        "predict_loop": _evaluation_loop({}),
    }


def _batch_progress(at: Standing) -> StateDict:
    progress = _counted(at.batches_seen, at.batches, "started", "processed")
    for counts in progress.values():
        counts["completed"] -= at.is_in_batch
    return {**progress, "is_last_batch": at.is_last_batch}


def _epoch_progress(at: Standing) -> StateDict:
    begun = at.epochs + (at.batches > 0)
    counts = {"ready": begun, "completed": at.epochs, "started": begun, "processed": at.epochs}
    return {"total": counts, "current": dict(counts)}


def _evaluation_loop(more: StateDict) -> StateDict:
    return {"state_dict": {}, "batch_progress": {**_counted(0, 0, "started", "processed"), **more}}


def _counted(total: int, current: int, *stages: str) -> StateDict:
    names = ("ready", "completed", *stages)
    return {"total": dict.fromkeys(names, total), "current": dict.fromkeys(names, current)}


def _with(progress: StateDict, stage: str) -> StateDict:
    return {key: {**counts, stage: counts["completed"]} for key, counts in progress.items()}


def read_loops(loops: Mapping[str, Value], steps: int, where: str) -> Standing:
    """The place from which Lightning goes on: a batch that was not finished counts as not begun, and an epoch whose
    last batch is done counts as finished. Raises CheckpointCorrupt, naming the file `where`."""
    try:
        fit = loops["fit_loop"]
        batch, epoch = fit["epoch_loop.batch_progress"], fit["epoch_progress"]["current"]
        epochs, is_open = int(epoch["processed"]), epoch["started"] > epoch["processed"]
        is_done = batch["total"]["ready"] == batch["total"]["started"] == batch["total"]["processed"]
        stage = "processed" if is_done else "completed"
        batches, seen = int(batch["current"][stage]), int(batch["total"][stage])
        if is_open and batch["is_last_batch"] and is_done:
            epochs, is_open = epochs + 1, False
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointCorrupt(f"{where}: its loops are not those of Lightning 2: {error!r}") from error
    return Standing(epochs, batches if is_open else 0, seen, steps)


def to_progress(at: Standing) -> Progress:
    """What is done up to there counts as validated: Lightning does not validate it again."""
    return Progress(
        current_epoch=at.epochs,
        global_step=at.steps,
        batch_idx=at.batches,
        num_batches_seen=at.batches_seen,
        validated_at=at.batches_seen,
        step_before=max(0, at.steps - 1),
    )
