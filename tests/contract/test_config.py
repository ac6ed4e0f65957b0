"""The trainer's arguments: what each may be, what they mean, and what a wrong one is told."""

from __future__ import annotations

import enum
import json
import pickle
from argparse import Namespace
from collections import UserList, deque
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from raylight.arguments.resolving import resolve
from raylight.arguments.rules import as_list
from raylight.arguments.scale import Available
from raylight.contract import seeding
from raylight.contract.config import DDP, MASK, Checkpointing, Config, describe, is_secret, mask_command, to_plain
from raylight.contract.errors import InvalidArguments, NotEnoughResources
from raylight.trainer import Trainer
from raylight.user.callback import Callback

CPU = Available(num_gpus_here=0)
ONE_GPU = Available(num_gpus_here=1)
FOUR_GPUS = Available(num_gpus_here=4)
CLUSTER = Available(num_gpus_here=0, ray_address=True, cluster_gpus=8, cluster_cpus=64)
CPU_CLUSTER = Available(num_gpus_here=0, ray_address=True, cluster_gpus=0, cluster_cpus=64)
NAMED_CLUSTER = Available(num_gpus_here=0, ray_address="10.0.0.1:6379")
GROWING_CLUSTER = Available(num_gpus_here=0, ray_address=True, cluster_gpus=0, cluster_cpus=4, autoscales=True)


class KeepBest(Callback):
    """Stands where ModelCheckpoint stands: it says when checkpoints are made."""

    def __repr__(self) -> str:
        return "KeepBest()"  # without an address: pytest-xdist wants the names of tests to be the same in all processes

    def __init__(self, **fields: Any):
        self.fields = fields

    def checkpointing(self) -> Checkpointing:
        return Checkpointing(**self.fields)


