"""The function `raylight.benchmark`."""

from __future__ import annotations

import platform
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from raylight.arguments.rules import as_list
from raylight.callbacks.throughput_monitor import find_peak_flops
from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Batch, Loader
from raylight.speed.cases import STEPS, Case, Compile, prepare
from raylight.speed.memory import PeakMemory
from raylight.speed.result import Benchmark, Latency, Measurement
from raylight.speed.sampling import Samples, take_samples
from raylight.user.module import Module
from raylight.user.transfer import batch_size_of
from raylight.worker.step.precision import make_precision

CALLS_FOR_MEMORY = 2


def benchmark(
    module: Module,
    batch_or_loader: Batch | Loader = None,
    *,
    batch_sizes: int | Sequence[int] | None = None,
    precision: str | Sequence[str] = "32-true",
    compile: Compile | Sequence[Compile] = False,
    stage: str = "predict",
    device: str | torch.device | None = None,
    spread: float = 0.02,
    max_s: float = 5.0,
) -> Benchmark:
    """Measures how fast a module is, on copies of it, and how much memory it takes.

    `batch_or_loader`: a batch as the step gets it, a loader whose first batch is taken, or None for the module's
    `example_input_array`. `batch_sizes` (samples): its samples are cut, or repeated. `precision` and `compile` (whether
    torch.compile is used, or its options) as of the trainer, one or several: every combination is measured. `stage` is
    "predict", "validate", "test", or "train" for training_step, backward and the optimizer's step. `device`: the GPU if
    there is one.

    A call is repeated until it gets no faster, and then until its median is known to within `spread` (a share), for
    `max_s` seconds at most. Raises InvalidArguments with all mistakes at once.
    """
    named = [(type(module).__name__, module)]
    return benchmark_all(
        named, batch_or_loader, batch_sizes=batch_sizes, precision=precision, compile=compile, stage=stage,
        device=device, spread=spread, max_s=max_s,
    )[0]  # fmt: skip


def benchmark_all(
    modules: Sequence[tuple[str, Module]],
    batch_or_loader: Batch | Loader = None,
    *,
    batch_sizes: int | Sequence[int] | None = None,
    precision: str | Sequence[str] = "32-true",
    compile: Compile | Sequence[Compile] = False,
    stage: str = "predict",
    device: str | torch.device | None = None,
    spread: float = 0.02,
    max_s: float = 5.0,
) -> list[Benchmark]:
    """As `benchmark`, for several modules with their names. Their calls take turns, so that they can be compared."""
    precisions, compiles = as_list(precision), as_list(compile)
    mistakes = [*_find_mistakes(modules, precisions, compiles, stage, spread, max_s)]
    where = _find_device(device, mistakes)
    batch = _find_batch(modules[0][1], batch_or_loader, mistakes)
    sizes = _find_sizes(batch, batch_sizes, mistakes)
    mistakes += _find_wrong_precisions(precisions, where)
    if mistakes:
        raise InvalidArguments(mistakes)
    rows: list[list[Measurement]] = [[] for _ in modules]
    for case in (Case(size, name, option) for option in compiles for name in precisions for size in sizes):
        measured = _measure([module for _, module in modules], batch, case, stage, where, spread, max_s)
        for its, measurement in zip(rows, measured, strict=True):
            its.append(measurement)
    machine, session = _describe_machine(where), uuid.uuid4().hex
    return [Benchmark(name, stage, machine, tuple(its), session) for (name, _), its in zip(modules, rows, strict=True)]


def _measure(
    modules: list[Module], batch: Batch, case: Case, stage: str, device: torch.device, spread: float, max_s: float
) -> list[Measurement]:
    calls, peaks, flops = [], [], []
    for module in modules:
        prepare(module, batch, replace(case, compile=False), stage, device).call()  # loads what libraries load once
        memory = PeakMemory(device)
        prepared = prepare(module, batch, case, stage, device)
        for _ in range(CALLS_FOR_MEMORY):
            prepared.call()
        peaks.append(memory.read())
        calls.append(prepared.call)
        flops.append(prepared.flops)
    samples = take_samples(calls, device, max_s, spread)
    at_best = find_peak_flops(device, case.precision)
    return [_summarise(case, *its, at_best, spread) for its in zip(samples, peaks, flops, strict=True)]


