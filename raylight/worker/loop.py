"""The training loop of one rank: fit -> train_epoch -> train_batch -> the user's training_step.

The loop is a generator of messages. Nothing in a step waits for the device: values are read in `report`, a few times
a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from time import monotonic, perf_counter
from typing import Any

import torch
from torch import Tensor

from raylight.contract.errors import DataError
from raylight.contract.messages import Message, Paused, Progress, StageFinished, StageStarted
from raylight.contract.seeding import seed_step, set_rng_state
from raylight.worker.checkpoint import contents as state
from raylight.worker.data.batches import TrainBatch, TrainBatches
from raylight.worker.diagnosis.evidence import keep_evidence
from raylight.worker.diagnosis.profiler import profile
from raylight.worker.evaluation import evaluate, gather_outputs, open_evaluation_data
from raylight.worker.group.collectives import agree
from raylight.worker.group.control import Action, Halted
from raylight.worker.rank import Rank, takes_outputs
from raylight.worker.schedule import Schedule
from raylight.worker.step.gradients import Gradients
from raylight.worker.step.moving_buffers import MovingBuffers
from raylight.worker.step.optimizers import step_schedulers

REPORT_EVERY_S = 0.25
FINAL_WRITE_TIMEOUT_S = 3600.0
SKIP_EPOCH = -1


def fit(rank: Rank) -> Iterator[Message]:
    """Trains from where `rank` stands (a fresh start, or a restored checkpoint) to the end of the run."""
    if rank.global_step == rank.current_epoch == rank.batch_idx == 0:
        yield from sanity_check(rank)
    open_training_data(rank)
    loop = Loop(rank)
    if rank.profiler is not None:
        profile(loop, rank.profiler)
    rank.has_trained = True
    rank.call("on_train_start")
    if rank.restored_rng is not None:  # what was drawn up to here, the run that goes on had drawn before its first step
        set_rng_state(rank.restored_rng)
        rank.restored_rng = None
    while not loop.schedule.is_finished():
        yield from loop.train_epoch()
    yield from loop.save_last()
    rank.call("on_train_end")
    if rank.profiler is not None:
        rank.profiler.stop()
        rank.notice(rank.profiler.summary())
        yield from rank.take_outbox()


def sanity_check(rank: Rank) -> Iterator[Message]:
    """A few validation batches before training, so that a broken validation_step fails in the first second."""
    config = rank.config
    if not config.num_sanity_val_steps or not config.limit_val_batches or not rank.overrides("validation_step"):
        return
    rank.stage = "sanity"
    rank.call("on_sanity_check_start")
    open_evaluation_data(rank, "validate")
    limit = float("inf") if config.num_sanity_val_steps == -1 else config.num_sanity_val_steps
    yield from evaluate(rank, "sanity", max_batches=limit)
    rank.metrics.forget()
    rank.call("on_sanity_check_end")
    rank.stage = "train"


def open_training_data(rank: Rank) -> None:
    """Finds the train loader and shards it; called again where loaders are reloaded every n epochs."""
    config, options = rank.config, rank.task.options
    rank.train_dataloader = rank.loader("train")
    if rank.train_dataloader is None:
        raise DataError("fit needs training data: pass train_dataloaders or define train_dataloader()")
    rank.train_batches = TrainBatches(
        rank.train_dataloader,
        rank=rank.global_rank,
        world_size=rank.world_size,
        seed=rank.seed,
        limit=config.overfit_batches or config.limit_train_batches,
        use_distributed_sampler=config.use_distributed_sampler,
        global_batch_size=config.global_batch_size,
        overfit=bool(config.overfit_batches),
    )
    position = options.pop("train_position", None)
    if position is not None:
        rank.train_batches.load_state_dict(position)
        rank.batch_idx = rank.train_batches.first_index  # another number of workers counts other steps
    rank.num_training_batches = rank.train_batches.num_batches
    if config.global_batch_size is not None:
        rank.accumulate_grad_batches = rank.train_batches.accumulate


class Loop:
    """One rank in training."""

    def __init__(self, rank: Rank):
        self.rank, self.config = rank, rank.config
        self.gradients = rank.gradients = Gradients(rank)
        self.buffers = rank.moving_buffers = MovingBuffers(rank.module)
        self.schedule = Schedule(rank)
        self.transfers = rank.transfers
        self.several = rank.world_size > 1
        self.on_batch_start = rank.hooks("on_train_batch_start")
        self.on_batch_end = rank.hooks("on_train_batch_end")
        self.keeps_outputs = rank.overrides("training_epoch_end")
        self.wants_outputs = self.keeps_outputs or bool(self.on_batch_end)
        self.steps_schedulers = any(c.interval == "step" for c in rank.lr_scheduler_configs)
        self.log_every = self.config.log_every_n_steps
        self.beat_stage = "first training batch"
        self.num_samples = 0
        self.next_report = 0.0
        self.pause: Action | None = None
        self.regroups = False
        rank.seconds |= {"data": 0.0, "validation": 0.0}

    def train_epoch(self) -> Iterator[Message]:
        rank, control, schedule, gradients = self.rank, self.rank.control, self.schedule, self.gradients
        yield from self._begin_epoch()
        epoch, logged = rank.current_epoch, rank.global_step
        skipped, waited = False, perf_counter()
        for batch in rank.train_batches.iterate(epoch, rank.position, agree=self._agree, progress=self._say_skipped):
            rank.seconds["data"] += perf_counter() - waited
            control.beat = (self.beat_stage, rank.global_step, monotonic())
            if self.train_batch(batch) == SKIP_EPOCH:
                skipped = True
                break
            rank.batch_idx = batch.index + 1
            rank.num_batches_seen += 1
            self.beat_stage = "train"
            if rank.global_step != logged:
                before, logged = logged, rank.global_step
                if logged // self.log_every != before // self.log_every:
                    rank.metrics.record(logged, epoch)
            if not gradients.window:
                rank.metrics.end_step()
            if monotonic() >= self.next_report:
                yield from self.report(batch.index)
            action = control.tick(rank.num_batches_seen)
            if action is not None:
                self.obey(action)
            if self.pause is not None and not rank.checkpoint_requested:
                yield from self.stand_still()
            if schedule.validates_after_batch(batch.last):
                yield from self.validate()
            if not batch.last and schedule.saves_after_step(gradients.window):
                yield from self.save()
            if schedule.stops_in_epoch() and not gradients.window:  # what is accumulated is not thrown away
                break
            if self.regroups and not gradients.window:
                yield from self.report(batch.index)
                rank.barrier()  # nobody leaves while another is still in the step's collectives
                raise Halted("the group is made anew", broken=True)
            waited = perf_counter()
        if schedule.validates_after_epoch():
            yield from self.validate()
        yield from self.finish_epoch(whole=skipped or schedule.is_epoch_whole())

    def train_batch(self, batch: TrainBatch) -> int | None:
        rank, index, data = self.rank, batch.index, batch.data
        complete = batch.last or self.gradients.window + 1 >= rank.accumulate_grad_batches
        rank.batch, rank.batch_done = batch, False
        if self.several:
            seed_step(rank.seed, rank.global_rank, rank.num_batches_seen)
        else:
            rank.torch_rng = torch.default_generator.get_state()
            if not self.gradients.window:
                rank.window_rng = rank.torch_rng
        if self.buffers and not self.gradients.window:
            self.buffers.keep()
        rank.metrics.begin_batch(batch.size)
        self.num_samples += batch.size
        if batch.size:
            if self.transfers:
                data = rank.transfer(data)
            for hook in self.on_batch_start:
                if hook(data, index) == SKIP_EPOCH:
                    return SKIP_EPOCH
        outputs = self.gradients.take(batch, data, complete)
        rank.batch_done = True  # whatever fails from here on
        if complete and self.steps_schedulers:
            step_schedulers(rank, "step", rank.global_step)
            step_schedulers(rank, "step", rank.global_step, plateau=True)
        if batch.last:
            step_schedulers(rank, "epoch", rank.current_epoch + 1)
        if self.wants_outputs and batch.size:
            outputs = _detach(outputs)
            for hook in self.on_batch_end:
                hook(outputs, data, index)
            if self.keeps_outputs:
                rank.outputs.append(outputs)
        rank.batch = None
        return None

    # ---- around the steps

    def _begin_epoch(self) -> Iterator[Message]:
        rank = self.rank
        if self.schedule.reloads() and rank.batch_idx == 0:
            open_training_data(rank)
        rank.metrics.hook_is_step = False
        if rank.batch_idx == 0:
            rank.call("on_train_epoch_start")
            self.gradients.follow()
        self.num_samples, self.next_report, self.gradients.window = 0, 0.0, 0
        yield StageStarted("train", rank.current_epoch, rank.global_step, rank.num_training_batches)
        rank.metrics.stage, rank.metrics.hook_is_step = "train", True
        ended = rank.batch_idx > 0 and rank.batch_idx == rank.num_training_batches
        if rank.batch_idx and self.schedule.validates_after_batch(ended) and rank.validated_at != rank.num_batches_seen:
            yield from self.validate()  # it was due, and then the run was cut short

    def report(self, index: int) -> Iterator[Message]:
        """What is told a few times a second; the only place of the loop that waits for the device."""
        rank = self.rank
        yield from self._drain()
        shown, waited_s, share = rank.metrics.shown(), rank.seconds["data"], {}
        if self.several and not self.gradients.window:
            # a callable needs all values, which would be more with each message
            share = {name: its for name, its in rank.metrics.epoch_share().items() if its[0][0] != "callable"}
        yield Progress(
            "train", rank.current_epoch, rank.global_step, index + 1, self.num_samples, shown, waited_s, share
        )
        if rank.snapshots is not None:
            yield from rank.snapshots.poll()
        self.next_report = monotonic() + REPORT_EVERY_S

    def _drain(self) -> Iterator[Message]:
        metrics = self.rank.metrics.drain()
        if metrics is not None:
            yield metrics
        self._check_finite()
        yield from self.rank.take_outbox()

    def validate(self) -> Iterator[Message]:
        rank = self.rank
        began = perf_counter()
        yield from self._drain()
        if rank.val_dataloaders is None or self.schedule.reloads():
            open_evaluation_data(rank, "validate")
        rank.stage = "validate"
        yield from evaluate(rank, "validate")
        rank.stage = "train"
        rank.metrics.stage, rank.metrics.hook_is_step = "train", True
        rank.seconds["validation"] += perf_counter() - began
        rank.validated_at = rank.num_batches_seen
        if self.schedule.saves_after_validation():
            rank.checkpoint_requested = True

    def finish_epoch(self, whole: bool) -> Iterator[Message]:
        """Hooks, values and schedulers of the epoch's end; not `whole` where the run stopped in its middle.

        A run that goes on from there comes to this end once more, and so its checkpoint is made before the hooks.
        """
        rank, metrics, values = self.rank, self.rank.metrics, []
        yield from self._drain()
        metrics.stage, metrics.hook_is_step = "train", False
        share = metrics.keep_share()
        if not whole:
            values.append(metrics.finish_epoch("train", rank.current_epoch, rank.global_step))
            metrics.carried = share
            yield from self.save(must=True)
            metrics.carried = {}
        if self.keeps_outputs:
            hook, outputs = rank.module.training_epoch_end, gather_outputs(rank, rank.outputs)
            hook(outputs) if takes_outputs(hook) else hook()
        values.append(metrics.finish_epoch("train", rank.current_epoch, rank.global_step))
        for hooks in rank.hooks_at_epoch_end():
            for hook in hooks:
                hook()
            values.append(metrics.finish_epoch("train", rank.current_epoch, rank.global_step))
        metrics.end_epoch()
        rank.outputs = []
        if rank.is_global_zero:
            yield from (part for part in values if part.values)
        if whole:
            step_schedulers(rank, "epoch", rank.current_epoch + 1, plateau=True)
            rank.current_epoch += 1
            rank.batch_idx = rank.position = 0
        else:
            metrics.carried = share  # of a checkpoint that has to be made once more
        yield StageFinished("train", rank.current_epoch, rank.global_step)
        yield from rank.take_outbox()
        if whole and self.schedule.saves_after_epoch():
            yield from self.save(must=True)

    def save(self, must: bool = False) -> Iterator[Message]:
        """Starts a checkpoint of this step; the bytes are written behind the loop.

        While the one before is still being written, a checkpoint that `must` be made (an epoch's, the last) waits for
        it, and one in between is left out, on all ranks alike; one that was asked for is made after a later step.
        """
        rank = self.rank
        if rank.snapshots is None or rank.saved_step == rank.global_step:
            rank.checkpoint_requested = False
            return
        yield from rank.snapshots.poll()
        free = agree(not rank.snapshots.busy, rank.world_size)
        if free or must:
            rank.control.beat = ("save", rank.global_step, monotonic())
            state.take_snapshot(rank, wait=not free)
            rank.saved_step, rank.checkpoint_requested = rank.global_step, False

    def save_last(self) -> Iterator[Message]:
        """The state at the end of the run is always on storage; what fails on any rank is tried once more by all."""
        rank = self.rank
        yield from self._drain()
        if rank.snapshots is not None:
            yield from self.save(must=True)
            rank.control.beat = ("save", rank.global_step, monotonic())
            yield from rank.snapshots.close(FINAL_WRITE_TIMEOUT_S)
            if not self._agree(not rank.snapshots.has_failed):
                state.take_snapshot(rank, wait=True)
                yield from rank.snapshots.close(FINAL_WRITE_TIMEOUT_S)
        yield from rank.take_outbox()

    def obey(self, action: Action) -> None:
        """What the driver asked all ranks for at this boundary."""
        rank = self.rank
        if action.name == "save":
            rank.checkpoint_requested = True
        elif action.name == "pause":
            self.pause = action
        elif action.name == "resize":
            self.regroups = True
        elif action.name in ("stop", "interrupt"):
            rank.should_stop = True
            rank.status = "interrupted" if action.name == "interrupt" else "stopped"

    def stand_still(self) -> Iterator[Message]:
        """Until the driver lets it go on; in its own process, until the next message is asked for."""
        rank, pause = self.rank, self.pause
        assert pause is not None
        self.pause = None
        if rank.snapshots is not None:
            yield from rank.snapshots.close(FINAL_WRITE_TIMEOUT_S)
        yield Paused(rank.global_step)
        if pause.arguments.get("blocks", True):
            rank.control.stand_still()

    def _check_finite(self) -> None:
        """Names the first step since the last report whose loss was not finite."""
        losses, self.gradients.losses = self.gradients.losses, []
        if not losses:
            return
        finite = torch.isfinite(torch.stack([loss.reshape(()).float() for loss in losses]))
        if finite.all():
            return
        rank = self.rank
        behind = len(losses) - int((~finite).nonzero()[0])
        index = max(rank.batch_idx - behind, 0)
        samples = rank.train_batches.indices(rank.current_epoch, index)
        step, epoch = max(rank.global_step - behind + 1, 0), rank.current_epoch
        which = f", samples {samples}" if samples is not None else ""
        text = f"the loss is not finite at step {step} (epoch {epoch}, batch {index}, rank {rank.global_rank}{which})"
        rank.suspect = index
        if self.config.detect_anomaly:
            raise FloatingPointError(text)
        if not rank.said_not_finite:
            rank.said_not_finite = True
            files, path = rank.task.files, keep_evidence(rank, "NaN", text)
            again = f"; run that step again: raylight replay {files.argument_of(path)}" if files and path else ""
            rank.notice(f"{text}; detect_anomaly=True stops at it and shows where it came from{again}", "warning")

    def _say_skipped(self, done: int, total: int) -> None:
        self.rank.control.beat = ("train", self.rank.global_step, monotonic())
        if done >= total:
            self.rank.notice(f"read {total} items of the stream again to go on where the run had stopped")

    def _agree(self, flag: bool) -> bool:
        return agree(flag, self.rank.world_size)


def _detach(outputs: Any) -> Any:
    """What hooks see of a step: a dict with the loss, free of the graph."""
    if isinstance(outputs, Tensor):
        return {"loss": outputs.detach()}
    if isinstance(outputs, dict):
        return {name: value.detach() if isinstance(value, Tensor) else value for name, value in outputs.items()}
    return outputs
