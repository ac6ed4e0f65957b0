"""What a checkpoint holds: gathered from a rank for a snapshot, and put back into one."""

from __future__ import annotations

from raylight.contract.errors import CheckpointMismatch
from raylight.contract.kinds import StateDict
from raylight.contract.layout import MANIFEST_FILE, checkpoint_directory
from raylight.contract.messages import FileDropped, FileOrders
from raylight.contract.seeding import RNGState, rng_state
from raylight.contract.task import Begin
from raylight.user.callback import Callback
from raylight.user.data_module import DataModule
from raylight.user.module import Module
from raylight.worker.checkpoint import optimizer_options
from raylight.worker.checkpoint.kept_hyperparameters import (
    DATA_MODULE_KEY,
    MODULE_KEY,
    read_hyperparameters,
    write_hyperparameters,
)
from raylight.worker.checkpoint.lightning_loops import Standing, standing_of, write_loops
from raylight.worker.checkpoint.lightning_state import LIGHTNING_VERSION, show_to_hooks
from raylight.worker.checkpoint.pickled_values import PICKLED_KEY, check_callbacks, put_together, set_apart
from raylight.worker.checkpoint.restore import apply_weights
from raylight.worker.checkpoint.state import OwnState, State
from raylight.worker.metrics.epoch_shares import merge, pack, unpack
from raylight.worker.progress import Progress
from raylight.worker.step.schedulers import step_schedulers
from raylight.worker.worker import Worker

LIGHTNING_KEYS = (
    "epoch", "global_step", "pytorch-lightning_version", "state_dict", "optimizer_states", "lr_schedulers", "callbacks",
    "loops", "hyper_parameters",
)  # fmt: skip


def directory_of(worker: Worker) -> str:
    """Where a checkpoint of this state goes."""
    progress = worker.progress
    batch = None if progress.has_stepped else progress.num_batches_seen
    return checkpoint_directory(progress.global_step, worker.task.attempt, batch)


def is_committed(worker: Worker) -> bool:
    """Whether this attempt's checkpoint of this state is on storage: then it must not be written again."""
    files = worker.task.files
    return files is not None and files.exists(f"{directory_of(worker)}/{MANIFEST_FILE}")


def send_orders(worker: Worker) -> None:
    """Asks for the files that are wanted of this state, whose checkpoint is made now or was already."""
    orders = worker.saving.take_orders()
    if orders:
        worker.outbox.put(FileOrders(directory_of(worker), worker.progress.global_step, orders))


def drop_orders(worker: Worker) -> None:
    """The ranks meet again, and what was wanted of this state comes too late."""
    paths = [order.path for order in worker.saving.take_orders() if not isinstance(order, FileDropped)]
    if paths:
        worker.warn_once(f"not written, because a worker was lost meanwhile: {', '.join(paths)}")


def take_snapshot(worker: Worker, wait: bool) -> bool:
    """Starts a checkpoint of this step; False if one is still in flight and `wait` is off."""
    snapshots, options, progress = worker.saving.snapshots, worker.config.checkpoint, worker.progress
    assert snapshots is not None
    assert options is not None
    owned = [*worker.optimizers.parameters, *worker.optimizers.state_tensors]
    return snapshots.take(
        directory_of(worker), progress.global_step, progress.current_epoch,
        collect(worker), worker.metrics.newest(), options.save_weights_only, owned, wait=wait,
        carried=worker.metrics.find_carried(progress.global_step),
    )  # fmt: skip


