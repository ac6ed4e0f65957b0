"""What a checkpoint holds: gathered from a rank for a snapshot, and put back into one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raylight.contract.errors import CheckpointMismatch
from raylight.contract.seeding import rng_state
from raylight.worker.checkpoint import optimizer_options as hyperparameters
from raylight.worker.checkpoint.restore import apply_weights
from raylight.worker.checkpoint.snapshot import State, check_plain
from raylight.worker.metrics.epoch_shares import merge, pack, unpack
from raylight.worker.rank import Rank

LOOP_COUNTERS = ("current_epoch", "global_step", "batch_idx", "num_batches_seen", "position", "validated_at")
LIGHTNING_KEYS = (
    "epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers", "callbacks", "loops", "hyper_parameters"
)  # fmt: skip


def checkpoint_directory(step: int, attempt: int) -> str:
    """Each attempt has names of its own: one that was thought dead cannot write into a checkpoint of its successor."""
    return f"checkpoints/step-{step:08d}" + (f"-attempt-{attempt}" if attempt else "")


def committed_step(rank: Rank) -> int:
    """This step, if this attempt's checkpoint of it is on storage: then it must not be written again. Else -1."""
    files, directory = rank.task.files, checkpoint_directory(rank.global_step, rank.attempt)
    return rank.global_step if files is not None and files.exists(f"{directory}/manifest.json") else -1


def take_snapshot(rank: Rank, wait: bool) -> bool:
    """Starts a checkpoint of this step; False where one is still in flight and `wait` is off."""
    assert rank.snapshots is not None
    assert rank.config.checkpoint is not None
    weights_only = rank.config.checkpoint.save_weights_only
    metrics = rank.metrics.newest()
    owned = [p for o in rank.optimizers for g in o.param_groups for p in g["params"]]
    owned += [v for o in rank.optimizers for s in o.state.values() for v in s.values() if isinstance(v, Tensor)]
    directory = checkpoint_directory(rank.global_step, rank.attempt)
    return rank.snapshots.take(
        directory, rank.global_step, rank.current_epoch, collect(rank), metrics, weights_only, owned, wait=wait
    )


def collect(rank: Rank) -> State:
    """All state of this rank, by reference: the snapshot copies it."""
    if rank.batch_idx:
        rank.position = rank.train_batches.position_after(rank.batch_idx - 1)
    checkpoint = {
        "epoch": rank.current_epoch,
        "global_step": rank.global_step,
        "state_dict": rank.module.state_dict(),
        "optimizer_states": [optimizer.state_dict() for optimizer in rank.optimizers],
        "lr_schedulers": [config.scheduler.state_dict() for config in rank.lr_scheduler_configs],
        "callbacks": {
            state_key(callback): held for callback in rank.callbacks if (held := callback.state_dict())
        },
        "loops": {name: getattr(rank, name) for name in LOOP_COUNTERS},
        "hyper_parameters": plain_hyperparameters(rank, rank.module),
    }  # fmt: skip
    rank.call("on_save_checkpoint", checkpoint)
    finished = rank.batch_idx - 1 if rank.batch_idx else None
    data = rank.train_batches.state_dict(rank.current_epoch, finished) if rank.train_batches is not None else {}
    data_module = rank.datamodule.state_dict() if rank.datamodule is not None else {}
    return State(
        model=checkpoint["state_dict"],
        parameters=list(rank.module.parameters()),
        replicated={
            "optimizers": checkpoint["optimizer_states"],
            "schedulers": checkpoint["lr_schedulers"],
            "configured": rank.configured,
            "callbacks": checkpoint["callbacks"],
            "loop": checkpoint["loops"],
            "precision": rank.precision_plugin.state_dict(),
            "metrics": dict(rank.metrics.epoch_values),
            "data_module": data_module,
        },
        own={"rng": rng_state(), "data": data, "logged": pack(rank.metrics.epoch_share())},
        module={
            "hyper_parameters": checkpoint["hyper_parameters"],
            "datamodule_hyper_parameters": plain_hyperparameters(rank, rank.datamodule),
            "extra": {key: value for key, value in checkpoint.items() if key not in LIGHTNING_KEYS},
        },
    )


def state_key(callback: Any) -> str:
    return callback.state_key