def _summarise(
    case: Case, samples: Samples, peak: int | None, flops: int, at_best: float | None, spread: float
) -> Measurement:
    return Measurement(
        batch_size=case.batch_size,
        precision=case.precision,
        compiled=bool(case.compile),
        latency_s=Latency(*(samples.percentile(share) for share in (50, 95, 99))),
        throughput=case.batch_size / samples.mean,
        spread=samples.spread,
        is_stable=samples.spread <= spread,
        num_calls=len(samples.latencies),
        warm_up_s=samples.warm_up_s,
        peak_memory_bytes=peak,
        flops=flops,
        flops_share=flops / samples.mean / at_best if at_best else None,
        blocks=tuple(samples.blocks),
    )


def _find_mistakes(
    modules: Sequence[tuple[str, Module]], precisions: list[str], compiles: list[Compile], stage: str, spread: float,
    max_s: float,
) -> Iterator[str]:  # fmt: skip
    if stage not in STEPS:
        yield f"stage={stage!r} is not one of {', '.join(map(repr, STEPS))}"
    for name, module in modules:
        if not isinstance(module, Module):
            yield f"a raylight.Module is needed, and {name} is a {type(module).__name__}"
        elif stage != "predict" and stage in STEPS and not _has(module, STEPS[stage]):
            yield f"stage={stage!r} needs {STEPS[stage]}, which {name} does not have"
    for option in compiles:
        if not isinstance(option, bool | Mapping):
            yield f"compile={option!r} must be True, False or a dict of torch.compile's options"
    if not precisions or not compiles:
        yield "precision and compile need at least one value each"
    if not 0 < spread < 1:
        yield f"spread={spread!r} must be a share between 0 and 1"
    if not max_s > 0:
        yield f"max_s={max_s!r} must be a positive number of seconds"


def _has(module: Module, step: str) -> bool:
    return getattr(type(module), step, None) is not getattr(Module, step, None)


def _find_wrong_precisions(names: list[str], device: torch.device) -> Iterator[str]:
    for name in names:
        try:
            make_precision(name, device.type)
        except InvalidArguments as error:
            yield from error.mistakes


def _find_device(device: str | torch.device | None, mistakes: list[str]) -> torch.device:
    """The CPU if the device that was asked for cannot be used, which is then a mistake."""
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        mistakes.append(f"device={device!r} cannot be used: {str(error).splitlines()[0]}")
        return torch.device("cpu")
    return found


def _find_batch(module: Module, given: Batch | Loader, mistakes: list[str]) -> Batch:
    if given is None:
        given = getattr(module, "example_input_array", None)
        if given is None:
            mistakes.append(
                "there is nothing to compute: give a batch or a loader, or set example_input_array in the module"
            )
        return given
    if isinstance(given, Tensor | Mapping | list | tuple) or not isinstance(given, Iterable):
        return given
    batch = next(iter(given), None)
    if batch is None:
        mistakes.append(f"the loader ({type(given).__name__}) gave no batch")
    return batch


def _find_sizes(batch: Batch, given: int | Sequence[int] | None, mistakes: list[str]) -> list[int]:
    size = batch_size_of(batch)
    if given is None:
        return [size or 1]
    sizes = as_list(given)
    wrong = [it for it in sizes if isinstance(it, bool) or not isinstance(it, int) or it < 1]
    if wrong or not sizes:
        mistakes.append(f"batch_sizes={given!r} must be numbers of samples, from 1 on")
    if size is None and batch is not None:
        mistakes.append("batch_sizes needs a batch with a tensor, whose first dimension is cut or repeated")
    return sizes


def _describe_machine(device: torch.device) -> dict[str, str | int]:
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "torch": f"torch {torch.__version__}"}
    threads = torch.get_num_threads()
    return {
        "device": f"{device.type} ({platform.processor() or platform.machine()})",
        "threads": f"{threads} thread{'s' if threads != 1 else ''}",
        "torch": f"torch {torch.__version__}",
    }
