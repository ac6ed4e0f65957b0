"""Resolves the trainer's arguments into a Config, and reports every mistake at once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace

from raylight.arguments.lightning_objects import translate
from raylight.arguments.rules import CHECKPOINTING_RULES, DDP_RULES, RULES, say_nearest
from raylight.arguments.scale import Available, Scale, resolve_scale
from raylight.arguments.value_kinds import Refused, Rule
from raylight.contract.config import DDP, Checkpointing, Config, to_plain
from raylight.contract.errors import InvalidArguments, NotEnoughResources
from raylight.contract.kinds import Value
from raylight.contract.plain_numbers import with_python_numbers
from raylight.user.callback import Callback
from raylight.user.checkpoint_io import is_checkpoint_io
from raylight.user.overriding import overrides

_CONFIG_NAMES = {item.name for item in fields(Config)}
_SCALE_NAMES = ("num_workers", "use_gpu", "resources_per_worker", "devices", "gpus", "num_nodes", "accelerator")
_URI = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")

BAREBONES = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    "num_sanity_val_steps": 0, "log_every_n_steps": 0, "checkpoint": False, "fast_dev_run": 0, "detect_anomaly": False,
    "profiler": None,
}  # fmt: skip
"""What `barebones` sets, since each costs time beside the steps."""

# Arguments of fit, validate, test and predict that are easily given to the trainer.
ELSEWHERE = {
    "resume": 'it goes to fit: raylight.fit(..., resume="last"), or trainer.fit(..., ckpt_path="last")',
    "ckpt_path": "it goes to trainer.fit, .validate, .test or .predict",
    "datamodule": "it goes to fit: trainer.fit(model, datamodule=...)",
    "train_dataloaders": "it goes to fit: trainer.fit(model, train_dataloaders=...)",
    "val_dataloaders": "it goes to fit: trainer.fit(model, train_dataloaders=..., val_dataloaders=...)",
    "model": "it goes to fit: trainer.fit(model)",
}

# Lightning's arguments, of today and of older versions, that raylight does not take.
INSTEAD = {
    "amp_backend": "torch's is the only one; leave it out",
    "amp_level": "say precision=... instead",
    "auto_lr_find": "use raylight.tuner.Tuner(trainer).lr_find(model) instead",
    "auto_scale_batch_size": "use raylight.tuner.Tuner(trainer).scale_batch_size(model) instead",
    "auto_select_gpus": "Ray assigns the GPUs; leave it out",
    "checkpoint_callback": "use checkpoint=True, False or raylight.Checkpointing(...) instead",
    "distributed_backend": 'use strategy="ddp" instead',
    "enable_autolog_hparams": "hyperparameters go to run.json and TensorBoard; leave it out",
    "flush_logs_every_n_steps": "metrics reach storage every few seconds; leave it out",
    "hpus": "raylight trains on GPUs (use_gpu=True) and CPUs",
    "ipus": "raylight trains on GPUs (use_gpu=True) and CPUs",
    "log_gpu_memory": "use callbacks=[raylight.callbacks.DeviceStatsMonitor()] instead",
    "model_registry": "checkpoints go to storage_path; leave it out",
    "move_metrics_to_cpu": "metrics are small; leave it out",
    "multiple_trainloader_mode": "pass raylight.utilities.CombinedLoader(loaders, mode)",
    "num_processes": "use num_workers=N, use_gpu=False instead",
    "prepare_data_per_node": "set it on the module or data module: self.prepare_data_per_node = False",
    "process_position": "leave it out",
    "progress_bar_refresh_rate": "use enable_progress_bar=True or False instead",
    "reload_dataloaders_every_epoch": "use reload_dataloaders_every_n_epochs=1 instead",
    "replace_sampler_ddp": "use use_distributed_sampler=... instead",
    "resume_from_checkpoint": "use raylight.fit(..., resume=path) or trainer.fit(..., ckpt_path=path) instead",
    "stochastic_weight_avg": "use callbacks=[raylight.callbacks.StochasticWeightAveraging(...)] instead",
    "terminate_on_nan": "use detect_anomaly=True instead",
    "tpu_cores": "raylight trains on GPUs (use_gpu=True) and CPUs",
    "track_grad_norm": "log it in on_before_optimizer_step instead",
    "truncated_bptt_steps": "split the sequence in training_step, with automatic_optimization=False",
    "val_percent_check": "use limit_val_batches=... instead",
    "train_percent_check": "use limit_train_batches=... instead",
    "weights_save_path": "use storage_path=... instead",
    "weights_summary": "use enable_model_summary=True or False instead",
}


def resolve(arguments: dict[str, Value], available: Available) -> Config:
    """Checks the trainer's arguments against each other and against what there is, and fills in defaults.

    None stands for the default, except in `check_val_every_n_epoch`. `num_workers` stays "auto", and `use_gpu` None,
    only if they depend on a Ray cluster that is not connected yet; resolve again once it is. Raises InvalidArguments
    with every mistake, or NotEnoughResources if that alone is wrong.
    """
    mistakes: list[str] = []
    given = _check_each(translate(arguments, mistakes), mistakes)
    if given.get("barebones"):
        given |= _strip(given, arguments, mistakes)
    indices = _take_indices(given)
    scale = resolve_scale({name: given[name] for name in _SCALE_NAMES if name in given}, available, mistakes)
    values = {name: value for name, value in given.items() if name in _CONFIG_NAMES}
    values |= {
        "num_workers": scale.num_workers,
        "use_gpu": scale.use_gpu,
        "resources_per_worker": scale.resources_per_worker,
        "strategy": _check_strategy(given, mistakes),
        "storage_path": _check_storage(given, mistakes),
        "checkpoint": _check_checkpoint(given, mistakes),
        "seed": given.get("seed"),
        "max_time_s": given.get("max_time"),
        "gpu_indices": _check_indices(indices, scale, available, mistakes),
        "given": to_plain(arguments),
    }
    config = _fill_lengths(Config(**values))
    mistakes += find_callback_mistakes(given.get("callbacks", []))
    mistakes += _find_conflicts(given, config, scale)
    if mistakes:
        raise InvalidArguments(mistakes + ([scale.shortage] if scale.shortage else []))
    if scale.shortage:
        raise NotEnoughResources(scale.shortage)
    return _limit_batches(config)


def check_checkpointing(given: Checkpointing | Mapping[str, Value], label: str, mistakes: list[str]) -> Checkpointing:
    """Parses the fields; invalid ones keep their default and are added to `mistakes`."""
    if isinstance(given, Checkpointing):
        given = {item.name: getattr(given, item.name) for item in fields(given)}
    checked = Checkpointing(**_check_fields(given, CHECKPOINTING_RULES, label, mistakes))
    if checked.keep_best == 0 and checked.keep_last == 0:
        mistakes.append(f"{label}: keep_best=0 with keep_last=0 keeps no checkpoint; to make none: checkpoint=False")
    return checked


def find_callback_mistakes(callbacks: Iterable[object]) -> list[str]:
    """One sentence for each object that is not a Callback."""
    mistakes, callbacks = [], list(callbacks)
    for index, callback in enumerate(callbacks):
        if isinstance(callback, Callback):
            continue
        name = getattr(callback, "__qualname__", type(callback).__qualname__)
        found = f"callbacks[{index}] is {name}"
        kind = callback if isinstance(callback, type) else type(callback)
        if isinstance(callback, type) and issubclass(callback, Callback):
            mistakes.append(f"{found}, a class: pass an instance, {name}(...)")
        elif any(base.__module__.startswith(("pytorch_lightning.", "lightning.")) for base in kind.__mro__):
            mistakes.append(f"{found}, a callback of Lightning: import it, or its parent, from raylight.callbacks")
        else:
            mistakes.append(f"{found}, and a raylight.Callback is needed: make it a subclass")
    return mistakes + _find_shared_keys(callbacks)


def _find_shared_keys(callbacks: Iterable[object]) -> list[str]:
    """Callbacks of which one would get the other's state from a checkpoint."""
    places: dict[str, list[str]] = {}
    for index, callback in enumerate(callbacks):
        if isinstance(callback, Callback) and overrides(callback, "state_dict"):
            places.setdefault(callback.state_key, []).append(f"callbacks[{index}]")
    return [
        f"{' and '.join(names)} would keep their state under one key, {key!r}: give them different arguments, or "
        "override state_key"
        for key, names in places.items()
        if len(names) > 1
    ]


