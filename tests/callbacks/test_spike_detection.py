"""SpikeDetection: Lightning's verdicts, on the same losses."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raylight.callbacks.spike_detection import SpikeDetection, TrainingSpikeException
from raylight.contract.config import Config
from raylight.contract.errors import InvalidArguments


def judge(callback: Any, losses: list[float], trainer: Any) -> int | None:
    """The batch of the spike."""
    for batch_idx, loss in enumerate(losses):
        try:
            callback.on_train_batch_end(trainer, None, {"loss": torch.tensor(loss)}, None, batch_idx)
        except RuntimeError as error:
            if "spike" not in str(error):
                raise
            return batch_idx
    return None


def make_trainer(folder: Path) -> Any:
    strategy = SimpleNamespace(
        root_device=torch.device("cpu"), barrier=lambda: None, reduce_boolean_decision=lambda decision, all: decision
    )
    return SimpleNamespace(default_root_dir=str(folder), strategy=strategy, global_rank=0)


CASES: list[dict[str, Any]] = [
    {}, {"mode": "max"}, {"window": 3, "warmup": 4}, {"atol": 1.0, "rtol": None}, {"atol": 0.5, "rtol": 1.0},
    {"finite_only": False}, {"warmup": 0},
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_spike_is_where_lightning_sees_it(case: dict[str, Any], tmp_path: Path):
    lightning = pytest.importorskip("pytorch_lightning.callbacks")
    found = []
    for seed in range(40):
        draw = random.Random(seed)
        losses = [draw.uniform(0.5, 1.5) * draw.choice([1, 1, 1, 1, 1, 4, -1]) for _ in range(25)]
        if seed % 4 == 0:
            losses[draw.randrange(25)] = draw.choice([math.inf, math.nan])
        ours = judge(SpikeDetection(**case), losses, make_trainer(tmp_path / "ours"))
        theirs = judge(lightning.SpikeDetection(**case), losses, make_trainer(tmp_path / "theirs"))
        assert ours == theirs, (seed, losses)
        found.append(ours)
    assert any(each is not None for each in found)
    files = [json.loads((tmp_path / who / "skip_batches.json").read_text()) for who in ("ours", "theirs")]
    assert files[0] == files[1]


def test_a_spike_ends_the_run_and_the_next_leaves_its_batches_out(fit: Any, make_net: Any, tmp_path: Path):
    class Leaping(type(make_net())):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) * (50 if batch_idx == 4 else 1)

    callback = SpikeDetection(exclude_batches_path=tmp_path / "bad")
    with pytest.raises(TrainingSpikeException, match="Training spike detected in batch 4"):
        fit(Leaping(), callback)
    assert json.loads((tmp_path / "bad" / "skip_batches.json").read_text()) == [3, 4]


def test_its_state_goes_on(tmp_path: Path):
    first, second = SpikeDetection(), SpikeDetection()
    assert judge(first, [1.0, 0.9, 0.8], make_trainer(tmp_path)) is None
    second.load_state_dict(first.state_dict())
    for callback in (first, second):
        assert judge(callback, [0.7, 4.0], make_trainer(tmp_path)) == 1


def test_mistakes_are_named():
    with pytest.raises(InvalidArguments) as caught:
        SpikeDetection(mode="mn", window=0, atol="much")  # type: ignore[arg-type]
    assert len(caught.value.mistakes) == 3
    assert "exclude_batches_path" in SpikeDetection()._find_mistakes(Config(storage_path="s3://bucket/runs"))[0]
    assert SpikeDetection(exclude_batches_path="here")._find_mistakes(Config(storage_path="s3://bucket/runs")) == []
    with pytest.raises(TypeError, match="training_step returned NoneType"):
        SpikeDetection().on_train_batch_end(None, None, {"loss": None}, None, 0)  # type: ignore[arg-type]
