"""Plain values: what `torch.load(weights_only=True)` reads back without running any code."""

from __future__ import annotations

import argparse
import enum
import os
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping

import numpy
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Value

OnTensor = Callable[[Tensor, str], Value]

_ATOMS = frozenset({type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.Size})
_KEYS = frozenset({int, str})  # nearly all keys
_TENSORS = (Tensor, torch.nn.Parameter)
_ARRAY = "__numpy__"  # {_ARRAY: tensor} stands for a numpy array, which weights_only refuses
_ARRAY_TYPES = frozenset(map(numpy.dtype, "?bhilBHILefdFD"))
_MAX_INT_BITS = 2000  # the reader has no opcode for longer ones
_MAX_DEPTH = 100
_ALLOWED = (
    "a checkpoint holds numbers, text, bytes, tensors, numpy arrays, and lists, tuples, sets and dicts of them; "
    "leave it out, or keep something plain that rebuilds it"
)


def check_plain(value: Value, path: str) -> Value:
    """Return a copy of `value` in plain types; tensors stay the same objects.

    Paths, enums, namespaces, numpy scalars and subclasses of the plain types become their plain kind. Raises
    `InvalidArguments` with every entry that has none, each named as `path['key'][0]`.
    """
    return copy_plain(value, path, lambda tensor, _: tensor)


def copy_plain(value: Value, path: str, on_tensor: OnTensor, mistakes: list[str] | None = None) -> Value:
    """As `check_plain`, with what `on_tensor(tensor, path)` returns in place of each tensor.

    With `mistakes` given, they are added to it and nothing is raised.
    """
    copier = _Copier(on_tensor)
    copied = copier.copy(value, path, 0)
    if mistakes is not None:
        mistakes.extend(copier.mistakes)
    elif copier.mistakes:
        raise InvalidArguments(copier.mistakes)
    return copied


def restore_arrays(value: Value) -> Value:
    """Undo what `check_plain` did to numpy arrays, after loading."""
    kind = type(value)
    if kind is dict and value.keys() == {_ARRAY} and isinstance(value[_ARRAY], Tensor):
        return value[_ARRAY].numpy(force=True).copy()
    if kind in (dict, OrderedDict):
        return kind((key, restore_arrays(item)) for key, item in value.items())
    if kind in (list, tuple):
        return value if _all_atoms(value) else kind(restore_arrays(item) for item in value)
    return value


def is_plain_array(array: numpy.ndarray) -> bool:
    """Whether it is kept as it is."""
    return type(array) is numpy.ndarray and array.dtype in _ARRAY_TYPES


def find_tensor_mistake(tensor: Tensor) -> str | None:
    """Say why `tensor` has no plain copy in host memory, or None."""
    if is_lazy(tensor):
        return "has no shape yet, because no batch has come to its layer: use the layer in each step, or remove it"
    if tensor.is_meta:
        return "is on the meta device and has no values"
    if tensor.is_nested or (type(tensor) not in _TENSORS and is_traceable_wrapper_subclass(tensor)):
        return f"is a {type(tensor).__name__}; make it a plain tensor first (DTensor: full_tensor())"
    return None


class _Copier:
    def __init__(self, on_tensor: OnTensor):
        self.on_tensor = on_tensor
        self.mistakes: list[str] = []

    def copy(self, value: Value, path: str, depth: int) -> Value:
        kind = type(value)
        if kind in _ATOMS:
            too_long = kind is int and value.bit_length() > _MAX_INT_BITS
            return self.reject(path, f"is an integer of {value.bit_length()} bits") if too_long else value
        if isinstance(value, Tensor):
            mistake = find_tensor_mistake(value)
            return self.reject(path, mistake) if mistake else self.on_tensor(value, path)
        if depth == _MAX_DEPTH:
            return self.reject(f"{path[:60]}...", f"is nested more than {_MAX_DEPTH} deep, or holds itself")
        if kind is dict or isinstance(value, Mapping):
            return self.copy_mapping(value, path, depth + 1)
        if isinstance(value, (list, tuple, deque, set, frozenset)):
            return self.copy_sequence(value, path, depth + 1)
        return self.convert(value, path, depth + 1)

    def copy_mapping(self, value: Mapping[Value, Value], path: str, depth: int) -> Value:
        copied = OrderedDict() if type(value) is OrderedDict else {}
        for key, item in value.items():
            plain_key = key if type(key) in _KEYS else self.copy_key(key, path, depth)
            copied[plain_key] = self.copy(item, f"{path}[{plain_key!r}]", depth)
        return Counter(copied) if type(value) is Counter else copied

    def copy_key(self, key: Value, path: str, depth: int) -> Value:
        plain_key = self.copy(key, f"{path} key {key!r}", depth)
        if isinstance(plain_key, Hashable) and not isinstance(plain_key, Tensor):
            return plain_key
        return self.reject(path, f"has a {type(key).__name__} as a key")

    def copy_sequence(self, value: Value, path: str, depth: int) -> Value:
        kind = set if isinstance(value, (set, frozenset)) else tuple if isinstance(value, tuple) else list
        if kind is set and any(isinstance(item, Tensor) for item in value):
            return self.reject(path, "is a set of tensors, which has no order")
        if _all_atoms(value):  # a sampler may hold a million indices
            return kind(value)
        return kind([self.copy(item, f"{path}[{index}]", depth) for index, item in enumerate(value)])

    def convert(self, value: Value, path: str, depth: int) -> Value:
        if isinstance(value, (bytes, bytearray)):
            return type(value)(value) if value else bytearray()  # the reader refuses empty bytes
        if isinstance(value, enum.Enum):
            return self.copy(value.value, path, depth)
        if isinstance(value, argparse.Namespace):
            return self.copy(vars(value), path, depth)
        if isinstance(value, os.PathLike):
            return self.copy(os.fspath(value), path, depth)
        if isinstance(value, numpy.generic) and not isinstance(value.item(), numpy.generic):
            return self.copy(value.item(), path, depth)
        if isinstance(value, numpy.ndarray) and value.dtype in _ARRAY_TYPES:
            return {_ARRAY: self.on_tensor(torch.tensor(value), path)}
        kinds: tuple[Value, ...] = (int, float, complex, str)
        for kind in kinds:
            if isinstance(value, kind):
                return self.copy(kind(value), path, depth)
        return self.reject(path, f"is {_describe(value)}")

    def reject(self, path: str, what: str) -> None:
        self.mistakes.append(f"{path} {what}: {_ALLOWED}.")


def _all_atoms(values: Value) -> bool:
    return all(type(item) in _ATOMS and (type(item) is not int or -(2**63) <= item < 2**63) for item in values)


def _describe(value: Value) -> str:
    kind = type(value)
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return f"the {'class' if isinstance(value, type) else 'function'} {value.__module__}.{value.__qualname__}"
    return f"a {kind.__qualname__}" if kind.__module__ == "builtins" else f"a {kind.__module__}.{kind.__qualname__}"
