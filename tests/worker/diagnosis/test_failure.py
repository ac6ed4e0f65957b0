"""Which exceptions come again however often the run is tried."""

from __future__ import annotations

import pytest

from raylight.contract.errors import CheckpointMismatch, InvalidArguments
from raylight.worker.diagnosis.failure import describe_failure


class DataError(Exception):
    """A user's own, which only has the name of one of raylight's."""


@pytest.mark.parametrize(
    ("error", "is_permanent"),
    [
        (InvalidArguments("x"), True),
        (CheckpointMismatch("x"), True),
        (ModuleNotFoundError("x"), True),
        (UnboundLocalError("x"), True),
        (DataError("x"), False),
        (ConnectionError("x"), False),
    ],
)
def test_an_error_is_permanent_by_its_class(error: Exception, is_permanent: bool):
    assert describe_failure(error, step=3, stage="train").is_permanent is is_permanent
