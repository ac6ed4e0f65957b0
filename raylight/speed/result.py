"""Benchmark: what was measured, as a table, a picture or a file, and compared with another."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from raylight.contract.errors import InvalidArguments
from raylight.contract.plain_text import visible
from raylight.speed.sampling import CONFIDENCE, resample_ratio

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = 1


class Latency(NamedTuple):
    """Seconds of one call that half, 95 % and 99 % of the calls took at most."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class Measurement:
    """One step of one module on batches of one size, in one precision."""

    batch_size: int
    """Samples a call."""
    precision: str
    compiled: bool
    latency_s: Latency
    throughput: float
    """Samples a second."""
    spread: float
    """Half the width of the 95 % interval of `latency_s.p50`, as a share of it."""
    is_stable: bool
    """Whether `spread` came down to what was asked for in the time that was given."""
    num_calls: int
    warm_up_s: float
    """Until a call got no faster, compilation included."""
    peak_memory_bytes: int | None
    """Held at most by weights, batch and what is computed. None where the system has no figure."""
    flops: int
    """Floating point operations a call: matrix products, convolutions and attention, as torch counts them."""
    flops_share: float | None
    """Of what the device can do at best in this precision; None if that is not known."""
    blocks: tuple[float, ...]
    """The median latency of each round, in seconds."""

    @property
    def case(self) -> tuple[int, str, bool]:
        return self.batch_size, self.precision, self.compiled


