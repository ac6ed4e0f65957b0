"""Lightning's checkpoint of one file: made from a run or from a native checkpoint.

Its entries are Lightning's, in types that `torch.load(weights_only=True)` opens. What raylight knows beyond them, so
that it goes on exactly as from a native checkpoint, is under one key that Lightning passes over.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from raylight import __version__
from raylight.contract.config import FilePath
from raylight.contract.kinds import StateDict, Value
from raylight.contract.task import SavedState
from raylight.user.checkpoint_io import CheckpointIO
from raylight.worker.checkpoint import contents
from raylight.worker.checkpoint.kept_hyperparameters import DATA_MODULE_KEY, MODULE_KEY, read_hyperparameters
from raylight.worker.checkpoint.lightning_loops import Standing, standing_of, write_loops
from raylight.worker.checkpoint.lightning_state import LIGHTNING_VERSION, OWN_FORMAT, OWN_KEY, SCALER_KEYS
from raylight.worker.checkpoint.plain_values import check_plain, copy_plain
from raylight.worker.checkpoint.restore import load_state
from raylight.worker.checkpoint.state import OwnState, State
from raylight.worker.group.collectives import gather_objects
from raylight.worker.progress import Progress
from raylight.worker.worker import Worker

NAME_KEYS = {MODULE_KEY: "hparams_name", DATA_MODULE_KEY: "datamodule_hparams_name"}
_ALL_ARGUMENTS = "kwargs"


def save_run(
    worker: Worker, io: CheckpointIO, path: FilePath, weights_only: bool, batch: int | None, stepped: bool,
    storage_options: Value = None,
) -> None:  # fmt: skip
    """Writes the present state of a run. Every rank calls it; rank 0 writes, and the others wait, so that the file is
    there when any of them goes on. `batch` and `stepped` are as for `make_from_run`."""
    checkpoint = make_from_run(worker, weights_only, batch, stepped)
    if worker.is_first:
        io.save_checkpoint(checkpoint, path, storage_options)
    worker.barrier()


def make_from_run(worker: Worker, weights_only: bool, batch: int | None = None, stepped: bool = True) -> StateDict:
    """The present state of a run, tensors by reference. Every rank calls it. `batch`: the index of the batch whose
    last hooks are running, if they are; `stepped`: that batch made an optimizer step."""
    worker.saving.finish_copying()
    progress = Progress(**worker.progress.state_dict())
    num_batches = worker.data.num_batches
    in_epoch_end = batch is None and worker.stage == "train" and 0 < progress.batch_idx == num_batches
    if batch is not None:
        progress.finish_batch(batch)
    is_last = 0 < progress.batch_idx == num_batches
    at = Standing(
        progress.current_epoch + in_epoch_end, 0 if in_epoch_end else progress.batch_idx, progress.num_batches_seen,
        progress.global_step, batch is not None, in_epoch_end, is_last and not in_epoch_end, stepped,
    )  # fmt: skip
    if in_epoch_end:
        progress.finish_epoch()
    elif worker.stage == "validate" and progress.global_step in worker.metrics.measured_at.values():
        progress.finish_validation()
    state = contents.collect(worker, progress, at)
    state.module["facts"]["plateau_due"] = in_epoch_end
    owns = gather_objects(check_plain(state.own, "own"), worker.world_size)
    return _make(state, owns, at, weights_only)


def make_from_saved(saved: SavedState, weights_only: bool = False, owner: type = object) -> StateDict:
    """A committed native checkpoint. `owner`, the module's class if it is at hand, names the classes that enums among
    the hyperparameters need. Raises CheckpointCorrupt."""
    state = load_state(saved, 0, 1)
    facts, loop = state.module.get("facts", {}), state.replicated.get("loop", {})
    progress = Progress()
    if loop:
        progress.load_state_dict(loop)
    else:  # weights alone
        progress.stand_at(getattr(saved, "step", 0), getattr(saved, "epoch", 0))
    at = standing_of(progress, facts.get("num_batches"))
    owns = [check_plain(own, "own") for own in state.others or [state.own]]
    return _make(state, owns, at, weights_only or not loop, owner)


def _make(state: State, owns: list[OwnState], at: Standing, weights_only: bool, owner: type = object) -> StateDict:
    saved, module = state.replicated, state.module
    facts = module.get("facts", {})
    checkpoint: StateDict = {
        "epoch": at.epochs - at.is_in_epoch_end,
        "global_step": at.steps,
        "pytorch-lightning_version": LIGHTNING_VERSION,
        "loops": write_loops(at, facts.get("automatic", True)),
    }
    if not weights_only:
        checkpoint["callbacks"] = saved["callbacks"]
        checkpoint["optimizer_states"] = saved["optimizers"]
        checkpoint["lr_schedulers"] = saved["schedulers"]
        if saved.get("precision"):
            checkpoint[SCALER_KEYS[0]] = saved["precision"]
    for key in (MODULE_KEY, DATA_MODULE_KEY):
        checkpoint |= _write_hyperparameters(module, key, owner)
    if saved.get("data_module") and facts.get("data_module"):
        checkpoint[facts["data_module"]] = saved["data_module"]
    checkpoint |= module.get("extra", {})
    own = {"format": OWN_FORMAT, "version": __version__, "module": {**module, "extra": {}}}
    if not weights_only:
        mine = {key: value for key, value in saved.items() if key in ("configured", "loop", "metrics", "measured_at")}
        own |= {"replicated": mine, "own": owns}
    return {
        "state_dict": _copy_weights(state.model),
        **check_plain(checkpoint, "checkpoint"),
        OWN_KEY: check_plain(own, OWN_KEY),
    }


def _copy_weights(weights: StateDict) -> StateDict:
    """In plain types, with the versions of the modules' layouts, which torch keeps beside the dict."""
    copied: StateDict = check_plain(weights, "state_dict")
    if isinstance(copied, OrderedDict) and hasattr(weights, "_metadata"):
        copied.__dict__["_metadata"] = weights._metadata
    return copied


def _write_hyperparameters(module: Mapping[str, Value], key: str, owner: type) -> StateDict:
    """What Lightning reads: those that have a plain form. The others are under raylight's key alone."""
    kept = read_hyperparameters(module, owner, key)
    values: StateDict = {}
    for name, value in kept.values.items():
        mistakes: list[str] = []
        plain = copy_plain(value, name, lambda tensor, _: tensor, mistakes)
        if not mistakes:
            values[name] = plain
    if not values:
        return {}
    name = kept.argument.name if kept.argument is not None else _ALL_ARGUMENTS
    return {NAME_KEYS[key]: name, key: values}


def find_left_out(checkpoint: StateDict) -> list[str]:
    """The hyperparameters that Lightning will not find, as they have no plain form."""
    module = checkpoint[OWN_KEY]["module"]
    return [
        name for key in (MODULE_KEY, DATA_MODULE_KEY) for name in module.get(key, {})
        if name not in checkpoint.get(key, {})
    ]  # fmt: skip
