"""The leanest script that trains on two Ray actors with DDP: what `raylight.fit(..., num_workers=2)` is held against.

    python benchmarks/ray_start.py FILE

It does what a script by hand would do to begin soon: a Ray without a dashboard, actors that import torch as soon as
they exist, a rendezvous on a port that is known beforehand. It has no log, no metric, no checkpoint, and survives
nothing.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
from typing import Any

import ray
import torch
from torch.nn import functional as F

from benchmarks.start_scripts import BATCH_SIZE, make_dataset, make_net, mark

WORLD_SIZE = 2


@ray.remote(num_cpus=1)
class Worker:
    def __init__(self) -> None:
        importlib.import_module("torch._dynamo")  # else DDP does, when all is waiting for it

    def train(self, rank: int, host: str, port: int, net: Any, dataset: Any, path: str) -> float:
        import torch.distributed as dist

        dist.init_process_group("gloo", init_method=f"tcp://{host}:{port}", rank=rank, world_size=WORLD_SIZE)
        sampler: Any = torch.utils.data.DistributedSampler(dataset)
        loader = torch.utils.data.DataLoader(dataset, BATCH_SIZE, sampler=sampler)
        net = torch.nn.parallel.DistributedDataParallel(net)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        for index, (images, labels) in enumerate(loader):
            if index == 0 and rank == 0:
                mark(path, "batch")
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
        return loss.item()


def find_port(host: str) -> int:
    with socket.socket() as free:
        free.bind((host, 0))
        return free.getsockname()[1]


def main(path: str) -> None:
    net, dataset = make_net(), make_dataset()
    mark(path, "call")
    ray.init(address="local", num_cpus=WORLD_SIZE, include_dashboard=False, log_to_driver=False)
    workers: list[Any] = [Worker.remote() for _ in range(WORLD_SIZE)]  # type: ignore[attr-defined]
    host = ray.util.get_node_ip_address()
    port, data = find_port(host), ray.put(dataset)
    ray.get([worker.train.remote(rank, host, port, net, data, path) for rank, worker in enumerate(workers)])


if __name__ == "__main__":
    main(os.path.abspath(sys.argv[1]))
