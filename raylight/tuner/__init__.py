"""The tuner: short runs that find a learning rate or a batch size, of which nothing else stays."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raylight.tuner.tuner import Tuner

__all__ = ["Tuner"]


def __getattr__(name: str) -> type:
    if name != "Tuner":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from raylight.tuner.tuner import Tuner

    return Tuner
