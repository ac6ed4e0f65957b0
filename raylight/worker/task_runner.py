"""Where a worker begins: one rank's whole work as a generator of messages, the same in-process and on Ray."""

from __future__ import annotations

import os
import socket
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from raylight.contract.errors import InvalidArguments
from raylight.contract.messages import Finished, Hyperparameters, Message, PeerLost, Started
from raylight.contract.rank_zero import set_rank
from raylight.contract.seeding import seed_process
from raylight.contract.task import Place, Task
from raylight.worker.checkpoint import contents as state
from raylight.worker.checkpoint import optimizer_options as hyperparameters
from raylight.worker.checkpoint.restore import load_lightning, load_state
from raylight.worker.checkpoint.snapshot import Snapshots
from raylight.worker.diagnosis.evidence import keep_evidence
from raylight.worker.diagnosis.failure import describe_failure
from raylight.worker.diagnosis.out_of_memory import advise
from raylight.worker.evaluation import evaluate, open_evaluation_data, split_by_loader
from raylight.worker.group import process_group, rejoin
from raylight.worker.group.control import Control, Halted
from raylight.worker.loop import fit
from raylight.worker.rank import Rank
from raylight.worker.step.dynamo import postpone_dynamo
from raylight.worker.step.optimizers import check_schedulers, make_optimizers


def run(task: Task, place: Place, control: Control) -> Iterator[Message]:
    """Everything that one rank does for one task. An exception ends it with a message, never with a raise.

    In a later generation of the group the ranks that are left go on with the state they kept, and new ones take the
    places of the dead.
    """
    rank: Rank | None = None
    try:
        yield Started(socket.gethostname(), os.getpid(), place.device)
        with ExitStack() as numerics:
            _set_numerics(task, place, numerics, is_kept="rank" in control.kept)
            if task.options.get("rescue"):
                yield from rejoin.rescue(control.kept.get("rank"), task, place, control)
                return
            if task.options.get("rejoin"):
                rank = yield from _rejoin(task, place, control, numerics)
            else:
                control.kept.clear()
                _join(place, task, numerics)
                rank = Rank(task, place, control)
                yield from prepare(rank)
                if task.stage == "fit":
                    prepare_fit(rank)
                control.kept["rank"] = rank
            yield from (_fit(rank) if task.stage == "fit" else _evaluate(rank))
            rank.call("teardown", task.stage)
            if rank.datamodule is not None:
                rank.datamodule.teardown(task.stage)
            if rank.logger is not None:
                rank.logger.close()
            yield from rank.take_outbox()
        yield _finish(rank)
    except Exception as error:
        rank = rank or control.kept.get("rank")
        yield from _fail(rank, error)
        if place.world_size == 1:
            control.kept["exception"] = error
    finally:
        if rank is not None:
            rank.module.trainer = None


def _join(place: Place, task: Task, stack: ExitStack) -> None:
    if place.world_size > 1:
        options = task.config.strategy
        process_group.join(place, options.backend, options.timeout_s)
        stack.callback(process_group.leave)


def _rejoin(task: Task, place: Place, control: Control, stack: ExitStack) -> Generator[Message, None, Rank]:
    """A survivor brings the rank it kept; a replacement makes one before it joins, so that nobody waits for that."""
    rank: Rank | None = control.kept.get("rank")
    if rank is None:
        rank = Rank(task, place, control)
        yield from prepare(rank)
        prepare_fit(rank)
        control.kept["rank"] = rank
    else:
        rejoin.move(rank, task, place, control)
    _join(place, task, stack)
    rejoin.meet(rank)
    return rank


def prepare(rank: Rank) -> Iterator[Message]:
    """From the pickled module to one that is ready on its device, in Lightning's order of hooks."""
    task, module, data_module = rank.task, rank.module, rank.datamodule
    added = module.configure_callbacks()
    if added:
        rank.add_callbacks(added)
    if rank.local_rank == 0:
        if data_module is not None:
            data_module.prepare_data()
        module.prepare_data()
    if not task.options.get("rejoin"):
        rank.barrier()
    if data_module is not None:
        data_module.setup(task.stage)
    for hook in rank.callback_hooks("setup"):
        hook(task.stage)
    module.setup(task.stage)
    module.configure_model()
    if task.checkpoint is not None:
        rank.restored = load_state(task.checkpoint, rank.global_rank, rank.world_size)
        state.restore_weights(rank, rank.restored)
    elif lightning_file := task.options.get("lightning_file"):
        state.restore_weights(rank, load_lightning(lightning_file))
    if rank.config.sync_batchnorm and rank.world_size > 1:
        module = rank.module = torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)
    rank.precision_plugin.convert_module(module)
    module.to(rank.device)
    hparams = {**getattr(data_module, "hparams", {}), **module.hparams}
    if rank.is_global_zero and hparams:
        yield Hyperparameters(dict(hparams))
    yield from rank.take_outbox()


