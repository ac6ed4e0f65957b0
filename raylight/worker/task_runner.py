"""One rank's whole work for one task, as a generator of messages; the same in-process and on Ray."""

from __future__ import annotations

import os
import socket
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from raylight.arguments.rules import as_list
from raylight.contract.errors import InvalidArguments
from raylight.contract.messages import ENDING, RECOVERY, Finished, Hyperparameters, Message, PeerLost, Started, Trained
from raylight.contract.rank_zero import set_rank
from raylight.contract.seeding import seed_process, set_rng_state
from raylight.contract.task import Begin, Place, Rejoin, Rescue, Task
from raylight.user.checkpoint_io import find_checkpoint_io
from raylight.user.given_hyperparameters import INSTANTIATOR
from raylight.user.hyperparameters import merge_logged
from raylight.user.run_view import PLAIN
from raylight.worker.checkpoint import contents, optimizer_options
from raylight.worker.checkpoint.lightning_state import load_content, to_state
from raylight.worker.checkpoint.restore import load_state
from raylight.worker.checkpoint.state import State
from raylight.worker.diagnosis.evidence import keep_evidence
from raylight.worker.diagnosis.failure import Aftermath, describe_failure
from raylight.worker.diagnosis.out_of_memory import advise
from raylight.worker.diagnosis.sections import begin_profile, end_profile
from raylight.worker.evaluation import EvaluationResult, evaluate, split_by_loader
from raylight.worker.group import process_group, rejoin
from raylight.worker.group.control import Control, Halted
from raylight.worker.loop import sanity_check
from raylight.worker.returned import pack_objects
from raylight.worker.session import Session
from raylight.worker.step.dynamo import postpone_dynamo
from raylight.worker.step.optimizers import NoOptimizer, check_schedulers, make_optimizers
from raylight.worker.step.reduction import explain
from raylight.worker.surprises import warn_of_surprises
from raylight.worker.worker import Worker


def run(task: Task, place: Place, control: Control) -> Iterator[Message]:
    """Does everything that one rank does for one task. An exception ends it with a message, never with a raise.

    In a later generation of the group the ranks that are left go on with the session they kept, and new ones take the
    places of the dead.
    """
    kept = control.kept if isinstance(control.kept, Session) else None
    session: Session | None = None
    try:
        yield Started(socket.gethostname(), os.getpid(), place.device)
        with ExitStack() as numerics:
            numerics.callback(process_group.leave)
            _set_numerics(task, place, numerics, goes_on=kept is not None and not isinstance(task.mode, Begin))
            if isinstance(task.mode, Rescue):
                if kept is not None:
                    yield from rejoin.rescue(kept, task, place, control)
                return
            if isinstance(task.mode, Rejoin):
                session = yield from _rejoin(kept, task, place, control, task.mode)
            else:
                control.keep(None)
                if place.world_size > 1:
                    process_group.join(place, task.config.strategy.backend, task.config.strategy.timeout_s)
                session = Session(task, place, control)
                yield from prepare(session)
                _part_random_numbers(session.worker)
                control.keep(session)
            result = yield from (_fit(session) if task.stage == "fit" else _evaluate(session.worker))
            end_profile(session.worker)
            _tear_down(session)
        finished = _finish(session, result)
        yield from session.worker.outbox.take()
        yield finished
    except Exception as error:
        session = session or kept
        yield from _fail(session, error)
        if place.world_size == 1:
            control.note_exception(error)
    finally:
        if session is not None:
            session.end()


def _rejoin(
    kept: Session | None, task: Task, place: Place, control: Control, mode: Rejoin
) -> Generator[Message, None, Session]:
    """A survivor brings the session it kept; a replacement makes one before it joins, so that nobody waits for that."""
    session = kept
    if session is None:
        session = Session(task, place, control)
        yield from prepare(session)
        _part_random_numbers(session.worker)
        control.keep(session)
    else:
        session.worker.move(task, place, control)
        session.begin()
    if place.world_size > 1:
        process_group.join(place, task.config.strategy.backend, task.config.strategy.timeout_s)
    with session.meeting():
        rejoin.meet(session, mode)
    return session