@dataclass(frozen=True, slots=True)
class Comparison:
    """How much faster the other module is in one case."""

    batch_size: int
    precision: str
    compiled: bool
    speedup: float
    """Its throughput by that of the first; above 1 it is faster."""
    low: float
    high: float
    """The 95 % interval of `speedup`."""

    @property
    def verdict(self) -> str:
        """ "faster" or "slower" if that is more than noise, else "no difference"."""
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "no difference"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The figures of one module. With a single measurement its figures can be read here too."""

    name: str
    """Of the module."""
    stage: str
    machine: Mapping[str, Any]
    """The device and what else the figures depend on."""
    measurements: tuple[Measurement, ...]
    session: str
    """The same for those that were measured in turns, whose rounds can be compared one by one."""

    @property
    def latency_s(self) -> Latency:
        return self._only.latency_s

    @property
    def throughput(self) -> float:
        return self._only.throughput

    @property
    def spread(self) -> float:
        return self._only.spread

    @property
    def peak_memory_bytes(self) -> int | None:
        return self._only.peak_memory_bytes

    @property
    def flops(self) -> int:
        return self._only.flops

    @property
    def _only(self) -> Measurement:
        if len(self.measurements) != 1:
            cases = ", ".join(map(str, (it.case for it in self.measurements)))
            raise InvalidArguments(f"this benchmark has several measurements; take one of .measurements: {cases}")
        return self.measurements[0]

    def compare(self, other: Benchmark) -> list[Comparison]:
        """How much faster `other` is in each case that both have. Between two that were not measured in turns, as
        `raylight benchmark A B` does, a machine that became slower in between counts too.

        Raises InvalidArguments if they have no case in common, or not the same stage or device.
        """
        mistakes = [
            f"one was measured with {name}={ours!r}, the other with {theirs!r}"
            for name, ours, theirs in (
                ("stage", self.stage, other.stage),
                ("device", self.machine.get("device"), other.machine.get("device")),
            )
            if ours != theirs
        ]
        theirs = {it.case: it for it in other.measurements}
        if not any(it.case in theirs for it in self.measurements):
            mistakes.append("they have no batch size, precision and compilation in common")
        if mistakes:
            raise InvalidArguments(mistakes)
        paired = self.session == other.session
        return [_compare(it, theirs[it.case], paired) for it in self.measurements if it.case in theirs]

    def table(self) -> Table:
        """A rich table: a line for each measurement."""
        from rich.table import Table

        machine = ", ".join(visible(str(value)) for value in self.machine.values())
        title = f"{visible(self.name)}, {self.stage}, on {machine}"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        headers = (
            "batch",
            "precision",
            "compiled",
            "p50, ms",
            "p95",
            "p99",
            "±",
            "samples/s",
            "peak MB",
            "GFLOP",
            "of peak",
        )
        for header in headers:
            table.add_column(header, justify="left" if header == "precision" else "right", no_wrap=True)
        for it in self.measurements:
            table.add_row(
                str(it.batch_size), it.precision, "yes" if it.compiled else "no",
                *(f"{seconds * 1e3:.3g}" for seconds in it.latency_s),
                f"{it.spread:.1%}{'' if it.is_stable else '!'}", f"{it.throughput:.4g}",
                "-" if it.peak_memory_bytes is None else f"{it.peak_memory_bytes / 1e6:.4g}", f"{it.flops / 1e9:.3g}",
                "-" if it.flops_share is None else f"{it.flops_share:.1%}",
            )  # fmt: skip
        if not all(it.is_stable for it in self.measurements):
            table.caption = "! the median was not steady in the time given: close other programs, or give more max_s"
            table.caption_justify = "left"
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        with console.file:
            console.print(self.table())
        return console.export_text().rstrip()

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Writes a picture of latency and throughput over the batch size; needs matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise InvalidArguments("a picture needs matplotlib: pip install raylight[plot]") from error
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for precision, compiled in dict.fromkeys((it.precision, it.compiled) for it in self.measurements):
            its = sorted(
                (it for it in self.measurements if (it.precision, it.compiled) == (precision, compiled)),
                key=lambda it: it.batch_size,
            )
            sizes, label = [it.batch_size for it in its], f"{precision}{', compiled' if compiled else ''}"
            p50 = np.array([it.latency_s.p50 for it in its]) * 1e3
            above = np.array([it.latency_s.p99 for it in its]) * 1e3 - p50
            left.errorbar(sizes, p50, yerr=[np.zeros_like(above), above], marker="o", capsize=3, label=label)
            right.plot(sizes, [it.throughput for it in its], marker="o", label=label)
        left.set(xlabel="batch size", ylabel="latency, ms (bar: up to p99)", ylim=(0, None))
        right.set(xlabel="batch size", ylabel="samples a second", ylim=(0, None))
        right.legend()
        figure.suptitle(f"{self.name}, {self.stage}, on {self.machine.get('device')}")
        figure.savefig(path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a JSON file, from which `load` makes the same again."""
        temporary = f"{os.fspath(path)}.part"
        with open(temporary, "w") as file:
            json.dump({"format": FORMAT, **asdict(self)}, file, indent=1)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Benchmark:
        """What `save` has written; raises InvalidArguments if the file is none of its."""
        try:
            with open(path) as file:
                content = json.load(file)
            measurements = tuple(_read_measurement(it) for it in content["measurements"])
            found = {name: content[name] for name in ("name", "stage", "machine", "session")}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InvalidArguments(f"{os.fspath(path)} is no file of Benchmark.save: {error}") from error
        return cls(measurements=measurements, **found)


def _read_measurement(content: dict[str, Any]) -> Measurement:
    latency, blocks = Latency(*content["latency_s"]), tuple(content["blocks"])
    return Measurement(**{**content, "latency_s": latency, "blocks": blocks})


def _compare(ours: Measurement, theirs: Measurement, paired: bool) -> Comparison:
    ratios = resample_ratio(theirs.blocks, ours.blocks, paired)  # of latencies, so that more is faster
    low, high = np.percentile(ratios, CONFIDENCE)
    return Comparison(*ours.case, ours.latency_s.p50 / theirs.latency_s.p50, float(low), float(high))


def comparison_table(names: Sequence[str], comparisons: Sequence[Comparison]) -> Table:
    """A rich table: whether the second module is faster than the first, case by case."""
    from rich.table import Table

    title = f"{visible(names[1])} against {visible(names[0])}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for header in ("batch", "precision", "compiled", "speed", "95 %", ""):
        table.add_column(header, justify="left" if header in ("precision", "") else "right", no_wrap=True)
    for it in comparisons:
        interval = f"{it.low:.3f} to {it.high:.3f}"
        compiled = "yes" if it.compiled else "no"
        table.add_row(str(it.batch_size), it.precision, compiled, f"{it.speedup:.3f}", interval, it.verdict)
    return table