def collect(worker: Worker, at: Progress | None = None, standing: Standing | None = None) -> State:
    """All state of this rank, by reference: the snapshot copies it. `at`: where it stands, if the hooks of a batch or
    an epoch are running and that is past what the worker has counted; `standing`: the same in Lightning's words."""
    progress, batches, data_module = at or worker.progress, worker.data.batches, worker.data_module
    if progress.batch_idx and batches is not None:
        progress.note_position(batches.position_after(progress.batch_idx - 1))
    checkpoint = collect_lightning(worker, standing or standing_of(progress, worker.data.num_batches))
    with worker.metrics.outside():
        worker.hooks.call("on_save_checkpoint", checkpoint)
    finished = progress.batch_idx - 1 if progress.batch_idx else None
    extra = {key: value for key, value in checkpoint.items() if key not in LIGHTNING_KEYS}
    callbacks, pickled_callbacks, left_out = set_apart(checkpoint["callbacks"])
    extra, pickled_extra, more_left_out = set_apart(extra)
    worker.saving.name_left_out(left_out | more_left_out, worker.outbox)
    return State(
        model=checkpoint["state_dict"],
        parameters=list(worker.module.parameters()),
        replicated={
            "optimizers": checkpoint["optimizer_states"],
            "schedulers": checkpoint["lr_schedulers"],
            "configured": worker.optimizers.configured,
            "callbacks": callbacks,
            "loop": progress.state_dict(),
            "precision": worker.precision.state_dict(),
            "metrics": dict(worker.metrics.epoch_values),
            "measured_at": dict(worker.metrics.measured_at),
            "data_module": data_module.state_dict() if data_module is not None else {},
        },
        own={
            "rng": rng_state(),
            "data": batches.state_dict(progress.current_epoch, finished) if batches is not None else None,
            "logged": pack(worker.metrics.epoch_share()),
        },
        module={
            **_write_hyperparameters(worker, worker.module, checkpoint["hyper_parameters"], MODULE_KEY),
            **_write_hyperparameters(worker, data_module, getattr(data_module, "hparams", {}), DATA_MODULE_KEY),
            "extra": extra,
            PICKLED_KEY: {"extra": pickled_extra, "callbacks": pickled_callbacks},
            "facts": {
                "automatic": worker.module.automatic_optimization,
                "num_batches": worker.data.num_batches,
                "data_module": type(data_module).__qualname__ if data_module is not None else None,
                "seed": worker.task.seed,
            },
        },
    )


def collect_lightning(worker: Worker, standing: Standing) -> StateDict:
    """The state under the keys that Lightning's files have, as `on_save_checkpoint` receives it."""
    return {
        "epoch": standing.epochs - standing.is_in_epoch_end,
        "global_step": standing.steps,
        "pytorch-lightning_version": LIGHTNING_VERSION,
        "state_dict": worker.module.state_dict(),
        "optimizer_states": [optimizer.state_dict() for optimizer in worker.optimizers.all],
        "lr_schedulers": [config.scheduler.state_dict() for config in worker.optimizers.schedulers],
        "callbacks": {
            state_key(callback): held for callback in worker.hooks.callbacks if (held := callback.state_dict())
        },
        "loops": write_loops(standing, worker.module.automatic_optimization),
        "hyper_parameters": dict(worker.module.hparams),
    }  # fmt: skip


def state_key(callback: Callback) -> str:
    return callback.state_key


def _write_hyperparameters(worker: Worker, owner: Module | DataModule | None, values: StateDict, key: str) -> StateDict:
    """The entries of a checkpoint; what it cannot hold is named once."""
    entries, unsaved = write_hyperparameters(owner, values, key)
    worker.saving.name_unsaved(unsaved, worker.outbox)
    return entries


def restore_weights(worker: Worker, state: State, is_own: bool = False) -> None:
    """The module's part, before its optimizers are made. `is_own`: it comes from another rank of this run."""
    checkpoint = call_load_hooks(worker, state, is_own)
    apply_weights(worker.module, checkpoint["state_dict"], strict=worker.module.strict_loading)


def call_load_hooks(worker: Worker, state: State, is_own: bool = False) -> StateDict:
    """What `on_load_checkpoint` has made of the state."""
    if worker.task.runs_code or is_own:
        put_together(state)
    checkpoint = show_to_hooks(state, read_hyperparameters(state.module, type(worker.module)).values)
    worker.hooks.call("on_load_checkpoint", checkpoint)
    state.take_from_hooks(checkpoint)
    return checkpoint


