"""raylight trains PyTorch models at any scale on Ray."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from raylight.lightning import alias_modules
from raylight.user import checkpoint_reader

__version__ = "0.1.0"

if TYPE_CHECKING:
    from raylight import callbacks, loggers
    from raylight.contract.config import DDP, Checkpointing
    from raylight.contract.errors import (
        CheckpointCorrupt,
        CheckpointMismatch,
        ClusterError,
        DataError,
        InvalidArguments,
        NotEnoughResources,
        RaylightError,
        StorageError,
        WorkerFailed,
        WorkerHung,
    )
    from raylight.contract.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
    from raylight.contract.seeding import seed_everything
    from raylight.driver.result import Result
    from raylight.runs import Run, open_run
    from raylight.speed.benchmark import benchmark
    from raylight.speed.result import Benchmark
    from raylight.sweep import sweep
    from raylight.trainer import Trainer, fit, predict, test, validate
    from raylight.user.callback import Callback
    from raylight.user.data_module import DataModule
    from raylight.user.module import Module

    LightningModule = Module
    LightningDataModule = DataModule

_ERRORS = (
    "RaylightError", "InvalidArguments", "WorkerFailed", "WorkerHung", "CheckpointCorrupt", "CheckpointMismatch",
    "StorageError", "ClusterError", "NotEnoughResources", "DataError",
)  # fmt: skip

# Public name -> (module, name there); "" stands for the module itself. Loaded at first use, so that `import raylight`
# costs next to nothing.
_NAMES = {
    "Module": ("user.module", "Module"),
    "LightningModule": ("user.module", "Module"),
    "DataModule": ("user.data_module", "DataModule"),
    "LightningDataModule": ("user.data_module", "DataModule"),
    "Trainer": ("trainer", "Trainer"),
    "fit": ("trainer", "fit"),
    "validate": ("trainer", "validate"),
    "test": ("trainer", "test"),
    "predict": ("trainer", "predict"),
    "sweep": ("sweep", ""),
    "open_run": ("runs", "open_run"),
    "Run": ("runs", "Run"),
    "Result": ("driver.result", "Result"),
    "benchmark": ("speed.benchmark", "benchmark"),
    "Benchmark": ("speed.result", "Benchmark"),
    "Callback": ("user.callback", "Callback"),
    "Checkpointing": ("contract.config", "Checkpointing"),
    "DDP": ("contract.config", "DDP"),
    "seed_everything": ("contract.seeding", "seed_everything"),
    "rank_zero_only": ("contract.rank_zero", "rank_zero_only"),
    "rank_zero_info": ("contract.rank_zero", "rank_zero_info"),
    "rank_zero_warn": ("contract.rank_zero", "rank_zero_warn"),
    "callbacks": ("callbacks", ""),
    "loggers": ("loggers", ""),
    **{name: ("contract.errors", name) for name in _ERRORS},
}

# Written out, because type checkers read it: of a typed package they let users import these names alone.
__all__ = [  # noqa: RUF022  (in the order of the table)
    "Module", "LightningModule", "DataModule", "LightningDataModule", "Trainer", "fit", "validate", "test", "predict",
    "sweep", "open_run", "Run", "Result", "benchmark", "Benchmark", "Callback", "Checkpointing", "DDP",
    "seed_everything", "rank_zero_only", "rank_zero_info", "rank_zero_warn", "callbacks", "loggers", "RaylightError",
    "InvalidArguments", "WorkerFailed", "WorkerHung", "CheckpointCorrupt", "CheckpointMismatch", "StorageError",
    "ClusterError", "NotEnoughResources", "DataError",
]  # fmt: skip


class _LazyReader(checkpoint_reader.CheckpointReader):
    """Loads what reads checkpoints when it is first asked for."""

    def load_module(self, kind: Any, *arguments: Any) -> Any:
        from raylight.rebuilding import load_module

        return load_module(kind, *arguments)

    def load_data_module(self, kind: Any, *arguments: Any) -> Any:
        from raylight.rebuilding import load_data_module

        return load_data_module(kind, *arguments)

    def read_file(self, path: Any, *arguments: Any) -> Any:
        from raylight.rebuilding import read_file

        return read_file(path, *arguments)

    def open_write(self, path: Any) -> Any:
        from raylight.storage.single_file import open_write

        return open_write(path)

    def remove(self, path: Any) -> None:
        from raylight.storage.single_file import remove

        remove(path)


checkpoint_reader.install(_LazyReader())
alias_modules.install()


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        if alias_modules.is_known(name):
            return importlib.import_module(f"raylight.{name}")
        raise AttributeError(f"module 'raylight' has no attribute {name!r}")
    path, attribute = _NAMES[name]
    module = importlib.import_module(f"raylight.{path}")
    found = getattr(module, attribute) if attribute else module
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*_NAMES, "__version__"])