def prepare(session: Session) -> Iterator[Message]:
    """From the pickled module to one that is ready to be trained or evaluated, in Lightning's order of hooks."""
    worker, state = session.worker, None
    task, hooks, data_module = worker.task, worker.hooks, worker.data_module
    added = worker.module.configure_callbacks()
    if added:
        hooks.add_callbacks(as_list(added))
    for owner in (data_module, worker.module):
        if owner is not None and (worker.place.local_rank if owner.prepare_data_per_node else worker.rank) == 0:
            owner.prepare_data()
    if isinstance(task.mode, Begin):
        worker.barrier()
    if data_module is not None:
        data_module.setup(task.stage)
    for hook in hooks.of_callbacks("setup"):
        hook(task.stage)
    worker.module.setup(task.stage)
    worker.module.configure_model()
    if task.checkpoint is not None:
        state = load_state(task.checkpoint, worker.rank, worker.world_size)
    elif task.file is not None:
        state = _load_file(task, worker)
    if state is not None:
        contents.restore_weights(worker, state)
    if worker.config.sync_batchnorm and worker.world_size > 1:
        hooks.replace_module(torch.nn.SyncBatchNorm.convert_sync_batchnorm(worker.module))
    worker.precision.convert_module(worker.module)
    worker.module.to(worker.device)
    hparams = {**getattr(data_module, "hparams", {}), **worker.module.hparams}
    hparams.pop(INSTANTIATOR, None)
    if worker.is_first and hparams:
        yield Hyperparameters(dict(hparams), merge_logged(worker.module, data_module))
    yield from worker.outbox.take()
    begin_profile(worker)
    if worker.is_fitting:
        session.keep_random_numbers(_prepare_fit(worker, state))


def _load_file(task: Task, worker: Worker) -> State:
    assert task.file is not None
    where = task.file if isinstance(task.file, str) else "the file"
    content = load_content(task.file, find_checkpoint_io(worker.config.plugins), weights_only=not task.runs_code)
    return to_state(content, where, worker.rank, worker.world_size)


def _prepare_fit(worker: Worker, state: State | None) -> contents.RNGState | None:
    """Optimizers, snapshots, and the state of the checkpoint that the run goes on from."""
    task, config, module = worker.task, worker.config, worker.module
    returned = module.configure_optimizers()
    optimizers, schedulers = make_optimizers(returned, module.automatic_optimization)
    if returned is None and module.automatic_optimization:
        optimizers = [NoOptimizer()]
        worker.warn_once("configure_optimizers returned None: this fit has no optimizer and trains nothing")
    mistakes = check_schedulers(optimizers, schedulers)
    if module.automatic_optimization and len(optimizers) > 1:
        mistakes.append(
            f"configure_optimizers returned {len(optimizers)} optimizers: set automatic_optimization = False "
            "and step them in training_step, as Lightning asks too"
        )
    if module.automatic_optimization and not optimizers:
        mistakes.append(
            "configure_optimizers returned no optimizer: nothing would be trained; to mean that, return None"
        )
    if mistakes:
        raise InvalidArguments(mistakes)
    worker.optimizers.take(optimizers, schedulers)
    if config.checkpoint is not None and task.files is not None:
        worker.saving.begin(task.files, worker.rank, worker.world_size)
        worker.optimizers.configure(optimizer_options.describe(optimizers, schedulers))
    worker.hooks.call("on_fit_start")
    if state is None or task.weights_only:
        return None
    return contents.restore_training(worker, state)


def _fit(session: Session) -> Generator[Message, None, None]:
    worker = session.worker
    if worker.progress.is_at_start:
        yield from sanity_check(worker)
    worker.open_training_data()
    if worker.progress.is_at_start:
        warn_of_surprises(worker)
    yield from session.open_loop().fit(session.take_random_numbers())
    worker.hooks.call("on_fit_end")


def _evaluate(worker: Worker) -> Generator[Message, None, EvaluationResult]:
    worker.progress.stand_at(*worker.task.trained)
    worker.open_evaluation_data(worker.stage)
    return (yield from evaluate(worker, worker.stage))


def _tear_down(session: Session) -> None:
    worker = session.worker
    worker.hooks.call("teardown", worker.task.stage)
    if worker.data_module is not None:
        worker.data_module.teardown(worker.task.stage)


def _finish(session: Session, result: EvaluationResult | None) -> Finished:
    worker, progress = session.worker, session.worker.progress
    finished = Finished(worker.status, progress.global_step, progress.current_epoch, dict(worker.seconds))
    if worker.stage == "predict" and result is not None:
        return replace(finished, outputs=result.outputs)
    if worker.is_first and result is not None:
        return replace(finished, results=tuple(split_by_loader(result.values, result.num_loaders)))
    if worker.is_first and worker.task.returns_module:
        return replace(finished, trained=_gather_trained(session))
    return finished


