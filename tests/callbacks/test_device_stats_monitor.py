from __future__ import annotations

import sys

import pytest
import torch

from raylight.callbacks import DeviceStatsMonitor, device_stats_monitor
from raylight.contract.config import Config


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_cpu_values_are_those_that_psutil_reads(make_rank):
    psutil = pytest.importorskip("psutil")
    monitor, rank = DeviceStatsMonitor(), make_rank({"log_every_n_steps": 2})
    monitor.setup(rank, None, "fit")
    monitor.on_train_batch_start(rank, None, None, 0)
    rank.global_step = 1
    monitor.on_train_batch_end(rank, None, None, None, 0)
    assert rank.logged == []
    monitor.on_train_batch_start(rank, None, None, 1)
    rank.global_step = 2
    monitor.on_train_batch_end(rank, None, None, None, 1)
    assert [step for step, _ in rank.logged] == [2, 2]
    values = rank.logged[1][1]
    prefix = "DeviceStatsMonitor.on_train_batch_end/"
    assert set(values) == {prefix + name for name in ("cpu_percent", "cpu_vm_percent", "cpu_swap_percent")}
    assert 0 <= values[f"{prefix}cpu_percent"] <= 100
    assert values[f"{prefix}cpu_vm_percent"] == pytest.approx(psutil.virtual_memory().percent, abs=3)
    assert values[f"{prefix}cpu_swap_percent"] == pytest.approx(psutil.swap_memory().percent, abs=3)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_busy_cpu_counts_as_busy(make_rank):
    monitor = DeviceStatsMonitor()
    monitor.setup(make_rank(), None, "fit")
    busy, total = device_stats_monitor._read_processor_time()
    while device_stats_monitor._read_processor_time()[0] < busy + 5:
        pass
    now_busy, now_total = device_stats_monitor._read_processor_time()
    assert now_total - total >= now_busy - busy >= 5
    assert monitor._read_cpu_stats()["cpu_percent"] > 0


def test_without_proc_the_load_average_is_logged(make_rank, monkeypatch):
    monkeypatch.setattr(device_stats_monitor, "_read_processor_time", lambda: None)
    monitor, rank = DeviceStatsMonitor(), make_rank({"log_every_n_steps": 1}, global_step=1)
    monitor.setup(rank, None, "fit")
    monitor.on_train_batch_end(rank, None, None, None, 0)
    assert list(rank.logged[0][1]) == ["DeviceStatsMonitor.on_train_batch_end/cpu_load_percent"]


def test_gpu_values_are_the_allocators(make_rank, monkeypatch):
    stats = {"allocated_bytes.all.current": 7, "num_ooms": 0}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    rank = make_rank({"log_every_n_steps": 1}, device=torch.device("cuda", 0), global_step=1)
    monitor = DeviceStatsMonitor()
    monitor.on_train_batch_end(rank, None, None, None, 0)
    prefix = "DeviceStatsMonitor.on_train_batch_end/"
    assert rank.logged == [(1, {f"{prefix}allocated_bytes.all.current": 7.0, f"{prefix}num_ooms": 0.0})]


def test_other_ranks_other_stages_and_no_cpu_stats(make_rank):
    monitor = DeviceStatsMonitor()
    other = make_rank({"log_every_n_steps": 1}, is_global_zero=False, global_step=1)
    monitor.on_train_batch_end(other, None, None, None, 0)
    assert other.logged == []
    rank = make_rank({"log_every_n_steps": 1}, global_step=8, stage="validate")
    monitor.on_validation_batch_start(rank, None, None, 0)
    monitor.on_validation_batch_end(rank, None, None, None, 0)
    rank.stage = "test"
    monitor.on_test_batch_start(rank, None, None, 0)
    monitor.on_test_batch_end(rank, None, None, None, 0)
    assert [step for step, _ in rank.logged] == [8, 8, 8, 8]
    silent = make_rank({"log_every_n_steps": 1}, global_step=1)
    DeviceStatsMonitor(cpu_stats=False).on_train_batch_end(silent, None, None, None, 0)
    assert silent.logged == []
    assert "logger=False" in monitor._find_mistakes(Config(logger=False))[0]
