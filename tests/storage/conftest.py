from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from raylight.storage.filesystem import Storage
from raylight.storage.retry import Backoff
from tests.faults_storage import FaultProxy, uri_at

QUICK = Backoff(num_attempts=6, first_s=0.01, longest_s=0.05)


@pytest.fixture
def s3_uri(s3_port: int) -> str:
    """A prefix of its own on the S3 server, reached directly."""
    return uri_at(s3_port, uuid.uuid4().hex)


@pytest.fixture
def behind_proxy(proxy: FaultProxy) -> Storage:
    """S3 reached through the proxy, with short waits between tries."""
    return Storage(proxy.uri(uuid.uuid4().hex), backoff=QUICK)


@pytest.fixture(params=["local", "s3", "fsspec"])
def storage(request: pytest.FixtureRequest) -> Storage:
    """The same contract on a folder, on S3, and on a file system of fsspec that the caller made."""
    if request.param == "local":
        return Storage(request.getfixturevalue("tmp_path") / "storage")
    if request.param == "s3":
        return Storage(request.getfixturevalue("s3_uri"), backoff=QUICK)
    import fsspec
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return Storage(f"/{uuid.uuid4().hex}", PyFileSystem(FSSpecHandler(fsspec.filesystem("memory"))), backoff=QUICK)


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: killed processes, unlike power cuts, do not depend on the disk."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm")) if os.access("/dev/shm", os.W_OK) else tmp_path
    yield folder
    shutil.rmtree(folder)
