"""Every argument of the trainer, as frozen dataclasses, and every rule on them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True, slots=True)
class Checkpointing:
    """When checkpoints are made and which are kept.

    With nothing set, one is made at the end of each epoch (after its validation). Best and last are always kept.
    """

    every_n_steps: int | None = None
    """Optimizer steps between checkpoints."""
    every_n_epochs: int | None = None
    """Epochs between checkpoints; 1 where no other interval is set."""
    every_s: float | str | None = None
    """Seconds between checkpoints, or "auto": as often as costs under 1 % of the wall time."""
    monitor: str | None = None
    """The metric that decides which is best. None: "val_loss" if it is logged, else the newest is the best."""
    mode: str = "min"
    """"min" or "max"."""
    keep_best: int = 1
    """How many of the best to keep; -1 keeps all."""
    keep_last: int = 1
    """How many of the newest to keep; -1 keeps all."""
    save_weights_only: bool = False
    """Leave out optimizer, loop and RNG; such a checkpoint cannot be resumed from."""
    on_exception: bool = True
    """Save what there is when user code raises."""


@dataclass(frozen=True, slots=True)
class DDP:
    """torch's DistributedDataParallel; each field is its argument of that name."""

    find_unused_parameters: bool = False
    static_graph: bool = False
    gradient_as_bucket_view: bool = True
    bucket_cap_mb: float | None = None
    broadcast_buffers: bool = True
    placement: str = "PACK"
    """Ray's placement group strategy: "PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"."""
    backend: str | None = None
    """"gloo" or "nccl"; None: NCCL on GPUs, gloo on CPUs."""
    timeout_s: float = 1800.0
    """Seconds after which a collective fails."""


@dataclass(frozen=True, slots=True)
class Config:
    """The resolved trainer arguments: Lightning's spellings are already translated, defaults filled in."""

    # scale
    num_workers: int | tuple[int, int] | str = "auto"
    use_gpu: bool | None = None
    resources_per_worker: dict[str, float] = field(default_factory=dict)
    strategy: DDP = field(default_factory=DDP)
    # length
    max_epochs: int | None = None  # None with no other limit: 1000, as Lightning; -1: no limit
    min_epochs: int | None = None
    max_steps: int = -1
    min_steps: int | None = None
    max_time_s: float | None = None
    limit_train_batches: int | float = 1.0
    limit_val_batches: int | float = 1.0
    limit_test_batches: int | float = 1.0
    limit_predict_batches: int | float = 1.0
    overfit_batches: int | float = 0.0
    fast_dev_run: int = 0  # number of batches; 0 is off
    val_check_interval: int | float = 1.0
    check_val_every_n_epoch: int | None = 1
    num_sanity_val_steps: int = 2
    reload_dataloaders_every_n_epochs: int = 0
    # numerics
    precision: str = "32-true"
    accumulate_grad_batches: int = 1
    global_batch_size: int | None = None
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str = "norm"
    deterministic: bool | str = False
    benchmark: bool | None = None
    sync_batchnorm: bool = False
    detect_anomaly: bool = False
    inference_mode: bool = True
    seed: int | None = None
    use_distributed_sampler: bool = True
    # storage
    storage_path: str = "runs"
    storage_filesystem: Any = None
    name: str = "default"
    checkpoint: Checkpointing | None = field(default_factory=Checkpointing)  # None: none are made
    # report
    logger: Any = True
    log_every_n_steps: int = 50
    enable_progress_bar: bool = True
    enable_model_summary: bool = True
    profiler: str | None = None
    # failure
    max_restarts: int = 3
    hang_timeout_s: float | None = None  # None: adapted to the run's own step times
    replacement_timeout_s: float = 60.0
    num_standby: int | None = None  # None: one on each node that holds workers
    # extension
    plugins: tuple[Any, ...] = ()
    # what the user wrote, as plain values without secrets, for run.json
    given: dict[str, Any] = field(default_factory=dict)


RUN_NAMES = (
    'at least one character, none of / \\ : * ? " < > |, no space at its ends, no dot at its start, and not version_N, '
    "as the folders in it are called"
)


def is_run_name(name: str) -> bool:
    """Whether a run may be called so: it becomes one folder on any kind of storage, beside those of other runs."""
    fits = re.fullmatch(r"[^/\\\0\n:*?\"<>|]+", name) and not name.startswith(".") and name == name.strip()
    return bool(fits) and not re.fullmatch(r"version_\d+", name)


def describe(config: Config) -> dict[str, Any]:
    """Every argument as resolved, and under "given" as the user wrote it: JSON values only, secrets masked."""
    return {item.name: to_plain(getattr(config, item.name), item.name) for item in fields(config)}


MASK = "***"
_SECRET_WORDS = {"password", "passwd", "passphrase", "secret", "token", "credential", "credentials", "apikey"}
_SECRET_PAIRS = {("api", "key"), ("access", "key"), ("account", "key"), ("private", "key"), ("auth", "key")}
_URI_USER = re.compile(r"(?<=://)[^/@\s]+@")
_URI_OPTION = re.compile(r"([?&])([^=&\s]+)=([^&\s]*)")


def to_plain(value: Any, name: str = "") -> Any:
    """`value` as JSON values, for a person to read: objects become the name of their class. Strings under a name that
    looks like a secret's, and the secrets in URIs, become "***"."""
    if isinstance(value, str):
        return MASK if value and is_secret(name) else mask_uri(value)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): to_plain(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_plain(item, name) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_plain(getattr(value, item.name), item.name) for item in fields(value)}
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a number of numpy or torch
        return to_plain(value.item(), name)
    if hasattr(value, "__fspath__"):
        return to_plain(str(value), name)
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def mask_command(words: list[str]) -> list[str]:
    """A command line without the values of options whose name looks like a secret's: `--api-key X`, `--api-key=X`."""
    masked = []
    for before, word in zip(["", *words], words, strict=False):
        name, equals, value = word.partition("=")
        if equals and is_secret(name):
            masked.append(f"{name}={MASK}" if value else word)
        elif before.startswith("-") and "=" not in before and not word.startswith("-") and is_secret(before):
            masked.append(MASK)
        else:
            masked.append(mask_uri(word))
    return masked


def is_secret(name: str) -> bool:
    """Whether a value of that name is likely to be a password, key or token."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]
    return not _SECRET_WORDS.isdisjoint(words) or not _SECRET_PAIRS.isdisjoint(pairwise(words))


def mask_uri(text: str) -> str:
    """`text` without the passwords and keys of the URIs in it."""
    if "://" not in text:
        return text
    text = _URI_USER.sub(f"{MASK}@", text)
    return _URI_OPTION.sub(lambda m: f"{m[1]}{m[2]}={MASK if is_secret(m[2]) else m[3]}", text)