def _check_each(arguments: dict[str, Value], mistakes: list[str]) -> dict[str, Value]:
    """The valid arguments, parsed; the others are added to `mistakes`."""
    given: dict[str, Value] = {}
    for name, value in arguments.items():
        if name in ELSEWHERE:
            mistakes.append(f"{name} is not an argument of the trainer: {ELSEWHERE[name]}")
        elif name in INSTEAD:
            mistakes.append(f"{name} is Lightning's, and raylight does not take it: {INSTEAD[name]}")
        elif name not in RULES:
            nearest = say_nearest(name, RULES) or "; `help(raylight.Trainer)` lists all of them"
            mistakes.append(f"{name} is not an argument of the trainer{nearest}")
        elif value is None and name != "check_val_every_n_epoch":
            continue
        else:
            _check_value(name, value, RULES[name], given, mistakes)
    return given


def _strip(given: dict[str, Value], arguments: dict[str, Value], mistakes: list[str]) -> dict[str, Value]:
    """The arguments that `barebones` sets; one that was given another value is added to `mistakes`."""
    for name, off in BAREBONES.items():
        if given.get(name, off) != off:
            mistakes.append(
                f"barebones=True turns off what costs time beside the steps, and {name}={_show(arguments[name], name)} "
                "asks for it: leave one of them out"
            )
    return {name: off for name, off in BAREBONES.items() if off is not None}


