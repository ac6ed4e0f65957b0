"""The origin of a run: versions of packages, and the commit of the working directory."""

from __future__ import annotations

import os
import subprocess
from importlib.metadata import PackageNotFoundError, version

RECORDED_PACKAGES = ("raylight", "torch", "torchvision", "ray", "pyarrow", "numpy", "tensorboard")


def package_versions() -> dict[str, str]:
    """Of those packages that are installed."""
    found = {}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the working directory; None outside a repository, or without git."""
    if not any(os.path.exists(os.path.join(parent, ".git")) for parent in _parents(os.getcwd())):
        return None
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _parents(path: str) -> list[str]:
    found = [path]
    while os.path.dirname(found[-1]) != found[-1]:
        found.append(os.path.dirname(found[-1]))
    return found
