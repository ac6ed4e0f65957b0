"""Global settings of torch, numpy, warnings and logging: what a script sets before a run holds in its workers too."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from raylight.contract.kinds import Value

Settings = dict[str, Any]
"""Plain values by name, and the warning filters."""


class _Setting(NamedTuple):
    read: Callable[[], object]
    write: Callable[[Value], object]


def read_settings() -> Settings:
    """The settings of this process, without those that the installed torch does not have."""
    found = {name: _read(setting) for name, setting in _SETTINGS.items()}
    return {name: value for name, value in found.items() if value is not _UNKNOWN}


def apply_settings(settings: Settings) -> list[str]:
    """Makes this process as the one in which they were read. Returns the names of those that it refuses."""
    refused = []
    for name, value in settings.items():
        setting = _SETTINGS.get(name)
        if setting is not None and _read(setting) != value:
            try:
                setting.write(value)
            except (AttributeError, RuntimeError, ValueError, AssertionError):
                refused.append(name)
    return refused


_UNKNOWN = object()


def _read(setting: _Setting) -> object:
    try:
        return setting.read()
    except (AttributeError, RuntimeError):  # torch refuses if its old and new names for a setting were mixed
        return _UNKNOWN


def _attribute(owner: Callable[[], object], name: str) -> _Setting:
    return _Setting(lambda: getattr(owner(), name), lambda value: setattr(owner(), name, value))


# ---- torch


def _read_device() -> str | None:
    """The kind of the default device; its number is another on each worker."""
    current: Any = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return current.device.type if current is not None else None


def _read_deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _write_deterministic(mode: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])


_FP32_PLACES = [("generic", "all")] + [
    (backend, kind) for backend in ("cuda", "mkldnn") for kind in ("all", "matmul", "conv", "rnn")
]


def _fp32(backend: str, kind: str) -> _Setting:
    return _Setting(
        lambda: torch._C._get_fp32_precision_getter(backend, kind),
        lambda value: torch._C._set_fp32_precision_setter(backend, kind, value),
    )


def _sdp(name: str) -> _Setting:
    cuda: Any = torch.backends.cuda
    return _Setting(lambda: getattr(cuda, f"{name}_sdp_enabled")(), lambda on: getattr(cuda, f"enable_{name}_sdp")(on))


def _write_safe_globals(kinds: list[Value]) -> None:
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(kinds)


def _read_printing() -> dict[str, object]:
    return dict(vars(torch._tensor_str.PRINT_OPTS))


# ---- warnings and logging

_NO_LEVEL = (logging.NOTSET, False, True)
_levels_before: dict[str, tuple[int, bool, bool]] = {}


def _write_filters(filters: list[tuple[object, ...]]) -> None:
    warnings.resetwarnings()
    warnings.filters.extend(filters)  # type: ignore[attr-defined]


def _own_loggers() -> Iterator[tuple[str, logging.Logger]]:
    """All but those of Ray, which it sets itself, with the root as ""."""
    yield "", logging.root
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and name.partition(".")[0] != "ray":
            yield name, logger


def _read_levels() -> dict[str, tuple[int, bool, bool]]:
    levels = {name: (each.level, each.disabled, each.propagate) for name, each in _own_loggers()}
    return {name: level for name, level in levels.items() if not name or level != _NO_LEVEL}


def _write_levels(levels: dict[str, tuple[int, bool, bool]]) -> None:
    """Puts back the changes of an earlier call first; levels that libraries of this process set stay."""
    for name, level in _levels_before.items():
        _write_level(name, level)
    _levels_before.clear()
    now = {name: (each.level, each.disabled, each.propagate) for name, each in _own_loggers()}
    for name, level in levels.items():
        if now.get(name) != level:
            _levels_before[name] = now.get(name, _NO_LEVEL)
            _write_level(name, level)


def _write_level(name: str, level: tuple[int, bool, bool]) -> None:
    logger = logging.getLogger(name) if name else logging.root
    logger.disabled, logger.propagate = level[1:]
    logger.setLevel(level[0])


def _read_console() -> tuple[str | None, str | None, int] | None:
    """Format and level of what `logging.basicConfig` makes; None: log records are not printed."""
    shown = (sys.stderr, sys.stdout)
    passed_on_to = [getattr(stream, "stream", None) for stream in shown]  # while a run is on they are LastingStreams
    for handler in logging.root.handlers:
        if type(handler) is logging.StreamHandler and handler.stream in (*shown, *passed_on_to):
            formatter = handler.formatter
            form = (formatter._fmt, formatter.datefmt) if type(formatter) is logging.Formatter else (None, None)
            return *form, handler.level
    return None


def _write_console(console: tuple[str | None, str | None, int] | None) -> None:
    """A worker has no handler of its own; with one, its records go to its output."""
    for handler in list(logging.root.handlers):
        if getattr(handler, "_is_raylights", False):
            logging.root.removeHandler(handler)
    if console is None or logging.root.handlers:
        return
    made: Any = logging.StreamHandler()
    made._is_raylights = True
    made.setFormatter(logging.Formatter(console[0] or logging.BASIC_FORMAT, console[1]))
    made.setLevel(console[2])
    logging.root.addHandler(made)


_SETTINGS: dict[str, _Setting] = {
    "default dtype": _Setting(torch.get_default_dtype, torch.set_default_dtype),
    "default device": _Setting(_read_device, torch.set_default_device),
    "deterministic algorithms": _Setting(_read_deterministic, _write_deterministic),
    "filling of uninitialized memory": _attribute(lambda: torch.utils.deterministic, "fill_uninitialized_memory"),
    "anomaly mode": _Setting(
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda mode: torch.set_anomaly_enabled(*mode),
    ),
    "float32 matmul precision": _Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "cudnn TF32": _attribute(lambda: torch.backends.cudnn, "allow_tf32"),
    **{f"float32 precision of {backend} {kind}": _fp32(backend, kind) for backend, kind in _FP32_PLACES},
    **{
        f"cudnn {name}": _attribute(lambda: torch.backends.cudnn, name)
        for name in ("enabled", "benchmark", "deterministic", "benchmark_limit")
    },
    **{
        f"matmul {name}": _attribute(lambda: torch.backends.cuda.matmul, name)
        for name in (
            "allow_fp16_reduced_precision_reduction",
            "allow_bf16_reduced_precision_reduction",
            "allow_fp16_accumulation",
        )
    },
    **{f"{name} attention": _sdp(name) for name in ("flash", "mem_efficient", "math", "cudnn")},
    **{f"einsum {name}": _attribute(lambda: torch.backends.opt_einsum, name) for name in ("enabled", "strategy")},
    "sharing strategy": _Setting(
        torch.multiprocessing.get_sharing_strategy, torch.multiprocessing.set_sharing_strategy
    ),
    "warnings each time": _Setting(torch.is_warn_always_enabled, torch.set_warn_always),
    "overwriting parameters": _Setting(
        torch.__future__.get_overwrite_module_params_on_conversion,
        torch.__future__.set_overwrite_module_params_on_conversion,
    ),
    "swapping parameters": _Setting(
        torch.__future__.get_swap_module_params_on_conversion, torch.__future__.set_swap_module_params_on_conversion
    ),
    "classes that may be loaded": _Setting(
        lambda: sorted(torch.serialization.get_safe_globals(), key=str), _write_safe_globals
    ),
    "printing of tensors": _Setting(_read_printing, lambda options: vars(torch._tensor_str.PRINT_OPTS).update(options)),
    "printing of arrays": _Setting(np.get_printoptions, lambda options: np.set_printoptions(**options)),
    "errors of arrays": _Setting(np.geterr, lambda modes: np.seterr(**modes)),
    "recursion limit": _Setting(sys.getrecursionlimit, sys.setrecursionlimit),
    "warning filters": _Setting(lambda: list(warnings.filters), _write_filters),
    "log levels": _Setting(_read_levels, _write_levels),
    "disabled log levels": _Setting(lambda: logging.root.manager.disable, logging.disable),
    "log records on the console": _Setting(_read_console, _write_console),
}  # fmt: skip
