"""The training loop of one rank: fit -> train_epoch -> train_batch -> the user's training_step.

The loop is a generator of messages. Nothing in a step waits for the device: values are read in `report`, a few times
a second.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from time import monotonic, perf_counter

import torch
from torch import Tensor

from raylight.contract import messages
from raylight.contract.kinds import Batch, Hook, Output
from raylight.contract.messages import EpochMetrics, FilesAwaited, Message, Paused, StageFinished, StageStarted
from raylight.contract.requests import Request
from raylight.contract.seeding import isolate_rng, set_rng_state
from raylight.user.profilers import Profiler
from raylight.worker.checkpoint import contents
from raylight.worker.checkpoint.spare import keep_locally
from raylight.worker.data.batches import TrainBatch
from raylight.worker.diagnosis.evidence import keep_evidence
from raylight.worker.diagnosis.sections import Sections
from raylight.worker.evaluation import evaluate, gather_outputs
from raylight.worker.group.collectives import agree
from raylight.worker.group.control import Action, Halted
from raylight.worker.hooks import bind_step, takes_outputs
from raylight.worker.monitor import MonitorWatch
from raylight.worker.schedule import NEVER, Schedule
from raylight.worker.step.schedulers import step_schedulers
from raylight.worker.step.step import Step
from raylight.worker.worker import Worker

REPORT_EVERY_S = 0.25
FINAL_WRITE_TIMEOUT_S = 3600.0
SKIP_EPOCH = -1
NO_ROWS = sys.maxsize  # steps between rows of step values with log_every_n_steps=0


def sanity_check(worker: Worker) -> Iterator[Message]:
    """A few validation batches before training, so that a broken validation_step fails in the first second."""
    config = worker.config
    if not config.num_sanity_val_steps or not config.limit_val_batches or not worker.hooks.overrides("validation_step"):
        return
    worker.enter("sanity")
    worker.hooks.call("on_sanity_check_start")
    worker.open_evaluation_data("validate")
    limit = float("inf") if config.num_sanity_val_steps == -1 else config.num_sanity_val_steps
    with isolate_rng():  # training draws the same with and without it
        yield from evaluate(worker, "sanity", max_batches=limit)
    worker.metrics.forget()
    worker.hooks.call("on_sanity_check_end")
    worker.enter("train")


class Loop:
    """One rank in training, from where its worker stands (a fresh start, or a restored checkpoint) to the end."""

    def __init__(self, worker: Worker):
        self.worker, self.config = worker, worker.config
        self.step = Step(worker)
        self.schedule = Schedule(worker)
        self.monitor = MonitorWatch(worker, self.schedule.val_every != NEVER)
        self.transfer: Callable[[Batch], Batch] | None = worker.transfer if worker.transfer.is_needed else None
        self.sections: Sections | None = None
        self.on_batch_start = worker.hooks.of("on_train_batch_start")
        self.on_batch_end = worker.hooks.of("on_train_batch_end")
        self.keeps_outputs = worker.hooks.overrides("training_epoch_end")
        self.gathers_outputs = self.keeps_outputs and takes_outputs(worker.module.training_epoch_end)
        self.wants_outputs = self.gathers_outputs or bool(self.on_batch_end)
        self.steps_schedulers = worker.optimizers.steps_every("step")
        self.log_every = self.config.log_every_n_steps or NO_ROWS
        self.beat_stage = "first training batch"
        self.num_samples = 0
        self.next_report = 0.0
        self.pause: Action | None = None
        self.regroups = False
        self.suspect: int | None = None
        """Index of a finished batch whose loss was not finite."""
        self.said_not_finite = False
        worker.begin_timing()

    def fit(self, restored_rng: contents.RNGState | None = None) -> Iterator[Message]:
        """`restored_rng` are the random numbers of the checkpoint: put in place just before the first step, because
        what was drawn up to here, the run that is continued had drawn before its own first step."""
        worker = self.worker
        if worker.config.profiler is not None:
            self._profile(worker.profiler)
        worker.begin_training()
        worker.metrics.enter("train")
        worker.hooks.call("on_train_start")
        if restored_rng is not None:
            set_rng_state(restored_rng)
        while not self.schedule.is_finished():
            yield from self.train_epoch()
        worker.metrics.enter("")
        yield from self.save_last()
        yield from self.await_files()
        worker.end_training()
        worker.hooks.call("on_train_end")
        self._send_orders()

    def train_epoch(self) -> Iterator[Message]:
        worker, schedule, step = self.worker, self.schedule, self.step
        control, progress, saving = worker.control, worker.progress, worker.saving
        yield from self._begin_epoch()
        epoch, logged = worker.progress.current_epoch, worker.progress.global_step
        skipped, waited = False, perf_counter()
        batches = worker.data.batches
        assert batches is not None
        stream = batches.iterate(epoch, progress.position, agree=self._agree, progress=self._say_skipped)
        for batch in stream if self.sections is None else self.sections.around_items("data", stream):
            worker.seconds["data"] += perf_counter() - waited
            control.show_life(self.beat_stage, progress.global_step)
            if self.train_batch(batch) == SKIP_EPOCH:
                skipped = True
                break
            progress.finish_batch(batch.index)
            self.beat_stage = "train"
            if progress.global_step != logged:
                before, logged = logged, progress.global_step
                if logged // self.log_every != before // self.log_every:
                    worker.metrics.record(logged, epoch)
            if not step.window:
                worker.metrics.end_step()
            if monotonic() >= self.next_report:
                yield from self.report(batch.index)
            action = control.tick(progress.num_batches_seen)
            if action is not None:
                self.obey(action)
            if self.pause is not None and not saving.is_requested:
                yield from self.stand_still()
            if schedule.validates_after_batch(batch.last) or schedule.validates_before_stop(step.window):
                yield from self.validate()
            if not batch.last and schedule.saves_after_step(step.window):
                yield from self.save()
            if schedule.stops_in_epoch() and not step.window:  # what is accumulated is not thrown away
                break
            if self.regroups and not step.window:
                yield from self.report(batch.index)
                worker.barrier()  # nobody leaves while another is still in the step's collectives
                raise Halted("the group is made anew", broken=True)
            waited = perf_counter()
        if schedule.validates_after_epoch():
            yield from self.validate()
        yield from self.finish_epoch(whole=skipped or schedule.is_epoch_whole())

    def train_batch(self, batch: TrainBatch) -> int | None:
        worker, step, index, data = self.worker, self.step, batch.index, batch.data
        complete = batch.last or step.window + 1 >= worker.data.accumulate
        step.begin(batch)
        self.num_samples += batch.size
        if batch.size:
            if self.transfer is not None:
                data = self.transfer(data)
            for hook in self.on_batch_start:
                if hook(data, index) == SKIP_EPOCH:
                    return SKIP_EPOCH
        outputs = step.make(batch, data, complete)
        if complete and self.steps_schedulers:
            step_schedulers(worker, "step", worker.progress.global_step)
            step_schedulers(worker, "step", worker.progress.global_step, plateau=True)
        if batch.last:
            step_schedulers(worker, "epoch", worker.progress.current_epoch + 1)
        if self.wants_outputs and batch.size:
            outputs = _detach(outputs)
            for hook in self.on_batch_end:
                hook(outputs, data, index)
            if self.gathers_outputs:
                worker.epoch_outputs.append(outputs)
        step.end()
        return None

    # ---- around the steps

    def _profile(self, profiler: Profiler) -> None:
        sections = self.sections = Sections(profiler)
        self.step.profile(sections)
        if self.transfer is not None:
            self.transfer = sections.around("transfer", self.transfer)
        self.on_batch_start = tuple(sections.around("on_train_batch_start", hook) for hook in self.on_batch_start)
        self.on_batch_end = tuple(sections.around("on_train_batch_end", hook) for hook in self.on_batch_end)

    def forward_epoch(self, skip_uneven: bool) -> None:
        """Calls training_step on each of this rank's batches; what it logs is dropped. With `skip_uneven` a batch that
        some rank lacks is left out, because layers wait for one another over the ranks."""
        worker, batches, number = self.worker, self.worker.data.batches, self.worker.progress
        assert batches is not None
        step = bind_step(worker.module.training_step)
        with worker.metrics.set_aside():
            for batch in batches.iterate(number.current_epoch, agree=self._agree):
                worker.control.show_life("train", number.global_step)
                if batch.size and not (skip_uneven and batch.uneven):
                    data = worker.transfer(batch.data)
                    with worker.precision.forward_context():
                        step(data, batch.index, 0)

    def _begin_epoch(self) -> Iterator[Message]:
        worker, progress = self.worker, self.worker.progress
        if worker.progress.batch_idx == 0 and self.schedule.reloads(worker.data.opened_in):
            worker.open_training_data()
        if worker.progress.batch_idx == 0:
            worker.hooks.call("on_train_epoch_start")
            self.step.follow()
        self.num_samples, self.next_report = 0, 0.0
        assert worker.data.batches is not None
        self.step.begin_epoch(worker.data.batches.knows_sizes)
        yield StageStarted("train", worker.progress.current_epoch, worker.progress.global_step, worker.data.num_batches)
        worker.metrics.enter("train", in_step=True)
        ended = progress.batch_idx == worker.data.num_batches
        if progress.batch_idx and self.schedule.validates_after_batch(ended) and not progress.is_validated:
            yield from self.validate()  # it was due, and then the run was cut short

    def report(self, index: int) -> Iterator[Message]:
        """What is told a few times a second; the only place of the loop that waits for the device."""
        worker = self.worker
        yield from self._drain()
        shown, waited_s, share = worker.metrics.shown(), worker.seconds["data"], {}
        if worker.world_size > 1 and not self.step.window:
            # a callable needs all values, which would be more with each message
            share = {name: its for name, its in worker.metrics.epoch_share().items() if its[0][0] != "callable"}
        epoch, step = worker.progress.current_epoch, worker.progress.global_step
        yield messages.Progress("train", epoch, step, index + 1, self.num_samples, shown, waited_s, share)
        yield from worker.saving.poll()
        self.next_report = monotonic() + REPORT_EVERY_S

    def _drain(self) -> Iterator[Message]:
        metrics = self.worker.metrics.drain()
        if metrics is not None:
            yield metrics
        self._check_finite()
        yield from self.worker.outbox.take()

    def validate(self) -> Iterator[Message]:
        worker = self.worker
        began = perf_counter()
        yield from self.report(worker.progress.batch_idx - 1)  # one that dies in the validation has said all
        opened = worker.evaluation_data.get("validate")
        if opened is None or self.schedule.reloads(opened.opened_in):
            worker.open_evaluation_data("validate")
        worker.enter("validate")
        worker.request_validation(False)
        if not self.step.window:  # what is accumulated is not thrown away
            hooks = worker.hooks.of("on_validation_model_zero_grad")
            hooks[0]() if hooks else worker.module.zero_grad()
        with worker.profiler.profile("validation"):
            yield from evaluate(worker, "validate")
        worker.enter("train")
        worker.metrics.enter("train", in_step=True)
        worker.seconds["validation"] += perf_counter() - began
        worker.progress.finish_validation()
        if self.schedule.saves_after_validation():
            worker.saving.request()

    def finish_epoch(self, whole: bool) -> Iterator[Message]:
        """Hooks, values and schedulers of the epoch's end; not `whole` where the run stopped in its middle.

        A run that goes on from there comes to this end once more, and so its checkpoint is made before the hooks.
        """
        worker, metrics = self.worker, self.worker.metrics
        values: list[EpochMetrics] = []
        yield from self.report(worker.progress.batch_idx - 1)
        metrics.enter("train")
        share = metrics.keep_share()
        if not whole:
            values.append(metrics.finish_epoch("train", worker.progress.current_epoch, worker.progress.global_step))
            metrics.carry(share)
            yield from self.save(must=True)
            metrics.carry({})
        if self.keeps_outputs:
            hook: Hook = worker.module.training_epoch_end
            outputs = gather_outputs(worker, worker.epoch_outputs)
            hook(outputs) if takes_outputs(hook) else hook()
        values.append(metrics.finish_epoch("train", worker.progress.current_epoch, worker.progress.global_step))
        for hooks in worker.hooks.at_epoch_end():
            for hook in hooks:
                hook()
            values.append(metrics.finish_epoch("train", worker.progress.current_epoch, worker.progress.global_step))
        metrics.end_epoch()
        worker.drop_epoch_outputs()
        if worker.is_first:
            yield from (part for part in values if part.values)
        if whole:
            step_schedulers(worker, "epoch", worker.progress.current_epoch + 1, plateau=True)
            if worker.hooks.overrides("lr_scheduler_step"):  # which may log, too
                late = metrics.finish_epoch("train", worker.progress.current_epoch, worker.progress.global_step)
                metrics.end_epoch()
                if late.values and worker.is_first:
                    yield late
            worker.progress.finish_epoch()
        else:
            metrics.carry(share)  # of a checkpoint that has to be made once more
        yield StageFinished("train", worker.progress.current_epoch, worker.progress.global_step)
        yield from worker.outbox.take()
        if (whole and self.schedule.saves_after_epoch()) or worker.saving.orders:
            yield from self.save(must=True)

    def save(self, must: bool = False) -> Iterator[Message]:
        """Starts a checkpoint of this step; the bytes are written behind the loop.

        While the one before is still being written, a checkpoint that `must` be made (an epoch's, the last, and as
        `Schedule.must_save` says) waits for it, and one in between is left out, on all ranks alike, which is said once;
        one that was asked for is made after a later step.
        """
        worker, saving, step = self.worker, self.worker.saving, self.worker.progress.global_step
        if saving.snapshots is None or saving.saved_at == worker.progress.num_batches_seen:
            saving.drop_request()
            self._send_orders()
            return
        self.monitor.look()
        yield from self._poll()
        free = agree(not saving.snapshots.busy, worker.world_size)
        if free or must or self.schedule.must_save():
            worker.control.show_life("save", step)
            self._send_orders()
            contents.take_snapshot(worker, wait=not free)
            saving.note_saved(worker.progress.num_batches_seen)
            worker.control.show_life(self.beat_stage, step)
        elif not saving.is_requested and worker.is_first:
            saving.say_left_out(step, worker.outbox)

    def _send_orders(self) -> None:
        """All ranks have the same."""
        if self.worker.is_first:
            contents.send_orders(self.worker)
        else:
            self.worker.saving.take_orders()

    def _poll(self) -> Iterator[Message]:
        """What has become of snapshots. Values come before the checkpoint that they led to: it would be committed, and
        a run that goes on from it does not log them again."""
        results = self.worker.saving.poll()
        if results:
            yield from self._drain()
            yield from results

    def save_last(self) -> Iterator[Message]:
        """The state at the end of the run is always on storage; what fails on any rank is tried once more by all."""
        worker, saving = self.worker, self.worker.saving
        yield from self._drain()
        self.schedule.say_never_validated()
        if saving.snapshots is not None:
            self.monitor.look(is_final=True)
            yield from self.save(must=True)
            worker.control.show_life("save", worker.progress.global_step)
            yield from saving.close(FINAL_WRITE_TIMEOUT_S)
            if not self._agree(not saving.has_failed):
                contents.take_snapshot(worker, wait=True)
                yield from saving.close(FINAL_WRITE_TIMEOUT_S)
                if not self._agree(not saving.has_failed):
                    yield from keep_locally(worker)
            worker.control.show_life("end", worker.progress.global_step)
        yield from worker.outbox.take()

    def await_files(self) -> Iterator[Message]:
        """Hooks at the end of a run may read what a ModelCheckpoint has had written."""
        worker = self.worker
        if worker.saving.snapshots is not None and worker.hooks.trainer.checkpoint_callbacks:
            worker.control.pause()
            yield FilesAwaited(worker.progress.global_step)
            worker.control.stand_still()

    def obey(self, action: Action) -> None:
        """Does what the driver asked all ranks for at this boundary."""
        worker = self.worker
        if action.request == Request.SAVE:
            worker.saving.request()
        elif action.request == Request.VALIDATE:
            worker.request_validation()
        elif action.request in (Request.PAUSE, Request.PAUSE_IN_PROCESS):
            self.pause = action
        elif action.request == Request.RESIZE:
            self.regroups = True
        elif action.request == Request.STOP:
            worker.end_as(True, "stopped")
        elif action.request == Request.INTERRUPT:
            worker.end_as(True, "interrupted")

    def stand_still(self) -> Iterator[Message]:
        """Until the driver lets it go on; in its own process, until the next message is asked for."""
        worker, pause = self.worker, self.pause
        self.pause = None
        yield from self._drain()
        yield from worker.saving.close(FINAL_WRITE_TIMEOUT_S)
        yield Paused(worker.progress.global_step)
        if pause is not None and pause.request == Request.PAUSE:
            worker.control.stand_still()

    def _check_finite(self) -> None:
        """Names the first step since the last report whose loss was not finite."""
        losses = self.step.take_losses()
        if not losses:
            return
        finite = torch.isfinite(torch.stack([loss.reshape(()).float() for loss in losses]))
        if finite.all():
            return
        worker, progress, batches = self.worker, self.worker.progress, self.worker.data.batches
        behind = len(losses) - int((~finite).nonzero()[0])
        index = max(progress.batch_idx - behind, 0)
        step, epoch = max(progress.global_step - behind + 1, 0), progress.current_epoch
        samples = batches.indices(epoch, index) if batches is not None else None
        which = f", samples {samples}" if samples is not None else ""
        text = f"the loss is not finite at step {step} (epoch {epoch}, batch {index}, rank {worker.rank}{which})"
        self.suspect = index
        if self.config.detect_anomaly:
            raise FloatingPointError(text)
        if not self.said_not_finite:
            self.said_not_finite = True
            files, path = worker.task.files, keep_evidence(worker, self.step, index, "NaN", text)
            again = f"; run that step again: raylight replay {files.argument_of(path)}" if files and path else ""
            advice = "detect_anomaly=True stops at it and shows where it came from"
            worker.outbox.notice(f"{text}; {advice}{again}", "warning")

    def _say_skipped(self, done: int, total: int) -> None:
        self.worker.control.show_life("train", self.worker.progress.global_step)
        if done >= total:
            self.worker.outbox.notice(f"read {total} items of the stream again to go on where the run had stopped")

    def _agree(self, flag: bool) -> bool:
        return agree(flag, self.worker.world_size)


def _detach(outputs: Output) -> Output:
    """What hooks see of a step: a dict with the loss, free of the graph; empty for a batch that was skipped."""
    if outputs is None:
        return {}
    if isinstance(outputs, Tensor):
        return {"loss": outputs.detach()}
    if isinstance(outputs, dict):
        return {name: value.detach() if isinstance(value, Tensor) else value for name, value in outputs.items()}
    return outputs
