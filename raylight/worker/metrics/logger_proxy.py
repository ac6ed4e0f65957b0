"""`trainer.logger` on a worker."""

from __future__ import annotations

import threading
import time
from argparse import Namespace
from collections.abc import Callable

from raylight.contract.errors import StorageError
from raylight.contract.kinds import Value
from raylight.contract.messages import EpochMetrics, Hyperparameters
from raylight.worker.worker import Worker

FLUSH_EVERY_S = 5


class LoggerProxy:
    """Sends values to the driver, which owns the real loggers."""

    def __init__(self, worker: Worker):
        self._worker = worker
        self._experiment: Value = None
        self._directory: Value = None
        self._copying: threading.Thread | None = None
        self._closing = threading.Event()

    @property
    def log_dir(self) -> str:
        return self._worker.task.version_path

    save_dir = log_dir

    @property
    def name(self) -> str:
        return self._worker.config.name

    def log_metrics(self, metrics: dict[str, Value], step: int | None = None) -> None:
        """Rank 0's values alone are kept; `step` counts optimizer steps and defaults to the present one."""
        worker = self._worker
        if not worker.is_first:
            return
        step = worker.progress.global_step if step is None else int(step)
        values = {name: float(value) for name, value in metrics.items()}
        logged = frozenset(values)
        epoch = worker.progress.current_epoch
        worker.outbox.put(EpochMetrics(worker.stage, epoch, step, time.time(), values, logged, frozenset()))

    def log_hyperparams(self, params: Value, metrics: dict[str, Value] | None = None) -> None:
        """Adds to the hyperparameters that the run records; `params` is a dict or a namespace. `metrics` are logged."""
        if self._worker.is_first:
            self._worker.outbox.put(Hyperparameters(dict(vars(params) if isinstance(params, Namespace) else params)))
        if metrics:
            self.log_metrics(metrics)

    @property
    def experiment(self) -> Value:
        """A torch SummaryWriter on rank 0 for images, histograms and text, which reach the version's storage every few
        seconds; on other ranks it swallows every call."""
        if self._experiment is None:
            files = self._worker.task.files
            if self._worker.is_first and files is not None:
                from torch.utils.tensorboard import SummaryWriter

                self._directory = files.local_directory()
                self._experiment = SummaryWriter(self._directory.path, flush_secs=FLUSH_EVERY_S)
                if files.local_path("") is None:
                    self._closing.clear()
                    self._copying = threading.Thread(target=self._keep_copying, name="raylight events", daemon=True)
                    self._copying.start()
            else:
                self._experiment = _Silent()
        return self._experiment

    def close(self) -> None:
        """All that was logged is on storage, or the person is told why not."""
        self._closing.set()
        if self._copying is not None:
            self._copying.join()
        if self._experiment is not None:
            self._experiment.close()
        if self._directory is not None:
            self._try(self._directory.close)
        self._experiment = self._directory = self._copying = None

    def _keep_copying(self) -> None:
        works = True
        while not self._closing.wait(FLUSH_EVERY_S):
            works = self._try(self._bring, tell=works)  # once for each outage

    def _bring(self) -> None:
        self._experiment.flush()
        self._directory.copy()

    def _try(self, copy: Callable[[], None], tell: bool = True) -> bool:
        try:
            copy()
        except (OSError, StorageError) as error:
            if tell:
                text = f"what was logged to trainer.logger.experiment is not on storage: {error}"
                self._worker.outbox.notice(text, "warning")
            return False
        return True


class _Silent:
    """Accepts every method call of a SummaryWriter."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **keywords: None
