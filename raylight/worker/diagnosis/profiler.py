"""Profilers: where the time of a run goes, by section of the loop or by operator."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from time import perf_counter
from typing import Protocol

import torch

from raylight.contract.errors import InvalidArguments


class Profiler(Protocol):
    """What the loop calls where a profiler was asked for: `start`, a `section` around each part of a step, `step`
    after each step, `stop`, and at the end `summary` for a person to read."""

    def start(self) -> None: ...
    def section(self, name: str) -> AbstractContextManager[object]: ...
    def step(self) -> None: ...
    def stop(self) -> None: ...
    def summary(self) -> str: ...


class SimpleProfiler:
    """Sums the wall time of each section, without the time of sections inside it, so that all add up to the whole.

    Times are the host's: on a GPU, work that was only launched in a section counts where it is waited for. For one
    thread. A section costs about a microsecond.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.num_steps = 0
        self.total_s = 0.0
        self._started = 0.0
        self._open: list[_Section] = []

    def start(self) -> None:
        self._started = perf_counter()

    def section(self, name: str) -> AbstractContextManager[object]:
        return _Section(self, name)

    def step(self) -> None:
        self.num_steps += 1

    def stop(self) -> None:
        self.total_s += perf_counter() - self._started

    def summary(self) -> str:
        """A table of the sections, the longest first."""
        other = max(self.total_s - sum(self.seconds.values()), 0.0)
        width = max([len(name) for name in self.seconds] + [len("section")])
        lines = [f"{'section':<{width}}  {'calls':>9}  {'seconds':>9}  {'mean, ms':>9}  {'share':>7}"]
        for name, seconds in sorted(self.seconds.items(), key=lambda item: -item[1]):
            mean_ms = f"{1000 * seconds / self.counts[name]:9.3f}"
            lines.append(f"{name:<{width}}  {self.counts[name]:9d}  {seconds:9.3f}  {mean_ms}  {self._share(seconds)}")
        lines.append(f"{'other':<{width}}  {'':9}  {other:9.3f}  {'':9}  {self._share(other)}")
        rate = f", {self.num_steps / self.total_s:.1f} steps/s" if self.num_steps and self.total_s else ""
        lines.append(f"{self.total_s:.3f} s in all, {self.num_steps} steps{rate}")
        return "\n".join(lines)

    def _share(self, seconds: float) -> str:
        return f"{100 * seconds / self.total_s if self.total_s else 0.0:5.1f} %"


class _Section:
    __slots__ = ("inner_s", "name", "profiler", "started")

    def __init__(self, profiler: SimpleProfiler, name: str):
        self.profiler = profiler
        self.name = name
        self.inner_s = 0.0

    def __enter__(self) -> None:
        self.profiler._open.append(self)
        self.started = perf_counter()

    def __exit__(self, *_: object) -> None:
        elapsed_s = perf_counter() - self.started
        profiler, name = self.profiler, self.name
        profiler._open.pop()
        profiler.seconds[name] = profiler.seconds.get(name, 0.0) + elapsed_s - self.inner_s
        profiler.counts[name] = profiler.counts.get(name, 0) + 1
        if profiler._open:
            profiler._open[-1].inner_s += elapsed_s


class TorchProfiler:
    """`torch.profiler` for a few steps: skips `wait` steps, warms up for `warmup`, records `active`, and writes them
    to `trace_path`, a local file that chrome://tracing and Perfetto open (.json or .json.gz)."""

    def __init__(self, trace_path: str, *, wait: int = 1, warmup: int = 1, active: int = 3):
        self.trace_path = trace_path
        self.first_recorded_step = wait + warmup + 1
        self._table = ""
        self._uses_cuda = torch.cuda.is_available()
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._uses_cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=wait, warmup=warmup, active=active, repeat=1),
            on_trace_ready=self._export,
        )
        self.num_steps = 0

    def start(self) -> None:
        self._profile.start()

    def section(self, name: str) -> AbstractContextManager[object]:
        return torch.profiler.record_function(name)

    def step(self) -> None:
        self.num_steps += 1
        self._profile.step()

    def stop(self) -> None:
        self._profile.stop()

    def summary(self) -> str:
        """The operators that took longest, and where the trace is."""
        if not self._table:
            return f"No trace: steps are recorded from number {self.first_recorded_step} on; {self.num_steps} were made"
        return f"{self._table}\nTrace: {self.trace_path} (open it in https://ui.perfetto.dev)"

    def _export(self, profile: torch.profiler.profile) -> None:
        os.makedirs(os.path.dirname(os.path.abspath(self.trace_path)), exist_ok=True)
        profile.export_chrome_trace(self.trace_path)
        sort_by = "self_cuda_time_total" if self._uses_cuda else "self_cpu_time_total"
        self._table = profile.key_averages().table(sort_by=sort_by, row_limit=20)


def make_profiler(
    name: str | None, *, trace_path: str = "trace.json", wait: int = 1, warmup: int = 1, active: int = 3
) -> Profiler | None:
    """The profiler of that name ("simple" or "torch"), or None for None. The other arguments are those of
    TorchProfiler. Raises InvalidArguments."""
    if name is None:
        return None
    if name == "simple":
        return SimpleProfiler()
    if name == "torch":
        return TorchProfiler(trace_path, wait=wait, warmup=warmup, active=active)
    raise InvalidArguments(f'profiler={name!r}; allowed are "simple" and "torch"')