class Stateful(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {}


class LightningStrategy:
    pass


LightningStrategy.__module__ = "pytorch_lightning.strategies.ddp"


class Loud:
    def log_metrics(self, metrics: dict[str, float], step: int) -> None: ...


class SLURMEnvironment:
    pass


class ClusterEnvironment(SLURMEnvironment):
    pass


class OwnPrecision:
    def unscale(self, optimizer: Any) -> None: ...
    def forward_context(self) -> None: ...


BAD = [
    # names
    (dict(max_epoch=3), CPU, ["max_epoch is not an argument", "did you mean max_epochs?"]),
    (dict(precison="32"), CPU, ["precison", "did you mean precision?"]),
    (dict(qqq=1), CPU, ["qqq is not an argument", "help(raylight.Trainer)"]),
    (dict(resume="last"), CPU, ["resume", 'raylight.fit(..., resume="last")']),
    (dict(datamodule=1), CPU, ["datamodule", "trainer.fit(model, datamodule=...)"]),
    (dict(terminate_on_nan=True), CPU, ["terminate_on_nan is Lightning's", "detect_anomaly=True"]),
    (dict(barebones=True, profiler="simple"), CPU, ["barebones=True turns off", "profiler='simple' asks for it"]),
    (dict(barebones=True, fast_dev_run=True), CPU, ["barebones=True", "fast_dev_run=True"]),
    (dict(barebones=True, log_every_n_steps=5), CPU, ["barebones=True", "log_every_n_steps=5"]),
    (dict(barebones=True, enable_checkpointing=True), CPU, ["barebones=True", "enable_checkpointing=True"]),
    (dict(accelerator="mps"), CPU, ["accelerator must be", 'on a Mac accelerator="cpu"']),
    (dict(resume_from_checkpoint="x"), CPU, ["resume_from_checkpoint", "resume=path"]),
    # types and ranges
    (dict(max_epochs="ten"), CPU, ["max_epochs must be a whole number of at least -1", "'ten' (str)"]),
    (dict(max_epochs=-2), CPU, ["max_epochs", "at least -1", "-2 (int)"]),
    (dict(max_epochs=True), CPU, ["max_epochs", "True (bool)"]),
    (dict(max_steps=1e6), CPU, ["max_steps", "1000000.0 (float)", "write 1000000"]),
    (dict(max_time="1:2"), CPU, ["max_time", "DD:HH:MM:SS", "'1:2'"]),
    (dict(max_time={"hour": 1}), CPU, ["max_time", '{"hours": 2}']),
    (dict(max_time=timedelta(0)), CPU, ["max_time", "above zero"]),
    (dict(limit_train_batches=1.5), CPU, ["limit_train_batches", "share from 0.0 to 1.0", "1.5 (float)"]),
    (dict(limit_val_batches=-1), CPU, ["limit_val_batches", "at least 0", "-1 (int)"]),
    (dict(limit_test_batches="all"), CPU, ["limit_test_batches", "'all'"]),
    (dict(fast_dev_run="yes"), CPU, ["fast_dev_run", "True, False, or a number of batches", "'yes'"]),
    (dict(val_check_interval=0.0), CPU, ["val_check_interval", "above 0.0", "limit_val_batches=0"]),
    (dict(val_check_interval="1:2"), CPU, ["val_check_interval", "or a time", "it must read DD:HH:MM:SS"]),
    (dict(val_check_interval=timedelta(0)), CPU, ["val_check_interval", "or a time"]),
    (dict(val_check_interval=[3]), CPU, ["val_check_interval", "or a time", "[3] (list)"]),
    (dict(check_val_every_n_epoch=0), CPU, ["check_val_every_n_epoch", "at least 1, or None"]),
    (dict(num_sanity_val_steps=-3), CPU, ["num_sanity_val_steps", "(-1: all)"]),
    (dict(precision="bf16-mix"), CPU, ["precision", "'32-true'", "did you mean 'bf16-mixed'?"]),
    (dict(precision=8), CPU, ["precision", "8 (int)", "'16-mixed'"]),
    (dict(accumulate_grad_batches={0: 2}), CPU, ["accumulate_grad_batches", "GradientAccumulationScheduler"]),
    (dict(gradient_clip_val=-0.1), CPU, ["gradient_clip_val", "at least 0", "-0.1"]),
    (dict(gradient_clip_val=float("nan")), CPU, ["gradient_clip_val", "nan (float)"]),
    (dict(gradient_clip_algorithm="nrom"), CPU, ["gradient_clip_algorithm", "did you mean 'norm'?"]),
    (dict(deterministic="wran"), CPU, ["deterministic", "True or False or one of 'warn'", "did you mean 'warn'?"]),
    (dict(benchmark=1), CPU, ["benchmark must be True or False", "1 (int)"]),
    (dict(seed=2**32), CPU, ["seed", "from 0 to 4294967295"]),
    (dict(log_every_n_steps=-1), CPU, ["log_every_n_steps", "at least 0", "-1 (int)"]),
    (dict(profiler="advancd"), CPU, ["profiler", "'simple'", "'torch'", "did you mean 'advanced'?"]),
    (dict(logger="tensorboard"), CPU, ["logger", "log_metrics", "'tensorboard'"]),
    (dict(logger=[Loud(), 3]), CPU, ["logger", "log_metrics"]),
    (dict(max_restarts=-1), CPU, ["max_restarts", "at least 0"]),
    (dict(hang_timeout_s=0), CPU, ["hang_timeout_s", "above 0", "inf: never"]),
    (dict(replacement_timeout_s="60"), CPU, ["replacement_timeout_s", "seconds", "'60' (str)"]),
    (dict(storage_path=3), CPU, ["storage_path", "path or a URI", "3 (int)"]),
    (dict(storage_path=""), CPU, ["storage_path", "'' (str)"]),
    (dict(storage_filesystem="s3"), CPU, ["storage_filesystem", "pyarrow.fs.FileSystem", "'s3'"]),
    (dict(name="a/b"), CPU, ["name", "none of / ", "'a/b'"]),
    (dict(name="version_1"), CPU, ["name", "not version_N", "'version_1'"]),
    (dict(name=".."), CPU, ["name", "'..'"]),
    (dict(logger=iter([Loud()])), CPU, ["logger", "make it a list"]),
    (dict(callbacks=iter([Callback()])), CPU, ["callbacks", "a sequence of them", "make it a list"]),
    (dict(callbacks={"one": Callback()}.values()), CPU, ["callbacks", "make it a list"]),
    (dict(callbacks={"one": Callback()}), CPU, ["callbacks[0] is dict"]),
    (dict(callbacks=[3]), CPU, ["callbacks[0] is int", "raylight.Callback"]),
    (dict(callbacks=[Callback(), KeepBest]), CPU, ["callbacks[1] is KeepBest, a class", "KeepBest(...)"]),
    (dict(plugins=[object()]), CPU, ["plugins", "raylight Precision"]),
    (dict(plugins=ClusterEnvironment()), CPU, ["plugins", "Ray knows the nodes"]),
    (dict(plugins=[OwnPrecision()], precision="16-mixed"), ONE_GPU, ["precision='16-mixed'", "plugins"]),
    # strategy
    (dict(strategy="fsdp"), CPU, ["'fsdp'", "a model that does not fit one device is not supported yet"]),
    (dict(strategy="deepspeed"), CPU, ["strategy", '"ddp"', "raylight.DDP(...)", "'deepspeed'"]),
    (dict(strategy=LightningStrategy()), CPU, ["strategy", "raylight.DDP(...) in place of Lightning's object"]),
    (dict(strategy=DDP(backend="ncl")), CPU, ["strategy: backend", "did you mean 'nccl'?"]),
    (dict(strategy=DDP(placement="SPREED")), CPU, ["strategy: placement", "did you mean 'SPREAD'?"]),
    (dict(strategy=DDP(timeout_s=0)), CPU, ["strategy: timeout_s", "above 0"]),
    (dict(strategy=DDP(backend="nccl"), num_workers=2), CPU, ['backend="nccl" needs GPUs', '"gloo"']),
    # checkpoints
    (dict(checkpoint="often"), CPU, ["checkpoint", "raylight.Checkpointing(...)", "'often'"]),
    (dict(checkpoint={"every_steps": 5}), CPU, ["no field 'every_steps'", "did you mean every_n_steps?"]),
    (dict(checkpoint={"mode": "mni"}), CPU, ["checkpoint: mode", "'min', 'max'", "did you mean 'min'?"]),
    (dict(checkpoint=Checkpointing(every_n_steps=0)), CPU, ["checkpoint: every_n_steps", "at least 1, or None"]),
    (dict(checkpoint=Checkpointing(every_s="sometimes")), CPU, ["checkpoint: every_s", "'auto'"]),
    (dict(checkpoint=Checkpointing(monitor=3)), CPU, ["checkpoint: monitor", "string", "3 (int)"]),  # type: ignore[arg-type]
    (dict(checkpoint=Checkpointing(keep_best=0, keep_last=0)), CPU, ["keeps no checkpoint", "checkpoint=False"]),
    (dict(checkpoint=False, enable_checkpointing=True), CPU, ["checkpoint=False", "enable_checkpointing=True"]),
    (dict(enable_checkpointing=False, callbacks=KeepBest()), CPU, ["enable_checkpointing=False", "KeepBest"]),
    (
        dict(callbacks=[Stateful(), Callback(), Stateful()]), CPU,
        ["callbacks[0] and callbacks[2] would keep their state under one key, 'Stateful'", "override state_key"],
    ),
    (dict(callbacks=[KeepBest(mode="mean")]), CPU, ["KeepBest (callbacks[0]): mode", "'mean'"]),
    # impossible together
    (dict(min_epochs=5, max_epochs=3), CPU, ["min_epochs=5 is more than max_epochs=3"]),
    (dict(min_steps=5, max_steps=3), CPU, ["min_steps=5 is more than max_steps=3"]),
    (dict(precision="16-mixed"), CPU, ['precision="16-mixed" needs a GPU', 'precision="bf16-mixed"']),
    (dict(precision=16, use_gpu=False), FOUR_GPUS, ['use precision="bf16-mixed"']),
    (dict(sync_batchnorm=True, num_workers=2), CPU, ["sync_batchnorm=True needs GPUs"]),
    (dict(global_batch_size=64, accumulate_grad_batches=2), CPU, ["global_batch_size=64", "accumulate_grad_batches=2"]),
    (dict(global_batch_size=2, num_workers=(1, 4)), CPU, ["global_batch_size=2", "at least 4"]),
    (dict(check_val_every_n_epoch=None), CPU, ["check_val_every_n_epoch=None", "number of batches", "1.0"]),
    (dict(val_check_interval=9, limit_train_batches=5), CPU, ["val_check_interval=9", "limit_train_batches=5"]),
    (dict(storage_path="a", default_root_dir="b"), CPU, ["storage_path='a'", "default_root_dir='b'"]),
    # scale
    (dict(num_workers=-1), CPU, ["num_workers", '"auto", 0 (in this process)', "(min, max)", "-1 (int)"]),
    (dict(num_workers=(4, 2)), CPU, ["num_workers", "write (2, 4)"]),
    (dict(num_workers=(0, 2)), CPU, ["num_workers", "at least 1 each"]),
    (dict(num_workers="two"), CPU, ["num_workers", "'two'"]),
    (dict(devices=0), CPU, ["devices", "at least 1", "0 (int)"]),
    (dict(devices=[1, 3]), CLUSTER, ["devices", "CUDA_VISIBLE_DEVICES=1,3", "devices=2"]),
    (dict(devices="2,"), CPU, ["devices=[2] names GPUs", "on CPUs: devices=1"]),
    (dict(devices=[0, 4]), FOUR_GPUS, ["devices=[0,4]", "this machine has 4 GPUs"]),
    (dict(devices=[1, 1]), FOUR_GPUS, ["devices", "indices of GPUs such as [0, 2]", "each GPU once"]),
    (dict(devices="0,x"), FOUR_GPUS, ["devices", "'0,x'"]),
    (dict(accelerator="tpu"), CPU, ["accelerator", "'cpu'", "'gpu'", "'tpu'"]),
    (dict(resources_per_worker={"cpu": 2}), CPU, ["resources_per_worker", "Ray writes 'CPU'"]),
    (dict(resources_per_worker={"CPU": -1}), CPU, ["resources_per_worker", "negative"]),
    (dict(num_workers=2, devices=4), CPU, ["num_workers=2 and devices=4", "pass one of them"]),
    (dict(use_gpu=True, accelerator="cpu"), FOUR_GPUS, ["use_gpu=True and accelerator='cpu' contradict"]),
    (dict(gpus=2, use_gpu=False), FOUR_GPUS, ["use_gpu=False and gpus=2 contradict"]),
    (dict(gpus=2, num_nodes=2), FOUR_GPUS, ["num_nodes=2 needs a Ray cluster", "RAY_ADDRESS"]),
    (dict(num_workers=4, num_nodes=2), CLUSTER, ["num_nodes=2", "devices=N"]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "available", "words"), BAD, ids=[",".join(row[0]) for row in BAD])
def test_a_bad_argument_is_told_with_what_is_allowed(
    arguments: dict[str, Any], available: Available, words: list[str]
) -> None:
    with pytest.raises(InvalidArguments) as caught:
        resolve(arguments, available)
    assert len(caught.value.mistakes) == 1
    for word in words:
        assert word in str(caught.value)


def test_all_mistakes_are_told_at_once_and_missing_resources_with_them() -> None:
    with pytest.raises(InvalidArguments) as caught:
        resolve(dict(max_epoch=3, precision="fp16", gpus=4, checkpoint={"mode": "mni", "every": 2}, callbacks=[1]), CPU)
    told = caught.value.mistakes
    assert len(told) == 6
    for word in (
        "max_epochs?",
        "precision must be",
        "mode must be",
        "no field 'every'",
        "callbacks[0]",
        "asks for 4 GPUs",
    ):
        assert sum(word in text for text in told) == 1, word
    assert str(caught.value).startswith("6 mistakes:\n  - ")
    assert isinstance(caught.value, ValueError)


SHORT = [
    (dict(gpus=4), CPU, ["gpus=4 asks for 4 GPUs", "machine has none", "num_workers=4, use_gpu=False", "RAY_ADDRESS"]),
    (dict(gpus=4), Available(2), ["gpus=4 asks for 4 GPUs", "this machine has 2 GPUs", "What runs here: gpus=2."]),
    (dict(gpus=1), CPU, ["gpus=1 asks for a GPU", "has none", "use_gpu=False"]),
    (dict(devices=8, accelerator="gpu"), FOUR_GPUS, ["devices=8", "has 4 GPUs", "runs here: devices=4."]),
    (dict(devices=-1, accelerator="gpu"), CPU, ["accelerator='gpu' asks for a GPU", "has none"]),
    (dict(num_workers=0, use_gpu=True), CPU, ["num_workers=0 asks for a GPU", "use_gpu=False"]),
    (dict(num_workers=6), FOUR_GPUS, ["num_workers=6", "has 4 GPUs", "num_workers=4.", "num_workers=6, use_gpu=False"]),
    (dict(num_workers=16), CLUSTER, ["the Ray cluster has 8 GPUs", "runs here: num_workers=8."]),
    (dict(num_workers=(9, 12)), CLUSTER, ["asks for 9 GPUs", "runs here: num_workers=(8, 12)."]),
    (dict(devices=4, num_nodes=4), CLUSTER, ["asks for 16 GPUs", "devices=2, num_nodes=4"]),
    (dict(num_workers=100), CPU_CLUSTER, ["asks for 100 CPUs", "has 64 CPUs", "num_workers=64."]),
    (dict(num_workers=3, resources_per_worker={"GPU": 2}), FOUR_GPUS, ["asks for 6 GPUs", "num_workers=2."]),
    (dict(use_gpu=True), CPU_CLUSTER, ["use_gpu=True", "no room", "num_workers=N, use_gpu=False"]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "available", "words"), SHORT, ids=[str(row[0]) for row in SHORT])
def test_more_than_there_is_names_what_would_run(
    arguments: dict[str, Any], available: Available, words: list[str]
) -> None:
    with pytest.raises(NotEnoughResources) as caught:
        resolve(arguments, available)
    for word in words:
        assert word in str(caught.value)


ONE_EACH = {"CPU": 1.0, "GPU": 1.0}
SCALES = [
    (dict(), CPU, 0, False, {}),
    (dict(), ONE_GPU, 0, True, {}),
    (dict(), FOUR_GPUS, 4, True, ONE_EACH),
    (dict(), CLUSTER, 8, True, ONE_EACH),
    (dict(), CPU_CLUSTER, 0, False, {}),
    (dict(), NAMED_CLUSTER, "auto", None, {}),
    (dict(), Available(0, True, 8, 3), 3, True, ONE_EACH),
    (dict(use_gpu=False), FOUR_GPUS, 0, False, {}),
    (dict(num_workers="auto", accelerator="gpu"), ONE_GPU, 0, True, {}),
    (dict(resources_per_worker={"GPU": 0.5}), ONE_GPU, 2, True, {"CPU": 1.0, "GPU": 0.5}),
    (dict(num_workers=2), CPU, 2, False, {"CPU": 1.0}),
    (dict(num_workers=2, resources_per_worker={"CPU": 4}), CPU, 2, False, {"CPU": 4.0}),
    (dict(num_workers=2), FOUR_GPUS, 2, True, ONE_EACH),
    (dict(num_workers=2, use_gpu=False), FOUR_GPUS, 2, False, {"CPU": 1.0}),
    (dict(num_workers=1), CPU, 1, False, {"CPU": 1.0}),
    (dict(num_workers=0), FOUR_GPUS, 0, True, {}),
    (dict(num_workers=(1, 3)), CPU, (1, 3), False, {"CPU": 1.0}),
    (dict(num_workers=[2, 3]), CPU, (2, 3), False, {"CPU": 1.0}),
    (dict(num_workers=np.int64(2)), CPU, 2, False, {"CPU": 1.0}),
    (dict(num_workers=4), NAMED_CLUSTER, 4, None, {"CPU": 1.0}),
    (dict(num_workers=16, use_gpu=True), GROWING_CLUSTER, 16, True, ONE_EACH),
    (dict(gpus=4), FOUR_GPUS, 4, True, ONE_EACH),
    (dict(gpus=1), ONE_GPU, 0, True, {}),
    (dict(gpus=1), CLUSTER, 1, True, ONE_EACH),
    (dict(gpus=0), FOUR_GPUS, 0, False, {}),
    (dict(gpus=0, num_workers=3), FOUR_GPUS, 3, False, {"CPU": 1.0}),
    (dict(gpus=[0, 1]), FOUR_GPUS, 2, True, ONE_EACH),
    (dict(gpus=-1), FOUR_GPUS, 4, True, ONE_EACH),
    (dict(devices="3"), CPU, 3, False, {"CPU": 1.0}),
    (dict(devices="auto"), FOUR_GPUS, 4, True, ONE_EACH),
    (dict(devices=1, accelerator="cpu"), CPU_CLUSTER, 0, False, {}),
    (dict(devices=2, accelerator="cuda"), FOUR_GPUS, 2, True, ONE_EACH),
    (dict(devices=2, num_nodes=4, num_workers=None), CLUSTER, 8, True, ONE_EACH),
    (dict(devices=2, num_nodes=1, accelerator="cpu"), CPU, 2, False, {"CPU": 1.0}),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "available", "workers", "gpu", "resources"), SCALES, ids=range(len(SCALES)))
