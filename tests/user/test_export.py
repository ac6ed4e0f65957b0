"""A module as TorchScript and ONNX."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import raylight as pl
from raylight.contract.errors import InvalidArguments
from raylight.user import export


class Net(pl.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(1)
        self.layer, self.drop = nn.Linear(width, 2), nn.Dropout(0.5)
        self.example_input_array = torch.ones(3, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.layer(x))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(batch).sum()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch * 2


@pytest.mark.parametrize("method", ["script", "trace"])
def test_torchscript_computes_the_same_and_leaves_the_module_as_it_was(method: str, tmp_path: Path):
    net = Net().train()
    net.layer.eval()
    path = tmp_path / "net.pt"
    returned = net.to_torchscript(path, method)
    assert net.training
    assert net.drop.training
    assert not net.layer.training
    x = torch.randn(5, 4)
    for scripted in (returned, torch.jit.load(str(path))):
        assert torch.equal(scripted(x), net.layer(x))
        assert not scripted.training


def test_a_trace_follows_the_example_that_is_given():
    net = Net()
    net.example_input_array = None
    with pytest.raises(InvalidArguments, match="example_input_array"):
        net.to_torchscript(method="trace")
    assert net.to_torchscript(method="trace", example_inputs=torch.ones(1, 4))(torch.ones(2, 4)).shape == (2, 2)
    with pytest.raises(InvalidArguments, match="'script' or 'trace'"):
        net.to_torchscript(method="compile")


def test_onnx_computes_the_same(tmp_path: Path):
    onnx = pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference")
    net, x = Net().train(), torch.randn(3, 4)
    net.to_onnx(tmp_path / "net.onnx", dynamo=False)
    net.to_onnx(tmp_path / "given.onnx", torch.ones(3, 4), dynamo=True)
    into = io.BytesIO()
    net.to_onnx(into, dynamo=False)
    assert net.training
    for model in (
        onnx.load(tmp_path / "net.onnx"),
        onnx.load(tmp_path / "given.onnx"),
        onnx.load(io.BytesIO(into.getvalue())),
    ):
        run = reference.ReferenceEvaluator(model)
        (found,) = run.run(None, {run.input_names[0]: x.numpy()})
        torch.testing.assert_close(torch.tensor(found), net.layer(x).detach())


def test_what_onnx_needs_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidArguments, match=r"needs onnx and onnxscript: pip install 'raylight\[onnx\]'"):
        Net().to_onnx("net.onnx")


def test_names_of_lightnings_module_that_have_little_to_say_here():
    net = Net()
    assert not net.on_gpu
    assert net.device_mesh is None
    assert net.fabric is None
    with pytest.raises(InvalidArguments, match="to_onnx"):
        net.to_tensorrt("net.trt")


def test_every_public_name_of_lightnings_module_is_there():
    lightning = pytest.importorskip("pytorch_lightning")
    theirs = {name for name in dir(lightning.LightningModule) if not name.startswith("_")}
    missing = {name for name in theirs if not hasattr(pl.Module, name) and name not in vars(pl.Module)}
    hyperparameters = {name for name in missing if "HYPER_PARAMS" in name or "hparams" in name}
    assert missing - hyperparameters == {"configure_sharded_model"}, (
        "a hook of older versions, for raylight doctor FILE"
    )
