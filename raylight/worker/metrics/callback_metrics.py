"""`trainer.callback_metrics` on a rank: a dict that hooks may write to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from raylight.contract.kinds import Value


class CallbackMetrics(dict[str, Tensor]):
    """The newest values; what a hook sets is kept for those that read later."""

    def __init__(self, values: Mapping[str, float], keep: Callable[[str, float], None]):
        super().__init__({name: torch.tensor(value) for name, value in values.items()})
        self._keep = keep

    def __setitem__(self, name: str, value: Value) -> None:
        super().__setitem__(name, torch.as_tensor(value))
        self._keep(name, float(value))

    def update(self, *others: Any, **values: Value) -> None:
        for name, value in dict(*others, **values).items():
            self[name] = value

    def __reduce__(self) -> tuple[type, tuple[dict[str, Tensor]]]:
        return dict, (dict(self),)