def test_every_spelling_of_scale_becomes_one(
    arguments: dict[str, Any], available: Available, workers: Any, gpu: bool | None, resources: dict[str, float]
) -> None:
    config = resolve(arguments, available)
    assert (config.num_workers, config.use_gpu, config.resources_per_worker) == (workers, gpu, resources)


SPELLINGS = [
    (dict(precision=16), "precision", "16-mixed"),
    (dict(precision="16"), "precision", "16-mixed"),
    (dict(precision=32), "precision", "32-true"),
    (dict(precision=64), "precision", "64-true"),
    (dict(precision="bf16"), "precision", "bf16-mixed"),
    (dict(precision="BF16-true"), "precision", "bf16-true"),
    (dict(precision=None), "precision", "32-true"),
    (dict(max_time="01:02:03:04"), "max_time_s", 93784.0),
    (dict(max_time=timedelta(minutes=2)), "max_time_s", 120.0),
    (dict(max_time={"hours": 1, "seconds": 1}), "max_time_s", 3601.0),
    (dict(limit_train_batches=None), "limit_train_batches", 1.0),
    (dict(limit_train_batches=10.0), "limit_train_batches", 10),
    (dict(limit_val_batches=0.25), "limit_val_batches", 0.25),
    (dict(val_check_interval=np.float32(0.5)), "val_check_interval", 0.5),
    (dict(val_check_interval="00:00:30:00"), "val_check_interval", timedelta(minutes=30)),
    (dict(val_check_interval=timedelta(seconds=5)), "val_check_interval", timedelta(seconds=5)),
    (dict(val_check_interval={"hours": 2}), "val_check_interval", timedelta(hours=2)),
    (dict(val_check_interval={"hours": 2}, check_val_every_n_epoch=None), "check_val_every_n_epoch", None),
    (dict(val_check_interval="00:00:30:00", fast_dev_run=True), "val_check_interval", 1.0),
    (dict(check_val_every_n_epoch=None, val_check_interval=7), "check_val_every_n_epoch", None),
    (dict(strategy="auto"), "strategy", DDP()),
    (dict(strategy="ddp_spawn"), "strategy", DDP()),
    (dict(strategy="ddp_find_unused_parameters_true"), "strategy", DDP(find_unused_parameters=True)),
    (dict(strategy=DDP(placement="spread")), "strategy", DDP(placement="SPREAD")),
    (dict(gradient_clip_val=0), "gradient_clip_val", None),
    (dict(gradient_clip_val=1), "gradient_clip_val", 1.0),
    (dict(deterministic="warn"), "deterministic", "warn"),
    (dict(checkpoint=False), "checkpoint", None),
    (dict(enable_checkpointing=False), "checkpoint", None),
    (dict(checkpoint=True), "checkpoint", Checkpointing()),
    (dict(checkpoint=None, enable_checkpointing=True), "checkpoint", Checkpointing()),
    (dict(checkpoint={"every_n_steps": 5, "mode": "MAX"}), "checkpoint", Checkpointing(every_n_steps=5, mode="max")),
    (dict(callbacks=KeepBest(monitor="acc")), "checkpoint", Checkpointing(monitor="acc")),
    (dict(callbacks=KeepBest(mode="max"), checkpoint={"keep_last": 3}), "checkpoint", Checkpointing(keep_last=3)),
    (
        dict(callbacks=[KeepBest(every_s=60, every_n_steps=9), KeepBest(monitor="a", mode="max"), KeepBest(every_s=7)]),
        "checkpoint",
        Checkpointing(every_n_steps=9, every_s=7.0, monitor="a", mode="max"),
    ),
    (dict(logger=False), "logger", False),
    (dict(logger=[]), "logger", False),
    (dict(logger=None), "logger", True),
    (dict(hang_timeout_s=float("inf")), "hang_timeout_s", float("inf")),
    (dict(storage_path="s3://bucket/runs"), "storage_path", "s3://bucket/runs"),
    (dict(storage_path=Path("/tmp/x")), "storage_path", "/tmp/x"),
    (dict(default_root_dir="/tmp/x"), "storage_path", "/tmp/x"),
    (dict(storage_path="/tmp/x", default_root_dir="/tmp/x"), "storage_path", "/tmp/x"),
    (dict(max_epochs=None), "max_epochs", 1000),
    (dict(max_steps=10), "max_epochs", -1),
    (dict(max_time="00:01:00:00"), "max_epochs", -1),
    (dict(max_epochs=3, max_steps=10), "max_epochs", 3),
    (dict(seed=7), "seed", 7),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "name", "meaning"), SPELLINGS, ids=[str(row[0]) for row in SPELLINGS])
