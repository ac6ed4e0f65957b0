"""`raylight.benchmark` and its command on modules whose cost is known."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import raylight as pl
from raylight.command import main
from raylight.speed.memory import PeakMemory
from raylight.speed.result import Latency, Measurement

QUICK = {"max_s": 0.2, "spread": 0.5}


class Dense(pl.Module):
    def __init__(self, width: int = 64, sleep_s: float = 0.0):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 1))
        self.norm = nn.BatchNorm1d(32)
        self.sleep_s = sleep_s
        self.sizes: list[int] = []
        self.example_input_array = torch.randn(4, 32)

    def forward(self, x):
        if self.sleep_s:
            time.sleep(self.sleep_s)
        return self.net(self.norm(x))

    def training_step(self, batch, batch_idx):
        self.log("loss", 1.0)
        return {"loss": self(batch).pow(2).mean()}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def test_latency_throughput_and_operations():
    found = pl.benchmark(Dense(sleep_s=0.005), **QUICK)
    assert 0.005 <= found.latency_s.p50 <= found.latency_s.p95 <= found.latency_s.p99
    assert found.throughput <= 4 / 0.005
    assert found.throughput == pytest.approx(4 / found.latency_s.p50, rel=0.5)
    assert found.flops == 2 * 4 * (32 * 64 + 64)
    [measured] = found.measurements
    assert measured.case == (4, "32-true", False)
    assert measured.num_calls >= 10
    assert measured.flops_share is None
    assert "predict" in str(found)


def test_every_combination_is_measured():
    found = pl.benchmark(Dense(), batch_sizes=[1, 6], precision=["32-true", "bf16-mixed"], **QUICK)
    cases = [(1, "32-true"), (6, "32-true"), (1, "bf16-mixed"), (6, "bf16-mixed")]
    assert [it.case[:2] for it in found.measurements] == cases
    assert [it.flops for it in found.measurements[:2]] == [2 * 2112, 6 * 2 * 2112]
    with pytest.raises(pl.InvalidArguments, match="several measurements"):
        _ = found.latency_s


def test_compiled_and_not():
    found = pl.benchmark(Dense(), compile=[False, {"backend": "eager"}], **QUICK)
    assert [it.compiled for it in found.measurements] == [False, True]


def test_training_on_a_copy():
    module = Dense()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random_before = torch.get_rng_state()
    train = pl.benchmark(module, stage="train", **QUICK)
    assert train.flops > 2 * pl.benchmark(module, **QUICK).flops
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert module.training
    assert torch.equal(torch.get_rng_state(), random_before)


def test_a_loader_and_nested_batches():
    class Pairs(pl.Module):
        def predict_step(self, batch, batch_idx):
            assert len(batch["x"]) == len(batch["more"][0]) == 5
            assert batch["names"] == ["a", "b"]
            return batch["x"] + batch["more"][0]

    batch = {"x": torch.ones(2, 3), "more": (torch.zeros(2, 3),), "names": ["a", "b"]}
    assert pl.benchmark(Pairs(), batch, batch_sizes=5, **QUICK).measurements[0].batch_size == 5
    loader = DataLoader(torch.randn(20, 32), batch_size=10)
    assert pl.benchmark(Dense(), loader, **QUICK).measurements[0].batch_size == 10


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="not Linux")
def test_peak_memory_is_what_was_held_at_most():
    memory = PeakMemory(torch.device("cpu"))
    held = torch.ones(64 << 20, dtype=torch.uint8)
    del held
    small = torch.ones(1 << 20, dtype=torch.uint8)
    peak = memory.read()
    assert peak is not None
    assert 63 << 20 < peak < 80 << 20  # the system counts pages in lots
    del small


def test_all_mistakes_at_once():
    with pytest.raises(pl.InvalidArguments) as caught:
        pl.benchmark(nn.Linear(1, 1), batch_sizes=[0], precision="33", compile=3, stage="prediction", spread=2, max_s=0)
    said = str(caught.value)
    for part in (
        "Linear",
        "batch_sizes=[0]",
        "'33'",
        "compile=3",
        "'prediction'",
        "spread=2",
        "max_s=0",
        "example_input",
    ):
        assert part in said
    with pytest.raises(pl.InvalidArguments, match="test_step"):
        pl.benchmark(Dense(), stage="test")


def figures(blocks: list[float], **changed: Any) -> pl.Benchmark:
    measurement = Measurement(4, "32-true", False, Latency(blocks[0], 1.0, 1.0), 1.0, 0.1, True, 10, 0.1, None, 0, None,
                              tuple(blocks))  # fmt: skip
    return pl.Benchmark(**{"name": "Net", "stage": "predict", "machine": {"device": "cpu"}, "session": "a",
                           "measurements": (measurement,), **changed})  # fmt: skip


def test_faster_is_more_than_noise():
    slow, fast = figures([2.0, 2.1, 2.2] * 4), figures([1.0, 1.1, 1.2] * 4)
    [comparison] = slow.compare(fast)
    assert comparison.speedup == 2.0
    assert comparison.low <= comparison.speedup <= comparison.high
    assert comparison.verdict == "faster"
    assert fast.compare(slow)[0].verdict == "slower"
    assert slow.compare(slow)[0].verdict == "no difference"
    assert figures([1.0, 3.0] * 5).compare(figures([1.2, 2.9] * 5, session="b"))[0].verdict == "no difference"


def test_what_cannot_be_compared():
    here = figures([1.0])
    with pytest.raises(pl.InvalidArguments) as caught:
        here.compare(figures([1.0], stage="test", machine={"device": "cuda"}, measurements=()))
    for part in ("stage='predict'", "device='cpu'", "in common"):
        assert part in str(caught.value)


def test_saved_loaded_and_drawn(tmp_path):
    found = pl.benchmark(Dense(), batch_sizes=[1, 2], **QUICK)
    found.save(tmp_path / "figures.json")
    assert pl.Benchmark.load(tmp_path / "figures.json") == found
    found.plot(tmp_path / "figures.png")
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(pl.InvalidArguments, match=r"other\.json"):
        pl.Benchmark.load(tmp_path / "other.json")


def fit(tmp_path: Path, name: str, **arguments: float) -> str:
    result = pl.fit(
        Dense(**arguments), DataLoader(torch.randn(8, 32), batch_size=4), max_epochs=1, num_workers=0, use_gpu=False,
        storage_path=tmp_path, name=name, logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    assert result.path is not None
    return result.path


def test_the_command(tmp_path, capsys):
    slow, fast = fit(tmp_path, "slow", sleep_s=0.03), fit(tmp_path, "fast")
    place = f"{__file__}:Dense"
    saved = str(tmp_path / "slow.json")
    capsys.readouterr()
    assert main(["benchmark", slow, fast, "--module", place, "--max-s", "0.5", "--save", saved]) == 0
    said = capsys.readouterr().out
    assert "faster" in said
    assert "samples/s" in said
    assert main(["benchmark", saved, saved]) == 0
    assert "no difference" in capsys.readouterr().out
    assert (
        main(["benchmark", slow, "--module", place, "--input-shape", "32", "--batch-sizes", "2,3", "--max-s", "0.1"])
        == 0
    )
    assert main(["benchmark", slow]) == 1
    assert main(["benchmark", slow, "--module", f"{__file__}:Dens"]) == 1
    assert main(["benchmark", slow, "--module", "nowhere.py:Dense"]) == 1
    said = capsys.readouterr().err
    assert "--module is needed" in said
    assert "no raylight.Module of that name" in said
    assert "there is no file nowhere.py" in said