def _take_indices(given: dict[str, Value]) -> tuple[int, ...]:
    """The GPUs that `devices` or `gpus` names; in `given` their number takes their place."""
    for name in ("devices", "gpus"):
        indices = given.get(name)
        if isinstance(indices, tuple):
            given[name] = len(indices)
            return indices
    return ()


def _check_indices(
    indices: tuple[int, ...], scale: Scale, available: Available, mistakes: list[str]
) -> tuple[int, ...]:
    """Empty where they are all that there would be anyway."""
    count = len(indices)
    if indices == tuple(range(count)) and (scale.use_gpu is False or available.is_foreign):
        return ()
    listed = ",".join(map(str, indices))
    if indices and scale.use_gpu is False:
        mistakes.append(f"devices=[{listed}] names GPUs, and this run is on CPUs: devices={count}")
    elif indices and available.is_foreign:
        mistakes.append(
            f"devices=[{listed}]: Ray chooses the GPUs of a cluster; for these alone, start Ray there with "
            f"CUDA_VISIBLE_DEVICES={listed}, and pass devices={count}"
        )
    elif indices and max(indices) >= available.num_gpus_here > 0:
        there = f"{available.num_gpus_here} GPU{'s' if available.num_gpus_here > 1 else ''}"
        mistakes.append(f"devices=[{listed}]: this machine has {there}, and the first is 0")
    return () if indices == tuple(range(available.num_gpus_here)) else indices


def _check_value(
    name: str, value: object, rule: Rule, given: dict[str, Value], mistakes: list[str], label: str = ""
) -> None:
    try:
        given[name] = rule.parse(with_python_numbers(value))
    except Refused as refused:
        advice = f"; {refused}" if str(refused) else ""
        shown = f"{_show(value, name)} ({type(value).__name__})"
        mistakes.append(f"{label}{name} must be {rule.allowed}; {shown} was given{advice}")


def _check_fields(
    given: Mapping[str, Value], rules: dict[str, Rule], label: str, mistakes: list[str]
) -> dict[str, Value]:
    """The fields of a nested setting, such as those of Checkpointing."""
    checked: dict[str, Value] = {}
    for name, value in given.items():
        if name not in rules:
            nearest = say_nearest(str(name), rules) or f"; there are {', '.join(rules)}"
            mistakes.append(f"{label} has no field {name!r}{nearest}")
        else:
            _check_value(name, value, rules[name], checked, mistakes, f"{label}: ")
    return checked


def _show(value: object, name: str) -> str:
    text = repr(to_plain(value, name)) if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check_strategy(given: dict[str, Value], mistakes: list[str]) -> DDP:
    strategy = given.get("strategy", DDP())
    values = {item.name: getattr(strategy, item.name) for item in fields(DDP)}
    return replace(strategy, **_check_fields(values, DDP_RULES, "strategy", mistakes))


def _check_storage(given: dict[str, Value], mistakes: list[str]) -> str:
    paths = {name: given[name] for name in ("storage_path", "default_root_dir") if name in given}
    if len(set(paths.values())) > 1:
        texts = " and ".join(f"{name}={_show(path, '')}" for name, path in paths.items())
        mistakes.append(f"{texts} both set the storage of the run: pass storage_path alone")
    path = next(iter(paths.values()), Config().storage_path)
    if "storage_filesystem" in given:
        if _URI.match(path):
            mistakes.append(
                f"storage_path={_show(path, '')} is a URI and names its own filesystem: with storage_filesystem pass "
                f"a path inside it"
            )
        return path
    # Absolute, because workers have a working directory of their own.
    return path if _URI.match(path) else os.path.abspath(os.path.expanduser(path))


def _check_checkpoint(given: dict[str, Value], mistakes: list[str]) -> Checkpointing | None:
    """When checkpoints are made: `checkpoint` says so, else each ModelCheckpoint, `enable_checkpointing` if at all."""
    asked: dict[str, Checkpointing] = {}
    for index, callback in enumerate(given.get("callbacks", [])):
        if isinstance(callback, Callback) and hasattr(callback, "checkpointing"):
            label = f"{type(callback).__name__} (callbacks[{index}])"
            asked[label] = check_checkpointing(callback.checkpointing(), label, mistakes)
    found = _merge(list(asked.values()))
    if isinstance(given.get("checkpoint"), (Checkpointing, Mapping)):
        found = check_checkpointing(given["checkpoint"], "checkpoint", mistakes)
        asked["checkpoint"] = found
    off = [name for name in ("checkpoint", "enable_checkpointing") if given.get(name) is False]
    on = [f"{name}=True" for name in ("checkpoint", "enable_checkpointing") if given.get(name) is True] + list(asked)
    if off and on:
        mistakes.append(f"{off[0]}=False and {on[0]} contradict each other: one makes no checkpoints, the other does")
    if off:
        return None
    return found


