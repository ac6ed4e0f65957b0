"""Handover: a task from the driver to the workers and results back, large tensors without a copy by pickle."""

from __future__ import annotations

import ctypes
import io
import pickle
import types
from collections.abc import Sequence
from typing import Any

import cloudpickle
import numpy as np
import torch

from raylight.contract import main_module
from raylight.contract.reducers import hooks_of, put_hooks, reduce_special

Buffer = Any  # what supports the buffer protocol; typing has no word for it before Python 3.12

MIN_BUFFER_BYTES = 1 << 20
"""Smaller tensors and arrays are pickled in place: sharing them saves less than it costs."""


def dump(obj: Any) -> tuple[bytes, list[memoryview]]:
    """Pickles `obj` by cloudpickle, and classes of `__main__` or a notebook by value.

    The memory of large dense tensors and arrays is not copied, it comes back as buffers over the objects' own memory.
    Views of one storage and tied parameters stay so. Tensors of a GPU arrive on the CPU.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump((obj, pickler.of_main))
    return file.getvalue(), pickler.buffers


def load(payload: Buffer, buffers: Sequence[Buffer], adopts: bool = False) -> Any:
    """The object that `dump` was given. Large tensors are views of `buffers`, if those can be written to; but
    parameters, and all tensors if not, have memory of their own. `adopts`: classes of the script become known in this
    `__main__`."""
    try:
        obj, of_main = pickle.loads(payload, buffers=buffers)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}: this worker cannot import a module that the model, the data or a callback comes from. Install "
            "it on every node, or send it along by ray.init(runtime_env={'working_dir': '.'})",
            name=error.name,
            path=error.path,
        ) from error
    if adopts:
        main_module.adopt(of_main)
    return obj


class _Pickler(cloudpickle.Pickler):
    def __init__(self, file: io.BytesIO):
        super().__init__(file, protocol=5, buffer_callback=self._stays_inside)
        self.buffers: list[memoryview] = []
        self.of_main: dict[str, Any] = {}
        """Classes and functions of `__main__` that go along, by name. Pickled last, when they are known."""
        self._memories: dict[int, _Memory] = {}

    def _stays_inside(self, buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < MIN_BUFFER_BYTES:
            return True
        self.buffers.append(raw)
        return False

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is types.CodeType:
            return _load_code, (self.dispatch_table[kind](obj)[1], obj.co_filename)
        if kind is _Memory:
            return _load_memory, (pickle.PickleBuffer(_view_bytes(obj.storage)), obj.is_own)
        if (kind is torch.Tensor or kind is torch.nn.Parameter) and _is_plain(obj):
            arguments = (
                kind, self._memory_of(obj), obj.dtype, obj.storage_offset(), tuple(obj.shape), obj.stride(),
                obj.requires_grad,
            )  # fmt: skip
            # As a state, not as an argument: a hook often holds the module whose parameter the tensor is.
            extra = obj.__dict__ or None, hooks_of(obj)
            return (_load_tensor, arguments, extra, None, None, _set_extra) if any(extra) else (_load_tensor, arguments)
        main_module.note(self.of_main, obj)
        special = reduce_special(obj)
        return special if special is not None else super().reducer_override(obj)

    def _memory_of(self, tensor: torch.Tensor) -> _Memory:
        """The same object for all views of one storage, so that pickle writes it once."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._memories:
            self._memories[storage._cdata] = _Memory(storage, isinstance(tensor, torch.nn.Parameter))
        return self._memories[storage._cdata]


class _Memory:
    """The bytes that tensors view."""

    def __init__(self, storage: torch.UntypedStorage, is_own: bool):
        self.storage = storage
        self.is_own = is_own
        """Whether each process must have it to itself. True for parameters: some strategies resize their storage."""


def _view_bytes(storage: torch.UntypedStorage) -> ctypes.Array:
    """A CPU storage's own memory, or a copy of a GPU's. Not by `numpy()`: that would forbid the user to resize it."""
    storage = storage.cpu()
    view = (ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())
    view.owner = storage  # type: ignore[attr-defined]
    return view


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether bytes, shape and strides are all there is to it; others are pickled torch's way."""
    return (
        tensor.layout is torch.strided
        and tensor.device.type != "meta"
        and not tensor.is_quantized
        and not tensor.is_nested
        and not tensor.is_conj()
        and not tensor.is_neg()
        and (tensor.is_leaf or not tensor.requires_grad)
    )


def _load_code(arguments: tuple[Any, ...], filename: str) -> types.CodeType:
    """Since its 3.1.3 cloudpickle leaves the file's name out, by which tracebacks find the user's lines."""
    return types.CodeType(*arguments).replace(co_filename=filename)


def _load_memory(buffer: Buffer, is_own: bool) -> torch.UntypedStorage:
    source = np.frombuffer(buffer, dtype=np.uint8)
    if not is_own and source.flags.writeable and source.nbytes >= MIN_BUFFER_BYTES:
        return torch.from_numpy(source).untyped_storage()
    storage = torch.UntypedStorage(source.nbytes)
    ctypes.memmove(storage.data_ptr(), source.ctypes.data, source.nbytes)
    return storage


def _load_tensor(
    kind: type, storage: torch.UntypedStorage, dtype: torch.dtype, offset: int, size: tuple[int, ...],
    stride: tuple[int, ...], requires_grad: bool,
) -> torch.Tensor:  # fmt: skip
    tensor = torch.empty(0, dtype=dtype).set_(storage, offset, size, stride)
    if kind is torch.nn.Parameter:
        tensor = torch.nn.Parameter(tensor, requires_grad)
    elif requires_grad:
        tensor.requires_grad_()
    return tensor


def _set_extra(tensor: torch.Tensor, extra: tuple[dict[str, Any] | None, tuple[Any, Any] | None]) -> None:
    attributes, hooks = extra
    if attributes:
        tensor.__dict__.update(attributes)
    if hooks:
        put_hooks(tensor, hooks)
