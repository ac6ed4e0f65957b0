"""Names for values whose type is the user's own affair; a type checker takes each of them as Any."""

from __future__ import annotations

from typing import Any, TypeAlias

Batch: TypeAlias = Any
"""An item that a loader yields: a tensor, or containers of tensors and other values."""
Output: TypeAlias = Any
"""The return value of a step hook."""
Loader: TypeAlias = Any
"""An iterable of batches, or a list or dict of them."""
Value: TypeAlias = Any
"""A value under a name of the user's: a hyperparameter, an item of a state, a setting."""
