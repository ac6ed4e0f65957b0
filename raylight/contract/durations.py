"""A length of time, in each of the ways that Lightning lets it be said."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta

Duration = timedelta | str | Mapping[str, float]
FORMS = '"DD:HH:MM:SS", a timedelta, or a dict such as {"hours": 2}'


def read_duration(value: object) -> timedelta:
    """`value` may be each of FORMS. Raises ValueError with the end of the sentence "it ..."."""
    if isinstance(value, timedelta):
        return value
    if isinstance(value, str):
        parts = re.fullmatch(r"(\d+):(\d+):(\d+):(\d+)", value.strip())
        if parts is None:
            raise ValueError('must read DD:HH:MM:SS, such as "00:12:00:00" for twelve hours')
        value = dict(zip(("days", "hours", "minutes", "seconds"), map(int, parts.groups()), strict=True))
    if not isinstance(value, Mapping):
        raise ValueError(f"must be {FORMS}")
    try:
        return timedelta(**value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"must hold arguments of datetime.timedelta: {error}") from None
