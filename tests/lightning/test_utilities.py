"""What Lightning keeps in `utilities` says the same here, on the same input."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import raylight as pl
from raylight.contract.errors import InvalidArguments

lightning = pytest.importorskip("pytorch_lightning")


def both(module: str, name: str) -> list[Any]:
    import importlib

    return [getattr(importlib.import_module(f"{root}.{module}"), name) for root in ("raylight", "pytorch_lightning")]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.third = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(self.first(x)))


@pytest.mark.parametrize("norm", [1, 2, "inf"])
def test_norms_of_gradients(norm: Any):
    net = Net()
    net(torch.ones(2, 3)).sum().backward()
    ours, theirs = (grad_norm(net, norm) for grad_norm in both("utilities.grads", "grad_norm"))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name])
    assert both("utilities", "grad_norm")[0](Net(), norm) == {}
    with pytest.raises(ValueError, match="above 0"):
        pl.utilities.grad_norm(net, 0)


def test_shared_parameters():
    ours, theirs = both("utilities", "find_shared_parameters")
    assert ours(Net()) == theirs(Net()) == [["first.weight", "second.weight"]]
    net = Net()
    net.second.weight = nn.Parameter(torch.ones(3, 3))
    assert pl.utilities.set_shared_parameters(net, [["first.weight", "second.weight"]]) is net
    assert net.second.weight is net.first.weight


def test_detaching_and_batch_sizes():
    tensor = torch.ones(2, requires_grad=True) * 2
    for detach in both("utilities.memory", "recursive_detach"):
        found = detach({"a": [tensor, (tensor, 3)], "b": "text"})
        assert not found["a"][0].requires_grad
        assert not found["a"][1][0].requires_grad
        assert found["b"] == "text"
    for batch in (torch.ones(4, 2), {"x": torch.ones(3, 1)}, [torch.ones(5)], torch.tensor(1.0)):
        ours, theirs = both("utilities.data", "extract_batch_size")
        assert ours(batch) == theirs(batch)
    for root, extract in zip((pl, lightning), both("utilities.data", "extract_batch_size"), strict=True):
        with pytest.raises(root.utilities.exceptions.MisconfigurationException):
            extract({"text": 3})


def test_errors_of_memory():
    errors = [
        RuntimeError("CUDA error: out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. x"), RuntimeError("other"),
        ValueError("CUDA out of memory"),
    ]  # fmt: skip
    for error in errors:
        ours, theirs = both("utilities.memory", "is_oom_error")
        assert ours(error) == theirs(error)


def test_operations_are_counted():
    net = Net()
    for measure in both("utilities", "measure_flops"):
        assert measure(net, lambda: net(torch.ones(2, 3))) == 84
        assert measure(net, lambda: net(torch.ones(2, 3)), torch.sum) > 84


def test_the_summary_can_be_read():
    def make(base: type) -> Any:
        class Wrapped(base):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.net, self.example_input_array = Net(), torch.ones(2, 3)
                self.net.third.requires_grad_(False).eval()

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.net(x)

        return Wrapped()

    summarize, real = both("utilities.model_summary", "summarize")
    for depth in (1, 2, -1):
        ours, theirs = summarize(make(pl.Module), depth), real(make(lightning.LightningModule), depth)
        for name in ("layer_names", "layer_types", "param_nums", "total_parameters", "trainable_parameters",
                     "total_training_modes", "total_flops"):  # fmt: skip
            assert getattr(ours, name) == getattr(theirs, name), name
        assert ours.model_size == pytest.approx(theirs.model_size)
        assert ours.in_sizes == [str(size) for size in theirs.in_sizes]
        assert "trainable parameters" in str(ours)
    human, theirs = both("utilities.model_summary", "get_human_readable_count")
    for number in (0, 12, 999, 1000, 1234, 99_999, 100_000, 2_000_000, 5 * 10**15):
        assert human(number) == theirs(number)


def test_attributes_of_a_module_and_its_hyperparameters():
    class Mine(pl.Module):
        def __init__(self, lr: float = 0.1) -> None:
            super().__init__()
            pl.utilities.parsing.save_hyperparameters(self)
            self.width = 3

        def on_fit_start(self) -> None: ...

    from raylight.utilities.model_helpers import is_overridden
    from raylight.utilities.parsing import lightning_getattr, lightning_hasattr, lightning_setattr

    mine = Mine(0.5)
    assert mine.hparams == {"lr": 0.5}
    assert lightning_hasattr(mine, "lr")
    assert not lightning_hasattr(mine, "depth")
    lightning_setattr(mine, "lr", 0.7)
    assert lightning_getattr(mine, "lr") == mine.hparams.lr == 0.7
    assert lightning_getattr(mine, "width") == 3
    with pytest.raises(AttributeError, match="'depth'"):
        lightning_getattr(mine, "depth")
    assert is_overridden("on_fit_start", mine)
    assert not is_overridden("on_fit_end", mine)
    assert is_overridden("on_fit_start", mine, pl.Module)
    assert not is_overridden("on_fit_start", None)


def test_hyperparameters_in_a_file(tmp_path: Path):
    from raylight.core.saving import load_hparams_from_yaml, save_hparams_to_yaml

    path = tmp_path / "hparams.yaml"
    with pytest.warns(UserWarning, match="left out: net"):
        save_hparams_to_yaml(path, {"lr": 0.1, "nested": {"a": (1, 2)}, "net": nn.Linear(1, 1)})
    assert load_hparams_from_yaml(path) == {"lr": 0.1, "nested": {"a": [1, 2]}}
    assert both("core.saving", "load_hparams_from_yaml")[1](path, use_omegaconf=False) == load_hparams_from_yaml(path)
    with pytest.warns(RuntimeWarning, match="is not there"):
        assert load_hparams_from_yaml(tmp_path / "other.yaml") == {}
    for update in both("core.saving", "update_hparams"):
        values = {"a": {"b": 1, "c": 2}, "d": 3}
        update(values, {"a": {"b": 5}, "e": 6})
        assert values == {"a": {"b": 5, "c": 2}, "d": 3, "e": 6}


def test_warnings_are_given_once():
    from raylight.utilities.rank_zero import WarningCache, rank_zero_deprecation
    from raylight.utilities.warnings import PossibleUserWarning

    cache = WarningCache()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            cache.warn("once", category=PossibleUserWarning)
            cache.deprecation("old")
        rank_zero_deprecation("older")
    assert [(str(w.message), w.category.__name__) for w in found] == [
        ("once", "PossibleUserWarning"), ("old", "LightningDeprecationWarning"),
        ("older", "LightningDeprecationWarning"),
    ]  # fmt: skip
    assert {Path(w.filename).name for w in found[2:]} == {"test_utilities.py"}


def test_strings_with_a_fixed_choice():
    ours, theirs = both("utilities.enums", "GradClipAlgorithmType")
    for kind in (ours, theirs):
        assert kind("norm") == "norm" == kind.NORM
        assert kind.from_str("VALUE") is kind.VALUE
        assert kind.supported_type("norm")
        assert not kind.supported_type("mean")
        assert {kind.NORM: 1}["norm"] == 1


def test_the_machine(tmp_path: Path):
    strategy = pl.Trainer(num_workers=0).strategy
    assert pl.utilities.is_shared_filesystem(strategy, tmp_path)
    with pytest.raises(FileNotFoundError):
        pl.utilities.is_shared_filesystem(strategy, tmp_path / "nowhere")
    ours, theirs = both("utilities", "suggested_max_num_workers")
    assert [ours(n) for n in (1, 2, 64)] == [theirs(n) for n in (1, 2, 64)]
    if not torch.cuda.is_available():
        assert pl.accelerators.find_usable_cuda_devices() == []
        with pytest.raises(InvalidArguments.__bases__[0], match="this machine has 0 GPUs"):
            pl.accelerators.find_usable_cuda_devices(1)
