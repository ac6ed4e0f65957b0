"""Seeds, and the state of the random number generators as plain values."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from raylight.contract import seeding
from raylight.contract.errors import InvalidArguments
from raylight.contract.seeding import isolate_rng, last_seed, rng_state, seed_everything, seed_process, set_rng_state


def draw() -> tuple[float, float, float, float]:
    return random.random(), random.gauss(0, 1), float(np.random.standard_normal()), float(torch.randn(()))


def test_seed_everything_makes_all_generators_repeat(capsys: pytest.CaptureFixture[str]) -> None:
    assert seed_everything(5) == 5
    assert "Seed set to 5" in capsys.readouterr().err
    first = draw()
    assert draw() != first
    seed_everything(5, workers=True, verbose=False)
    assert draw() == first
    assert capsys.readouterr().err == ""
    assert last_seed() == 5


def test_without_a_seed_the_environments_is_taken_else_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert seed_everything(verbose=False) == 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    assert seed_everything(verbose=False) == 17
    monkeypatch.setenv("PL_GLOBAL_SEED", "many")
    with pytest.raises(InvalidArguments, match="PL_GLOBAL_SEED='many' is no whole number"):
        seed_everything(verbose=False)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused_and_changes_nothing(seed: int) -> None:
    seed_everything(3, verbose=False)
    with pytest.raises(InvalidArguments, match="allowed is 0 to 4294967295"):
        seed_everything(seed)
    assert last_seed() == 3


def test_a_ranks_seed_may_be_beyond_numpys_limit_and_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeding, "_last_seed", None)
    seed_process(2**32 + 5)
    first = draw()
    seed_process(2**32 + 5)
    assert draw() == first
    assert last_seed() is None


def test_the_state_goes_through_a_file_that_is_read_without_code(tmp_path: Path) -> None:
    seed_everything(9, verbose=False)
    random.gauss(0, 1)  # leaves a second value behind, which is state too
    np.random.standard_normal()
    torch.save(rng_state(), tmp_path / "rng.pt")
    expected = [draw() for _ in range(5)]
    seed_everything(10, verbose=False)
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert [draw() for _ in range(5)] == expected


def test_a_gpus_state_is_passed_over_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    state = rng_state()
    assert "cuda" not in state
    expected = draw()
    set_rng_state({**state, "cuda": torch.zeros(16, dtype=torch.uint8)})
    assert draw() == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpus_state_is_put_back() -> None:
    torch.randn(1, device="cuda")
    state = rng_state()
    expected = torch.randn(4, device="cuda")
    set_rng_state(state)
    assert torch.equal(torch.randn(4, device="cuda"), expected)


def test_what_is_drawn_inside_isolate_rng_leaves_no_trace() -> None:
    seed_everything(4, verbose=False)
    expected = draw()
    seed_everything(4, verbose=False)
    with isolate_rng():
        assert draw() == expected
    assert draw() == expected
    state = rng_state()
    with contextlib.suppress(ZeroDivisionError), isolate_rng():
        draw()
        raise ZeroDivisionError
    assert torch.equal(rng_state()["torch"], state["torch"])