def test_every_spelling_is_read(arguments: dict[str, Any], name: str, meaning: Any) -> None:
    value = getattr(resolve(arguments, ONE_GPU), name)
    assert value == meaning
    assert type(value) is type(meaning)


def test_without_arguments_everything_has_its_documented_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(seeding, "_last_seed", None)
    config = resolve({}, CPU)
    resolved = dict(num_workers=0, use_gpu=False, max_epochs=1000, storage_path=str(tmp_path / "runs"))
    assert config == Config(**resolved)  # type: ignore[arg-type]
    pickle.loads(pickle.dumps(config))


def test_a_path_on_a_filesystem_of_its_own_is_left_as_it_is() -> None:
    from pyarrow.fs import LocalFileSystem

    filesystem = LocalFileSystem()
    assert resolve(dict(storage_path="bucket/runs", storage_filesystem=filesystem), CPU).storage_path == "bucket/runs"
    with pytest.raises(InvalidArguments, match="names its own filesystem"):
        resolve(dict(storage_path="s3://bucket/runs", storage_filesystem=filesystem), CPU)


def test_a_seed_is_the_callers_own_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeding, "_last_seed", 11)
    assert resolve({}, CPU).seed is None
    assert resolve(dict(seed=0), CPU).seed == 0


def test_fast_dev_run_means_what_it_means_in_lightning() -> None:
    config = resolve(dict(fast_dev_run=3, max_epochs=50, min_epochs=5, limit_val_batches=9, logger=Loud()), CPU)
    limits = (
        config.limit_train_batches,
        config.limit_val_batches,
        config.limit_test_batches,
        config.limit_predict_batches,
    )
    assert limits == (3, 3, 3, 3)
    assert (config.max_epochs, config.max_steps, config.min_epochs, config.num_sanity_val_steps) == (1, 3, None, 0)
    assert (config.checkpoint, config.logger, config.val_check_interval) == (None, False, 1.0)
    assert resolve(dict(fast_dev_run=True), CPU).max_steps == 1
    assert resolve(dict(fast_dev_run=False), CPU).checkpoint == Checkpointing()


