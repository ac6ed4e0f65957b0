"""Which exceptions come again however often the run is tried."""

from __future__ import annotations

import pytest

from raylight.contract.errors import CheckpointMismatch, InvalidArguments
from raylight.worker.diagnosis.failure import describe_failure, is_users


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


@pytest.mark.parametrize(
    ("path", "is_own"),
    [
        ("/home/me/project/net.py", True),
        ("/usr/lib/python3/dist-packages/torch/nn/modules.py", False),
        ("/home/me/.local/lib/python3.11/site-packages/torch/_ops.py", False),
        ("<stdin>", True),
        ("<string>", False),
    ],
)
def test_whose_a_file_is(path: str, is_own: bool):
    assert is_users(path) is is_own


def test_what_pip_has_put_into_a_folder_of_the_path_is_installed(tmp_path, monkeypatch):
    (tmp_path / "lib-1.0.dist-info").mkdir()
    (tmp_path / "lib-1.0.dist-info" / "RECORD").write_text("lib/__init__.py,sha256=x,1\nsingle.py,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not is_users(str(tmp_path / "lib" / "deep" / "part.py"))
    assert not is_users(str(tmp_path / "single.py"))
    assert is_users(str(tmp_path / "library.py"))