def prepare_fit(rank: Rank) -> None:
    """Optimizers, snapshots, and the state of the checkpoint that the run goes on from."""
    task, config = rank.task, rank.config
    rank.optimizers, rank.lr_scheduler_configs = make_optimizers(
        rank.module.configure_optimizers(), rank.module.automatic_optimization
    )
    mistakes = check_schedulers(rank.optimizers, rank.lr_scheduler_configs)
    if rank.module.automatic_optimization and len(rank.optimizers) > 1:
        mistakes.append(
            f"configure_optimizers returned {len(rank.optimizers)} optimizers: set automatic_optimization = False "
            "and step them in training_step, as Lightning asks too"
        )
    if rank.module.automatic_optimization and not rank.optimizers:
        mistakes.append("configure_optimizers returned no optimizer: nothing would be trained")
    if mistakes:
        raise InvalidArguments(mistakes)
    if config.checkpoint is not None and task.files is not None:
        rank.snapshots = Snapshots(task.files, rank.global_rank, rank.world_size)
        rank.configured = hyperparameters.describe(rank.optimizers, rank.lr_scheduler_configs)
    rank.call("on_fit_start")
    if rank.restored is not None and not task.weights_only:
        state.restore_training(rank, rank.restored)
    rank.restored = None


def _fit(rank: Rank) -> Iterator[Message]:
    yield from fit(rank)
    rank.call("on_fit_end")


def _evaluate(rank: Rank) -> Iterator[Message]:
    rank.global_step, rank.current_epoch = rank.task.options.get("trained", (0, 0))
    open_evaluation_data(rank, rank.stage)
    yield from evaluate(rank, rank.stage)


def _finish(rank: Rank) -> Finished:
    """Rank 0 brings back what the caller gets; in prediction every rank brings its batches."""
    returned: Any = None
    if rank.stage == "predict":
        returned = rank.evaluation_outputs
    elif rank.is_global_zero and rank.fitting:
        returned = state.share_module(rank) if rank.task.options.get("share_module") else None
    elif rank.is_global_zero:
        returned = split_by_loader(rank.evaluation_results[0], len(rank.evaluation_batches))
    return Finished(rank.status, rank.global_step, rank.current_epoch, dict(rank.seconds), returned)


def _fail(rank: Rank | None, error: Exception) -> Iterator[Message]:
    """A broken collective is a peer's failure: this rank settles and waits for a new group. Anything else is its own:
    the hooks are told, and the exception is described."""
    lost_peer = process_group.is_peer_loss(error) or (isinstance(error, Halted) and error.broken)
    step, stage = (rank.global_step, rank.stage) if rank is not None else (0, "setup")
    if rank is not None and not lost_peer:
        for hook in rank.hooks("on_exception"):
            hook(error)
        if rank.logger is not None:
            rank.logger.close()
    failure = describe_failure(error, step, stage)
    if rank is not None and not lost_peer:
        evidence = keep_evidence(rank, failure.kind, failure.text) if stage == "train" else None
        failure = replace(failure, evidence=evidence, notes=advise(rank, error))
        yield from rank.take_outbox()
    if rank is not None and rank.fitting:
        rejoin.settle(rank)
    yield PeerLost(step, failure.text) if lost_peer else failure


def _set_numerics(task: Task, place: Place, stack: ExitStack, is_kept: bool) -> None:
    """Global switches of torch, put back when the run ends: in-process the caller's program goes on. A rank that is
    kept through a failure goes on with its random numbers too."""
    config = task.config
    postpone_dynamo()
    set_rank(place.rank)
    stack.callback(set_rank, 0)
    is_going_on = is_kept and (task.options.get("rejoin") or task.options.get("rescue"))
    if (config.seed is not None or place.world_size > 1) and not is_going_on:
        # every rank draws another stream, so that dropout masks differ between them
        seed_process(task.seed + place.rank)
    if config.deterministic:
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=config.deterministic == "warn")
        stack.callback(torch.use_deterministic_algorithms, before)
    if config.benchmark is not None:
        stack.callback(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
        torch.backends.cudnn.benchmark = config.benchmark
    if config.detect_anomaly:
        stack.enter_context(torch.autograd.set_detect_anomaly(True))
