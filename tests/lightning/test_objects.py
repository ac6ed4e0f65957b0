"""Lightning's strategies, plugins and accelerators as arguments of the trainer, and as what the trainer has."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from raylight.accelerators import CPUAccelerator, CUDAAccelerator
from raylight.plugins import DoublePrecision, HalfPrecision, MixedPrecision, Precision, TorchSyncBatchNorm
from raylight.strategies import DDPStrategy, FSDPStrategy, ParallelStrategy, SingleDeviceStrategy, Strategy

import raylight as pl
from raylight.contract.errors import InvalidArguments
from raylight.user.run_view import Record
from raylight.user.strategies import strategy_of


def configure(**arguments: Any) -> Any:
    return pl.Trainer(**{"num_workers": 0, "use_gpu": False} | arguments).config


def test_a_ddp_strategy_is_read_as_its_settings():
    given = DDPStrategy(
        find_unused_parameters=True, static_graph=True, bucket_cap_mb=5, process_group_backend="gloo",
        timeout=timedelta(seconds=7), start_method="spawn", gradient_as_bucket_view=False,
    )  # fmt: skip
    assert configure(strategy=given).strategy == pl.DDP(
        find_unused_parameters=True, static_graph=True, bucket_cap_mb=5, backend="gloo", timeout_s=7.0,
        gradient_as_bucket_view=False,
    )  # fmt: skip
    assert configure(strategy=DDPStrategy(accelerator="cpu")).strategy == pl.DDP()
    assert pl.Trainer(strategy=DDPStrategy(CPUAccelerator()), num_workers=0).config.use_gpu is False


def test_a_single_device_is_this_process():
    for given in (SingleDeviceStrategy(), SingleDeviceStrategy("cpu"), "single_device"):
        config = pl.Trainer(strategy=given, devices=1).config
        assert config.num_workers == 0
    with pytest.raises(InvalidArguments, match="SingleDeviceStrategy is one device, and devices=2 asks for others"):
        pl.Trainer(strategy=SingleDeviceStrategy(), devices=2)
    with pytest.raises(InvalidArguments, match="CUDA_VISIBLE_DEVICES=1"):
        SingleDeviceStrategy("cuda:1")


def test_the_class_of_the_trainers_strategy_is_lightnings():
    trainer = pl.Trainer(num_workers=0)
    assert isinstance(trainer.strategy, SingleDeviceStrategy)
    assert not isinstance(trainer.strategy, ParallelStrategy | FSDPStrategy)
    two = strategy_of(Record(world_size=2, global_rank=1), trainer.strategy.checkpoint_io)
    assert isinstance(two, DDPStrategy)
    assert isinstance(two, ParallelStrategy)
    assert isinstance(two, Strategy)
    assert (two.world_size, two.global_rank) == (2, 1)


def test_what_a_strategy_does_not_take_is_named():
    with pytest.raises(InvalidArguments) as caught:
        DDPStrategy(ddp_comm_hook=print, cluster_environment=object(), stage=3)
    assert len(caught.value.mistakes) == 3
    assert DDPStrategy(checkpoint_io=None).settings == pl.DDP()

    class Mine(DDPStrategy):
        def barrier(self, name: str | None = None) -> None: ...

    with pytest.raises(InvalidArguments, match=r"Mine\.barrier: raylight calls no method of a strategy"):
        Mine()

    class Named(DDPStrategy):
        def __init__(self) -> None:
            super().__init__(find_unused_parameters=True)

    assert configure(strategy=Named()).strategy.find_unused_parameters


@pytest.mark.parametrize(
    ("plugin", "precision"),
    [(MixedPrecision("bf16-mixed", "cpu"), "bf16-mixed"), (HalfPrecision("bf16-true"), "bf16-true"),
     (DoublePrecision(), "64-true"), (Precision(), "32-true")],
)  # fmt: skip
def test_a_precision_plugin_is_read_as_its_name(plugin: Precision, precision: str):
    trainer = pl.Trainer(plugins=[plugin], num_workers=0, use_gpu=False)
    assert trainer.precision == precision
    assert trainer.config.plugins == ()
    assert type(trainer.precision_plugin) is type(plugin)
    assert trainer.precision_plugin.precision == precision
    with pytest.raises(InvalidArguments, match="among the plugins means precision="):
        configure(plugins=plugin, precision="16-true")


def test_other_plugins():
    assert configure(plugins=[TorchSyncBatchNorm()]).sync_batchnorm
    assert configure(plugins=TorchSyncBatchNorm(), sync_batchnorm=True).sync_batchnorm
    with pytest.raises(InvalidArguments, match="calls no method of Lightning's precision plugins"):
        type("Mine", (MixedPrecision,), {})
    with pytest.raises(InvalidArguments, match="must be '16-mixed' or 'bf16-mixed'"):
        MixedPrecision("16", "cuda")


def test_an_accelerator_is_read_as_its_name():
    assert pl.Trainer(accelerator=CPUAccelerator(), num_workers=0).config.use_gpu is False
    with pytest.raises(InvalidArguments, match="contradict each other"):
        pl.Trainer(accelerator=CUDAAccelerator(), use_gpu=False)
    with pytest.raises(InvalidArguments, match="the run calls no accelerator"):
        type("Mine", (CPUAccelerator,), {})
