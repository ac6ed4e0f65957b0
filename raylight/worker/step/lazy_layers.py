"""Layers that learn their shapes from a first batch, on several ranks: once they have them, all ranks have the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from raylight.worker.group.collectives import agree, broadcast_object, broadcast_tensors, gather_objects


def find_unshaped(module: nn.Module) -> list[str]:
    """Names of the parameters and buffers that have no shape yet."""
    return [name for name, tensor in _named_tensors(module) if is_lazy(tensor)]


def shaped(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    return (tensor for tensor in tensors if not is_lazy(tensor))


def waits_for_shapes(module: nn.Module, world_size: int) -> bool:
    """Whether layers have no shape yet, on all ranks alike: what some have met in a validation, all know then. A layer
    that gets its shape later gets the values of rank 0 with it, in its first forward pass on all ranks."""
    unshaped = find_unshaped(module)
    if agree(not unshaped, world_size):
        return False
    everywhere = gather_objects(unshaped, world_size)
    source = everywhere.index(min(everywhere, key=len))
    differing = sorted({name for names in everywhere for name in names} - set(everywhere[source]))
    tensors: dict[str, Tensor] = dict(_named_tensors(module))
    shapes = broadcast_object([tuple(tensors[name].shape) if name not in unshaped else () for name in differing],
                              world_size, source)  # fmt: skip
    for name, shape in zip(differing, shapes, strict=True):
        if is_lazy(tensors[name]):
            tensors[name].materialize(shape)  # type: ignore[attr-defined]
    broadcast_tensors((tensors[name] for name in differing), world_size, source)
    for layer in module.modules():
        if isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params():
            _Share.follow(layer)
    return bool(everywhere[source])


class _Share:
    """A hook in front of a layer's forward pass, behind the one that gives it its shape."""

    @classmethod
    def follow(cls, layer: nn.Module) -> None:
        if not any(isinstance(hook, cls) for hook in layer._forward_pre_hooks.values()):
            share = cls()
            share.handle = layer.register_forward_pre_hook(share)

    handle: RemovableHandle

    def __call__(self, layer: nn.Module, arguments: tuple[object, ...]) -> None:
        self.handle.remove()
        own = chain(layer.parameters(recurse=False), layer.buffers(recurse=False))
        broadcast_tensors(shaped(own), dist.get_world_size())


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())
