"""ModelCheckpoint alone: arguments, names, and what it asks the driver for."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pytorch_lightning import callbacks as lightning

from raylight.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from raylight.callbacks.checkpoint_names import fill_in, join_path
from raylight.contract.config import Checkpointing, Config
from raylight.contract.errors import InvalidArguments
from raylight.contract.messages import FileDropped, FileWanted, LinkWanted
from raylight.storage.checkpoints import Checkpoint, Manifest
from raylight.storage.filesystem import Storage


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, Checkpointing(every_n_epochs=1)),
        (
            {"monitor": "acc", "mode": "max", "save_top_k": 3},
            Checkpointing(every_n_epochs=1, monitor="acc", mode="max"),
        ),
        ({"every_n_train_steps": 100}, Checkpointing(every_n_steps=100)),
        ({"every_n_train_steps": 100, "every_n_epochs": 0}, Checkpointing(every_n_steps=100)),
        ({"every_n_epochs": 5, "save_last": "link"}, Checkpointing(every_n_epochs=5)),
        ({"every_n_epochs": 0}, Checkpointing()),
        ({"train_time_interval": timedelta(minutes=2)}, Checkpointing(every_s=120.0)),
        ({"train_time_interval": "00:00:02:00"}, Checkpointing(every_s=120.0)),
        ({"train_time_interval": {"minutes": 2}}, Checkpointing(every_s=120.0)),
        ({"train_time_interval": timedelta(0)}, Checkpointing()),
        ({"save_weights_only": True}, Checkpointing(every_n_epochs=1)),  # raylight's own are always whole
    ],
)
def test_raylights_own_checkpoints_are_made_when_a_file_may_be_due(arguments, expected):
    assert ModelCheckpoint(**arguments).checkpointing() == expected


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"mode": "maxx"}, "Did you mean 'max'"),
        ({"save_top_k": -2}, "save_top_k=-2"),
        ({"save_top_k": 2}, "needs monitor="),
        ({"every_n_train_steps": 5, "every_n_epochs": 1}, "every_n_train_steps=5 and every_n_epochs=1 exclude"),
        ({"every_n_train_steps": -1}, "every_n_train_steps=-1 must be an int of at least 0"),
        ({"train_time_interval": timedelta(0), "every_n_epochs": 2}, "every_n_epochs=2 and train_time_interval"),
        ({"train_time_interval": 60}, 'train_time_interval=60 must be "DD:HH:MM:SS", a timedelta'),
        ({"train_time_interval": timedelta(seconds=-1)}, "must not be negative"),
        ({"train_time_interval": "1:00", "mode": "maxx"}, "train_time_interval='1:00' must read DD:HH(.|\n)*maxx"),
        ({"save_last": "always"}, "save_last"),
        ({"save_last": "link", "dirpath": "s3://bucket/run"}, "save_last='link' needs a local directory"),
    ],
)
def test_what_cannot_work_is_told(arguments, text):
    with pytest.raises(InvalidArguments, match=text):
        ModelCheckpoint(**arguments)


def test_a_link_into_remote_storage_is_told_before_the_run(tmp_path):
    link = ModelCheckpoint(save_last="link")
    assert link._find_mistakes(Config(storage_path=str(tmp_path))) == []
    assert "storage_path='s3://bucket'" in link._find_mistakes(Config(storage_path="s3://bucket"))[0]
    assert ModelCheckpoint(tmp_path, save_last="link")._find_mistakes(Config(storage_path="s3://bucket")) == []


METRICS = {
    "epoch": torch.tensor(3), "step": torch.tensor(40), "val_loss": torch.tensor(0.12345), "val/acc": torch.tensor(1.5),
    "epoch_test": torch.tensor(7),
}  # fmt: skip


@pytest.mark.parametrize("with_names", [True, False])
@pytest.mark.parametrize(
    "template",
    [
        "{epoch}", "{epoch:03d}", "{epoch}-{val_loss:.2f}", "{val/acc}", "a{missing:d}b", "{missing:.2f}", "{val_loss}",
        "{epoch}-{epoch_test}", "x{epoch:02d}{step}", "plain", "{step}-{epoch}-{step}",
    ],
)  # fmt: skip
def test_names_are_filled_in_as_by_lightning(template, with_names):
    theirs = lightning.ModelCheckpoint()._format_checkpoint_name(template, dict(METRICS), None, with_names)
    assert fill_in(template, METRICS, with_names=with_names) == theirs


@pytest.mark.parametrize("options", [{}, {"filename": "{step}"}, {"auto_insert_metric_name": False}])
@pytest.mark.parametrize(
    "asked", [{}, {"ver": 2}, {"prefix": "p"}, {"filename": "{val/acc:.1f}"}, {"filename": "last", "ver": 1}]
)
def test_format_checkpoint_name_is_lightnings(tmp_path, options, asked):
    ours, theirs = (kind(tmp_path, **options) for kind in (ModelCheckpoint, lightning.ModelCheckpoint))
    assert ours.format_checkpoint_name(dict(METRICS), **asked) == theirs.format_checkpoint_name(dict(METRICS), **asked)


def test_the_directory_is_lightnings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in ("some/where", "~/models", tmp_path / "a" / ".." / "b", None):
        assert ModelCheckpoint(given).dirpath == lightning.ModelCheckpoint(given).dirpath
    assert ModelCheckpoint("s3://bucket/x?region=eu").dirpath == "s3://bucket/x?region=eu"
    assert join_path("s3://bucket/x?region=eu", "a=1.ckpt") == "s3://bucket/x/a=1.ckpt?region=eu"


@pytest.mark.parametrize(
    "arguments",
    [{}, {"monitor": "acc", "mode": "max"}, {"every_n_train_steps": 3}, {"train_time_interval": timedelta(hours=1)}],
)
def test_key_and_fresh_state_are_lightnings(arguments):
    ours, theirs = ModelCheckpoint(**arguments), lightning.ModelCheckpoint(**arguments)
    assert (ours.state_key, ours.state_dict()) == (theirs.state_key, theirs.state_dict())


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_state_is_taken_over_as_by_lightning(tmp_path, make_rank):
    state: dict[str, Any] = {
        "monitor": "acc", "best_model_score": torch.tensor(0.5), "best_model_path": "b.ckpt", "dirpath": str(tmp_path),
        "current_score": torch.tensor(0.4), "best_k_models": {"b.ckpt": torch.tensor(0.5)}, "last_model_path": "l.ckpt",
        "kth_best_model_path": "b.ckpt", "kth_value": torch.tensor(0.5),
    }  # fmt: skip
    for directory in (tmp_path, tmp_path / "other"):
        ours, theirs = ModelCheckpoint(directory, monitor="acc"), lightning.ModelCheckpoint(directory, monitor="acc")
        ours.load_state_dict(state)
        theirs.load_state_dict(state)
        assert ours.state_dict() == theirs.state_dict()
    ours.on_train_start(rank := make_rank(), None)
    assert "only best_model_path" in rank.notices[0][0]


class Orders(list[Any]):
    """What a callback asks for, and the little it reads; files that were asked for count as there."""

    def __init__(self, make_rank: Any, **values: float):
        self.rank = make_rank(global_step=0, **{"ckpt_path": None, "fast_dev_run": False, "automatic": True})
        self.rank.order_file = self.append
        self.rank.is_file_wanted = self.is_file_wanted
        self.rank.callback_metrics = values

    def is_file_wanted(self, path: str) -> bool | None:
        return next((not isinstance(it, FileDropped) for it in reversed(self) if it.path == path), None)

    @property
    def names(self) -> list[tuple[str, str]]:
        kinds = {FileWanted: "write", LinkWanted: "link", FileDropped: "drop"}
        return [(kinds[type(order)], os.path.basename(order.path)) for order in self]


def save(callback: ModelCheckpoint, orders: Orders, step: int, **values: float) -> None:
    orders.rank.global_step = step
    orders.rank.callback_metrics = values
    candidates = callback._monitor_candidates(orders.rank)
    callback._save_topk_checkpoint(orders.rank, candidates)
    callback._save_last_checkpoint(orders.rank, candidates)


def test_a_file_is_asked_for_before_the_one_that_it_replaces_is_dropped(tmp_path, make_rank):
    callback, orders = ModelCheckpoint(tmp_path, monitor="acc", mode="max", save_last="link"), Orders(make_rank)
    for step, acc in ((1, 0.5), (2, 0.4), (3, 0.7)):
        save(callback, orders, step, acc=acc)
    assert orders.names == [
        ("write", "epoch=0-step=1.ckpt"), ("link", "last.ckpt"), ("link", "last.ckpt"),
        ("write", "epoch=0-step=3.ckpt"), ("drop", "epoch=0-step=1.ckpt"), ("link", "last.ckpt"),
    ]  # fmt: skip
    assert orders[-1].target == callback.best_model_path
    key, state = orders[3].state
    assert (key, state["best_model_path"]) == (callback.state_key, callback.best_model_path)


def test_the_worst_of_the_best_goes_and_a_nan_is_the_worst(tmp_path, make_rank):
    callback, orders = ModelCheckpoint(tmp_path, monitor="loss", save_top_k=2), Orders(make_rank)
    for step, loss in ((1, float("nan")), (2, 3.0), (3, 2.0), (4, 5.0)):
        save(callback, orders, step, loss=loss)
    assert [float(score) for score in callback.best_k_models.values()] == [3.0, 2.0]
    assert orders.names[-1] == ("drop", "epoch=0-step=1.ckpt")
    assert (float(callback.kth_value), float(callback.current_score)) == (3.0, 2.0)


def test_a_file_of_another_directory_or_one_that_was_resumed_from_stays(tmp_path, make_rank):
    callback, orders = ModelCheckpoint(tmp_path / "a"), Orders(make_rank)
    callback.best_model_path = str(tmp_path / "b" / "old.ckpt")
    save(callback, orders, 1)
    orders.rank.ckpt_path = callback.best_model_path
    save(callback, orders, 2)
    save(callback, orders, 3)
    assert [kind for kind, _ in orders.names] == ["write", "write", "write", "drop"]
    assert callback._should_remove_checkpoint(orders.rank, "s3://bucket/x.ckpt", "s3://bucket/y.ckpt")


def test_a_name_that_is_taken_gets_a_version(tmp_path, make_rank):
    (tmp_path / "x.ckpt").touch()
    callback, orders = ModelCheckpoint(tmp_path, "x", "loss", save_top_k=-1), Orders(make_rank)
    for step in (1, 2):
        save(callback, orders, step, loss=0.5)
    assert [name for _, name in orders.names] == ["x-v1.ckpt", "x-v2.ckpt"]


def test_the_table_of_the_best_as_yaml(tmp_path):
    ours, theirs = ModelCheckpoint(tmp_path / "a"), lightning.ModelCheckpoint(tmp_path / "a")
    for callback in (ours, theirs):
        callback.best_k_models = {"b/é 'x': 1.ckpt": torch.tensor(0.25), "a.ckpt": torch.tensor(float("inf"))}
    (tmp_path / "a").mkdir()
    theirs.to_yaml()
    expected = yaml.safe_load((tmp_path / "a" / "best_k_models.yaml").read_text())
    ours.to_yaml()
    assert yaml.safe_load((tmp_path / "a" / "best_k_models.yaml").read_text()) == expected
    ours.best_k_models = {}
    ours.to_yaml(tmp_path / "empty.yaml")
    assert yaml.safe_load(Path(tmp_path, "empty.yaml").read_text()) == {}


def test_without_one_the_trainers_names_raylights_own_checkpoints():
    callback = ModelCheckpoint()
    callback.take_kept(None, None)
    assert (callback.best_model_path, callback.last_model_path, callback.best_model_score) == ("", "", None)
    best, last = (
        Checkpoint(
            Storage(f"/run/version_0/checkpoints/step-{step:08d}"), Manifest(step, 0, (), metrics={"val_loss": 2.0})
        )
        for step in (1, 2)
    )
    callback.take_kept(best, last)
    assert (callback.best_model_path, callback.last_model_path) == (best.path, last.path)
    assert float(callback.best_model_score) == 2.0


def test_on_exception_contradicts_no_checkpoints():
    callback = OnExceptionCheckpoint("somewhere")
    assert callback._find_mistakes(Config()) == []
    assert "checkpoint=False" in callback._find_mistakes(Config(checkpoint=None))[0]
    assert "on_exception=False" in callback._find_mistakes(Config(checkpoint=Checkpointing(on_exception=False)))[0]
    with pytest.raises(InvalidArguments):
        OnExceptionCheckpoint(filename="")
