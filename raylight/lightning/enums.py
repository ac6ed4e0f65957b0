"""Strings with a fixed choice of values."""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class LightningEnum(StrEnum):
    """A string that equals its value in upper and lower case."""

    @classmethod
    def from_str(cls, value: str) -> Self:
        """The member of that name or value; raises ValueError if there is none."""
        for member in cls:
            if value.lower() in (member.name.lower(), member.value.lower()):
                return member
        raise ValueError(f"{value!r} is none of {[member.value for member in cls]}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and self.value.lower() == str(getattr(other, "value", other)).lower()

    def __hash__(self) -> int:
        return hash(self.value.lower())


class GradClipAlgorithmType(LightningEnum):
    """How `gradient_clip_val` is applied."""

    VALUE = "value"
    NORM = "norm"

    @staticmethod
    def supported_type(val: str) -> bool:
        """Whether it is one of the two."""
        return val in GradClipAlgorithmType.supported_types()

    @staticmethod
    def supported_types() -> list[str]:
        """Both, as strings."""
        return [member.value for member in GradClipAlgorithmType]
