"""ModelSummary as an object: the layers of a module, their parameters and sizes, to be read by code."""

from __future__ import annotations

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from raylight.callbacks.mistake_list import Mistakes
from raylight.callbacks.model_summary import Layer, count_parameters, list_layers, run_example
from raylight.callbacks.model_summary import summarize as show

UNITS = (" ", "K", "M", "B", "T")


class ModelSummary:
    """The layers of `model` down to `max_depth` (-1: all); lists have one item for each."""

    def __init__(self, model: nn.Module, max_depth: int = 1):
        mistakes = Mistakes("ModelSummary")
        mistakes.require_count("max_depth", max_depth, -1)
        mistakes.raise_any()
        self._model, self._max_depth = model, max_depth
        self._layers: list[Layer] = list_layers(model, max_depth)

    @property
    def layer_names(self) -> list[str]:
        """Names, as `model.get_submodule` takes them."""
        return [layer.name for layer in self._layers]

    @property
    def layer_types(self) -> list[str]:
        """Names of the layers' classes."""
        return [layer.kind for layer in self._layers]

    @property
    def layer_modes(self) -> list[bool]:
        """Whether each is in training mode."""
        return [layer.mode == "train" for layer in self._layers]

    @property
    def in_sizes(self) -> list[str]:
        """Shapes of what goes in, as text; "" without `example_input_array`."""
        return [layer.in_size for layer in self._layers]

    @property
    def out_sizes(self) -> list[str]:
        """Shapes of what comes out, as text; "" without `example_input_array`."""
        return [layer.out_size for layer in self._layers]

    @property
    def param_nums(self) -> list[int]:
        """Numbers of parameters; a lazy layer that has no shape yet counts 0."""
        return [layer.num_parameters or 0 for layer in self._layers]

    @property
    def total_parameters(self) -> int:
        """Parameters of the module, shared ones once."""
        return count_parameters(self._model) or 0

    @property
    def trainable_parameters(self) -> int:
        """Those that require a gradient."""
        return count_parameters(self._model, trainable=True) or 0

    @property
    def total_training_modes(self) -> dict[str, int]:
        """How many modules inside are in "train" and in "eval" mode."""
        modes = [module.training for name, module in self._model.named_modules() if name]
        return {"train": sum(modes), "eval": len(modes) - sum(modes)}

    @property
    def model_size(self) -> float:
        """Megabytes of parameters."""
        return sum(p.numel() * p.element_size() for p in self._model.parameters()) / 1e6

    @property
    def total_flops(self) -> int:
        """Floating-point operations of one forward pass of `example_input_array`; 0 without it."""
        if getattr(self._model, "example_input_array", None) is None:
            return 0
        counter = FlopCounterMode(display=False)
        with counter:
            run_example(self._model)
        return int(counter.get_total_flops())

    def __str__(self) -> str:
        return show(self._model, self._max_depth)

    __repr__ = __str__


def summarize(lightning_module: nn.Module, max_depth: int = 1) -> ModelSummary:
    """The summary of a module."""
    return ModelSummary(lightning_module, max_depth)


def get_human_readable_count(number: int) -> str:
    """A number with three digits or so and K, M, B or T for thousands: "1.2 M"."""
    if number < 0:
        raise ValueError(f"number={number} must be at least 0")
    power = min((len(str(int(number))) - 1) // 3, len(UNITS) - 1)
    scaled = number / 1000**power
    return f"{int(scaled):,d} {UNITS[power]}" if power == 0 or scaled >= 100 else f"{scaled:,.1f} {UNITS[power]}"


def get_formatted_model_size(total_model_size: float) -> str:
    """Megabytes, as text."""
    return f"{total_model_size:,.3f}"
