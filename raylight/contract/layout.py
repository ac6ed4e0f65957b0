"""The names of files and folders in a version's directory; each is written here once."""

from __future__ import annotations

import re

RUN_FILE = "run.json"
FENCE_FILE = "fence.json"
METRICS_FILE = "metrics.parquet"
CHECKPOINTS = "checkpoints"
MANIFEST_FILE = "manifest.json"
LOGS = "logs"
FAILURES = "failures"
"""Folder of the evidence of failed steps, for `raylight replay`."""
CHECKPOINT_FOLDER = re.compile(r"step-\d{8,}(-batch-\d{8,})?(-attempt-\d+)?")
"""The last part of what `checkpoint_directory` gives."""
LOG_FILE = re.compile(r"rank-(\d+)\.log")
"""The last part of what `log_file` gives."""


def checkpoint_directory(step: int, attempt: int = 0, batch: int | None = None) -> str:
    """`batch`: of a state that no optimizer step has made, the number of batches it has seen. Each attempt has names of
    its own: a worker that was taken for dead cannot write into a checkpoint of its successor."""
    name = f"step-{step:08d}" + ("" if batch is None else f"-batch-{batch:08d}")
    return f"{CHECKPOINTS}/{name}" + (f"-attempt-{attempt}" if attempt else "")


def log_file(rank: int) -> str:
    return f"{LOGS}/rank-{rank}.log"
