"""Profilers: where the time of a run goes, by section, by function or by operator. Lightning's names and arguments."""

from __future__ import annotations

import cProfile
import io
import os
import pstats
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import nn

from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Value

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from raylight.contract.config import FilePath

SHOWN_RANKS = 8
"""In a table; of more ranks the quickest and the slowest of each section."""


class Profiler(ABC):
    """To write one, override `start` and `stop`, which enclose each section, and `summary`.

    A run calls `setup`, then `profile` around each section, `step` after each training step, and at the end `describe`,
    which writes the summary to `<dirpath>/<filename>.txt` if there is a `filename`, and returns it else. `dirpath` is
    the version's directory if it is None, where that is a local one. Each worker has a profiler of its own.
    """

    def __init__(self, dirpath: FilePath | None = None, filename: str | None = None) -> None:
        self.dirpath, self.filename = dirpath, filename
        self._stage: str | None = None
        self._rank: int | None = None

    @abstractmethod
    def start(self, action_name: str) -> None:
        """A section of this name begins."""

    @abstractmethod
    def stop(self, action_name: str) -> None:
        """The section of this name has ended."""

    def summary(self) -> str:
        """For a person to read."""
        return ""

    @contextmanager
    def profile(self, action_name: str) -> Iterator[str]:
        """A section around a `with` block."""
        self.start(action_name)
        try:
            yield action_name
        finally:
            self.stop(action_name)

    def step(self) -> None:  # noqa: B027  (may be overridden)
        """A training step is done."""

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """A run begins on a worker; `local_rank` is its rank if there are several."""
        self._stage, self._rank = stage, local_rank
        self.dirpath = self.dirpath or log_dir

    def watch(self, module: nn.Module) -> None:  # noqa: B027  (may be overridden)
        """The module that is about to run."""

    def teardown(self, stage: str | None) -> None:  # noqa: B027  (may be overridden)
        """The run is over."""

    def describe(self) -> str:
        text = self.summary()
        if not text or not self.filename or self.dirpath is None:
            return text
        path = os.path.join(self.dirpath, self._prepare_filename())
        os.makedirs(self.dirpath, exist_ok=True)
        with open(path, "a") as file:
            file.write(text)
        return f"profile: {path}"

    def _prepare_filename(self, action_name: str | None = None, extension: str = ".txt") -> str:
        parts = [self._stage, self.filename, None if self._rank is None else str(self._rank), action_name]
        name = re.sub(r"[\\/:*?\"<>|\s]+", "_", "-".join(part for part in parts if part))
        return (name or "profile") + extension


class PassThroughProfiler(Profiler):
    """Records nothing."""

    def start(self, action_name: str) -> None: ...
    def stop(self, action_name: str) -> None: ...


@dataclass(slots=True)
class Section:
    """What a rank has measured under one name: seconds without those of sections inside it."""

    count: int = 0
    seconds: float = 0.0
    first_s: float = 0.0

    def add(self, seconds: float) -> None:
        if not self.count:
            self.first_s = seconds
        self.count += 1
        self.seconds += seconds

    @property
    def once_s(self) -> float:
        """The first of several: what is imported, compiled or allocated in it comes once."""
        return self.first_s if self.count > 1 else 0.0

    @property
    def mean_s(self) -> float:
        return (self.seconds - self.once_s) / max(self.count - bool(self.once_s), 1)


@dataclass(slots=True)
class Measured:
    """All that a rank has measured."""

    sections: dict[str, Section] = field(default_factory=dict)
    total_s: float = 0.0
    num_steps: int = 0


