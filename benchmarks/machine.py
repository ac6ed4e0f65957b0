"""On what machine, with what versions, a figure was measured: `python -m benchmarks.machine`."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "ray", "pytorch-lightning", "pyarrow", "numpy")


def describe_machine() -> str:
    """Processor, cores this process may use, memory, GPUs, load, system, and the versions that matter."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    lines = [
        f"machine   {processor_name()}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, {gpu_names()}",
        f"system    {platform.system()} {platform.release()}, Python {platform.python_version()}, "
        f"load {os.getloadavg()[0]:.1f} before the first measurement",
        "versions  " + ", ".join(f"{name} {package_version(name)}" for name in PACKAGES),
    ]
    return "\n".join(lines)


def processor_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def gpu_names() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "no GPU"
    return ", ".join(name for name in names if name) or "no GPU"


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print(describe_machine())
