"""`raylight doctor`: whether training will work on this machine, and what to do if it will not."""

from __future__ import annotations

import os
import platform
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from importlib import metadata
from typing import Any

from raylight.contract.errors import RaylightError

Check = tuple[str, str, str]
"""State ("ok", "note" or "bad"), subject, finding."""

REQUIRED = ("torch", "ray", "pyarrow", "tensorboard", "rich", "numpy", "cloudpickle")
OPTIONAL = {"safetensors": "export to .safetensors", "optuna": "sweeps with Optuna", "torchvision": "the examples"}
MIN_SHARED_MEMORY = 1 << 30
MIN_OPEN_FILES = 4096
PROBE_SIZE = 64 << 20


def examine(storage_path: str | None = None) -> Iterator[Check]:
    """Yields one check after the other; with `storage_path`, also writes, reads and deletes a file there."""
    yield "ok", "python", f"{platform.python_version()} on {platform.platform(terse=True)}"
    yield from _packages()
    yield from _processors()
    yield from _devices()
    yield from _limits()
    yield _ray_address()
    if storage_path is not None:
        yield from _storage(storage_path)


def examine_scripts(paths: Iterable[str]) -> Iterator[Check]:
    """Yields one check for each line of Lightning scripts that has to change. Raises InvalidArguments for a file that
    is no script."""
    from raylight.lightning.script import examine_script

    for path in paths:
        findings = examine_script(path)
        for finding in findings:
            yield finding.state, f"{path}:{finding.line}", finding.text
        if not findings:
            yield "ok", path, "uses nothing of Lightning's"


def _packages() -> Iterator[Check]:
    for name in ("raylight", *REQUIRED):
        version = _version(name)
        if version is None:
            yield "bad", name, f"is not installed: pip install {name}"
        else:
            yield "ok", name, version
    for name, use in OPTIONAL.items():
        version = _version(name)
        yield ("ok", name, version) if version else ("note", name, f"not installed; only needed for {use}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processors() -> Iterator[Check]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "ok", "processors", f"{usable} usable of {os.cpu_count()}"
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is not None:
        yield "note", "OMP_NUM_THREADS", f"is {threads}: each worker computes with so many threads"


def _devices() -> Iterator[Check]:
    try:
        import torch
    except ImportError as error:
        yield "bad", "torch", f"cannot be imported: {error}"
        return
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield "note", "GPU", f"none can be used ({built}); training runs on the CPU, distributed with gloo"
        return
    for index in range(torch.cuda.device_count()):
        properties: Any = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if properties.major >= 8 else "no bf16, use precision='16-mixed'"
        yield "ok", f"GPU {index}", f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, {bf16}"
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    yield ("ok", "NCCL", "available") if nccl else ("bad", "NCCL", "is missing in this torch; GPU workers need it")


def _limits() -> Iterator[Check]:
    if os.path.isdir("/dev/shm"):
        size = shutil.disk_usage("/dev/shm").total
        few = size < MIN_SHARED_MEMORY
        advice = "; loader workers and Ray need more: docker run --shm-size=8g" if few else ""
        yield "bad" if few else "ok", "shared memory", f"{size / 1e9:.1f} GB in /dev/shm{advice}"
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= soft < MIN_OPEN_FILES
    advice = "; raise it: ulimit -n 65536" if few else ""
    yield "note" if few else "ok", "open files", f"{soft} (hard limit {hard}){advice}"


def _ray_address() -> Check:
    address = os.environ.get("RAY_ADDRESS")
    if address:
        return "ok", "Ray cluster", f"RAY_ADDRESS={address}: training joins that cluster"
    return "ok", "Ray cluster", "RAY_ADDRESS is not set: num_workers >= 1 starts a local Ray"


def _storage(path: str) -> Iterator[Check]:
    from raylight.storage.filesystem import Storage

    name, block = f"doctor-{uuid.uuid4().hex[:8]}.bin", os.urandom(1 << 20)
    try:
        storage = Storage(path)
        storage.check_writable()
        yield "ok", "storage", f"{storage.uri} can be written, read and deleted in"
        started = time.perf_counter()
        storage.write(name, [block] * (PROBE_SIZE // len(block)))
        written = time.perf_counter()
        size = len(storage.read_bytes(name))
        read = time.perf_counter()
        storage.delete(name)
    except RaylightError as error:
        yield "bad", "storage", str(error)
        return
    write_rate, read_rate = (size / 1e6 / seconds for seconds in (written - started, read - written))
    yield "ok", "storage speed", f"{write_rate:.0f} MB/s written (digests included), {read_rate:.0f} MB/s read"
