from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from raylight.callbacks import ThroughputMonitor, throughput_monitor
from raylight.contract.errors import InvalidArguments


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(throughput_monitor.time, "perf_counter", lambda: Clock.now)
    return Clock


def train(monitor, rank, module, clock, num_steps, step_s, batch):
    for _ in range(num_steps):
        clock.now += step_s
        rank.global_step += 1
        monitor.on_train_batch_end(rank, module, None, batch, 0)


def test_rates_of_the_last_window(make_rank, clock):
    monitor = ThroughputMonitor(len, length_fn=sum, window_size=4)
    rank, module = make_rank({"log_every_n_steps": 2}), SimpleNamespace(flops_per_batch=1000)
    monitor.available_flops = 16_000
    monitor.on_train_start(rank, module)
    train(monitor, rank, module, clock, 4, 1.0, [5, 5, 5])
    train(monitor, rank, module, clock, 4, 0.25, [5, 5, 5])
    assert [step for step, _ in rank.logged] == [2, 4, 6, 8]
    assert rank.logged[0][1] == {
        "train/time": 2.0,
        "train/batches": 2,
        "train/samples": 6,
        "train/lengths": 30,
        "train/device/batches_per_sec": 1.0,
        "train/device/samples_per_sec": 3.0,
        "train/device/items_per_sec": 15.0,
        "train/device/flops_per_sec": 1000.0,
        "train/device/mfu": 1000 / 16_000,
    }
    assert rank.logged[2][1]["train/device/batches_per_sec"] == 4 / 2.5  # two slow steps and two fast ones
    assert rank.logged[3][1]["train/device/batches_per_sec"] == 4.0
    assert rank.logged[3][1]["train/time"] == 5.0


def test_all_ranks_together_where_there_are_several(make_rank, clock):
    monitor, rank = ThroughputMonitor(len, separator="."), make_rank({"log_every_n_steps": 1}, world_size=4)
    monitor.on_train_start(rank, None)
    train(monitor, rank, None, clock, 1, 0.5, [0, 0])
    values = rank.logged[0][1]
    assert values["train.device.samples_per_sec"] == 4.0
    assert values["train.samples_per_sec"] == 16.0
    assert values["train.batches_per_sec"] == 8.0


def test_validation_is_measured_apart_and_does_not_count_as_training(make_rank, clock):
    monitor, rank = ThroughputMonitor(len), make_rank({"log_every_n_steps": 1})
    monitor.on_train_start(rank, None)
    train(monitor, rank, None, clock, 1, 1.0, [0])
    monitor.on_validation_start(rank, None)
    for _ in range(5):
        clock.now += 10.0
        monitor.on_validation_batch_end(rank, None, None, [0, 0], 0)
    monitor.on_validation_end(rank, None)
    train(monitor, rank, None, clock, 1, 1.0, [0])
    assert rank.logged[1][1]["validate/device/samples_per_sec"] == 0.2
    assert rank.logged[2][1]["train/time"] == 2.0
    assert rank.logged[2][1]["train/device/batches_per_sec"] == 1.0


def test_accumulated_batches_are_logged_with_the_step_that_they_make(make_rank, clock):
    monitor, rank = ThroughputMonitor(len), make_rank({"log_every_n_steps": 1})
    monitor.on_train_start(rank, None)
    for batch in range(4):
        clock.now += 1.0
        rank.global_step = (batch + 1) // 2
        monitor.on_train_batch_end(rank, None, None, [0], batch)
    assert [(step, values["train/batches"]) for step, values in rank.logged] == [(1, 2), (2, 4)]


def test_sanity_validation_logs_nothing(make_rank, clock):
    monitor, rank = ThroughputMonitor(len), make_rank(stage="sanity")
    monitor.on_validation_start(rank, None)
    monitor.on_validation_end(rank, None)
    assert rank.logged == []


@pytest.mark.parametrize(
    ("name", "precision", "flops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16-mixed", 312e12),
        ("NVIDIA H100 80GB HBM3", "16-mixed", 989.4e12),
        ("NVIDIA H100 PCIe", "bf16-true", 756e12),
        ("NVIDIA L40S", "32-true", 91.6e12),
        ("NVIDIA L4", "32-true", 30.3e12),
        ("Tesla T4", "16-true", 65e12),
        ("NVIDIA A10G", "bf16-mixed", None),
        ("Some other GPU", "bf16-mixed", None),
        ("NVIDIA A100-SXM4-80GB", "64-true", None),
    ],
)
def test_peak_flops_by_name_and_precision(monkeypatch, name, precision, flops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert throughput_monitor.find_peak_flops(torch.device("cuda", 0), precision) == flops
    assert throughput_monitor.find_peak_flops(torch.device("cpu"), precision) is None


def test_what_cannot_work_is_told():
    with pytest.raises(InvalidArguments) as caught:
        ThroughputMonitor(3, length_fn="x", window_size=1)
    assert len(caught.value.mistakes) == 3
