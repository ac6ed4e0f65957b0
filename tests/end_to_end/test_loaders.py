"""What may stand for a loader, and what the trainer's arguments make of it: the batches that Lightning's steps get."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import pytorch_lightning
import torch
from pytorch_lightning.utilities.combined_loader import CombinedLoader as TheirLoader
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

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


# ---- loaders that are made again


@pytest.mark.parametrize(
    "options",
    [
        {"reload_dataloaders_every_n_epochs": 1}, {"reload_dataloaders_every_n_epochs": 2},
        {"reload_dataloaders_every_n_epochs": 1, "val_check_interval": 2},
        {"reload_dataloaders_every_n_epochs": 2, "val_check_interval": 2},
        {"reload_dataloaders_every_n_epochs": 1, "val_check_interval": 3, "check_val_every_n_epoch": None},
        {"reload_dataloaders_every_n_epochs": 1, "num_sanity_val_steps": 2}, {"val_check_interval": 2},
    ],
)  # fmt: skip
def test_loaders_are_made_again_where_lightnings_are(options: dict[str, Any]) -> None:
    def train(self: Any) -> Any:
        self.seen.append("make train")
        return load(8)

    def validate(self: Any) -> Any:
        self.seen.append("make validation")
        return load(2)

    found = []
    for lib in (pytorch_lightning, pl):
        net = make_net(lib, train_dataloader=train, val_dataloader=validate)
        make_trainer(lib, max_epochs=5, **options).fit(net)
        found.append(net.seen)
    assert found[0] == found[1]


def test_validation_loaders_are_made_again_after_n_epochs_and_not_in_each_nth() -> None:
    made = []

    def validate(self: Any) -> Any:
        made.append(self.current_epoch)
        return load(2)

    options = {"reload_dataloaders_every_n_epochs": 3, "check_val_every_n_epoch": 2, "max_epochs": 8}
    make_trainer(**options).fit(make_net(val_dataloader=validate), load(4))
    assert made == [0, 3, 7]  # validated after the epochs 1, 3, 5, 7


# ---- samplers


class Backwards(Sampler[int]):
    def __init__(self, length: int):
        self.length = length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.length - 1, -1, -1))

    def __len__(self) -> int:
        return self.length


class Triples(BatchSampler):
    """With an argument of its own, so that nobody else can make one."""

    def __init__(self, length: int, note: str):
        super().__init__(SequentialSampler(range(length)), 3, drop_last=False)
        self.note = note


LOADERS = {
    "shuffled": lambda: load(8, shuffle=True), "in order": lambda: load(8),
    "own order": lambda: load(8, sampler=Backwards(8)),
    "some": lambda: load(8, sampler=SubsetRandomSampler([7, 5, 3, 1])),
    "weighted": lambda: load(8, sampler=WeightedRandomSampler([1.0] * 8, 8)),
    "own batches": lambda: DataLoader(range(8), batch_sampler=Triples(8, "mine")),  # type: ignore[arg-type]
    "several": lambda: {"a": load(8, shuffle=True), "b": load(6, sampler=Backwards(6))},
}  # fmt: skip


@pytest.mark.parametrize("limit", [2, 0.5])
@pytest.mark.parametrize("kind", LOADERS)
def test_overfitting_takes_the_batches_that_lightnings_takes(kind: str, limit: float) -> None:
    found = []
    for lib in (pytorch_lightning, pl):
        net = make_net(lib)
        make_trainer(lib, max_epochs=2, overfit_batches=limit).fit(net, LOADERS[kind](), load(4))
        found.append(net.seen)
    assert found[0] == found[1]


def test_overfitting_says_that_the_sampler_rests(capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(overfit_batches=2).fit(make_net(), load(8, sampler=Backwards(8)), load(4))
    shown = capsys.readouterr()
    assert "overfit_batches takes the first samples in the order of the dataset" in shown.out + shown.err
    make_trainer(overfit_batches=2).fit(make_net(), LOADERS["own batches"](), load(4))
    make_trainer().fit(make_net(), load(8, shuffle=True), load(4))
    shown = capsys.readouterr()
    assert "overfit_batches" not in shown.out + shown.err


@BOTH
def test_samplers_of_ones_own_are_kept(lib: ModuleType) -> None:
    net = make_net(lib)
    make_trainer(lib).fit(net, {"a": LOADERS["own batches"](), "b": load(6, sampler=Backwards(6))})
    assert [batch for _, batch, _ in net.seen] == [
        {"a": [0, 1, 2], "b": [5, 4]}, {"a": [3, 4, 5], "b": [3, 2]}, {"a": [6, 7], "b": [1, 0]},
    ]  # fmt: skip


# ---- modules and data modules


@BOTH
@pytest.mark.parametrize("empty", [[], {}])
def test_an_empty_collection_is_no_validation_loader(lib: ModuleType, empty: Any) -> None:
    for members, given in (({}, empty), ({"val_dataloader": lambda self: empty}, None)):
        net = make_net(lib, **members)
        make_trainer(lib, num_sanity_val_steps=2).fit(net, load(4), given)
        assert [stage for stage, *_ in net.seen] == ["train", "train"]


@BOTH
def test_data_is_prepared_on_one_process_whatever_the_switch_says(lib: ModuleType) -> None:
    class Data(lib.LightningDataModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.prepare_data_per_node = False
            self.calls = 0

        def prepare_data(self) -> None:
            self.calls += 1

        def train_dataloader(self) -> Any:
            return load(4)

    net, data = make_net(lib, prepare_data=lambda self: self.seen.append("prepare")), Data()
    assert (net.prepare_data_per_node, net.allow_zero_length_dataloader_with_multiple_devices) == (True, False)
    trainer = make_trainer(lib)
    trainer.fit(net, datamodule=data)
    assert (data.calls, net.seen.count("prepare")) == (1, 1)
    assert trainer.datamodule is data
    assert data.trainer is trainer


@BOTH
def test_transfer_hooks_are_told_the_loader_and_the_data_modules_come_first(lib: ModuleType) -> None:
    calls: list[Any] = []

    class Data(lib.LightningDataModule):  # type: ignore[misc, name-defined]
        def train_dataloader(self) -> Any:
            return load(2)

        def val_dataloader(self) -> Any:
            return [load(2), load(2)]

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch + 1

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            calls.append((self.trainer.training, dataloader_idx))
            return batch * 10

    def move(self: Any, batch: Any, device: Any, dataloader_idx: int) -> Any:
        calls.append(str(device))
        return batch

    net = make_net(lib, transfer_batch_to_device=move, on_before_batch_transfer=lambda self, batch, index: 1 / 0)
    make_trainer(lib).fit(net, datamodule=Data())
    assert calls == ["cpu", (True, 0), "cpu", (False, 0), "cpu", (False, 1)]
    assert [batch for _, batch, *_ in net.seen] == [[10, 20]] * 3


@BOTH
def test_a_data_module_of_datasets(lib: ModuleType) -> None:
    class Plain(lib.LightningDataModule):  # type: ignore[misc, name-defined]
        def __init__(self, batch_size: int, note: str = ""):
            super().__init__()
            self.given = (batch_size, note)

    first, second = TensorDataset(torch.arange(4)), TensorDataset(torch.arange(6))
    datasets = {"train_dataset": first, "val_dataset": [first, second], "predict_dataset": {"a": first, "b": second}}
    data = Plain.from_datasets(**datasets, batch_size=4, note="mine")
    assert data.given == (4, "mine")
    assert isinstance(data.train_dataloader().sampler, RandomSampler)
    assert [len(loader) for loader in data.val_dataloader()] == [1, 2]
    assert make_trainer(lib).predict(make_net(lib), datamodule=data) == [[[[0, 1, 2, 3]]], [[[0, 1, 2, 3]], [[4, 5]]]]
    net = make_net(lib)
    make_trainer(lib).fit(net, datamodule=data)
    assert [stage for stage, *_ in net.seen] == ["train", "validate", "validate", "validate"]