def _merge(asked: list[Checkpointing]) -> Checkpointing:
    """Checkpoints as often as one of them wants; the first that monitors something says which is the best."""
    if len(asked) < 2:
        return next(iter(asked), Checkpointing())
    judge = next((one for one in asked if one.monitor is not None), asked[0])
    times = [one.every_s for one in asked if isinstance(one.every_s, int | float)]
    return replace(
        judge,
        every_n_steps=min((one.every_n_steps for one in asked if one.every_n_steps), default=None),
        every_n_epochs=min((one.every_n_epochs for one in asked if one.every_n_epochs), default=None),
        every_s=min(times, default=None),
    )


def _fill_lengths(config: Config) -> Config:
    """Fills in `max_epochs` if it was not given: 1000 as in Lightning, or no limit if something else ends the run."""
    if config.max_epochs is not None:
        return config
    is_limited = config.max_steps != -1 or config.max_time_s is not None
    return replace(config, max_epochs=-1 if is_limited else 1000)


def _find_conflicts(given: dict[str, Value], config: Config, scale: Scale) -> list[str]:
    """Arguments that are valid alone and cannot be combined."""
    mistakes = []
    on_cpu = config.use_gpu is False
    for least, most in (("min_epochs", "max_epochs"), ("min_steps", "max_steps")):
        low, high = given.get(least), given.get(most)
        if low is not None and high is not None and -1 < high < low:
            mistakes.append(f"{least}={low} is more than {most}={high}")
    if config.precision == "16-mixed" and on_cpu:
        mistakes.append('precision="16-mixed" needs a GPU, and this run is on CPUs: use precision="bf16-mixed"')
    if "precision" in given and not all(map(is_checkpoint_io, config.plugins)):
        mistakes.append(f"precision={config.precision!r} and the precision among plugins contradict: pass one of them")
    if config.strategy.backend == "nccl" and on_cpu:
        mistakes.append('strategy: backend="nccl" needs GPUs, and this run is on CPUs: use backend="gloo"')
    if config.sync_batchnorm and on_cpu and config.num_workers != 0:
        mistakes.append("sync_batchnorm=True needs GPUs: torch has no synchronised batch norm for CPUs; leave it out")
    if config.global_batch_size is not None and given.get("accumulate_grad_batches", 1) != 1:
        mistakes.append(
            f"global_batch_size={config.global_batch_size} decides how many batches are accumulated: leave out "
            f"accumulate_grad_batches={config.accumulate_grad_batches}"
        )
    most_workers = scale.num_workers[1] if isinstance(scale.num_workers, tuple) else scale.num_workers
    if config.global_batch_size is not None and most_workers != "auto" and config.global_batch_size < int(most_workers):
        mistakes.append(
            f"global_batch_size={config.global_batch_size} leaves some of {most_workers} workers without a sample: "
            f"make it at least {most_workers}"
        )
    return mistakes + _find_validation_conflicts(given, config)


def _find_validation_conflicts(given: dict[str, Value], config: Config) -> list[str]:
    if config.fast_dev_run or not config.limit_val_batches:
        return []
    if config.check_val_every_n_epoch is None and isinstance(config.val_check_interval, float):
        return [
            f"check_val_every_n_epoch=None counts batches over epochs, so val_check_interval must be a number of "
            f"batches; {config.val_check_interval} was given"
        ]
    interval, limit = config.val_check_interval, given.get("limit_train_batches")
    if config.check_val_every_n_epoch and isinstance(interval, int) and isinstance(limit, int) and 0 < limit < interval:
        return [
            f"val_check_interval={interval} is more than limit_train_batches={limit}, so that validation would never "
            f"run; with check_val_every_n_epoch=None batches are counted over epochs"
        ]
    return []


def _limit_batches(config: Config) -> Config:
    """Applies overfit_batches and fast_dev_run to the other arguments, as in Lightning."""
    if config.overfit_batches:
        limit = config.overfit_batches
        config = replace(config, limit_train_batches=limit, limit_val_batches=limit)
    if not config.fast_dev_run:
        return config
    count = config.fast_dev_run
    if not config.overfit_batches:
        config = replace(config, limit_train_batches=count, limit_val_batches=count)
    return replace(
        config, limit_test_batches=count, limit_predict_batches=count, max_steps=count, max_epochs=1, min_epochs=None,
        min_steps=None, num_sanity_val_steps=0, val_check_interval=1.0, check_val_every_n_epoch=1, checkpoint=None,
        logger=False,
    )  # fmt: skip
