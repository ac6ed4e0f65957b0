"""What is told about module, loaders and callbacks before anything starts, and about a loss or monitor later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from raylight.arguments.checks import check_loss, check_run, count_edits, find_misspelt_hooks, say_unknown_metric
from raylight.contract.config import Checkpointing, Config
from raylight.contract.errors import InvalidArguments
from raylight.contract.task import Loaders
from raylight.user.callback import Callback
from raylight.user.data_module import DataModule
from raylight.user.module import Module


class Net(Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Any) -> Tensor:
        return self.layer(batch[0]).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class WithValidation(Net):
    def validation_step(self, batch: Any) -> None: ...


class WithLoader(Net):
    def train_dataloader(self) -> Any:
        return loader()


class Data(DataModule):
    def train_dataloader(self) -> Any:
        return loader()


class Trainless(Module):
    def train_step(self, batch: Any) -> None: ...
    def configure_optimizer(self) -> None: ...


class Misspelt(Net):
    def on_train_epoch_strat(self) -> None: ...
    def validaton_step(self, batch: Any) -> None: ...


class Forward(Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(range(3))


class LightningModule(nn.Module):
    pass


class Ported(LightningModule):
    pass


class LightningDataModule:
    pass


class PortedData(LightningDataModule):
    pass


class TypoCallback(Callback):
    def on_train_epoch_ends(self, trainer: Any, module: Any) -> None: ...


def dataset(size: int = 4) -> TensorDataset:
    return TensorDataset(torch.zeros(size, 2))


def loader(size: int = 4, **arguments: Any) -> DataLoader:
    return DataLoader(dataset(size), batch_size=2, **arguments)


BAD: list[tuple[str, Any, Loaders, list[str]]] = [
    # the module
    ("fit", Net, Loaders(train=loader()), ["model is the class Net", "Net(...)"]),
    ("fit", nn.Linear(1, 1), Loaders(train=loader()), ["Linear, a plain torch.nn.Module", "raylight.Module"]),
    ("fit", Ported(), Loaders(train=loader()), ["LightningModule of Lightning", "`import raylight as pl`"]),
    ("fit", torch.compile(Net()), Loaders(train=loader()), ["torch.compile", "configure_model"]),
    ("fit", 3, Loaders(train=loader()), ["model is int"]),
    ("validate", Net(), Loaders(validate=loader()), ["Net has no validation_step(self, batch): validate needs it"]),
    ("test", Net(), Loaders(test=loader()), ["Net has no test_step(self, batch): test needs it"]),
    ("predict", Net(), Loaders(predict=loader()), ["Net has no predict_step(self, batch), and no forward"]),
    # the data
    ("fit", Net(), Loaders(), ["no data to fit", "pass train_dataloaders", "define train_dataloader in the module"]),
    ("validate", WithValidation(), Loaders(), ["no data to validate", "pass dataloaders", "define val_dataloader"]),
    ("predict", Forward(), Loaders(data_module=Data()), ["no data to predict", "predict_dataloader"]),
    ("fit", Net(), Loaders(train=loader(), data_module=Data()), ["train_dataloaders and datamodule both bring"]),
    ("fit", Net(), Loaders(data_module=Data), ["datamodule is the class Data", "Data(...)"]),
    ("fit", WithLoader(), Loaders(data_module=PortedData()), ["LightningDataModule of Lightning"]),
    ("fit", WithLoader(), Loaders(data_module=loader()), ["datamodule is DataLoader", "train_dataloaders=..."]),
    ("fit", Net(), Loaders(train=dataset()), ["train_dataloaders is a dataset (TensorDataset)", "DataLoader(dataset"]),
    ("fit", Net(), Loaders(train=DataLoader), ["train_dataloaders is the class DataLoader"]),
    ("fit", Net(), Loaders(train=5), ["train_dataloaders is int", "a DataLoader or another iterable is needed"]),
    ("fit", Net(), Loaders(train="data/train"), ["train_dataloaders is str"]),
    ("fit", Net(), Loaders(train=Data()), ["train_dataloaders is Data", "passed as datamodule=..."]),
    ("fit", Net(), Loaders(train=loader(1, drop_last=True)), ["drop_last=True drops the 1 samples", "batch_size=2"]),
    ("fit", Net(), Loaders(train=loader(0)), ["train_dataloaders is empty: its dataset has no samples"]),
    ("fit", Net(), Loaders(train=loader(4, sampler=[])), ["empty: its sampler gives no samples"]),
    ("fit", Net(), Loaders(train=[]), ["train_dataloaders is empty: list has no batches"]),
    ("fit", WithValidation(), Loaders(train=loader(), validate=[loader(), loader(0)]), ["val_dataloaders[1] is empty"]),
    ("fit", Net(), Loaders(train={"a": loader(), "b": dataset()}), ["train_dataloaders['b'] is a dataset"]),
    ("predict", Forward(), Loaders(predict=loader(0)), ["dataloaders is empty"]),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "module", "loaders", "words"), BAD, ids=range(len(BAD)))
def test_what_cannot_run_is_told(stage: str, module: Any, loaders: Loaders, words: list[str]) -> None:
    mistakes = check_run(stage, module, loaders, Config(), [])
    assert len(mistakes) == 1, mistakes
    for word in words:
        assert word in mistakes[0]


def test_misspelt_hooks_are_told_once_also_where_they_are_missed() -> None:
    assert check_run("fit", Misspelt(), Loaders(train=loader(), validate=loader()), Config(), []) == [
        "Misspelt.on_train_epoch_strat is never called; did you mean on_train_epoch_start?",
        "Misspelt.validaton_step is never called; did you mean validation_step?",
    ]
    assert check_run("fit", Trainless(), Loaders(train=loader()), Config(), []) == [
        "Trainless has no training_step(self, batch): fit needs it; there is train_step: is that the one?",
        "Trainless.configure_optimizer is never called; did you mean configure_optimizers?",
    ]


GOOD: list[tuple[str, Any, Loaders]] = [
    ("fit", Net(), Loaders(train=loader(), validate=loader())),
    ("fit", Net(), Loaders(train=loader())),
    ("fit", WithLoader(), Loaders()),
    ("fit", Net(), Loaders(data_module=Data())),
    ("fit", WithValidation(), Loaders(train=loader(), validate=[loader(), loader()])),
    ("fit", Net(), Loaders(train=DataLoader(Stream()))),
    ("fit", Net(), Loaders(train=Stream())),
    ("fit", Net(), Loaders(train=[(torch.zeros(2, 2),), (torch.ones(2, 2),)])),
    ("validate", WithValidation(), Loaders(validate=loader())),
    ("predict", Forward(), Loaders(predict={"a": loader()})),
]


@pytest.mark.parametrize(("stage", "module", "loaders"), GOOD, ids=range(len(GOOD)))
def test_what_can_run_is_let_through(stage: str, module: Any, loaders: Loaders) -> None:
    assert check_run(stage, module, loaders, Config(), [Callback()]) == []


def test_all_of_it_is_told_at_once() -> None:
    config = Config(checkpoint=Checkpointing(monitor="loss", mode="mni"))
    mistakes = check_run("fit", Trainless(), Loaders(train=loader(0)), config, [TypoCallback(), 3])
    words = [
        "callbacks[1] is int",
        "on_train_epoch_ends",
        "checkpoint: mode",
        "training_step",
        "configure_optimizers",
        "empty",
    ]
    assert len(mistakes) == len(words)
    for word in words:
        assert any(word in text for text in mistakes), word


def test_validation_that_is_switched_off_needs_no_step() -> None:
    loaders = Loaders(train=loader(), validate=loader())
    assert check_run("fit", Net(), loaders, Config(limit_val_batches=0), []) == []


class Owner(Net):
    """Methods that resemble hooks, and are its own."""

    training_steps = 5

    def training_step(self, batch: Any) -> Tensor:
        return self.training_step2(batch)

    def training_step2(self, batch: Any) -> Tensor:
        return batch[0].mean()

    def training_step3(self, batch: Any) -> None: ...  # called from elsewhere, but beside training_step

    def configure_optimizers(self) -> Any:
        return [self.lr_scheduler_steps(value) for value in (1, 2)]

    def lr_scheduler_steps(self, value: int) -> int:  # called, from inside a comprehension
        return value

    def next_step(self) -> None: ...  # two letters off a short name

    def val_stop(self) -> None: ...

    def _validation_stepp(self) -> None: ...

    @property
    def test_steps(self) -> int:
        return 0


def test_methods_that_are_the_users_own_are_not_flagged() -> None:
    assert find_misspelt_hooks(Owner(), Module) == {}


def test_a_data_modules_misspelt_hook_is_told() -> None:
    class Typo(Data):
        def prepare_date(self) -> None: ...

    assert "did you mean prepare_data?" in find_misspelt_hooks(Typo(), DataModule)["prepare_data"]


def test_hooks_of_a_parent_class_and_static_ones_are_read_too() -> None:
    class Parent(Net):
        @staticmethod
        def test_setp(batch: Any) -> None: ...

    class Child(Parent):
        pass

    assert "Parent.test_setp" in find_misspelt_hooks(Child(), Module)["test_step"]


@pytest.mark.parametrize(
    ("a", "b", "edits"),
    [("", "abc", 3), ("step", "step", 0), ("setp", "step", 1), ("stp", "step", 1), ("kitten", "sitting", 3)],
)  # fmt: skip
def test_count_edits(a: str, b: str, edits: int) -> None:
    assert count_edits(a, b) == count_edits(b, a) == edits


def test_a_good_loss_comes_back() -> None:
    for loss in (torch.ones((), requires_grad=True), torch.ones(1, requires_grad=True)):
        assert check_loss(loss) is loss


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (torch.ones(3, requires_grad=True), ["shape (3,)", "scalar", ".mean()"]),
        (torch.ones(()), ["without a gradient", "torch.no_grad()", "torch.float32"]),
        (torch.ones((), dtype=torch.int64), ["torch.int64 without a gradient"]),
        (0.5, ["returned float", "not its .item()"]),
        ("loss", ["returned str", "a scalar tensor"]),
        ([torch.ones(())], ["returned list"]),
        ({"los": 1, "acc": 2}, ['without the key "loss"', "'los', 'acc'"]),
        ({}, ['without the key "loss"', "none"]),
    ],
)
def test_a_loss_that_cannot_be_trained_on_is_told(loss: Any, words: list[str]) -> None:
    with pytest.raises(InvalidArguments) as caught:
        check_loss(loss)
    for word in ["training_step", *words]:
        assert word in str(caught.value)


def test_an_unknown_metric_is_told_with_those_there_are() -> None:
    text = say_unknown_metric("val_los", ["val_loss", "acc"], "EarlyStopping")
    assert text.startswith("EarlyStopping monitors 'val_los', which was never logged; logged were: acc, val_loss; ")
    assert text.endswith("did you mean 'val_loss'?")
    assert say_unknown_metric("f1", ["acc"]) == "checkpoint monitors 'f1', which was never logged; logged were: acc"
    assert "nothing was ever logged" in say_unknown_metric("f1", [])
