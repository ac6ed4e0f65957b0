from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest

from raylight.storage.checkpoints import Checkpoint, Manifest
from raylight.storage.filesystem import Storage
from raylight.storage.retention import best, retain

nan = math.nan


def make(*values: float | None, monitor: str = "val_loss") -> list[Checkpoint]:
    """Checkpoints of steps 1, 2, ... with these values of the monitored metric; None: it was not logged."""
    return [
        Checkpoint(
            Storage(f"/x/checkpoints/step-{step:08d}"),
            Manifest(step=step, epoch=0, files=(), metrics={} if value is None else {monitor: value}),
        )
        for step, value in enumerate(values, start=1)
    ]


def steps(checkpoints: list[Checkpoint]) -> list[int]:
    return [checkpoint.step for checkpoint in checkpoints]


@pytest.mark.parametrize(
    ("values", "monitor", "mode", "step"),
    [
        ((3.0, 1.0, 2.0), "val_loss", "min", 2),
        ((3.0, 1.0, 2.0), "val_loss", "max", 1),
        ((1.0, nan, 2.0), "val_loss", "min", 1),
        ((nan, 5.0, nan), "val_loss", "max", 2),
        ((math.inf, 5.0, -math.inf), "val_loss", "min", 3),
        ((2.0, 1.0, 1.0), "val_loss", "min", 2),  # the oldest of equals: later ones may only carry its value on
        ((1.0, 2.0, 2.0), "val_loss", "max", 2),
        ((2.0, 1.0, 1.0), None, "min", 2),
        ((None, 2.0, None), "val_loss", "min", 2),
        ((3.0, 1.0, 2.0), None, "min", 2),  # val_loss without being asked
        ((3.0, 1.0, 2.0), None, "max", 2),  # a mode without a monitor says nothing
        ((3.0, 1.0, None), None, "min", 3),  # the newest lacks it: the newest it is
        ((None, None), None, "min", 2),
    ],
)
def test_best(values: tuple[float | None, ...], monitor: str | None, mode: str, step: int) -> None:
    found = best(make(*values), monitor, mode)
    assert found is not None
    assert found.step == step


def test_there_is_no_best_among_what_cannot_be_compared() -> None:
    assert best([]) is None
    assert best(make(nan, nan), "val_loss") is None
    assert best(make(1.0, 2.0), "accuracy") is None
    assert best(make(nan, nan)) is None


@pytest.mark.parametrize(
    ("values", "options", "deleted"),
    [
        ((3.0, 1.0, 2.0), {}, [1]),
        ((3.0, 1.0, 2.0, 2.5), {"keep_best": 2}, [1]),
        ((3.0, 1.0, 2.0, 2.5), {"keep_last": 2}, [1]),
        ((3.0, 1.0, 2.0), {"keep_best": -1}, []),
        ((3.0, 1.0, 2.0), {"keep_last": -1}, []),
        ((2.0, 1.0, 1.0, 1.0), {}, [1, 3]),
        ((1.0, 3.0, 2.0), {"keep_best": 0, "keep_last": 0}, [2]),  # best and last are always kept
        ((3.0, 1.0, 2.0), {"protected": {"step-00000001"}}, []),
        ((3.0, 1.0, 2.0), {"protected": {"/x/checkpoints/step-00000001"}}, []),
        ((1.0, 2.0, 3.0), {"monitor": "val_loss", "mode": "max"}, [1, 2]),
        ((nan, nan, nan), {"monitor": "val_loss"}, [1, 2]),
        ((None, None, None), {}, [1, 2]),
        ((), {}, []),
    ],
)
def test_retention(values: tuple[float | None, ...], options: dict, deleted: list[int]) -> None:
    assert steps(retain(make(*values), **options)) == deleted


def test_retention_keeps_what_it_must_whatever_comes() -> None:
    chance = random.Random(0)
    options = itertools.product((0, 1, 2, -1), (0, 1, 2, -1), ("val_loss", None), ("min", "max"))
    for keep_best, keep_last, monitor, mode in options:
        values = [chance.choice((nan, None, 1.0, 2.0, 3.0, math.inf)) for _ in range(8)]
        checkpoints = make(*values)
        chance.shuffle(checkpoints)
        protected = {f"step-{chance.randint(1, 8):08d}"}
        gone = retain(checkpoints, keep_best, keep_last, monitor, mode, protected)
        left = [it for it in checkpoints if it not in gone]
        assert steps(gone) == sorted(steps(gone))
        assert 8 in steps(left)
        assert protected <= {it.name for it in left}
        assert (best(left, monitor, mode) or left[0]).step == (best(checkpoints, monitor, mode) or left[0]).step
        assert retain(left, keep_best, keep_last, monitor, mode, protected) == []


def carry(checkpoint: Checkpoint, step: int) -> Checkpoint:
    return replace(checkpoint, manifest=replace(checkpoint.manifest, carried={"val_loss": step}))


def test_a_value_that_is_carried_on_takes_one_place_among_the_best() -> None:
    measured = make(1.0, 1.0, 1.0, 2.0, 2.0, 3.0)  # validated after steps 1, 4 and 6
    carried = [carry(it, {2: 1, 3: 1, 5: 4}[it.step]) if it.step in (2, 3, 5) else it for it in measured]
    assert steps(retain(measured, keep_best=2)) == [3, 4, 5]  # each with a value of its own
    assert steps(retain(carried, keep_best=2)) == [2, 3, 5]
    assert steps(retain(carried[1:], keep_best=2)) == [3, 5]  # the one that was measured is lost
    assert steps(retain(carried, keep_best=9)) == [2, 3, 5]


def test_where_all_are_kept_those_without_a_value_are_kept_too() -> None:
    assert retain(make(None, nan, 1.0, 2.0), keep_best=-1, monitor="val_loss") == []
    assert retain(make(None, nan, 1.0, 2.0), keep_last=-1, monitor="val_loss") == []
