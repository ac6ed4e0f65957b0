"""Lengths of time in Lightning's spellings."""

from __future__ import annotations

from datetime import timedelta
from types import MappingProxyType
from typing import Any

import pytest
from pytorch_lightning.callbacks import Timer

from raylight.contract.durations import read_duration

SPELLINGS = ["01:02:03:04", " 00:00:00:05 ", timedelta(minutes=2), {"hours": 2, "minutes": 30}, {"days": 0.5}]


@pytest.mark.parametrize("value", SPELLINGS)
def test_a_duration_is_read_as_lightning_reads_it(value: Any) -> None:
    assert read_duration(value).total_seconds() == Timer(value).time_remaining()


def test_more_is_read_than_lightning_reads() -> None:
    assert read_duration("1:2:3:4") == read_duration("01:02:03:04")
    assert read_duration(MappingProxyType({"hours": 2})) == timedelta(hours=2)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("1:2:3", 'must read DD:HH:MM:SS, such as "00:12:00:00"'),
        ("-1:00:00:00", "must read DD:HH:MM:SS"),
        ("one hour", "must read DD:HH:MM:SS"),
        ({"hour": 1}, "must hold arguments of datetime.timedelta: .*hour"),
        ({"hours": "1"}, "must hold arguments of datetime.timedelta"),
        ({"days": 1e12}, "must hold arguments of datetime.timedelta"),
        ({"seconds": float("nan")}, "must hold arguments of datetime.timedelta"),
        (60, 'must be "DD:HH:MM:SS", a timedelta, or a dict such as'),
    ],
)
def test_what_is_no_duration_is_told_what_would_be_one(value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_duration(value)
