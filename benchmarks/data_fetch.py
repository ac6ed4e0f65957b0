"""What a batch costs before the user's step: raylight's fetch, torch's DataLoader, and the bare indexing calls.

The batches of the small-step benchmark: 32 rows of 784 floats and their labels, from memory, on one thread. Rounds are
interleaved and medians reported, since the machine's speed drifts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from benchmarks.figures import Figure, show
from raylight.worker.data.batches import TrainBatches

NUM_SAMPLES, BATCH_SIZE, NUM_ROUNDS = 16384, 32, 15
INPUTS, LABELS = torch.randn(NUM_SAMPLES, 784), torch.randint(0, 10, (NUM_SAMPLES,))
DATASET = TensorDataset(INPUTS, LABELS)
NUM_BATCHES = NUM_SAMPLES // BATCH_SIZE


class Items(IterableDataset):
    def __iter__(self) -> Iterator:
        return zip(INPUTS, LABELS, strict=True)


class Overridden(TensorDataset):
    """Code of a user's own, which keeps raylight from the fast way."""

    def __getitem__(self, index: int) -> tuple:
        return super().__getitem__(index)


def index_shuffled() -> Iterable:
    for rows in torch.randperm(NUM_SAMPLES).split(BATCH_SIZE):
        yield [INPUTS.index_select(0, rows), LABELS.index_select(0, rows)]


def index_in_order() -> Iterable:
    for low in range(0, NUM_SAMPLES, BATCH_SIZE):
        yield [INPUTS[low : low + BATCH_SIZE].clone(), LABELS[low : low + BATCH_SIZE].clone()]


def train_batches(loader: DataLoader) -> Callable[[], Iterable]:
    batches = TrainBatches(loader, rank=0, world_size=1, seed=0)
    return lambda: batches.iterate(0)


def loader(dataset: TensorDataset | Items, shuffle: bool = False) -> DataLoader:
    return DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=shuffle or None)


CASES: dict[str, dict[str, Callable[[], Iterable]]] = {
    "shuffled": {
        "bare indexing": index_shuffled,
        "raylight": train_batches(loader(DATASET, shuffle=True)),
        "DataLoader": lambda: loader(DATASET, shuffle=True),
    },
    "in order": {
        "bare indexing": index_in_order,
        "raylight": train_batches(loader(DATASET)),
        "DataLoader": lambda: loader(DATASET),
    },
    "own __getitem__": {
        "raylight": train_batches(loader(Overridden(INPUTS, LABELS), shuffle=True)),
        "DataLoader": lambda: loader(Overridden(INPUTS, LABELS), shuffle=True),
    },
    "stream": {
        "raylight": train_batches(loader(Items())),
        "DataLoader": lambda: loader(Items()),
    },
}


def time_batch(batches: Iterable) -> float:
    """Microseconds a batch."""
    began = time.perf_counter()
    for _ in batches:
        pass
    return (time.perf_counter() - began) / NUM_BATCHES * 1e6


def measure(case: str, ways: dict[str, Callable[[], Iterable]]) -> list[Figure]:
    for make in ways.values():
        time_batch(make())
    rounds = [{name: time_batch(make()) for name, make in ways.items()} for _ in range(NUM_ROUNDS)]
    figures = [
        Figure(f"{case}, {name}", statistics.median(each[name] for each in rounds), "µs a batch") for name in ways
    ]
    if "bare indexing" in ways:
        overhead = statistics.median(each["raylight"] - each["bare indexing"] for each in rounds)
        figures.append(Figure(f"{case}, raylight over bare indexing", overhead, "µs a batch", at_most=10.0))
    return figures


def main() -> None:
    torch.set_num_threads(1)
    figures = [figure for case, ways in CASES.items() for figure in measure(case, ways)]
    show(f"Fetching a batch of {BATCH_SIZE} x 784", figures)


if __name__ == "__main__":
    main()