def test_overfit_batches_limits_training_and_validation() -> None:
    config = resolve(dict(overfit_batches=5, limit_val_batches=2), CPU)
    assert (config.limit_train_batches, config.limit_val_batches, config.limit_test_batches) == (5, 5, 1.0)
    assert config.overfit_batches == 5


def test_loggers_become_a_list_and_plugins_a_tuple() -> None:
    loud, own = Loud(), OwnPrecision()
    config = resolve(dict(logger=loud, plugins=own), CPU)
    assert config.logger == [loud]
    assert config.plugins == (own,)


SEQUENCES = [list, tuple, deque, UserList]


@pytest.mark.parametrize("make", SEQUENCES)
def test_callbacks_and_loggers_come_in_any_sequence(make: Any) -> None:
    one, loud, own = KeepBest(monitor="acc"), Loud(), OwnPrecision()
    config = resolve(dict(callbacks=make([one]), logger=make([loud]), plugins=make([own])), CPU)
    assert config.checkpoint == Checkpointing(monitor="acc")
    assert (config.logger, config.plugins) == ([loud], (own,))
    assert config.given["callbacks"] == [f"{__name__}.KeepBest"]
    assert Trainer(callbacks=make([one]), num_workers=0).callbacks == [one]


@pytest.mark.parametrize("make", SEQUENCES)
def test_numbers_of_workers_and_devices_come_in_any_sequence(make: Any) -> None:
    config = resolve(dict(devices=make([0, 1])), FOUR_GPUS)
    assert config.num_workers == resolve(dict(num_workers=make([2, 2])), FOUR_GPUS).num_workers[0] == 2  # type: ignore[index]


