"""The Ray that raylight starts: it sees the GPUs that were named, and is started again for others."""

from __future__ import annotations

import os
from typing import Any

import pytest
import ray

from raylight.launch.ray_local import LocalRay


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES was while Ray started."""
    found: list[str | None] = []
    monkeypatch.setattr(ray, "init", lambda **_: found.append(os.environ.get("CUDA_VISIBLE_DEVICES")))
    return found


@pytest.mark.parametrize(
    ("before", "gpus", "expected"),
    [(None, (0, 2), "0,2"), (None, (), None), ("4,5,6", (0, 2), "4,6"), ("4,5", (), "4,5"), (None, (1,), "1")],
)
def test_ray_sees_the_gpus_that_were_named_and_this_process_all(
    monkeypatch: pytest.MonkeyPatch, seen: list[Any], before: str | None, gpus: tuple[int, ...], expected: str | None
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if before is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    local = LocalRay()
    local._gpus = gpus
    local._init()
    assert seen == [expected]
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before


def test_a_ray_with_other_gpus_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    local = LocalRay()
    assert local.fits(64, (0, 2))  # none runs
    monkeypatch.setattr(LocalRay, "is_running", True)
    local._num_cpus, local._gpus = 4, (0, 2)
    assert local.fits(4, (0, 2))
    assert not local.fits(8, (0, 2))
    assert not local.fits(2, ())
    assert not local.fits(2, (1, 2))
