"""What only rank 0 does."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from raylight.contract.rank_zero import get_rank, rank_zero_info, rank_zero_only, rank_zero_warn, set_rank


@pytest.fixture(autouse=True)
def _rank_zero_again() -> Iterator[None]:
    yield
    set_rank(0)


@rank_zero_only
def double(value: int) -> int:
    return 2 * value


def test_a_function_runs_on_rank_zero_alone() -> None:
    assert double(2) == 4
    set_rank(3)
    assert (get_rank(), rank_zero_only.rank) == (3, 3)  # type: ignore[attr-defined]
    assert double(2) is None
    assert rank_zero_only(lambda: 1, default=-1)() == -1
    assert double.__name__ == "double"


def test_info_fills_placeholders_and_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    rank_zero_info("epoch %d of %s", 3, "x")
    rank_zero_info("100 %")
    assert capsys.readouterr().err == "epoch 3 of x\n100 %\n"
    set_rank(1)
    rank_zero_info("unheard")
    assert capsys.readouterr().err == ""


def test_a_warning_points_at_its_caller() -> None:
    with pytest.warns(RuntimeWarning, match="careful") as caught:
        rank_zero_warn("careful", category=RuntimeWarning)
    assert caught[0].filename == __file__
    set_rank(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rank_zero_warn("unheard")


SEND = """
import sys, cloudpickle
from raylight.contract.rank_zero import rank_zero_only

@rank_zero_only
def shout():
    return "rank 0 " + str(rank_zero_only.rank)

sys.stdout.buffer.write(cloudpickle.dumps(shout))
"""
RECEIVE = """
import sys, pickle
from raylight.contract.rank_zero import set_rank
set_rank(2)
shout = pickle.loads(open(sys.argv[1], "rb").read())
print(shout())
set_rank(0)
print(shout())
"""


def test_a_function_of_a_script_knows_the_workers_rank_not_the_drivers(tmp_path: Path) -> None:
    sent = subprocess.run([sys.executable, "-c", SEND], capture_output=True, check=True, timeout=60).stdout
    (tmp_path / "function").write_bytes(sent)
    received = subprocess.run(
        [sys.executable, "-c", RECEIVE, str(tmp_path / "function")],
        capture_output=True,
        check=True,
        text=True,
        timeout=60,
    )
    assert received.stdout.split("\n")[:2] == ["None", "rank 0 0"]