def plain_hyperparameters(rank: Rank, owner: Any) -> dict[str, Any]:
    """Those of a module or data module that a checkpoint can hold; the others are named once."""
    kept = {}
    for name, value in getattr(owner, "hparams", {}).items():
        try:
            check_plain(value, name)
        except (TypeError, ValueError):
            if name not in rank.unsaved_hyperparameters:
                rank.unsaved_hyperparameters.add(name)
                rank.notice(
                    f"hyperparameter {name!r} ({type(value).__name__}) is no plain value and not in the checkpoints: "
                    f"give it to load_from_checkpoint(path, {name}=...)"
                )
            continue
        kept[name] = value
    return kept


def restore_weights(rank: Rank, state: State) -> None:
    """The module's part, before its optimizers are made."""
    checkpoint = {
        "state_dict": state.model,
        "hyper_parameters": state.module.get("hyper_parameters", {}),
        **state.module.get("extra", {}),
        "epoch": state.replicated.get("loop", {}).get("current_epoch", 0),
        "global_step": state.replicated.get("loop", {}).get("global_step", 0),
        **state.module.get("progress", {}),
    }  # fmt: skip
    rank.call("on_load_checkpoint", checkpoint)
    apply_weights(rank.module, checkpoint["state_dict"], strict=rank.module.strict_loading)


def restore_training(rank: Rank, state: State) -> None:
    """Optimizers, schedulers, loop, callbacks and RNG, after everything that they belong to exists."""
    saved = state.replicated
    if not saved:
        raise CheckpointMismatch(
            "this checkpoint holds weights only and cannot be resumed from; use it as the start of a new run: "
            "Net.load_from_checkpoint(path)"
        )
    if len(saved["optimizers"]) != len(rank.optimizers):
        raise CheckpointMismatch(
            f"the checkpoint has {len(saved['optimizers'])} optimizers, "
            f"configure_optimizers returned {len(rank.optimizers)}"
        )
    optimizer_states, scheduler_states = saved["optimizers"], saved["schedulers"]
    if rank.task.options.get("takes_new_hyperparameters"):
        optimizer_states, scheduler_states = hyperparameters.renew(saved, rank.configured)
    for optimizer, optimizer_state in zip(rank.optimizers, optimizer_states, strict=True):
        optimizer.load_state_dict(optimizer_state)
    for config, scheduler_state in zip(rank.lr_scheduler_configs, scheduler_states, strict=False):
        config.scheduler.load_state_dict(scheduler_state)
    for callback in rank.callbacks:
        if state_key(callback) in saved["callbacks"]:
            callback.load_state_dict(saved["callbacks"][state_key(callback)])
    if rank.datamodule is not None and saved.get("data_module"):
        rank.datamodule.load_state_dict(saved["data_module"])
    rank.precision_plugin.load_state_dict(saved["precision"])
    rank.metrics.epoch_values = dict(saved["metrics"])
    for name in LOOP_COUNTERS:
        setattr(rank, name, saved["loop"][name])
    rank.saved_step = rank.global_step if rank.attempt > 0 else committed_step(rank)
    own = state.own or (state.others[0] if state.others else {})
    if own.get("data"):
        rank.task.options["train_position"] = own["data"]
    mine = [state.own] if state.own else state.others[rank.global_rank :: rank.world_size]
    if rank.batch_idx and any("logged" in its for its in mine):
        rank.metrics.carried = merge(*(unpack(its["logged"]) for its in mine))
    if "rng" in state.own:  # with another number of workers there is no RNG stream that would be the right one
        rank.restored_rng = state.own["rng"]


def share_module(rank: Rank) -> dict[str, Any]:
    """What the caller's own objects receive after training in another process: weights on the CPU, and attributes
    of the module and the callbacks that can be sent."""
    import pickle

    def sendable(owner: Any, skip: set[str]) -> dict[str, Any]:
        found = {}
        for name, value in vars(owner).items():
            if name in skip or isinstance(value, torch.nn.Module):
                continue
            try:
                pickle.dumps(value)
            except (pickle.PicklingError, TypeError, AttributeError):
                continue
            found[name] = value
        return found

    module_internals = set(vars(torch.nn.Module())) | {"_trainer", "_modes", "_toggled"}
    weights = {name: v.detach().cpu() if isinstance(v, Tensor) else v for name, v in rank.module.state_dict().items()}
    return {
        "weights": weights,
        "attributes": sendable(rank.module, module_internals),
        "callbacks": [sendable(callback, set()) for callback in rank.callbacks],
    }
