"""What is done with the state of a run's end if storage takes it no more."""

from __future__ import annotations

from collections.abc import Iterator

from raylight.contract.errors import StorageError
from raylight.contract.layout import checkpoint_directory
from raylight.contract.messages import Message, Saved
from raylight.worker.checkpoint import contents
from raylight.worker.checkpoint.snapshot import Snapshots
from raylight.worker.worker import Worker


def keep_locally(worker: Worker) -> Iterator[Message]:
    """Rank 0 writes all of it to a folder of its own machine, and says where. Called on every rank: hooks of the user's
    that collect what a checkpoint holds may need all."""
    files, node, step = worker.task.files, worker.place.node, worker.progress.global_step
    assert files is not None
    whole = contents.collect(worker)
    if not worker.is_first:
        return
    reason = ""
    try:
        spare = files.local_spare()
        snapshots = Snapshots(spare.files, rank=0, world_size=1)
        weights_only = worker.config.checkpoint is not None and worker.config.checkpoint.save_weights_only
        directory, metrics = checkpoint_directory(step), worker.metrics.newest()
        snapshots.take(directory, step, worker.progress.current_epoch, whole, metrics, weights_only, (), wait=True)
        for result in snapshots.close():
            if isinstance(result, Saved):
                uri = spare.commit(result, worker.task.seed)
                worker.outbox.notice(
                    f"the checkpoint of step {step} is not on storage, but on {node}, in {uri}. "
                    f"Go on from it there with resume={uri!r}", "warning",
                )  # fmt: skip
            else:
                reason = result.reason
    except (OSError, StorageError) as error:
        reason = str(error)
    if reason:
        worker.outbox.notice(f"the checkpoint of step {step} could not be kept on {node} either: {reason}", "warning")
    yield from worker.outbox.take()