class SimpleProfiler(Profiler):
    """Sums the wall time of each section without the time of sections inside it, so that all add up to the whole.

    Times are the host's: on a GPU, work that was only launched in a section counts where it is waited for. The first
    call of a section, which may import or compile something, has a column of its own and is in no mean and no share.
    `extended=False` leaves out calls and shares. `recorded_durations` has the seconds of each call, with those of
    sections inside it. A section costs about two microseconds. Raises ValueError for a section that begins in itself,
    or that ends without having begun.
    """

    def __init__(self, dirpath: FilePath | None = None, filename: str | None = None, extended: bool = True) -> None:
        super().__init__(dirpath, filename)
        self.extended = extended
        self.current_actions: dict[str, float] = {}
        self.recorded_durations: dict[str, list[float]] = {}
        self.measured = Measured()
        self._inner = [0.0]  # seconds of the sections inside each open one
        self._began = perf_counter()

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        super().setup(stage, local_rank, log_dir)
        self._began = perf_counter()

    def start(self, action_name: str) -> None:
        if action_name in self.current_actions:
            raise ValueError(f"section {action_name!r} has begun already")
        self._inner.append(0.0)
        self.current_actions[action_name] = perf_counter()

    def stop(self, action_name: str) -> None:
        now = perf_counter()
        if action_name not in self.current_actions:
            raise ValueError(f"section {action_name!r} has not begun")
        elapsed_s = now - self.current_actions.pop(action_name)
        self.recorded_durations.setdefault(action_name, []).append(elapsed_s)
        section = self.measured.sections.get(action_name)
        if section is None:
            section = self.measured.sections[action_name] = Section()
        section.add(elapsed_s - self._inner.pop())
        self._inner[-1] += elapsed_s

    def step(self) -> None:
        self.measured.num_steps += 1

    def teardown(self, stage: str | None) -> None:
        self.measured.total_s += perf_counter() - self._began
        self._began = perf_counter()

    def summary(self) -> str:
        return self.summarize([self.measured])

    def summarize(self, ranks: Sequence[Measured]) -> str:
        """One table of all ranks: the sections, the longest first."""
        total_s = sum(one.total_s for one in ranks)
        others = [Section(1, max(one.total_s - sum(s.seconds for s in one.sections.values()), 0.0)) for one in ranks]
        named = {name: [one.sections.get(name, Section()) for one in ranks] for one in ranks for name in one.sections}
        steady_s = total_s - sum(section.once_s for sections in named.values() for section in sections)
        rows = [["section", *(["rank"] if len(ranks) > 1 else []), "seconds", "mean, ms", "first, ms"]]
        rows[0] += ["calls", "share"] if self.extended else []
        order = sorted(named, key=lambda name: -sum(section.seconds for section in named[name]))
        for name, sections in [*((name, named[name]) for name in order), ("other", others)]:
            for rank in _choose_ranks([section.seconds for section in sections]):
                section = sections[rank]
                share = (section.seconds - section.once_s) / steady_s if steady_s > 0 else 0.0
                row = [name, *([str(rank)] if len(ranks) > 1 else []), f"{section.seconds:.3f}"]
                is_other = sections is others
                row += ["", ""] if is_other else [f"{1000 * section.mean_s:.3f}", f"{1000 * section.first_s:.3f}"]
                row += ["" if is_other else str(section.count), f"{100 * share:.1f} %"] if self.extended else []
                rows.append(row)
        steps, longest_s = ranks[0].num_steps, max(one.total_s for one in ranks)
        rate = f", {steps / longest_s:.1f} steps/s" if steps and longest_s else ""
        return "\n".join([*_align(rows), f"{longest_s:.3f} s in all, {steps} steps{rate}"])


def _choose_ranks(seconds: list[float]) -> list[int]:
    ranks = range(len(seconds))
    if len(ranks) <= SHOWN_RANKS:
        return list(ranks)
    return sorted({min(ranks, key=seconds.__getitem__), max(ranks, key=seconds.__getitem__)})