def test_one_callback_or_several_or_none() -> None:
    one = Callback()
    assert as_list(None) == []
    assert as_list(one) == as_list([one]) == as_list((one,)) == as_list({one}) == [one]


@dataclass
class Extra:
    password: str
    size: int


def test_describe_gives_json_without_secrets() -> None:
    config = resolve(
        dict(
            storage_path="s3://KEY:VERYSECRET@bucket/x?secret_key=HIDDEN&region=eu",
            callbacks=[KeepBest(monitor="acc")],
            logger=[Loud()],
            max_time=timedelta(hours=1),
            hang_timeout_s=float("inf"),
            gpus=4,
        ),
        FOUR_GPUS,
    )
    text = json.dumps(describe(config), allow_nan=False)
    assert "SECRET" not in text
    assert "HIDDEN" not in text
    told = json.loads(text)
    assert told["storage_path"] == f"s3://{MASK}@bucket/x?secret_key={MASK}&region=eu"
    assert told["num_workers"] == 4
    assert told["checkpoint"]["monitor"] == "acc"
    assert told["hang_timeout_s"] == "inf"
    assert told["given"]["max_time"] == "1:00:00"
    assert told["given"]["gpus"] == 4
    assert told["given"]["callbacks"] == [f"{__name__}.KeepBest"]
    assert told["given"]["logger"] == [f"{__name__}.Loud"]


