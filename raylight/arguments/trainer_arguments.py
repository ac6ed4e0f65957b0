"""The trainer's arguments and their types, for fit, validate, test, predict and sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from raylight.contract.config import DDP, Checkpointing, FilePath, Filesystem
from raylight.contract.durations import Duration
from raylight.contract.kinds import Value
from raylight.user.callback import Callback
from raylight.user.logger import TakesMetrics
from raylight.user.profilers import Profiler

NumWorkers = int | tuple[int, int] | Literal["auto"]
Precision = Literal[
    64, 32, 16, "64", "32", "16", "bf16", "32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true"
]


class EvaluationArguments(TypedDict, total=False):
    """As in `Trainer.__init__`, for functions that pass them on. The documentation of most is below the field of that
    name in raylight.contract.config.Config; here is that of the others, which are spellings of Lightning's."""

    # scale
    num_workers: NumWorkers | None
    use_gpu: bool | None
    resources_per_worker: Mapping[str, float] | None
    strategy: str | DDP
    devices: int | str | Sequence[int]
    """Lightning's `num_workers`: workers of each node, -1 or "auto" for all GPUs; 1 is this process. Indices, as in
    [0, 2] or "2,", choose GPUs of this machine."""
    gpus: int | str | Sequence[int] | None
    """As `devices`, of workers that have a GPU each; 0: none has one."""
    num_nodes: int
    """Nodes of the Ray cluster that have `devices` workers each."""
    accelerator: str
    """"gpu" (or "cuda") is use_gpu=True, "cpu" is use_gpu=False, "auto" neither."""
    # length
    max_epochs: int | None
    min_epochs: int | None
    max_steps: int
    min_steps: int | None
    max_time: Duration | None
    """Time after which training ends: a timedelta, "DD:HH:MM:SS", or a dict such as {"hours": 2}."""
    limit_train_batches: int | float | None
    limit_val_batches: int | float | None
    limit_test_batches: int | float | None
    limit_predict_batches: int | float | None
    overfit_batches: int | float
    fast_dev_run: int | bool
    val_check_interval: int | float | Duration | None
    check_val_every_n_epoch: int | None
    num_sanity_val_steps: int | None
    reload_dataloaders_every_n_epochs: int
    # numerics
    precision: Precision | None
    accumulate_grad_batches: int
    global_batch_size: int | None
    gradient_clip_val: int | float | None
    gradient_clip_algorithm: Literal["norm", "value"] | None
    deterministic: bool | Literal["warn"] | None
    benchmark: bool | None
    sync_batchnorm: bool
    detect_anomaly: bool
    inference_mode: bool
    seed: int | None
    use_distributed_sampler: bool
    # storage
    storage_path: FilePath | None
    default_root_dir: FilePath | None
    """Lightning's name for `storage_path`."""
    storage_filesystem: Filesystem
    name: str
    enable_checkpointing: bool | None
    """False: no checkpoints are made, as with checkpoint=False."""
    # report
    logger: bool | TakesMetrics | Sequence[TakesMetrics] | None
    log_every_n_steps: int | None
    enable_progress_bar: bool | None
    enable_model_summary: bool | None
    barebones: bool
    profiler: str | Profiler | None
    # failure
    max_restarts: int
    hang_timeout_s: float | None
    replacement_timeout_s: float
    num_standby: int | None
    # extension
    callbacks: Callback | Sequence[Callback] | None
    """A raylight.Callback or several, called in this order."""
    plugins: Value


class TrainerArguments(EvaluationArguments, total=False):
    """All of them. Functions that only evaluate have a `checkpoint` of their own, the one that is evaluated."""

    checkpoint: bool | Checkpointing | Mapping[str, Value] | None
