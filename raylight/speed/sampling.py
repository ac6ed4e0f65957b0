"""Latencies of calls, taken in rounds until the median of each is known closely enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter

import numpy as np
import torch

Call = Callable[[], object]

MIN_ROUNDS, MIN_CALLS = 10, 100
BLOCK_S = 0.05
"""What one call gets in a round, at least one run of it."""
WARM_UP_SHARE = 0.5
"""Of the time for measuring: how long a call may take to become steady."""
STEADY = 0.02
"""A call is warm when a block is no faster than the one before by more than this share."""
NUM_RESAMPLES = 400
CONFIDENCE = (2.5, 97.5)
"""Percentiles of the resampled medians: an interval of 95 %."""


@dataclass(slots=True)
class Samples:
    """The latencies of one call, in seconds."""

    latencies: list[float] = field(default_factory=list)
    blocks: list[float] = field(default_factory=list)
    """The median of each round."""
    warm_up_s: float = 0.0
    """Until the call was steady, compilation included."""

    def percentile(self, share: float) -> float:
        return float(np.percentile(self.latencies, share))

    @property
    def mean(self) -> float:
        return math.fsum(self.latencies) / len(self.latencies)

    @property
    def spread(self) -> float:
        """Half the width of the 95 % interval of the median, as a share of it. Rounds are resampled, not calls, since
        what disturbs a machine lasts longer than one call."""
        low, high = np.percentile(resample(self.blocks), CONFIDENCE)
        return float((high - low) / 2 / np.median(self.blocks))


def resample(blocks: Sequence[float]) -> np.ndarray:
    """Medians of rounds drawn with replacement, shape (NUM_RESAMPLES,), the same for the same rounds."""
    return np.median(_draw(len(blocks), np.asarray(blocks)), axis=1)


def resample_ratio(ours: Sequence[float], theirs: Sequence[float], paired: bool) -> np.ndarray:
    """`theirs` by `ours`, resampled, shape (NUM_RESAMPLES,). `paired`: both were measured in the same rounds, so that
    what slowed one round slowed both."""
    if paired:
        return resample(np.asarray(theirs) / np.asarray(ours))
    return np.random.default_rng(1).permutation(resample(theirs)) / resample(ours)


def _draw(count: int, values: np.ndarray) -> np.ndarray:
    return values[np.random.default_rng(0).integers(0, count, (NUM_RESAMPLES, count))]


def take_samples(calls: Sequence[Call], device: torch.device, max_s: float, spread: float) -> list[Samples]:
    """The latencies of each call, all in turn in each round, so that a machine that slows down slows them all.

    Ends when every median is known to within `spread`, or after `max_s` seconds a call; warming up comes before.
    """
    samples = [Samples() for _ in calls]
    for call, its in zip(calls, samples, strict=True):
        its.warm_up_s = warm_up(call, device, max_s * WARM_UP_SHARE)
    sizes = [max(1, int(BLOCK_S / max(its, 1e-9))) for its in (min(time_calls(call, 3, device)) for call in calls)]
    ends_at = perf_counter() + max_s * len(calls)
    while True:
        for call, its, size in zip(calls, samples, sizes, strict=True):
            block = time_calls(call, size, device)
            its.latencies += block
            its.blocks.append(float(np.median(block)))
        if perf_counter() >= ends_at or all(_is_enough(its, spread) for its in samples):
            return samples


def _is_enough(samples: Samples, spread: float) -> bool:
    if len(samples.blocks) < MIN_ROUNDS or len(samples.latencies) < MIN_CALLS:
        return False
    return samples.spread <= spread


def warm_up(call: Call, device: torch.device, max_s: float) -> float:
    """Runs `call` until it gets no faster, for `max_s` seconds at most but three times at least; returns the seconds
    that went."""
    began = perf_counter()
    before = min(time_calls(call, 1, device))
    steady = 0
    while steady < 2:
        size = max(1, int(BLOCK_S / max(before, 1e-9)))
        now = float(np.median(time_calls(call, size, device)))
        steady = steady + 1 if now > before * (1 - STEADY) else 0
        before = min(before, now)
        if perf_counter() - began > max_s:
            break
    return perf_counter() - began


def time_calls(call: Call, count: int, device: torch.device) -> list[float]:
    """Seconds of each of `count` calls. On a GPU they are measured by events on its stream, and waited for once."""
    if device.type == "cuda":
        return _time_on_stream(call, count, device)
    latencies = []
    for _ in range(count):
        began = perf_counter()
        call()
        if device.type == "mps":
            torch.mps.synchronize()
        latencies.append(perf_counter() - began)
    return latencies


def _time_on_stream(call: Call, count: int, device: torch.device) -> list[float]:
    torch.cuda.synchronize(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]
