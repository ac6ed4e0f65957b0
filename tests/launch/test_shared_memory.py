from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from raylight.launch import handover, shared_memory

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "raylight.launch.handover"])
BIG = handover.MIN_BUFFER_BYTES


def _map_and_report(address: shared_memory.SegmentAddress, payload: bytes, value: float, pipe: Any) -> None:
    data = handover.load(payload, shared_memory.map_segment(address))
    total = float(data.tensors[0].sum())  # touches every page
    private_before = _private_bytes()
    data.tensors[0][:1000] = value
    pipe.send((total, private_before, _private_bytes()))
    pipe.recv()
    pipe.send(float(data.tensors[0][0]))


def _private_bytes() -> int:
    """What this process has copied of the memory of segments."""
    private, in_segment = 0, False
    with open("/proc/self/smaps") as file:
        for line in file:
            if "-" in line.split()[0]:
                in_segment = "memfd:raylight" in line
            elif in_segment and line.startswith("Anonymous:"):
                private += int(line.split()[1]) * 1024
    return private


def test_two_processes_share_one_copy_and_do_not_see_each_others_writes():
    num_elements = 25_000_000  # 100 MB
    payload, buffers = handover.dump(TensorDataset(torch.ones(num_elements)))
    segment = shared_memory.Segment(buffers)
    pipes = []
    for value in (5.0, 6.0):
        mine, theirs = PROCESSES.Pipe()
        PROCESSES.Process(target=_map_and_report, args=(segment.address, payload, value, theirs), daemon=True).start()
        pipes.append(mine)
    for total, private_before, private_after in [pipe.recv() for pipe in pipes]:
        assert total == num_elements
        assert private_before == 0
        assert 0 < private_after < 1_000_000  # the pages that were written
    segment.close()
    for pipe in pipes:
        pipe.send("both have written")
    assert [pipe.recv() for pipe in pipes] == [5.0, 6.0]


def _hold_a_segment(pipe: Any) -> None:
    segment = shared_memory.Segment([bytes(BIG)])
    pipe.send(segment.address)
    pipe.recv()


def test_a_segment_is_gone_with_the_process_that_made_it():
    mine, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=_hold_a_segment, args=(theirs,))
    process.start()
    address = mine.recv()
    assert len(shared_memory.map_segment(address)[0]) == BIG
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with pytest.raises(FileNotFoundError):
        shared_memory.map_segment(address)


def test_a_closed_segment_stays_with_those_who_mapped_it():
    segment = shared_memory.Segment([b"a" * BIG, b"b" * 10])
    first, second = shared_memory.map_segment(segment.address)
    segment.close()
    segment.close()
    assert bytes(first[-2:]) == b"aa"
    assert bytes(second) == b"b" * 10
    with pytest.raises(FileNotFoundError):
        shared_memory.map_segment(segment.address)


def test_memory_domain_is_that_of_the_machine():
    assert shared_memory.memory_domain() == pickle.loads(pickle.dumps(shared_memory.memory_domain()))
    assert str(os.geteuid()) in shared_memory.memory_domain()
