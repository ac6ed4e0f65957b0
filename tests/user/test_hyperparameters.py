"""Hyperparameters: what save_hyperparameters keeps, of which class, and what loggers get; beside Lightning's."""

from __future__ import annotations

import inspect
import pickle
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import pytorch_lightning
import torch
from omegaconf import OmegaConf
from pytorch_lightning.core.mixins import HyperparametersMixin as TheirMixin
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import raylight as pl
from raylight.contract.errors import InvalidArguments
from raylight.user.hyperparameters import HyperparametersMixin

pytestmark = pytest.mark.filterwarnings("ignore")
BOTH = pytest.mark.parametrize("lib", [pytorch_lightning, pl], ids=["lightning", "raylight"])


def mixin_of(lib: ModuleType) -> Any:
    return TheirMixin if lib is pytorch_lightning else HyperparametersMixin


@BOTH
def test_any_class_may_keep_its_arguments(lib: ModuleType) -> None:
    class Tokenizer(mixin_of(lib)):  # type: ignore[misc]
        def __init__(self, size: int, lower: bool = True, *rest: int, pad: str = "<pad>", **options: Any):
            super().__init__()
            self.save_hyperparameters(ignore=["lower", "unheard"])

    made = Tokenizer(100, False, 1, 2, depth=3)
    assert made.hparams == made.hparams_initial == {"size": 100, "pad": "<pad>", "depth": 3}
    assert made.hparams.size == 100


@BOTH
def test_the_initial_ones_stay_what_they_were(lib: ModuleType) -> None:
    class Holder(mixin_of(lib)):  # type: ignore[misc]
        def __init__(self, rate: float, widths: list[int]):
            super().__init__()
            self.save_hyperparameters()

    made = Holder(0.1, [1])
    made.hparams.rate = 0.2
    made.hparams.widths.append(2)
    made.hparams_initial["rate"] = 9.0
    assert made.hparams == {"rate": 0.2, "widths": [1, 2]}
    assert made.hparams_initial == {"rate": 0.1, "widths": [1]}


@BOTH
def test_a_class_that_kept_nothing_has_none(lib: ModuleType) -> None:
    for kind in (mixin_of(lib), lib.LightningModule, lib.LightningDataModule):
        assert (kind().hparams, kind().hparams_initial) == ({}, {})


@BOTH
def test_a_dataclass(lib: ModuleType) -> None:
    @dataclass(eq=False)
    class Net(lib.LightningModule):  # type: ignore[misc, name-defined]
        width: int = 2
        names: list[str] = field(default_factory=list)
        depth: int = field(default=3, init=False)

        def __post_init__(self) -> None:
            super().__init__()
            self.save_hyperparameters()

    assert Net(5, ["a"]).hparams == {"width": 5, "names": ["a"]}


@BOTH
def test_subclasses_add_override_and_leave_out(lib: ModuleType) -> None:
    class Base(lib.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, width: int, rate: float = 0.1):
            super().__init__()
            self.save_hyperparameters(logger=False)

    class Silent(Base):
        def __init__(self, width: int, depth: int, **options: Any):
            super().__init__(width + 1, **options)

    class Loud(Base):
        def __init__(self, *arguments: Any, depth: int = 4, **options: Any):
            super().__init__(*arguments, **options)
            self.save_hyperparameters()

    class Leaving(Base):
        def __init__(self, width: int, depth: int):
            super().__init__(width * 10)
            self.save_hyperparameters(ignore="rate")

    assert Silent(1, 3).hparams == {"width": 1, "depth": 3, "rate": 0.1}
    assert Loud(1, rate=0.5).hparams == {"width": 1, "rate": 0.5, "depth": 4}
    assert Leaving(1, 2).hparams == {"width": 1, "depth": 2}
    assert (Silent(1, 3)._log_hyperparams, Loud(1)._log_hyperparams) == (False, True)


def test_a_part_keeps_its_own_arguments_and_not_those_of_the_whole() -> None:
    class Part(pl.Module):
        def __init__(self, width: int):
            super().__init__()
            self.save_hyperparameters()

    class Whole(pl.Module):
        def __init__(self, size: int, given: Part | None = None):
            super().__init__()
            self.made, self.given = Part(width=size * 2), given
            self.save_hyperparameters(ignore=["given"])

    whole = Whole(3, Part(1))
    assert whole.given is not None
    assert (whole.hparams, whole.made.hparams, whole.given.hparams) == ({"size": 3}, {"width": 6}, {"width": 1})


def test_another_frame_and_another_method_will_do() -> None:
    class Framed(HyperparametersMixin):
        def __init__(self, rate: float, depth: int = 2):
            self.note(inspect.currentframe())

        def note(self, frame: Any) -> None:
            self.save_hyperparameters(frame=frame)

    class Helped(HyperparametersMixin):
        def __init__(self, rate: float, depth: int = 2):
            self.note()

        def note(self) -> None:
            self.save_hyperparameters("rate")
            self.save_hyperparameters("depth", logger=False)

    assert Framed(0.1).hparams == Helped(0.1).hparams == {"rate": 0.1, "depth": 2}


