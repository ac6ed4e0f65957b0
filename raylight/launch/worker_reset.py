"""WorkerReset: makes a worker that has run before as good as a new one."""

from __future__ import annotations

import gc
import importlib
import os
import random
import sys
import time
from types import ModuleType
from typing import Any

from raylight.worker.diagnosis.failure import is_users


class WorkerReset:
    """Knows what the process was like when it was new."""

    def __init__(self) -> None:
        self._environment = dict(os.environ)
        self._directory = os.getcwd()
        self._path = list(sys.path)
        self._stamps: dict[str, tuple[int, int] | None] = {}
        self._seen_at = time.time_ns()
        self._settings: dict[str, Any] | None = None

    def note_settings(self) -> None:
        """Remembers the global settings of a process that has not run yet. Not when it is made: this needs torch."""
        from raylight.contract.process_settings import read_settings

        if self._settings is None:
            self._settings = read_settings()

    def note_modules(self) -> None:
        """Remembers the files of the user's modules as they are now. One that was written after the last note may not
        be what was imported, and counts as changed."""
        for name, module in list(sys.modules.items()):
            if name not in self._stamps and is_users_module(module):
                stamp = _stamp(module)
                self._stamps[name] = stamp if stamp is not None and stamp[0] < self._seen_at else None
        self._seen_at = time.time_ns()

    def drop_changed_modules(self) -> bool:
        """If a file of the user's has changed, all the user's modules are imported afresh: one that is the same may
        hold what it imported from another. Returns whether that was so."""
        modules = {name: sys.modules[name] for name in self._stamps if name in sys.modules}
        changed = any(
            self._stamps[name] is None or _stamp(module) != self._stamps[name] for name, module in modules.items()
        )
        if changed:
            for name in modules:
                del sys.modules[name]
            self._stamps.clear()
            importlib.invalidate_caches()
        return changed

    def restore(self) -> None:
        """Random generators, and every global switch of torch and the process that user code may have set.

        Call it in the thread that will run, because some of torch's switches belong to a thread.
        """
        os.environ.clear()
        os.environ.update(self._environment)
        os.chdir(self._directory)
        sys.path[:] = self._path
        self.drop_changed_modules()
        _restore_torch()
        if self._settings is not None:
            from raylight.contract.process_settings import apply_settings

            apply_settings(self._settings)


def free_memory() -> None:
    """Frees what the last run has left, here and on the GPU."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _restore_torch() -> None:
    import numpy as np
    import torch

    torch.set_grad_enabled(True)
    torch.set_anomaly_enabled(False)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = False
    random.seed()
    np.random.seed()
    torch.seed()
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


def is_users_module(module: ModuleType) -> bool:
    """Whether it was imported from a file of the user's. One with a relative path, as torch.ops has, was imported from
    none."""
    file = getattr(module, "__file__", None)
    if not isinstance(file, str) or not file.endswith(".py") or not os.path.isabs(file):
        return False
    return module.__name__ != "__main__" and is_users(file)


def _stamp(module: ModuleType) -> tuple[int, int] | None:
    try:
        status = os.stat(str(module.__file__))
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size
