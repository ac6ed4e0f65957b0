"""The rule of each argument of the trainer: how to parse it, and a description of the allowed values."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping, ValuesView
from dataclasses import replace
from datetime import timedelta
from numbers import Integral, Real

from raylight.arguments.value_kinds import (
    FLAG,
    TEXT,
    Refused,
    Rule,
    choice,
    either,
    number,
    optional,
    read_text,
    to_float,
    whole,
)
from raylight.contract.config import DDP, RUN_NAMES, Checkpointing, is_collection, is_run_name
from raylight.contract.durations import FORMS, read_duration
from raylight.contract.kinds import Value
from raylight.contract.seeding import MAX_SEED
from raylight.lightning.refused import say_why_not
from raylight.user.checkpoint_io import is_checkpoint_io
from raylight.user.profilers import KINDS, is_profiler


def as_list(value: object) -> list[Value]:
    """`callbacks`, `logger` or `plugins` as a list: of nothing (None), of one, or of several."""
    if value is None:
        return []
    return list(value) if is_collection(value) and not hasattr(value, "log_metrics") else [value]


def say_nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""


# ---- values of single arguments


def _limit(value: object) -> int | float:
    if isinstance(value, Integral):
        return whole(0).parse(value)
    parsed = to_float(value)
    if 0 <= parsed <= 1:
        return parsed
    if parsed > 1 and parsed.is_integer():
        return int(parsed)
    raise Refused


def _profiler(value: object) -> Value:
    if isinstance(value, str) and value in KINDS:
        return KINDS[value]()
    if isinstance(value, str):
        near = difflib.get_close_matches(value, list(KINDS), n=1)
        raise Refused(f"did you mean {near[0]!r}?" if near else "")
    if isinstance(value, type) or not is_profiler(value):
        raise Refused
    return value


def _validation_interval(value: object) -> int | float | timedelta:
    if not isinstance(value, Real):
        return _duration(value)
    parsed = _limit(value)
    if parsed == 0:
        raise Refused("to run no validation: limit_val_batches=0")
    return parsed


def _num_workers(value: object) -> int | tuple[int, int] | str:
    if value == "auto":
        return "auto"
    if is_collection(value):
        if len(value) != 2:
            raise Refused
        low, high = (whole(1).parse(item) for item in value)
        if low > high:
            raise Refused(f"write ({high}, {low})")
        return low, high
    return whole(0).parse(value)


def _devices(value: object, least: int) -> int | str | tuple[int, ...]:
    """Lightning's ways to say how many: a number, all of them, or single GPUs by index."""
    if isinstance(value, str) and "," in value:
        parts = [part.strip() for part in value.split(",") if part.strip()]
        value = [int(part) if part.isdigit() else part for part in parts]
    if is_collection(value):
        indices = tuple(whole(0).parse(item) for item in value)
        if not indices or len(set(indices)) < len(indices):
            raise Refused("each GPU once, at least one" if indices else "")
        return indices
    if isinstance(value, str) and value.lstrip("-").isdigit():
        value = int(value)
    if value in ("auto", -1):
        return "auto"
    return whole(least).parse(value)


def _accelerator(value: object) -> Value:
    if isinstance(value, str) and value.lower() == "mps":
        raise Refused('GPUs are those that CUDA or ROCm reach; on a Mac accelerator="cpu"')
    return _ACCELERATORS.parse(value)


def _resources(value: object) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise Refused
    parsed = {}
    for name, amount in value.items():
        if not isinstance(name, str) or (name not in ("CPU", "GPU") and name.upper() in ("CPU", "GPU")):
            raise Refused(f"Ray writes {str(name).upper()!r}")
        parsed[name] = to_float(amount)
        if parsed[name] < 0:
            raise Refused(f"{name} is negative")
    return parsed


def _strategy(value: object) -> DDP:
    if isinstance(value, DDP):
        return value
    if not isinstance(value, str):
        is_lightning = type(value).__module__.startswith(("pytorch_lightning.", "lightning."))
        raise Refused("pass raylight.DDP(...) in place of Lightning's object" if is_lightning else "")
    name = value.lower()
    unused = name.endswith("_find_unused_parameters_true")
    name = name.removesuffix("_find_unused_parameters_true").removesuffix("_find_unused_parameters_false")
    if (why := say_why_not(name)) is not None:
        raise Refused(why)
    if name not in ("auto", "ddp", "ddp_spawn", "ddp_fork", "ddp_notebook"):  # here workers start in one way
        raise Refused
    return replace(DDP(), find_unused_parameters=unused)


