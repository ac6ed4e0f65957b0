"""Every argument of the trainer, as frozen dataclasses, and every rule on them."""

from __future__ import annotations

import math
import os
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import timedelta
from enum import Enum
from itertools import pairwise
from typing import Any, TypeAlias, TypeGuard

from raylight.contract.kinds import Value
from raylight.contract.plain_text import has_control

FilePath = str | os.PathLike[str]
Filesystem: TypeAlias = Any
"""A pyarrow.fs.FileSystem, or None for the one that a path or URI names."""


@dataclass(frozen=True, slots=True)
class Checkpointing:
    """When checkpoints are made and which are kept.

    With nothing set, one is made at the end of each epoch (after its validation). Best and last are always kept.
    """

    every_n_steps: int | None = None
    """Optimizer steps between checkpoints."""
    every_n_epochs: int | None = None
    """Epochs between checkpoints; 1 if no other interval is set."""
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
    """torch's DistributedDataParallel."""

    find_unused_parameters: bool = False
    """Look in each step for parameters that the loss does not depend on; needed if there are any."""
    static_graph: bool = False
    """The same parameters are used in every step, which lets DDP plan ahead."""
    gradient_as_bucket_view: bool = True
    """Gradients are views into DDP's buckets, which saves their memory once."""
    bucket_cap_mb: float | None = None
    """Megabytes of gradients that are reduced in one collective; None: torch's 25."""
    broadcast_buffers: bool = True
    """Before each forward all ranks take rank 0's buffers, such as running statistics."""
    placement: str = "PACK"
    """Ray's placement group strategy: "PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"."""
    backend: str | None = None
    """"gloo" or "nccl"; None: NCCL on GPUs, gloo on CPUs."""
    timeout_s: float = 1800.0
    """Seconds after which a collective fails."""


@dataclass(frozen=True, slots=True)
class Config:
    """The resolved trainer arguments: Lightning's spellings are already translated, defaults filled in.

    The docstring below a field is the documentation of the trainer's argument of that name; help(raylight.Trainer)
    shows it.
    """

    # scale
    num_workers: int | tuple[int, int] | str = "auto"
    """0: train in this process, without Ray. N: on N Ray workers. (min, max): on as many of these as there is room for,
    with new ones taken on later. "auto": a worker for each GPU of the Ray cluster that is connected or named by
    RAY_ADDRESS, else for each GPU of this machine; with one GPU or none, in this process."""
    use_gpu: bool | None = None
    """Whether each worker has a GPU. None: if there are any."""
    resources_per_worker: dict[str, float] = field(default_factory=dict)
    """Resources of each worker in Ray, such as {"CPU": 4}; by default one CPU, and one GPU with `use_gpu`."""
    strategy: DDP = field(default_factory=DDP)
    """How gradients are combined: "auto" or "ddp", "ddp_find_unused_parameters_true", or a raylight.DDP(...)."""
    # length
    max_epochs: int | None = None
    """Epochs after which training ends; -1: no limit. None: 1000, or no limit if `max_steps` or `max_time` ends it."""
    min_epochs: int | None = None
    """Epochs to train before `max_time` or a callback may end it."""
    max_steps: int = -1
    """Optimizer steps after which training ends; -1: no limit."""
    min_steps: int | None = None
    """Optimizer steps to make before `max_time` or a callback may end training."""
    max_time_s: float | None = None
    """Seconds after which training ends: `max_time`."""
    limit_train_batches: int | float = 1.0
    """Batches of a training epoch: an int is a number, a float a share of them."""
    limit_val_batches: int | float = 1.0
    """Batches of each validation, as for `limit_train_batches`; 0 turns validation off."""
    limit_test_batches: int | float = 1.0
    """Batches of each test loader, as for `limit_train_batches`."""
    limit_predict_batches: int | float = 1.0
    """Batches of each prediction loader, as for `limit_train_batches`."""
    overfit_batches: int | float = 0.0
    """Train and validate on the same few batches, as for `limit_train_batches`; 0 is off."""
    fast_dev_run: int = 0
    """See whether the code runs: this many batches of each loop, with neither logger nor checkpoints. True is 1."""
    val_check_interval: int | float | timedelta = 1.0
    """From one validation to the next: a share of the epoch (float), a number of training batches (int), or a time (a
    timedelta, "DD:HH:MM:SS", or a dict such as {"hours": 2}), which begins with the end of the validation before."""
    check_val_every_n_epoch: int | None = 1
    """Validate in every n-th epoch alone. None: batches are counted over epochs, for `val_check_interval` as an int."""
    num_sanity_val_steps: int = 2
    """Validation batches to try before training; -1: all, 0: none."""
    reload_dataloaders_every_n_epochs: int = 0
    """Ask for the loaders again every n epochs; 0: never."""
    # numerics
    precision: str = "32-true"
    """"32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true"; 16, 32, 64 and "bf16" as Lightning reads
    them."""
    accumulate_grad_batches: int = 1
    """Batches whose gradients make one optimizer step."""
    global_batch_size: int | None = None
    """Samples of one optimizer step over all workers, whatever their number. None: the loader's batch size for each."""
    gradient_clip_val: float | None = None
    """Bound that gradients are clipped to before each step; None or 0: no clipping."""
    gradient_clip_algorithm: str = "norm"
    """Quantity that is bounded: the "norm" of all gradients together, or the "value" of each."""
    deterministic: bool | str = False
    """Let torch use deterministic algorithms alone; "warn" only warns if there is none."""
    benchmark: bool | None = None
    """Let cuDNN try its algorithms and keep the fastest. None: as torch is set."""
    sync_batchnorm: bool = False
    """Compute the statistics of batch norm over all workers; on GPUs."""
    detect_anomaly: bool = False
    """Stop at the first loss that is not finite, and name the operation that a NaN in a gradient came from. Slow."""
    inference_mode: bool = True
    """Evaluate under torch.inference_mode(); False: under torch.no_grad()."""
    seed: int | None = None
    """Seed of all random numbers of the run. None: that of the last seed_everything, else a random one."""
    use_distributed_sampler: bool = True
    """Divide the samples over the workers. False: the loader gives each worker its own."""
    # storage
    storage_path: str = "runs"
    """Where runs are stored: a path, or a URI that pyarrow.fs reads (s3://, gs://, hdfs://)."""
    storage_filesystem: Filesystem = None
    """A pyarrow.fs.FileSystem that `storage_path` lies on."""
    name: str = "default"
    """The run: everything lies under <storage_path>/<name>/version_N/."""
    checkpoint: Checkpointing | None = field(default_factory=Checkpointing)
    """When checkpoints are made and which are kept: a raylight.Checkpointing(...) or a dict of its fields. True: one
    after each epoch; False: none."""
    # report
    logger: Value = True
    """True: TensorBoard; False: none; or one or several of raylight.loggers, Lightning's or your own."""
    log_every_n_steps: int = 50
    """Optimizer steps between rows of step values; 0: no step values are logged, epoch values still are."""
    enable_progress_bar: bool = True
    """Show how far the run is."""
    enable_model_summary: bool = True
    """Show the module's layers and their sizes before training."""
    barebones: bool = False
    """Measure the bare loop: no checkpoints, loggers, progress bar, summary or sanity check; `log` does nothing."""
    profiler: Value = None
    """"simple": seconds by what they went to; "advanced": by function; "pytorch": by operator, with a trace beside the
    logs; or an object of raylight.profilers."""
    # failure
    max_restarts: int = 3
    """Failures from which a run goes on; a lost node does not count."""
    hang_timeout_s: float | None = None
    """Seconds without a sign of life after which the workers count as hung; inf: never. None: from the run's own
    silences."""
    replacement_timeout_s: float = 60.0
    """Seconds to wait for room for the replacement of a lost worker."""
    num_standby: int | None = None
    """Workers on each node that wait, with torch imported, to replace one that is lost; 0: none. None: one a node."""
    # extension
    plugins: tuple[Value, ...] = ()
    """A precision of your own, and a CheckpointIO, through which all single checkpoint files go."""
    # no argument
    gpu_indices: tuple[int, ...] = ()
    """The GPUs of this machine that `devices` names; empty: any."""
    given: dict[str, Value] = field(default_factory=dict)
    """The arguments as the user wrote them, as plain values without secrets, for run.json."""


