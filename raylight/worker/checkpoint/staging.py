"""Staging: a training state split over the ranks, and one rank's files laid out with a host buffer for each tensor."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import StateDict, Value
from raylight.worker.checkpoint.host_buffers import HostBuffers
from raylight.worker.checkpoint.plain_values import OnTensor, copy_plain, find_tensor_mistake
from raylight.worker.checkpoint.state import State

MODULE_FILE = "module.pt"


def model_file(rank: int, world_size: int) -> str:
    return f"model-{rank:05d}-of-{world_size:05d}.pt"


def training_file(rank: int, world_size: int) -> str:
    return f"training-{rank:05d}-of-{world_size:05d}.pt"


def share(names_and_sizes: Iterable[tuple[str, int]], world_size: int, rank: int) -> set[str]:
    """Return the names that `rank` writes: the largest first, each to the rank that has the fewest bytes so far."""
    if world_size == 1:
        return {name for name, _ in names_and_sizes}
    loads = [(0, candidate) for candidate in range(world_size)]
    mine = set()
    for name, size in sorted(names_and_sizes, key=lambda item: (-item[1], item[0])):
        num_bytes, writer = loads[0]
        heapq.heapreplace(loads, (num_bytes + size, writer))
        if writer == rank:
            mine.add(name)
    return mine


def addresses(tensors: Iterable[Tensor]) -> set[int]:
    """Where in memory tensors lie; those that are empty, not strided or without a shape lie nowhere."""
    return {_address(tensor) for tensor in tensors} - {0}


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if not is_lazy(tensor) and tensor.layout is torch.strided else 0


@dataclass(slots=True)
class Copy:
    path: str
    source: Tensor
    target: Tensor
    owned: bool  # by an optimizer, so that it changes in `optimizer.step` alone


class Staging:
    """Splits a state over the ranks, and lays out this rank's files with a host buffer in place of each tensor.

    Parameters and what optimizers own are equal on all ranks by construction, and shared out. Every other replicated
    tensor is rank 0's: running statistics drift apart until ranks meet again, and a callback may hold one there alone.
    """

    def __init__(self, buffers: HostBuffers, rank: int, world_size: int, owned: set[int]):
        self.buffers, self.rank, self.world_size, self.owned = buffers, rank, world_size, owned
        self.copies: list[Copy] = []
        self.targets: dict[str, Tensor] = {}
        self.mistakes: list[str] = []

    def run(self, state: State, weights_only: bool) -> StateDict:
        weights, extras = self.split_model(state.model)
        alike = self.owned | addresses(state.parameters)
        shared: dict[str, Tensor] = {}
        replicated, own = None, {}
        if not weights_only:
            replicated = self.plain(state.replicated, "replicated", partial(self.share_or_stage, shared))
            own = self.plain(state.own, "own")
        module = self.plain(state.module, "module") if self.rank == 0 else {}
        if self.mistakes:
            raise InvalidArguments(self.mistakes)

        common = {path: tensor for path, tensor in weights.values() if _address(tensor) in alike} | shared
        sizes = {path: tensor.numel() * tensor.element_size() for path, tensor in common.items()}
        mine = share(sizes.items(), self.world_size, self.rank)
        if self.rank == 0:
            mine |= {path for path, _ in weights.values()} - common.keys()
        model = OrderedDict({name: self.stage(t, path) for name, (path, t) in weights.items() if path in mine})
        if self.rank == 0:
            model.update(extras)
            if hasattr(state.model, "_metadata"):  # versions of the modules' layouts, which torch keeps beside the dict
                model.__dict__["_metadata"] = self.plain(state.model._metadata, "_metadata")
        contents: StateDict = {model_file(self.rank, self.world_size): model}
        if not weights_only:
            contents[training_file(self.rank, self.world_size)] = {
                "replicated": replicated if self.rank == 0 else None,
                "shared": list(shared) if self.rank == 0 else None,
                "tensors": {path: self.stage(tensor, path) for path, tensor in shared.items() if path in mine},
                "own": own,
            }
        if self.rank == 0:
            contents[MODULE_FILE] = module
        return contents

    def split_model(self, model: StateDict) -> tuple[dict[str, tuple[str, Tensor]], StateDict]:
        """Tensors with their path, tied ones under the path of the first; and the rest, plain, on rank 0."""
        weights: dict[str, tuple[str, Tensor]] = {}
        extras: StateDict = {}
        first: dict[Value, str] = {}
        for name, value in model.items():
            path = f"model[{name!r}]"
            if not isinstance(value, Tensor):
                if self.rank == 0:
                    extras[name] = self.plain(value, path)
            elif mistake := find_tensor_mistake(value):
                self.mistakes.append(f"{path} {mistake}.")
            else:
                weights[name] = (first.setdefault(_identity(value, path), path), value)
        return weights, extras

    def plain(self, value: Value, path: str, on_tensor: OnTensor | None = None) -> Value:
        return copy_plain(value, path, on_tensor or self.stage, self.mistakes)

    def share_or_stage(self, shared: dict[str, Tensor], tensor: Tensor, path: str) -> Tensor | None:
        if _address(tensor) in self.owned:
            shared[path] = tensor
            return None
        return self.stage(tensor, path) if self.rank == 0 else None

    def stage(self, tensor: Tensor, path: str) -> Tensor:
        target = self.targets.get(path)
        if target is not None:
            return target
        source = tensor.detach() if tensor.requires_grad else tensor
        if source.layout is not torch.strided or source.is_quantized:
            target = source.to("cpu", copy=True)  # rare, and has no buffer to reuse
        else:
            if type(source) is not Tensor:
                source = source.as_subclass(Tensor)
            target = self.buffers.get(path, source)
            self.copies.append(Copy(path, source, target, _address(source) in self.owned))
        self.targets[path] = target
        return target


def _identity(tensor: Tensor, path: str) -> Value:
    address = _address(tensor)
    return (address, tensor.dtype, tensor.shape, tensor.stride()) if address else path