def _duration(value: object) -> timedelta:
    try:
        duration = read_duration(value)
    except ValueError as error:
        raise Refused(f"it {error}") from None
    if duration <= timedelta(0):
        raise Refused
    return duration


def _fast_dev_run(value: object) -> int:
    return int(value) if isinstance(value, bool) else whole(0).parse(value)


def _path(value: object) -> str:
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value) or isinstance(os.fspath(value), bytes):
        raise Refused
    return str(os.fspath(value))


def _run_name(value: object) -> str:
    name = read_text(value)
    if not is_run_name(name):
        raise Refused
    return name


def _filesystem(value: object) -> Value:
    if not hasattr(value, "open_output_stream"):
        wrap = "wrap it: pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem))"
        raise Refused(wrap if hasattr(value, "protocol") else "")
    return value


def _checkpoint(value: object) -> Value:
    if not isinstance(value, (bool, Checkpointing, Mapping)):
        raise Refused
    return value


def _logger(value: object) -> bool | list[Value]:
    if isinstance(value, bool):
        return value
    loggers = as_list(value)
    if any(not hasattr(logger, "log_metrics") for logger in loggers):
        raise Refused(_MAKE_LIST if _is_read_once(value) else "")
    return loggers or False


def _gradient_clip_val(value: object) -> float | None:
    parsed = to_float(value)
    if parsed < 0:
        raise Refused
    return parsed or None


def _accumulate_grad_batches(value: object) -> int:
    if isinstance(value, Mapping):
        raise Refused("to change it while training: callbacks=[GradientAccumulationScheduler(scheduling={...})]")
    return whole(1).parse(value)


def _plugins(value: object) -> tuple[Value, ...]:
    plugins = tuple(as_list(value))
    num_files = 0
    for plugin in plugins:
        if hasattr(plugin, "unscale") and hasattr(plugin, "forward_context"):
            continue
        kinds = {kind.__name__ for kind in type(plugin).__mro__}
        if "Precision" in kinds:
            raise Refused("set Lightning's precision by precision=...")
        if "ClusterEnvironment" in kinds:
            raise Refused("Ray knows the nodes: leave it out")
        if "CheckpointIO" in kinds or is_checkpoint_io(plugin):
            if not is_checkpoint_io(plugin):
                raise Refused("a CheckpointIO has save_checkpoint, load_checkpoint and remove_checkpoint")
            num_files += 1
            continue
        raise Refused
    if len(plugins) - num_files > 1:
        raise Refused("one precision is enough")
    if num_files > 1:
        raise Refused("one CheckpointIO is enough")
    return plugins


def _callbacks(value: object) -> list[Value]:
    if _is_read_once(value):
        raise Refused(_MAKE_LIST)
    return as_list(value)


def _is_read_once(value: object) -> bool:
    return isinstance(value, (Iterator, ValuesView))


_ACCELERATORS = choice({"auto": "auto", "cpu": "cpu", "gpu": "gpu", "cuda": "gpu"})
_DEVICES = 'a whole number of at least {least}, -1 or "auto" for all there are, or indices of GPUs such as [0, 2]'
_LIMIT = Rule("a whole number of batches of at least 0, or a share from 0.0 to 1.0", _limit)
_PRECISIONS: dict[str | int, str] = {
    "32-true": "32-true", "16-mixed": "16-mixed", "bf16-mixed": "bf16-mixed", "16-true": "16-true",
    "bf16-true": "bf16-true", "64-true": "64-true", 16: "16-mixed", 32: "32-true", 64: "64-true", "bf16": "bf16-mixed",
    "16": "16-mixed", "32": "32-true", "64": "64-true",
}  # fmt: skip
_MAKE_LIST = "make it a list: list(...)"
_SECONDS = "a number of seconds above 0"


def _is_positive(value: float) -> bool:
    return value > 0


RULES: dict[str, Rule] = {
    # scale
    "num_workers": Rule(
        '"auto", 0 (in this process), a number of Ray workers, or (min, max) of at least 1 each', _num_workers
    ),
    "use_gpu": FLAG,
    "resources_per_worker": Rule('a dict such as {"CPU": 2, "GPU": 1} with numbers of at least 0', _resources),
    "strategy": Rule('"auto", "ddp", "ddp_find_unused_parameters_true", or a raylight.DDP(...)', _strategy),
    "devices": Rule(_DEVICES.format(least=1), lambda value: _devices(value, 1)),
    "gpus": Rule(_DEVICES.format(least=0), lambda value: _devices(value, 0)),
    "num_nodes": whole(1),
    "accelerator": Rule(_ACCELERATORS.allowed, _accelerator),
    # length
    "max_epochs": whole(-1, " (-1: no limit)"),
    "min_epochs": whole(0),
    "max_steps": whole(-1, " (-1: no limit)"),
    "min_steps": whole(0),
    "max_time": Rule(f"{FORMS}, above zero", lambda value: _duration(value).total_seconds()),
    "limit_train_batches": _LIMIT,
    "limit_val_batches": _LIMIT,
    "limit_test_batches": _LIMIT,
    "limit_predict_batches": _LIMIT,
    "overfit_batches": _LIMIT,
    "fast_dev_run": Rule("True, False, or a number of batches of at least 0", _fast_dev_run),
    "val_check_interval": Rule(
        f"a whole number of batches of at least 1, a share of the epoch above 0.0, at most 1.0, or a time: {FORMS}",
        _validation_interval,
    ),
    "check_val_every_n_epoch": optional(whole(1)),
    "num_sanity_val_steps": whole(-1, " (-1: all)"),
    "reload_dataloaders_every_n_epochs": whole(0),
    # numerics
    "precision": choice(_PRECISIONS),
    "accumulate_grad_batches": Rule(whole(1).allowed, _accumulate_grad_batches),
    "global_batch_size": whole(1),
    "gradient_clip_val": Rule("a number of at least 0", _gradient_clip_val),
    "gradient_clip_algorithm": choice(("norm", "value")),
    "deterministic": either(FLAG, choice(("warn",))),
    "benchmark": FLAG,
    "sync_batchnorm": FLAG,
    "detect_anomaly": FLAG,
    "inference_mode": FLAG,
    "seed": whole(0, most=MAX_SEED),
    "use_distributed_sampler": FLAG,
    # storage
    "storage_path": Rule("a path or a URI that pyarrow.fs reads", _path),
    "default_root_dir": Rule("a path or a URI that pyarrow.fs reads", _path),
    "storage_filesystem": Rule("a pyarrow.fs.FileSystem", _filesystem),
    "name": Rule(f"a string that can be a folder: {RUN_NAMES}", _run_name),
    "checkpoint": Rule("True, False, a raylight.Checkpointing(...), or a dict of its fields", _checkpoint),
    "enable_checkpointing": FLAG,
    # report
    "logger": Rule("True, False, an object with log_metrics(metrics, step), or a sequence of them", _logger),
    "log_every_n_steps": whole(0, " (0: no step values)"),
    "enable_progress_bar": FLAG,
    "enable_model_summary": FLAG,
    "barebones": FLAG,
    "profiler": Rule(f"{', '.join(map(repr, KINDS))}, or an object of raylight.profilers", _profiler),
    # failure
    "max_restarts": whole(0),
    "hang_timeout_s": number(f"{_SECONDS} (inf: never)", _is_positive),
    "replacement_timeout_s": number("a number of seconds of at least 0", lambda value: value >= 0),
    "num_standby": whole(0),
    # extension
    "callbacks": Rule("a raylight.Callback or a sequence of them", _callbacks),
    "plugins": Rule("a list with a raylight Precision, a CheckpointIO or both", _plugins),
}

CHECKPOINTING_RULES: dict[str, Rule] = {
    "every_n_steps": optional(whole(1)),
    "every_n_epochs": optional(whole(1)),
    "every_s": optional(either(number(_SECONDS, _is_positive), choice(("auto",)))),
    "monitor": optional(TEXT),
    "mode": choice(("min", "max")),
    "keep_best": whole(-1, " (-1: all)"),
    "keep_last": whole(-1, " (-1: all)"),
    "save_weights_only": FLAG,
    "on_exception": FLAG,
}

DDP_RULES: dict[str, Rule] = {
    "find_unused_parameters": FLAG,
    "static_graph": FLAG,
    "gradient_as_bucket_view": FLAG,
    "bucket_cap_mb": optional(number("a number above 0", _is_positive)),
    "broadcast_buffers": FLAG,
    "placement": choice(("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")),
    "backend": optional(choice(("gloo", "nccl"))),
    "timeout_s": number(_SECONDS, _is_positive),
}