def test_plain_values_of_hyperparameters() -> None:
    given = {
        "lr": np.float32(0.5), "steps": torch.tensor(3), "api_key": "k", "layers": (1, 2), "path": Path("/a"),
        "net": torch.nn.Linear, "extra": Extra("p", 2), "token_dim": 64, "nan": float("nan"), "hfToken": "t",
        "none": None,
    }  # fmt: skip
    assert to_plain(given) == {
        "lr": 0.5, "steps": 3, "api_key": MASK, "layers": [1, 2], "path": "/a", "net": "torch.nn.modules.linear.Linear",
        "extra": {"password": MASK, "size": 2}, "token_dim": 64, "nan": "nan", "hfToken": MASK, "none": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["password", "AWS_SECRET_ACCESS_KEY", "apiKey", "wandb_token", "private_key", "dbPasswd"]
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize("name", ["tokenizer", "max_tokens", "key", "monitor", "author", "keep_last", "secretary"])
def test_names_that_only_look_like_secrets(name: str) -> None:
    assert not is_secret(name)


def test_a_command_line_without_secrets() -> None:
    words = [
        "train.py",
        "--api-key",
        "K",
        "--password=P",
        "HF_TOKEN=T",
        "--tokens",
        "5",
        "--token",
        "--lr",
        "1",
        "s3://a:b@c",
    ]
    assert mask_command(words) == [
        "train.py", "--api-key", MASK, f"--password={MASK}", f"HF_TOKEN={MASK}", "--tokens", "5", "--token", "--lr",
        "1", f"s3://{MASK}@c",
    ]  # fmt: skip


class Mode(enum.Enum):
    FAST = 1


class Word(enum.StrEnum):
    YES = "y"


def test_a_record_says_what_a_hyperparameter_is() -> None:
    given = {
        "mode": Mode.FAST, "word": Word.YES, "space": Namespace(lr=0.1, api_key="x"), "range": range(2),
        "conf": OmegaConf.create({"a": [1, "???"], "b": "${a}", "late": "???"}),
    }  # fmt: skip
    assert to_plain(given) == {
        "mode": "Mode.FAST", "word": "Word.YES", "space": {"lr": 0.1, "api_key": MASK}, "range": [0, 1],
        "conf": {
            "a": [1, "(MissingMandatoryValue)"], "b": [1, "(MissingMandatoryValue)"], "late": "(MissingMandatoryValue)",
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "available", "num_workers", "indices"),
    [
        (dict(devices=[1, 3]), FOUR_GPUS, 2, (1, 3)), (dict(gpus="0,2"), FOUR_GPUS, 2, (0, 2)),
        (dict(devices="2,"), FOUR_GPUS, 0, (2,)), (dict(devices=[0]), FOUR_GPUS, 0, (0,)),
        (dict(devices=[0, 1, 2, 3]), FOUR_GPUS, 4, ()), (dict(devices=[0, 1]), CPU, 2, ()),
        (dict(devices=[0, 1]), CLUSTER, 2, ()),
        (dict(devices=[1, 3]), Available(4, True, 4, 8, started_here=True), 2, (1, 3)),
    ],
)  # fmt: skip
def test_gpus_are_chosen_by_index(
    arguments: dict[str, Any], available: Available, num_workers: int, indices: tuple[int, ...]
) -> None:
    config = resolve(arguments, available)
    assert (config.num_workers, config.gpu_indices) == (num_workers, indices)


def test_barebones_turns_off_all_that_costs_time() -> None:
    config = resolve(dict(barebones=True), CPU)
    assert (config.logger, config.checkpoint, config.log_every_n_steps, config.num_sanity_val_steps) == (
        False,
        None,
        0,
        0,
    )
    assert not config.enable_progress_bar
    assert not config.enable_model_summary
    resolve(dict(barebones=True, logger=False, enable_checkpointing=False, num_sanity_val_steps=0), CPU)
