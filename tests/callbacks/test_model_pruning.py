"""ModelPruning: Lightning's weights, on the same data; masks that last; an ordinary module at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

import raylight as pl
from raylight.callbacks import ModelPruning
from raylight.contract.config import Config
from raylight.contract.errors import InvalidArguments


class Random(prune.RandomUnstructured):
    """A method of one's own."""


def make_net(base: type) -> Any:
    class Net(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(5)
            self.first, self.second = nn.Linear(4, 12), nn.Linear(12, 1)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x, y = batch
            return nn.functional.mse_loss(self.second(self.first(x).tanh()), y)

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    return Net()


def make_loader() -> DataLoader:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(48, 4, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=8)


def train(net: Any, folder: Path, *callbacks: Any, epochs: int = 3, resume: str | None = None, **options: Any) -> Any:
    trainer = pl.Trainer(
        num_workers=0, use_gpu=False, max_epochs=epochs, storage_path=folder, enable_progress_bar=False,
        enable_model_summary=False, logger=False, callbacks=list(callbacks), seed=1, **options,
    )  # fmt: skip
    trainer.fit(net, make_loader(), make_loader(), ckpt_path=resume)
    return trainer


CASES: list[dict[str, Any]] = [
    {"pruning_fn": "l1_unstructured"},
    {"pruning_fn": "l1_unstructured", "use_lottery_ticket_hypothesis": False, "amount": 7},
    {"pruning_fn": "l1_unstructured", "use_global_unstructured": False, "parameter_names": ["weight"]},
    {"pruning_fn": "ln_structured", "use_global_unstructured": False, "parameter_names": ["weight"], "pruning_dim": 0,
     "pruning_norm": 2, "amount": 0.3},
    {"pruning_fn": "l1_unstructured", "amount": lambda epoch: 0.1 * epoch, "apply_pruning": lambda epoch: epoch != 1,
     "use_lottery_ticket_hypothesis": lambda epoch: epoch == 2, "prune_on_train_epoch_end": False},
    {"pruning_fn": prune.L1Unstructured, "amount": 0.2, "make_pruning_permanent": False},
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_the_weights_are_lightnings(case: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lightning = pytest.importorskip("pytorch_lightning")
    copy = lightning.callbacks.ModelPruning._copy_param

    def copy_for_real(new: nn.Module, old: nn.Module, name: str) -> None:
        """On a CPU Lightning trains the kept first values themselves, so that weights go back to them once only."""
        copy(new, old, name)
        weight = getattr(new, f"{name}_orig", None)
        if weight is not None:
            weight.data = weight.data.clone()

    monkeypatch.setattr(lightning.callbacks.ModelPruning, "_copy_param", staticmethod(copy_for_real))
    theirs, net = make_net(lightning.LightningModule), make_net(pl.Module)
    lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[lightning.callbacks.ModelPruning(**case)], default_root_dir=tmp_path,
    ).fit(theirs, make_loader(), make_loader())  # fmt: skip
    train(net, tmp_path, ModelPruning(**case))
    ours = net.state_dict()
    assert ours.keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours[name]), name
    assert any((value == 0).any() for value in ours.values())


@pytest.mark.parametrize("method", ["random_unstructured", Random])
def test_random_methods_prune_as_many(method: Any, tmp_path: Path):
    net = make_net(pl.Module)
    train(net, tmp_path, ModelPruning(method, amount=10, use_lottery_ticket_hypothesis=False, verbose=2), epochs=2)
    assert sum(int((value == 0).sum()) for value in net.state_dict().values()) == 20


@pytest.mark.parametrize("permanent", [True, False])
def test_what_is_pruned_stays_so_when_a_run_continues(permanent: bool, tmp_path: Path):
    """As if it had never been interrupted: weights and momentum too."""
    options: dict[str, Any] = {"amount": 0.2, "use_lottery_ticket_hypothesis": False}
    options["make_pruning_permanent"] = permanent
    whole, parts = make_net(pl.Module), make_net(pl.Module)
    train(whole, tmp_path / "whole", ModelPruning("l1_unstructured", **options), epochs=4)
    first = train(make_net(pl.Module), tmp_path / "parts", ModelPruning("l1_unstructured", **options), epochs=2)
    train(parts, tmp_path / "parts", ModelPruning("l1_unstructured", **options), epochs=4, resume="last")
    assert parts.state_dict().keys() == whole.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    if permanent:
        loaded = type(make_net(pl.Module)).load_from_checkpoint(first.result.last_checkpoint)
        assert (loaded.first.weight == 0).any()
        assert list(loaded.state_dict()) == ["first.weight", "first.bias", "second.weight", "second.bias"]


def test_a_subclass_chooses_what_is_pruned(tmp_path: Path):
    class Second(ModelPruning):
        def filter_parameters_to_prune(self, parameters_to_prune: Any = ()) -> Any:
            return [(layer, name) for layer, name in parameters_to_prune if layer.out_features == 1]

    net = make_net(pl.Module)
    train(net, tmp_path, Second("l1_unstructured"))
    assert (net.first.weight != 0).all()
    assert (net.second.weight == 0).any()


def test_parameters_keep_their_order():
    """Optimizers number them; torch moves a pruned one to the end."""
    net = make_net(pl.Module)
    before = [id(parameter) for parameter in net.parameters()]
    callback = ModelPruning("l1_unstructured", [(net.first, "weight")])
    callback.apply_pruning(0.5)
    assert [id(parameter) for parameter in net.parameters()] == before
    callback.make_pruning_permanent(net)
    assert [name for name, _ in net.named_parameters()][:2] == ["first.weight", "first.bias"]


def test_mistakes_are_named():
    with pytest.raises(InvalidArguments) as caught:
        ModelPruning("ln_structured", parameter_names=["wieght"], amount="half", verbose=3)  # type: ignore[arg-type]
    text = str(caught.value)
    for part in ("'wieght'", "pruning_norm=", "pruning_dim=", "use_global_unstructured=False", "'half'", "verbose=3"):
        assert part in text
    with pytest.raises(InvalidArguments, match="Did you mean 'l1_unstructured'"):
        ModelPruning("l1_unstructred")
    with pytest.raises(InvalidArguments, match=r"the module does not have: Linear\.weight"):
        ModelPruning.sanitize_parameters_to_prune(make_net(pl.Module), [(nn.Linear(1, 1), "weight")])
    permanent = ModelPruning("l1_unstructured", make_pruning_permanent=False)
    assert "num_workers=0" in permanent._find_mistakes(Config(num_workers=2))[0]
    assert permanent._find_mistakes(Config(num_workers=0)) == []
