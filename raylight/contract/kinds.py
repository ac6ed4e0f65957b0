"""Names for values whose type is the user's own affair; a type checker takes each of them as Any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

Batch: TypeAlias = Any
"""An item that a loader yields: a tensor, or containers of tensors and other values."""
Output: TypeAlias = Any
"""The return value of a step, a closure or a hook."""
Loader: TypeAlias = Any
"""A DataLoader, any other iterable of batches, or a list or dict of those."""
Dataset: TypeAlias = Any
"""The data behind a DataLoader, read by index or as a stream."""
Sampler: TypeAlias = Any
"""An order of samples: one of torch's samplers, or any iterable of indices."""
Index: TypeAlias = Any
"""An item of a sampler: one sample's index, or the indices of a batch; of a stream, an item itself."""
Indices: TypeAlias = Any
"""A tensor, range or list of indices; an iterator if nobody knows how many there are."""
Scheduler: TypeAlias = Any
"""A learning rate scheduler: torch's, or any object with `step` and `state_dict`."""
ProcessGroup: TypeAlias = Any
"""A process group of torch.distributed that user code has made; None stands for all ranks."""
Value: TypeAlias = Any
"""A value of the user's own: a hyperparameter, an item of a state, a setting."""
StateDict: TypeAlias = dict[str, Value]
"""The state of a user's or torch's object."""
Hook: TypeAlias = Callable[..., Output]
"""A hook or another method of the user's."""
Closure: TypeAlias = Callable[[], Output]
"""A function that an optimizer calls for the loss."""
