"""`save_hyperparameters`, a checkpoint, and the arguments that `__init__` is called with again."""

from __future__ import annotations

import enum
import io
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

import raylight as pl
from raylight.contract.errors import CheckpointMismatch, InvalidArguments
from raylight.rebuilding import _accepted
from raylight.worker.checkpoint.kept_hyperparameters import MODULE_KEY, read_hyperparameters, write_hyperparameters
from raylight.worker.checkpoint.plain_values import check_plain
from raylight.worker.checkpoint.typed_values import TAG


class Act(enum.Enum):
    TANH = "tanh"
    RELU = "relu"


@dataclass
class Options:
    lr: float = 0.1
    act: Act = Act.RELU
    layers: list[int] = field(default_factory=list)


def reload(module: Any, **overrides: Any) -> Any:
    """What `load_from_checkpoint` makes of it, without weights."""
    file = io.BytesIO()
    entries, _ = write_hyperparameters(module, dict(module.hparams), MODULE_KEY)
    torch.save(check_plain(entries, "module"), file)
    file.seek(0)
    kept = read_hyperparameters(torch.load(file, weights_only=True), type(module))
    return type(module)(**_accepted(type(module), kept, overrides))


class Whole(pl.Module):
    """Keeps its one argument by what is in it."""

    def __init__(self, conf: Any, extra: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters(conf)
        self.conf, self.extra = conf, extra


CONFIGURATIONS = [
    {"lr": 0.5, "act": Act.TANH, "deep": {"a": (1,)}},
    {},
    Namespace(lr=0.5, act=Act.TANH, inner=Namespace(a=1)),
    SimpleNamespace(lr=0.5),
    Options(0.5, Act.TANH, [3]),
    OmegaConf.create({"lr": 0.5, "act": Act.TANH, "deep": {"twice": [1, "${lr}"]}}),
    OmegaConf.structured(Options(0.5, Act.TANH, [3])),
]


@pytest.mark.parametrize("conf", CONFIGURATIONS, ids=lambda conf: type(conf).__name__)
def test_an_argument_that_is_kept_by_its_items_comes_back_as_it_was(conf: Any) -> None:
    module = Whole(conf)
    assert module.hparams == ({key: conf[key] for key in conf} if isinstance(conf, dict | DictConfig) else vars(conf))
    again = reload(module)
    assert again.conf == conf
    assert type(again.conf) is type(conf)
    if conf != {}:
        assert module.hparams.lr == 0.5
        changed = reload(module, lr=0.25, extra=2)
        assert (changed.hparams.lr, changed.extra) == (0.25, 2)
        assert type(changed.conf) is type(conf)
        module.hparams.lr = 0.75  # as Lightning, what hparams hold in the end
        assert reload(module).hparams.lr == 0.75
        other = type(conf)(**{"lr": 1.0}) if not isinstance(conf, DictConfig) else OmegaConf.create({"lr": 1.0})
        assert reload(module, conf=other).conf == other


@pytest.mark.parametrize("conf", [{"lr": 0.5}, Namespace(lr=0.5), OmegaConf.create({"lr": 0.5})])
def test_lightning_gives_hparams_the_same_values(conf: Any) -> None:
    class Theirs(pytorch_lightning.LightningModule):
        def __init__(self, conf: Any) -> None:
            super().__init__()
            self.save_hyperparameters(conf)

    assert dict(Theirs(conf).hparams) == Whole(conf).hparams == {"lr": 0.5}


def test_an_argument_that_lightning_has_kept_so_is_put_together_again(tmp_path: Path) -> None:
    class Theirs(pytorch_lightning.LightningModule):
        def __init__(self, conf: Any) -> None:
            super().__init__()
            self.save_hyperparameters(conf)

    checkpoint: dict[str, Any] = {"state_dict": {}}
    module = Theirs({"lr": 0.5})
    checkpoint |= {"hyper_parameters": dict(module.hparams), "hparams_name": module._hparams_name}
    torch.save(checkpoint, tmp_path / "theirs.ckpt")
    again = Whole.load_from_checkpoint(tmp_path / "theirs.ckpt", extra=2)
    assert (again.conf.lr, again.extra) == (0.5, 2)


class Mixed(pl.Module):
    def __init__(self, conf: Any, act: Act = Act.RELU) -> None:
        super().__init__()
        self.save_hyperparameters("act")
        self.save_hyperparameters(conf)
        self.conf, self.act = conf, act


class First(pl.Module):
    """Before `super().__init__()`."""

    def __init__(self, act: Act = Act.RELU, *, where: Path | None = None) -> None:
        self.save_hyperparameters()
        super().__init__()
        self.act, self.where = act, where


class Child(First):
    def __init__(self, width: int, **others: Any) -> None:
        super().__init__(**others)
        self.width = width


class Indirect(pl.Module):
    def __init__(this, act: Act = Act.RELU) -> None:
        super().__init__()
        this._keep()
        this.act = act

    def _keep(self) -> None:
        self.save_hyperparameters()


@dataclass(eq=False)
class Generated(pl.Module):
    act: Act = Act.RELU

    def __post_init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()


class Data(pl.DataModule):
    def __init__(self, act: Act = Act.RELU) -> None:
        self.save_hyperparameters()
        self.act = act


def test_arguments_are_found_wherever_they_are_saved_from() -> None:
    assert reload(First(Act.TANH, where=Path("a"))).hparams == {"act": Act.TANH, "where": Path("a")}
    again = reload(Child(3, act=Act.TANH))
    assert (again.width, again.act, again.where) == (3, Act.TANH, None)
    for module in (Indirect(Act.TANH), Generated(Act.TANH), Data(Act.TANH)):
        assert reload(module).act is Act.TANH
    again = reload(Mixed(Namespace(lr=0.5), Act.TANH))
    assert (again.conf, again.act, again.hparams) == (Namespace(lr=0.5), Act.TANH, {"act": Act.TANH, "lr": 0.5})


class Net(pl.Module):
    def __init__(self, act: Any = torch.relu, conf: Any = None, **others: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.act, self.conf, self.others = act, conf, others


class Plain(pl.Module):
    def __init__(self, act: Any = torch.relu) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.act = act


def test_what_is_not_in_the_checkpoint_is_asked_for_and_no_default_is_taken() -> None:
    with pytest.raises(CheckpointMismatch) as error:
        reload(Net(lambda x: x, {"deep": nn.ReLU()}, third=open))
    for name in ("act", "conf", "third"):
        assert f"does not hold {name!r}" in str(error.value)
        assert f"load_from_checkpoint(path, {name}=...)" in str(error.value)
    assert "conf['deep'] is a torch.nn.modules.activation.ReLU" in str(error.value)
    again = reload(Net(lambda x: x, {"deep": nn.ReLU()}), act=torch.tanh, conf=None)
    assert (again.act, again.conf) == (torch.tanh, None)
    assert reload(Plain(nn.GELU)).act is nn.GELU
    with pytest.raises(CheckpointMismatch, match=r"needs builtins.open, which the module's own code does not name"):
        reload(Plain(open))
    with pytest.raises(CheckpointMismatch, match=r"does not hold 'act' \(act is the function .*load_from.*act=\.\.\."):
        reload(Whole({"act": lambda: 1, "lr": 0.5}))
    assert reload(Whole({"act": lambda: 1, "lr": 0.5}), act=Act.TANH).conf == {"lr": 0.5, "act": Act.TANH}


@pytest.mark.parametrize(
    "stored",
    [
        {TAG: []}, {TAG: "enum"}, {TAG: "range", "value": 3}, {TAG: "Decimal", "value": "x"}, {TAG: "pairs"},
        {TAG: "partial", "function": 3, "arguments": [], "keywords": {}}, {TAG: "dict", "pairs": [[[], 1]]},
        {TAG: "DictConfig", "items": {}, "type": "torch.nn.modules.linear:Linear"}, {TAG: "number", "dtype": "?!"},
    ],
    ids=str,
)  # fmt: skip
def test_what_nobody_has_written_so_is_asked_for(stored: Any) -> None:
    kept = read_hyperparameters({MODULE_KEY: {"act": stored}}, Plain)
    with pytest.raises(CheckpointMismatch, match="does not hold 'act'"):
        _accepted(Plain, kept, {})
    entries = {MODULE_KEY: {"lr": 1}, f"{MODULE_KEY}_argument": {"name": "conf", "keys": ["lr"], "shell": stored}}
    with pytest.raises(CheckpointMismatch, match="the checkpoint's 'conf'"):
        _accepted(Whole, read_hyperparameters(entries, Whole), {})


def test_what_save_hyperparameters_cannot_take_is_an_error() -> None:
    class Wrong(pl.Module):
        def __init__(self, lr: float, *chosen: Any) -> None:
            super().__init__()
            self.save_hyperparameters(*chosen)

    for chosen in ((3,), ({"a": 1}, "lr"), (OmegaConf.create([1]),)):
        with pytest.raises(InvalidArguments, match="names of arguments, or one dict, Namespace"):
            Wrong(0.1, *chosen)
    with pytest.raises(InvalidArguments, match=r"no argument 'rate'; it has \['lr'\]"):
        Wrong(0.1, "rate")


# ---- whole runs


class Trained(pl.Module):
    def __init__(self, act: Act = Act.RELU, conf: Any = None, loss: Any = None, where: Path = Path(".")) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.act, self.loss, self.conf = act, loss, conf
        self.l = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.l(x)) if self.act is Act.TANH else torch.relu(self.l(x))

    def training_step(self, batch: Any) -> torch.Tensor:
        return self(batch[0]).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert checkpoint["hyper_parameters"]["act"] is Act.TANH

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert checkpoint["hyper_parameters"]["act"] is Act.TANH


LOADER = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.arange(32.0).view(8, 4) / 10), batch_size=2)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.ray)])
def test_a_trained_module_comes_back_as_it_was(tmp_path: Path, request: Any, num_workers: int, capfd: Any) -> None:
    if num_workers:
        request.getfixturevalue("ray_cluster")
    options = {"num_workers": num_workers, "storage_path": str(tmp_path), "enable_progress_bar": False}
    module = Trained(Act.TANH, OmegaConf.create([1, 2]), nn.MSELoss, where=Path("a"))
    result = pl.fit(module, LOADER, max_epochs=1, **options)
    again = Trained.load_from_checkpoint(result.last_checkpoint)
    assert again.hparams == {"act": Act.TANH, "conf": [1, 2], "loss": nn.MSELoss, "where": Path("a")}
    assert type(again.conf) is type(module.conf)
    batch = next(iter(LOADER))[0]
    assert torch.equal(again(batch), module(batch))
    resumed = pl.fit(Trained(Act.TANH, loss=lambda: 1), LOADER, max_epochs=2, resume="last", **options)
    assert resumed.num_steps == result.num_steps * 2
    with pytest.raises(CheckpointMismatch, match="does not hold 'loss'"):
        Trained.load_from_checkpoint(resumed.last_checkpoint)
    assert "hyperparameter 'loss' is not in the checkpoints" in capfd.readouterr().out
