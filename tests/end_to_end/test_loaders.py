"""What may stand for a loader, and what the trainer's arguments make of it: the batches that Lightning's steps get."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import pytorch_lightning
import torch
from pytorch_lightning.utilities.combined_loader import CombinedLoader as TheirLoader
from torch import nn
from torch.utils.data import DataLoader

import raylight as pl
from raylight.contract.errors import InvalidArguments
from raylight.user.combined_loader import CombinedLoader

pytestmark = pytest.mark.filterwarnings("ignore")
BOTH = pytest.mark.parametrize("lib", [pytorch_lightning, pl], ids=["lightning", "raylight"])


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(length: int, batch_size: int = 2, **options: Any) -> DataLoader[Any]:
    return DataLoader(range(length), batch_size=batch_size, **options)  # type: ignore[arg-type]


def make_trainer(lib: ModuleType = pl, **changes: Any) -> Any:
    options = {
        "max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
    }  # fmt: skip
    return lib.Trainer(**(options | changes))


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return type(value)(map(plain, value)) if isinstance(value, (list, tuple)) else value


def make_net(lib: ModuleType = pl, **members: Any) -> Any:
    """Keeps what its steps get."""

    class Net(lib.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.seen: list[Any] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen.append(("train", plain(batch), batch_idx))
            return self.weight.sum()

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.seen.append(("validate", plain(batch), batch_idx, dataloader_idx))

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return plain(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    return type("Net", (Net,), members)()


COLLECTIONS = {
    "dict": lambda: {"a": load(6), "b": load(11)},
    "list": lambda: [load(6), load(3)],
    "nested": lambda: {"a": [load(4), load(9)], "b": load(7)},
    "iterables": lambda: {"a": range(3), "b": [1, 2]},
    "one": lambda: load(5),
    "numbers": lambda: [1, 2, 3],
}


def combine(lib: ModuleType, loaders: Any, mode: str | None) -> Any:
    if mode is None:
        return loaders
    return (TheirLoader if lib is pytorch_lightning else CombinedLoader)(loaders, mode)


@pytest.mark.parametrize("limit", [1.0, 2])
@pytest.mark.parametrize("mode", [None, "min_size", "max_size", "max_size_cycle"])
@pytest.mark.parametrize("kind", COLLECTIONS)
def test_a_fit_gets_the_batches_that_lightnings_gets(kind: str, mode: str | None, limit: float) -> None:
    found = []
    for lib in (pytorch_lightning, pl):
        net, trainer = make_net(lib), make_trainer(lib, limit_train_batches=limit)
        trainer.fit(net, combine(lib, COLLECTIONS[kind](), mode))
        found.append((net.seen, trainer.num_training_batches))
    assert found[0] == found[1]


@pytest.mark.parametrize("limit", [1.0, 2])
@pytest.mark.parametrize("mode", [None, "min_size", "max_size", "max_size_cycle", "sequential"])
@pytest.mark.parametrize("kind", COLLECTIONS)
def test_a_validation_gets_the_batches_that_lightnings_gets(kind: str, mode: str | None, limit: float) -> None:
    found = []
    for lib in (pytorch_lightning, pl):
        net, loader = make_net(lib), combine(lib, COLLECTIONS[kind](), mode)
        trainer = make_trainer(lib, limit_val_batches=limit)
        trainer.validate(net, loader, verbose=False)
        found.append(net.seen)
    assert trainer.val_dataloaders is loader
    assert found[0] == found[1]


@BOTH
def test_a_prediction_goes_through_one_loader_after_the_other(lib: ModuleType) -> None:
    loader = combine(lib, {"a": load(3), "b": load(2)}, "sequential")
    assert make_trainer(lib).predict(make_net(lib), loader) == [[[0, 1], [2]], [[0, 1]]]


def test_a_mode_that_a_stage_does_not_take_is_refused_before_anything_starts() -> None:
    net = make_net(setup=lambda self, stage: self.seen.append(stage))
    with pytest.raises(InvalidArguments, match=r'train_dataloaders: a fit takes no CombinedLoader .*"max_size_cycle"'):
        make_trainer().fit(net, CombinedLoader([load(4)], "sequential"))
    with pytest.raises(InvalidArguments, match=r"dataloaders: predict takes .*'min_size'"):
        make_trainer().predict(net, CombinedLoader([load(4)]))
    with pytest.raises(InvalidArguments, match=r"val_dataloaders\['b'\] is empty"):
        make_trainer().fit(net, load(4), CombinedLoader({"a": load(4), "b": load(0)}))
    assert net.seen == []
    made = make_net(train_dataloader=lambda self: CombinedLoader([load(4)], "sequential"))
    with pytest.raises(InvalidArguments, match="a fit takes no CombinedLoader"):
        make_trainer().fit(made)
