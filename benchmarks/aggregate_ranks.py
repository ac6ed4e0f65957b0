"""What many ranks cost the driver: their messages unpickled, merged, and written to the table and TensorBoard.

Each rank sends its step values and its progress once a second. The messages of some seconds are made beforehand; what
is counted is the processor time, of all threads, that the driver needs for a second's worth.
"""

from __future__ import annotations

import io
import pickle
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.figures import Figure, show
from raylight.contract.messages import Progress, SavedFile, StageStarted, StepMetrics, StepRow, StepValue
from raylight.driver.aggregate import StepAggregator
from raylight.driver.journal import Journal, read_metrics
from raylight.loggers import TensorBoardLogger
from raylight.report.console import Console
from raylight.report.gauges import Gauges
from raylight.storage.checkpoints import Manifest, commit
from raylight.storage.filesystem import Storage

WORLD_SIZE = 1000
NUM_SECONDS = 10
NAMES = ("train_loss", "accuracy", "lr", "grad_norm")
NUM_STEPS = 100_000
NUM_SHARES = 10_000


def make_second(second: int, rows_a_second: int) -> list[bytes]:
    """What all ranks send in one second, pickled as on the wire."""
    steps = range(second * rows_a_second + 1, (second + 1) * rows_a_second + 1)
    messages = []
    for rank in range(WORLD_SIZE):
        rows = (
            StepRow(step, 0, 1.7e9 + step, {name: StepValue(rank + step / 7, 32.0, "mean") for name in NAMES})
            for step in steps
        )
        progress = Progress("train", 0, steps[-1], steps[-1], 32 * steps[-1], {"train_loss": 0.5} if rank == 0 else {})
        messages += [pickle.dumps((rank, StepMetrics(tuple(rows)))), pickle.dumps((rank, progress))]
    return messages


class Driver:
    """The parts of the driver that every such message passes through, the gauges for Prometheus among them."""

    def __init__(self, folder: Path):
        files = Storage(folder)
        self.aggregator = StepAggregator(WORLD_SIZE)
        self.journal = Journal(files)
        self.logger = TensorBoardLogger()
        self.logger.attach(files)
        self.console = Console(stream=io.StringIO(), world_size=WORLD_SIZE, max_epochs=1)
        self.console.handle(0, StageStarted("train", 0, 0, NUM_STEPS))
        run: Any = SimpleNamespace(step=0, world_size=WORLD_SIZE, num_restarts=0, logged_metrics={"train_loss": 0.5})
        self.gauges = Gauges(run, lambda values: None)

    def handle(self, data: bytes) -> None:
        rank, message = pickle.loads(data)
        if isinstance(message, StepMetrics):
            for step, epoch, moment, values in self.aggregator.add(rank, message):
                self.journal.add(step, epoch, values, moment)
                self.logger.log_metrics({**values, "epoch": epoch}, step, moment)
        self.console.handle(rank, message)
        self.gauges.handle(rank, message)

    def flush(self) -> None:
        self.journal.flush()
        self.logger.save()

    def close(self) -> None:
        self.console.close()
        self.logger.finalize("success")
        self.journal.close()


def measure_cores(rows_a_second: int) -> float:
    """Seconds of processor time for a second of messages, the median of several; writing is counted every second."""
    used = []
    with tempfile.TemporaryDirectory() as folder:
        driver = Driver(Path(folder))
        for second in range(NUM_SECONDS):
            messages = make_second(second, rows_a_second)
            before = time.process_time()
            for data in messages:
                driver.handle(data)
            driver.flush()
            used.append(time.process_time() - before)
        driver.close()
        num_rows = read_metrics(Storage(folder)).num_rows
    expected = NUM_SECONDS * rows_a_second * len(NAMES)
    if num_rows != expected:
        raise RuntimeError(f"{num_rows} values were stored instead of {expected}")
    return statistics.median(used[1:])  # the first second also imports pyarrow


def measure_commit() -> float:
    """Seconds until the shares of ten thousand ranks, one file of each on a local disk, are a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        files = Storage(folder)
        share = Path(folder, "checkpoints/step-00000001")
        share.mkdir(parents=True)
        saved = []
        for rank in range(NUM_SHARES):
            path = share / f"model-{rank:05d}-of-{NUM_SHARES:05d}.pt"
            path.write_bytes(b"share")
            saved.append(SavedFile(str(path.relative_to(folder)), 5, "xxh3_64:0000000000000000"))
        began = time.perf_counter()
        manifest = Manifest(step=1, epoch=0, files=tuple(saved), world_size=NUM_SHARES)
        commit(files, "checkpoints/step-00000001", manifest)
        return time.perf_counter() - began


def measure() -> list[Figure]:
    return [
        Figure(f"checkpoint of {NUM_SHARES} ranks committed", measure_commit(), "s", at_most=2.0),
        Figure(f"{WORLD_SIZE} ranks, one step a second", measure_cores(1), "cores", at_most=0.5),
        Figure(f"{WORLD_SIZE} ranks, 20 steps a second", measure_cores(20), "cores"),
    ]


if __name__ == "__main__":
    show(f"Messages of {WORLD_SIZE} ranks in the driver ({len(NAMES)} values a step)", measure())