def _gather_trained(session: Session) -> Trained:
    worker, hooks = session.worker, session.worker.hooks
    state = worker.module.state_dict()
    return Trained(
        weights={name: value.detach().cpu() if isinstance(value, Tensor) else value for name, value in state.items()},
        objects=pack_objects(
            worker.module, hooks.callbacks, worker.data_module, hooks.trainer, worker.shipped, worker.outbox.notice
        ),
        facts={name: getattr(session, name) for name in PLAIN},
    )


def _fail(session: Session | None, error: Exception) -> Iterator[Message]:
    """A broken collective is a peer's failure: this rank settles and waits for a new group. Anything else is its own:
    the hooks are told, and the exception is described. Whatever fails meanwhile is told beside it."""
    if session is not None:
        error = explain(error, session.worker, session.step.reduction if session.step is not None else None)
    lost_peer = process_group.is_peer_loss(error) or (isinstance(error, Halted) and error.broken)
    if session is None:
        failure = describe_failure(error, 0, "setup")
        yield PeerLost(0, failure.text) if lost_peer else failure
        return
    worker, loop, aftermath = session.worker, session.loop, Aftermath()
    step, stage = worker.progress.global_step, _stage_of_failure(session)
    if lost_peer:
        failure = describe_failure(error, step, stage)
    else:
        for hook in worker.hooks.of("on_exception"):
            aftermath.attempt("on_exception", hook, error)
        if worker.data_module is not None:
            aftermath.attempt("on_exception", worker.data_module.on_exception, error)
        aftermath.attempt("the profiler", worker.profiler.teardown, worker.task.stage)
        failure = describe_failure(error, step, stage)
        if stage == "train" and loop is not None:
            evidence = keep_evidence(worker, loop.step, loop.suspect, failure.kind, failure.text)
            failure = replace(failure, evidence=evidence)
        advice = aftermath.attempt("measuring the memory", advise, worker, session.batch_size, error) or ()
        failure = replace(failure, notes=advice)
        yield from worker.outbox.take()
    if worker.is_fitting:
        num_notes = len(aftermath.notes)
        aftermath.attempt("taking the broken step back", session.settle)
        settle_orders = contents.drop_orders if lost_peer else contents.send_orders
        settle_orders(worker)
        yield from worker.outbox.take()
        if len(aftermath.notes) > num_notes:
            session.lose(aftermath.notes[-1])
        yield from rejoin.drain_rows(worker)
    failure = replace(failure, notes=(*failure.notes, *aftermath.notes))
    yield PeerLost(step, failure.text) if lost_peer else failure


def _stage_of_failure(session: Session) -> str:
    if session.is_meeting:
        return RECOVERY
    return ENDING if session.worker.has_ended else session.worker.stage


def _begin_random_numbers(task: Task, place: Place) -> None:
    """As the script has them when it calls `fit`, on all ranks alike: if setup() splits the data at random, each must
    get the same parts. In the script's own process they go on, as in Lightning; a `seed=` begins them again."""
    if task.config.seed is not None or place.world_size > 1 or task.rng is not None:
        seed_process(task.seed)
    if task.config.seed is None and task.rng is not None:
        set_rng_state(task.rng)


def _part_random_numbers(worker: Worker) -> None:
    """From here on every rank draws a stream of its own, so that dropout masks differ between them; the first goes on
    as one process would."""
    if worker.rank:
        seed_process(worker.task.seed + worker.rank)


def _set_numerics(task: Task, place: Place, stack: ExitStack, goes_on: bool) -> None:
    """Sets global switches of torch, put back when the run ends: in-process the caller's program goes on. A rank that
    is kept through a failure `goes_on` with its random numbers too."""
    config = task.config
    postpone_dynamo()
    set_rank(place.rank)
    stack.callback(set_rank, 0)
    if not goes_on:
        _begin_random_numbers(task, place)
    if config.deterministic:
        before = torch.are_deterministic_algorithms_enabled()
        only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True, warn_only=config.deterministic == "warn")
        stack.callback(torch.use_deterministic_algorithms, before, warn_only=only_warned)
    if config.benchmark is not None:
        stack.callback(_set_cudnn_benchmark, torch.backends.cudnn.benchmark)
        _set_cudnn_benchmark(config.benchmark)
    if config.detect_anomaly:
        stack.enter_context(torch.autograd.set_detect_anomaly(True))


def _set_cudnn_benchmark(value: bool) -> None:
    torch.backends.cudnn.benchmark = value
