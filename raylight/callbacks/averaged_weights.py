"""AveragedWeights: a running average of a module's state that can change places with the module's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_swa_multi_avg_fn

from raylight.contract.kinds import Value

AverageOne = Callable[[Tensor, Tensor, Tensor | int], Tensor]
AverageMany = Callable[[list[Tensor], list[Tensor], Tensor | int], None]


class AveragedWeights:
    """Averages the parameters of a module as `torch.optim.swa_utils.AveragedModel` does, without a second module.

    The first update copies the module's state. Later ones average what is of floating point, by `avg_fn(averaged,
    current, num_averaged)` or in place by `multi_avg_fn`, or with equal weights; buffers only with `use_buffers`, else
    they are the newest. `device` None keeps the average on the module's device. State that the module does not save
    (buffers that are not persistent) stays out of it.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        avg_fn: AverageOne | None = None,
        multi_avg_fn: AverageMany | None = None,
    ):
        self.device = None if device is None else torch.device(device)
        self.use_buffers = use_buffers
        self.avg_fn = avg_fn
        self.multi_avg_fn = multi_avg_fn or (None if avg_fn else get_swa_multi_avg_fn())
        self.reset()

    def reset(self) -> None:
        self.num_averaged = 0
        self.is_swapped = False  # the module has the average, and `kept` what the module had before
        self.kept: dict[str, Tensor] = {}  # by name in the module's state

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take the module's present state into the average."""
        current = dict(unique_state(module))
        if self.num_averaged == 0:
            self.kept = {name: self._copy(tensor, like=tensor) for name, tensor in current.items()}
        else:
            averaged = self._choose_averaged(module, current)
            self._average({name: tensor for name, tensor in current.items() if name in averaged})
            for name in current.keys() - averaged:
                self.kept[name].copy_(current[name])
        self.num_averaged += 1

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange the module's state and the average; before the first update nothing happens."""
        if self.num_averaged == 0:
            return
        self.is_swapped = not self.is_swapped
        for name, tensor in unique_state(module):
            before = tensor.detach().clone()
            tensor.copy_(self.kept[name])
            self.kept[name].copy_(before)

    def state_dict(self) -> dict[str, Value]:
        """ "average" or, while they have changed places, "current" holds what the module does not."""
        if self.num_averaged == 0:
            return {"num_averaged": 0}
        return {"num_averaged": self.num_averaged, "current" if self.is_swapped else "average": dict(self.kept)}

    def load_state_dict(self, state: dict[str, Value], module: nn.Module) -> None:
        """Put back what `state_dict` returned. `module` has its state already: with "current", that is the average."""
        self.reset()
        self.num_averaged = state["num_averaged"]
        if self.num_averaged == 0:
            return
        kept = state["current"] if "current" in state else state["average"]
        self.kept = {name: self._copy(kept.get(name, tensor), like=tensor) for name, tensor in unique_state(module)}
        if "current" in state:
            self.swap(module)
            self.is_swapped = False

    def _copy(self, tensor: Tensor, like: Tensor) -> Tensor:
        return tensor.detach().to(device=self.device or like.device, dtype=like.dtype, copy=True)

    def _choose_averaged(self, module: nn.Module, current: dict[str, Tensor]) -> set[str]:
        floating = {name for name, t in current.items() if t.is_floating_point() or t.is_complex()}
        return floating if self.use_buffers else floating - {name for name, _ in module.named_buffers()}

    def _average(self, current: dict[str, Tensor]) -> None:
        count = torch.tensor(self.num_averaged)  # on the CPU, so that no function that reads it waits for the device
        groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for name, tensor in current.items():
            averaged = self.kept[name]
            pair = groups.setdefault((averaged.device, averaged.dtype), ([], []))
            pair[0].append(averaged)
            pair[1].append(tensor.detach().to(averaged.device))
        for averages, tensors in groups.values():
            if self.multi_avg_fn is not None:
                self.multi_avg_fn(averages, tensors, count)
                continue
            assert self.avg_fn is not None
            for averaged, tensor in zip(averages, tensors, strict=True):
                averaged.copy_(self.avg_fn(averaged, tensor, count))


class AverageView:
    """The average under the names of `torch.optim.swa_utils.AveragedModel`, for subclasses that read it."""

    def __init__(self, average: AveragedWeights, module: nn.Module):
        self._average, self._module = average, module

    @property
    def n_averaged(self) -> Tensor:
        """Number of updates so far."""
        return torch.tensor(self._average.num_averaged)

    @property
    def module(self) -> nn.Module:
        """A copy of the module with the averaged weights, made at each call."""
        found = copy.deepcopy(self._module)
        if self._average.num_averaged and not self._average.is_swapped:
            with torch.no_grad():
                for name, tensor in unique_state(found):
                    tensor.copy_(self._average.kept[name])
        return found

    def update_parameters(self, model: nn.Module) -> None:
        """Take the module's present state into the average."""
        self._average.update(model)


def unique_state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the module's state, each once, under its first name."""
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor
