"""What all tests share: one Ray and one S3 server for the session, each started when the first test asks for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import cloudpickle
import pytest

if TYPE_CHECKING:
    from raylight.launch.ray_cluster import Cluster
    from tests.faults_storage import FaultProxy

NUM_CPUS = 8
"""Logical ones, so that groups of several sizes fit whatever the machine has."""


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Cluster]:
    """A local Ray with NUM_CPUS logical CPUs, one for each process of pytest-xdist. Groups are kept between tests."""
    from raylight.contract.config import Config
    from raylight.launch import ray_actors, ray_cluster

    os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")  # on a machine that is busy with other tests
    yield ray_actors.connect(Config(num_workers=NUM_CPUS))
    ray_actors.release_all()
    ray_cluster.disconnect()


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    from tests.faults_storage import s3_server

    with s3_server() as port:
        yield port


@pytest.fixture
def proxy(s3_port: int) -> Iterator[FaultProxy]:
    """What stands before the S3 server, and fails where a test asks for it."""
    from tests.faults_storage import FaultProxy

    proxy = FaultProxy(s3_port)
    yield proxy
    proxy.close()


@pytest.fixture(autouse=True)
def _send_test_modules_by_value(request: pytest.FixtureRequest) -> None:
    """Workers cannot import the tests; so their classes and functions go along, as those of a script do."""
    module = getattr(request, "module", None)
    if module is not None and module.__name__ in sys.modules:
        cloudpickle.register_pickle_by_value(module)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)
    # The long files come first, so that at the end no process works alone on one of them.
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)
