"""ModelSummary: the layers of the module, their parameters and shapes, as a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from raylight.callbacks.mistake_list import Mistakes
from raylight.contract.kinds import Batch, Output
from raylight.contract.plain_numbers import to_python
from raylight.user.callback import Callback

if TYPE_CHECKING:
    from raylight.user.module import Module
    from raylight.user.trainer_names import TrainerNames


@dataclass(frozen=True, slots=True)
class Layer:
    """One line of the table. `num_parameters` counts those of the layers inside too, shared ones once; None if a
    lazy layer does not know its own yet. Sizes are the shapes of the first tensor, known after a forward pass."""

    name: str
    kind: str
    num_parameters: int | None
    mode: str  # "train" or "eval"
    in_size: str = ""
    out_size: str = ""


class ModelSummary(Callback):
    """Shows the layers of the module down to `max_depth` before training; -1 shows all, 0 none.

    Shapes are shown if the module has an `example_input_array` (a tensor, a tuple of arguments or a dict of
    keyword arguments), which is sent through `forward` once.
    """

    def __init__(self, max_depth: int = 1, **summarize_kwargs: object):
        mistakes = Mistakes("ModelSummary")
        mistakes.require_count("max_depth", max_depth, -1)
        mistakes.raise_any()
        self.max_depth = to_python(max_depth)
        self.summarize_kwargs = summarize_kwargs  # Lightning passes them on to its table; there is nothing to set here

    def on_fit_start(self, trainer: TrainerNames, module: Module) -> None:
        if self.max_depth and trainer.is_global_zero:
            trainer.notice(summarize(module, self.max_depth))


class RichModelSummary(ModelSummary):
    """The same table under Lightning's other name."""


def summarize(module: nn.Module, max_depth: int = 1) -> str:
    """The module's layers down to `max_depth` (-1: all) and its totals, as text."""
    layers = list_layers(module, max_depth)
    rows = [["", "Name", "Type", "Params", "Mode"]]
    sized = any(layer.in_size for layer in layers)
    if sized:
        rows[0] += ["In sizes", "Out sizes"]
    for index, layer in enumerate(layers):
        count = "?" if layer.num_parameters is None else f"{layer.num_parameters:,}"
        row = [str(index), layer.name, layer.kind, count, layer.mode]
        rows.append(row + [layer.in_size, layer.out_size] if sized else row)
    return "\n".join([*_align(rows), "", *_total(module)])


def list_layers(module: nn.Module, max_depth: int = 1) -> list[Layer]:
    """The layers inside `module` down to `max_depth` (-1: all), in the order in which they were assigned."""
    shown = {
        name: layer
        for name, layer in module.named_modules()
        if name and (max_depth == -1 or name.count(".") < max_depth)
    }
    sizes = _measure_sizes(module, shown)
    return [
        Layer(
            name,
            type(layer).__name__,
            count_parameters(layer),
            "train" if layer.training else "eval",
            *sizes.get(name, ("", "")),
        )
        for name, layer in shown.items()
    ]


def count_parameters(layer: nn.Module, trainable: bool | None = None) -> int | None:
    """The parameters of a layer and those inside; None if a lazy one has no shape yet."""
    parameters = [p for p in layer.parameters() if trainable is None or p.requires_grad == trainable]
    if any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in parameters):
        return None
    return sum(parameter.numel() for parameter in parameters)


def _total(module: nn.Module) -> list[str]:
    parts = {
        "trainable parameters": count_parameters(module, trainable=True),
        "other parameters": count_parameters(module, trainable=False),
    }
    lines = [f"{'not known yet' if count is None else f'{count:,}':>14}  {name}" for name, count in parts.items()]
    if None not in parts.values():
        num_bytes = sum(p.numel() * p.element_size() for p in module.parameters())
        lines.append(f"{num_bytes / 1e6:>14,.3f}  MB of parameters")
    return lines


def _align(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    numeric = rows[0].index("Params")
    lines = [
        "  ".join(
            cell.rjust(width) if column == numeric else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _measure_sizes(module: nn.Module, layers: dict[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """Shapes of what goes in and out of each layer, from one forward pass that leaves no trace on the module."""
    if getattr(module, "example_input_array", None) is None:
        return {}
    sizes: dict[str, tuple[str, str]] = {}

    def note(name: str) -> Callable[[nn.Module, Batch, Output], None]:
        def hook(_: nn.Module, inputs: Batch, output: Output) -> None:
            sizes[name] = (_shape(inputs), _shape(output))

        return hook

    handles = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    try:
        run_example(module)
    finally:
        for handle in handles:
            handle.remove()
    return sizes


def run_example(module: nn.Module) -> None:
    """Sends `example_input_array` through `forward`, which leaves no trace on the module."""
    modes = {layer: layer.training for layer in module.modules()}
    module.eval()  # dropout draws no random numbers and batch norm keeps its statistics
    try:
        with torch.no_grad():
            device = next((p.device for p in module.parameters()), torch.device("cpu"))
            example = _move(module.example_input_array, device)
            if isinstance(example, dict):
                module(**example)
            else:
                module(*(example if isinstance(example, tuple) else (example,)))
    finally:
        for layer, training in modes.items():
            layer.training = training


def _shape(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return str(list(value.shape))
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return next((shape for shape in map(_shape, items) if shape), "")


def _move(value: Batch, device: torch.device) -> Batch:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _move(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_move(item, device) for item in value)
    return value