@BOTH
@pytest.mark.parametrize("kind", [dict, Namespace])
def test_the_items_of_one_object(lib: ModuleType, kind: Any) -> None:
    class Net(lib.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, conf: Any):
            super().__init__()
            self.save_hyperparameters(conf)

    conf = kind(rate=1, more={"deep": 2})
    assert Net(conf).hparams == Net(conf).hparams_initial == {"rate": 1, "more": {"deep": 2}}


@BOTH
def test_omegaconf(lib: ModuleType) -> None:
    class Net(lib.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, conf: Any):
            super().__init__()
            self.save_hyperparameters(conf)

    net = Net(OmegaConf.create({"rate": 1, "twice": "${rate}", "model": {"widths": [1, 2]}}))
    net.hparams.rate = 5
    assert (net.hparams.rate, net.hparams.model.widths[1], net.hparams_initial.rate) == (5, 2, 1)
    assert net.hparams_initial.twice == 1


def test_a_module_among_the_arguments_is_told_and_not_copied() -> None:
    class Net(pl.Module):
        def __init__(self, backbone: nn.Module, kept: nn.Module | None = None):
            super().__init__()
            self.save_hyperparameters(ignore=["kept"])
            self.backbone = backbone

    backbone = nn.Linear(1, 1)
    with pytest.warns(UserWarning, match=r"keeps the module 'backbone'.*ignore=\['backbone'\]"):
        net = Net(backbone, nn.Linear(1, 1))
    assert net.hparams_initial.backbone is net.hparams.backbone is backbone


def test_what_cannot_be_copied_is_kept_itself() -> None:
    class Holder(HyperparametersMixin):
        def __init__(self, lines: Any):
            self.save_hyperparameters()

    lines = iter([1])  # a generator cannot be copied
    made = Holder(line for line in lines)
    assert made.hparams_initial.lines is made.hparams.lines


# ---- what loggers get


class Spy:
    name = version = None

    def __init__(self) -> None:
        self.given: list[dict[str, Any]] = []

    def log_hyperparams(self, params: Any, *_: Any) -> None:
        self.given.append(dict(params))

    def log_metrics(self, metrics: Any, step: Any = None) -> None: ...


def load() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(4, 1)))


class Net(pl.Module):
    def __init__(self, rate: float = 0.1, batch: int = 4, logger: bool = True, _class_path: str = "net"):
        super().__init__()
        self.save_hyperparameters(ignore="logger", logger=logger)
        self.hparams.rate = 0.5
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Any) -> Any:
        return self.layer(batch[0]).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Data(pl.DataModule):
    def __init__(self, batch: Any = 4, path: str = "data", logger: bool = True, _class_path: str = "data"):
        super().__init__()
        self.save_hyperparameters(ignore="logger", logger=logger)

    def train_dataloader(self) -> Any:
        return load()


def fit(
    net: Net, data: Data | None, folder: Path, has_logger: bool = True
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What a logger got, and what the run's record has."""
    spy = Spy()
    trainer = pl.Trainer(
        max_epochs=1, num_workers=0, storage_path=folder, checkpoint=False, enable_progress_bar=False,
        enable_model_summary=False, logger=spy if has_logger else False,
    )  # fmt: skip
    result = trainer.fit(net, None if data is not None else load(), datamodule=data)
    return spy.given, pl.open_run(folder).hyperparameters if result.path else {}


def test_loggers_get_the_initial_ones_of_both_and_the_record_has_all(tmp_path: Path) -> None:
    given, recorded = fit(Net(), Data(), tmp_path)
    assert given == [{"rate": 0.1, "batch": 4, "path": "data"}]
    assert (recorded["rate"], recorded["batch"], recorded["path"]) == (0.5, 4, "data")


@pytest.mark.parametrize(
    ("net", "data", "expected"),
    [(True, False, [{"rate": 0.1, "batch": 4}]), (False, True, [{"batch": 4, "path": "data"}]), (False, False, [])],
)
def test_what_is_not_for_loggers_is_in_the_record_alone(tmp_path: Path, net: bool, data: bool, expected: Any) -> None:
    given, recorded = fit(Net(logger=net), Data(logger=data), tmp_path)
    assert given == expected
    assert {"rate", "batch", "path"} <= recorded.keys()


@pytest.mark.parametrize("other", [5, 4.0, torch.tensor(4)])
def test_two_values_of_one_name_are_refused_before_anything_starts(tmp_path: Path, other: Any) -> None:
    with pytest.raises(InvalidArguments, match="'batch' of Net and that of Data have different values"):
        fit(Net(), Data(other), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert fit(Net(logger=False), Data(5), tmp_path)[0] == [{"batch": 5, "path": "data"}]
    fit(Net(), Data(5), tmp_path, has_logger=False)


def test_a_module_with_hyperparameters_can_be_sent() -> None:
    sent = pickle.loads(pickle.dumps(Net(0.3)))
    assert (sent.hparams.rate, sent.hparams_initial.rate, sent._log_hyperparams) == (0.5, 0.3, True)
