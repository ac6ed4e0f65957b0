"""Summaries: one version in a line of a list."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

from raylight.contract.errors import StorageError
from raylight.contract.layout import CHECKPOINTS
from raylight.storage.checkpoints import Checkpoint, list_checkpoints
from raylight.storage.retention import DEFAULT_MONITOR, best
from raylight.storage.versions import Version

logger = logging.getLogger("raylight.storage")


@dataclass(frozen=True, slots=True)
class Summary:
    """One version in a line. Times are in seconds, sizes in bytes; an unknown one is None."""

    name: str
    number: int
    path: str
    status: str
    started_at: float | None
    duration_s: float | None
    silent_s: float | None
    """Seconds since anything was last written, for a version that is recorded as running."""
    metric: str | None
    value: float | None
    """The value of `metric` in the best checkpoint, or the final one if no checkpoint has it."""
    step: int | None
    num_checkpoints: int
    num_attempts: int
    size: int
    hyperparameters: dict[str, Any]
    trial: str | None = None
    """The trial of a sweep that this version is."""


def summarize(version: Version, metric: str | None = None, mode: str | None = None) -> Summary:
    """Reads `run.json`, the manifests and the list of files. `metric` and `mode` default to the run's own."""
    run = read_run_or_status(version)
    checkpoints = list_checkpoints(version.storage)
    files = version.storage.walk()
    own_metric, own_mode = monitor_of(run)
    metric, mode = metric or own_metric, mode or (own_mode if metric in (None, own_metric) else "min")
    metric = metric or default_metric(run, checkpoints)
    finals = {name: float(value) for name, value in (run.get("metrics") or {}).items() if is_number(value)}
    chosen = best(checkpoints, metric, mode)
    value = chosen.metrics.get(metric) if chosen is not None and metric is not None else None
    modified_at = max((entry.modified_at for entry in files), default=0.0)
    status = str(run.get("status", "claimed"))
    started_at = run.get("started_at")
    duration_s = run.get("duration_s")
    if duration_s is None and started_at is not None and modified_at:
        duration_s = max(0.0, modified_at - float(started_at))
    return Summary(
        name=version.name,
        number=version.number,
        path=version.path,
        status=status,
        started_at=started_at,
        duration_s=duration_s,
        silent_s=time.time() - modified_at if status == "running" and modified_at else None,
        metric=metric,
        value=value if value is not None else finals.get(metric or ""),
        step=checkpoints[-1].step if checkpoints else None,
        num_checkpoints=len(checkpoints),
        num_attempts=len(run.get("attempts") or []),
        size=sum(entry.size for entry in files),
        hyperparameters=run.get("hyperparameters") or {},
        trial=(run.get("trial") or {}).get("name"),
    )


def read_run_or_status(version: Version) -> dict[str, Any]:
    """`run.json`, or a status with the reason it cannot be read: one bad version must not hide others."""
    try:
        return version.read_run()
    except StorageError as error:
        logger.warning("%s", error)
        return {"status": "unreadable"}


def monitor_of(run: dict[str, Any]) -> tuple[str | None, str]:
    """The metric by which the run chose its best checkpoint, and its mode."""
    options = (run.get("arguments") or {}).get("checkpoint")
    options = options if isinstance(options, dict) else {}
    monitor = options.get("monitor")
    return monitor if isinstance(monitor, str) else None, "max" if options.get("mode") == "max" else "min"


def default_metric(run: dict[str, Any], checkpoints: list[Checkpoint]) -> str | None:
    """The metric to show by default: the validation loss, else any loss, else the first that was logged."""
    names = list(checkpoints[-1].metrics) if checkpoints else []
    names += [name for name in run.get("metrics") or {} if name not in names]
    candidates = [DEFAULT_MONITOR, *(name for name in names if "loss" in name), *names]
    return next((name for name in candidates if name in names), None)


def is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return not isinstance(value, bool)


def leftover_folders(version: Version, checkpoints: list[Checkpoint]) -> list[str]:
    """Folders under `checkpoints/` that hold no committed checkpoint."""
    committed = {checkpoint.name for checkpoint in checkpoints}
    folders = [entry.name for entry in version.storage.list(CHECKPOINTS) if entry.is_directory]
    return [name for name in folders if name not in committed]