def restore_training(worker: Worker, state: State) -> RNGState | None:
    """Optimizers, schedulers, loop and callbacks, after everything that they belong to exists. Returns the random
    numbers that this rank goes on with; with another number of workers there is no stream that would be the right
    one."""
    saved, optimizers = state.replicated, worker.optimizers
    if not saved:
        raise CheckpointMismatch(
            "this checkpoint holds weights only and cannot be resumed from; use it as the start of a new run: "
            "Net.load_from_checkpoint(path)"
        )
    if len(saved["optimizers"]) != len(optimizers.all):
        raise CheckpointMismatch(
            f"the checkpoint has {len(saved['optimizers'])} optimizers, "
            f"configure_optimizers returned {len(optimizers.all)}"
        )
    optimizer_states, scheduler_states = saved["optimizers"], saved["schedulers"]
    if worker.task.takes_new_options:
        optimizer_states, scheduler_states = optimizer_options.renew(saved, optimizers.configured)
    for optimizer, optimizer_state in zip(optimizers.all, optimizer_states, strict=True):
        optimizer.load_state_dict(optimizer_state)
    for config, scheduler_state in zip(optimizers.schedulers, scheduler_states, strict=False):
        config.scheduler.load_state_dict(scheduler_state)
    check_callbacks(state, [state_key(callback) for callback in worker.hooks.callbacks])
    for callback in worker.hooks.callbacks:
        if state_key(callback) in saved["callbacks"]:
            _load_callback(callback, saved["callbacks"][state_key(callback)])
    _name_missing_callbacks(worker, saved["callbacks"])
    if worker.data_module is not None:
        name = type(worker.data_module).__qualname__  # Lightning's key
        if held := saved.get("data_module") or state.module.get("extra", {}).get(name):
            worker.data_module.load_state_dict(held)
    worker.precision.load_state_dict(saved["precision"])
    worker.metrics.restore(saved["metrics"], saved.get("measured_at", {}))
    progress = worker.progress
    progress.load_state_dict(saved["loop"])
    is_saved = worker.task.attempt > 0 or is_committed(worker)
    worker.saving.note_saved(progress.num_batches_seen if is_saved else -1)
    own = state.own or (state.others[0] if state.others else OwnState())
    position = own.get("data")
    if position:
        worker.data.enter_at(position)
    task = worker.task
    if task.checkpoint is None and task.file is not None and isinstance(task.mode, Begin):
        # It may be of the middle of a step, and Lightning's says batches alone.
        worker.data.enter_after(None if position else progress.batch_idx, progress.batch_idx % worker.data.accumulate)
    mine = [state.own] if state.own else state.others[worker.rank :: worker.world_size]
    if progress.batch_idx and any("logged" in its for its in mine):
        worker.metrics.carry(merge(*(unpack(its["logged"]) for its in mine)))
    if state.module.get("facts", {}).get("plateau_due"):  # saved in the hooks of the epoch's end, before its turn
        step_schedulers(worker, "epoch", progress.current_epoch, plateau=True, is_late=True)
    return state.own.get("rng")


def _load_callback(callback: Callback, held: StateDict) -> None:
    try:
        callback.load_state_dict(held)
    except KeyError as error:
        raise CheckpointMismatch(
            f"the checkpoint's state of {state_key(callback)} is in another form, of Lightning or another version: it "
            f"has no {error}, and holds {list(held)}. To begin this callback anew, go on without it"
        ) from error


def _name_missing_callbacks(worker: Worker, saved: StateDict) -> None:
    missing = saved.keys() - {state_key(callback) for callback in worker.hooks.callbacks}
    if missing:
        worker.warn_once(
            f"the checkpoint holds the state of callbacks that this run does not have: {', '.join(sorted(missing))}. "
            "Pass them in callbacks=[...] to go on with them"
        )