def _align(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


class AdvancedProfiler(Profiler):
    """Python's cProfile for each section: the functions that took longest in it.

    `line_count_restriction` is a number of lines, or a share of them, of each section. With `dump_stats` each
    section's numbers are written to `dirpath`, for pstats.
    """

    def __init__(
        self,
        dirpath: FilePath | None = None,
        filename: str | None = None,
        line_count_restriction: int | float = 1.0,
        dump_stats: bool = False,
    ) -> None:
        super().__init__(dirpath, filename)
        self.profiled_actions: dict[str, cProfile.Profile] = {}
        self.line_count_restriction, self.dump_stats = line_count_restriction, dump_stats
        self._open: list[str] = []

    def start(self, action_name: str) -> None:
        if action_name in self._open:
            raise ValueError(f"section {action_name!r} has begun already")
        if self._open:
            self.profiled_actions[self._open[-1]].disable()  # Python has one profiler at a time
        self._open.append(action_name)
        self.profiled_actions.setdefault(action_name, cProfile.Profile()).enable()

    def stop(self, action_name: str) -> None:
        if not self._open or self._open[-1] != action_name:
            raise ValueError(f"section {action_name!r} has not begun, or one inside it has not ended")
        self.profiled_actions[self._open.pop()].disable()
        if self._open:
            self.profiled_actions[self._open[-1]].enable()

    def summary(self) -> str:
        parts = []
        for name, profile in self.profiled_actions.items():
            text = io.StringIO()
            stats = pstats.Stats(profile, stream=text).strip_dirs().sort_stats("cumulative")
            stats.print_stats(self.line_count_restriction)
            parts.append(f"Profile stats for: {name}\n{text.getvalue().strip()}")
        return "\n\n".join(parts)

    def teardown(self, stage: str | None) -> None:
        if not self.dump_stats:
            return
        if self.dirpath is None:
            raise InvalidArguments("AdvancedProfiler(dump_stats=True) needs dirpath")
        os.makedirs(self.dirpath, exist_ok=True)
        for name, profile in self.profiled_actions.items():
            profile.dump_stats(os.path.join(self.dirpath, self._prepare_filename(name, ".prof")))


class PyTorchProfiler(Profiler):
    """torch.profiler for a few training steps: skips one, warms up for one and records three, or as `schedule=` says.

    `profiler_kwargs` are torch.profiler.profile's. The trace is a file beside the logs, which chrome://tracing and
    Perfetto open (`export_to_chrome`). The summary has the `row_limit` operators that took longest, by `sort_by_key`;
    `table_kwargs` are those of its table. With `record_module_names` the trace names the module's layers.
    `emit_nvtx` annotates for an outer profiler, and records nothing.
    """

    def __init__(
        self,
        dirpath: FilePath | None = None,
        filename: str | None = None,
        group_by_input_shapes: bool = False,
        emit_nvtx: bool = False,
        export_to_chrome: bool = True,
        row_limit: int = 20,
        sort_by_key: str | None = None,
        record_module_names: bool = True,
        table_kwargs: Mapping[str, Value] | None = None,
        **profiler_kwargs: Value,
    ) -> None:
        super().__init__(dirpath, filename)
        self.export_to_chrome, self.row_limit, self.record_module_names = (
            export_to_chrome,
            row_limit,
            record_module_names,
        )
        self.table_kwargs = {"row_limit": row_limit, **(table_kwargs or {})}
        self.group_by_input_shapes, self.emit_nvtx = group_by_input_shapes, emit_nvtx
        self.sort_by_key = sort_by_key or (
            "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        )
        self.profiler_kwargs = dict(profiler_kwargs)
        if group_by_input_shapes:
            self.profiler_kwargs.setdefault("record_shapes", True)
        self.trace_path: str | None = None
        self.num_steps = 0
        self._table = ""
        self._run: Value = None  # torch's, while a run is on
        self._hooks: list[RemovableHandle] = []
        self._records: dict[str, list[Value]] = {}

    def __getstate__(self) -> dict[str, Value]:
        return {**vars(self), "_run": None, "_hooks": [], "_records": {}}

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        super().setup(stage, local_rank, log_dir)
        if self.emit_nvtx:
            self._run = torch.autograd.profiler.emit_nvtx(record_shapes=self.group_by_input_shapes)
        else:
            schedule = torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1) if stage == "fit" else None
            given = {"schedule": schedule, "on_trace_ready": self._export, **self.profiler_kwargs}
            self._run = torch.profiler.profile(**given)
        self._run.__enter__()

    def watch(self, module: nn.Module) -> None:
        if not self.record_module_names:
            return
        for name, part in module.named_modules():
            if name:
                label = f"{type(part).__name__}: {name}"
                self._hooks.append(part.register_forward_pre_hook(lambda *_, label=label: self.start(label)))
                self._hooks.append(part.register_forward_hook(lambda *_, label=label: self.stop(label)))

    def start(self, action_name: str) -> None:
        record = torch.profiler.record_function(action_name)
        record.__enter__()
        self._records.setdefault(action_name, []).append(record)

    def stop(self, action_name: str) -> None:
        records = self._records.get(action_name)
        if records:  # a forward that raised has left more
            records.pop().__exit__(None, None, None)

    def step(self) -> None:
        self.num_steps += 1
        if isinstance(self._run, torch.profiler.profile):
            self._run.step()

    def teardown(self, stage: str | None) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        run, self._run = self._run, None
        if run is not None:
            run.__exit__(None, None, None)

    def summary(self) -> str:
        if self.emit_nvtx:
            return ""
        if not self._table:
            return f"No trace: no step of the schedule was recorded; {self.num_steps} were made"
        return self._table + (
            f"\nTrace: {self.trace_path} (open it in https://ui.perfetto.dev)" if self.trace_path else ""
        )

    def _export(self, profile: torch.profiler.profile) -> None:
        if self.export_to_chrome:
            folder = str(self.dirpath or os.getcwd())
            os.makedirs(folder, exist_ok=True)
            self.trace_path = os.path.join(folder, self._prepare_filename(extension=".pt.trace.json"))
            profile.export_chrome_trace(self.trace_path)
        averages = profile.key_averages(group_by_input_shape=self.group_by_input_shapes)
        self._table = averages.table(sort_by=self.sort_by_key, **self.table_kwargs)


KINDS: dict[str, type[Profiler]] = {
    "simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler, "torch": PyTorchProfiler,
}  # fmt: skip
"""What a profiler's name stands for."""
METHODS = ("start", "stop", "profile", "setup", "teardown", "summary")


def is_profiler(value: object) -> bool:
    """Whether it can be one; Lightning's own can."""
    return all(callable(getattr(value, name, None)) for name in METHODS)
