"""A module as a file that runs without Python: TorchScript and ONNX."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import nn

from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Batch, Value
from raylight.user.transfer import move_to_device

if TYPE_CHECKING:
    from raylight.contract.config import FilePath
    from raylight.user.data_hooks import DataHooks

OnnxTarget: TypeAlias = "FilePath | io.BytesIO"


def to_torchscript(
    module: nn.Module, file_path: FilePath | None, method: str, example_inputs: Batch, options: dict[str, Value]
) -> torch.jit.ScriptModule:
    """The module in evaluation mode, by `torch.jit.script` or, of one call, by `torch.jit.trace`."""
    if method not in ("script", "trace"):
        raise InvalidArguments(f"to_torchscript: method={method!r} must be 'script' or 'trace'")
    with _evaluating(module):
        if method == "script":
            scripted = torch.jit.script(module, **options)
        else:
            scripted = torch.jit.trace(module, _find_example(module, example_inputs, "to_torchscript"), **options)
    if file_path is not None:
        torch.jit.save(scripted, str(file_path))
    return scripted


def to_onnx(module: nn.Module, file_path: OnnxTarget | None, input_sample: Batch, options: dict[str, Value]) -> Value:
    """What `torch.onnx.export` returns for the module in evaluation mode."""
    if lacking := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise InvalidArguments(f"to_onnx needs {' and '.join(lacking)}: pip install 'raylight[onnx]'")
    example = _find_example(module, input_sample, "to_onnx")
    target: Value = str(file_path) if isinstance(file_path, Path) else file_path  # a BytesIO works too
    with _evaluating(module):
        return torch.onnx.export(module, example, target, **options)


def _find_example(module: Value, given: Batch, who: str) -> Batch:
    """The example on the module's device, as a batch comes there."""
    example = module.example_input_array if given is None else given
    if example is None:
        raise InvalidArguments(f"{who} needs an example of what goes in: pass it, or set example_input_array")
    hooks: DataHooks = module
    example = hooks.on_before_batch_transfer(example, 0)
    return hooks.on_after_batch_transfer(move_to_device(example, module.device), 0)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """In evaluation mode and without gradients; afterwards each layer has the mode that it had."""
    modes = {layer: layer.training for layer in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for layer, training in modes.items():
            layer.training = training