RUN_NAMES = (
    'at least one character, none of / \\ : * ? " < > |, none that controls a terminal or is no Unicode, no space at '
    "its ends, no dot at its start, and not version_N, as the folders in it are called"
)


def is_run_name(name: str) -> bool:
    """Whether a run may be called so: it becomes one folder on any kind of storage, beside those of other runs."""
    fits = re.fullmatch(r"[^/\\:*?\"<>|]+", name) and not has_control(name)
    fits = fits and not name.startswith(".") and name == name.strip()
    return bool(fits) and not re.fullmatch(r"version_\d+", name)


def describe(config: Config) -> dict[str, Value]:
    """Every argument as resolved, and under "given" as the user wrote it: JSON values only, secrets masked."""
    return {item.name: to_plain(getattr(config, item.name), item.name) for item in fields(config)}


MASK = "***"
_SECRET_WORDS = {"password", "passwd", "passphrase", "secret", "token", "credential", "credentials", "apikey"}
_SECRET_PAIRS = {("api", "key"), ("access", "key"), ("account", "key"), ("private", "key"), ("auth", "key")}
_URI_USER = re.compile(r"(?<=://)[^/@\s]+@")
_URI_OPTION = re.compile(r"([?&])([^=&\s]+)=([^&\s]*)")


def to_plain(value: object, name: str = "") -> Value:
    """`value` as JSON values, for a person to read: objects become the name of their class. Strings under a name that
    looks like a secret's, and the secrets in URIs, become "***"."""
    if isinstance(value, str) and not isinstance(value, Enum):
        return MASK if value and is_secret(name) else mask_uri(value)
    if value is None or (isinstance(value, (bool, int)) and not isinstance(value, Enum)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): to_plain(_item(value, key), str(key)) for key in value}
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, Namespace):
        return to_plain(vars(value))
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview)):
        return [to_plain(_item(value, index), name) for index in range(len(value))]
    if is_collection(value):
        return [to_plain(item, name) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_plain(getattr(value, item.name), item.name) for item in fields(value)}
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a number of numpy or torch
        return to_plain(value.item(), name)
    if isinstance(value, timedelta) or hasattr(value, "__fspath__"):
        return to_plain(str(value), name)
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def is_collection(value: object) -> TypeGuard[Sequence[Value] | Set[Value]]:
    """Whether `value` is several things, as a list is, that can be gone through more than once: no text and no bytes,
    nor a tensor or an array."""
    return isinstance(value, (Sequence, Set)) and not isinstance(value, (str, bytes, bytearray, memoryview, range))


def _item(container: Mapping[Value, Value] | Sequence[Value], key: Value) -> Value:
    """A container may compute what it holds: a configuration has values that are yet to be given."""
    try:
        return container[key]
    except Exception as error:
        return f"({type(error).__name__})"


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
