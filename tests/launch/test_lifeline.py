"""A worker whose head is out of reach ends; one whose head only pauses does not."""

from __future__ import annotations

import queue
import socket
from types import SimpleNamespace

import pytest

from raylight.launch import lifeline, ray_cluster


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> queue.Queue[str]:
    monkeypatch.setenv(lifeline.LIMIT_VARIABLE, "0.6")
    return queue.Queue()


def test_a_head_that_does_not_answer_is_given_up(told: queue.Queue[str]) -> None:
    with socket.socket() as taken:  # bound, and listens to nobody
        taken.bind(("127.0.0.1", 0))
        lifeline.hold_on_to(f"127.0.0.1:{taken.getsockname()[1]}", told.put).join(30)
    assert "was out of reach for 0.6 s; this process ends" in told.get_nowait()


def test_as_long_as_it_answers_the_worker_lives(told: queue.Queue[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = lifeline.hold_on_to(f"127.0.0.1:{server.getsockname()[1]}", told.put)
        for _ in range(9):  # longer than the limit, at six connections within it
            server.accept()[0].close()
        assert told.empty()
    thread.join(30)
    assert not told.empty()


def test_a_process_that_has_left_the_cluster_lives_on(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    monkeypatch.setenv(lifeline.LIMIT_VARIABLE, "0.6")
    monkeypatch.setattr(ray_cluster, "end_process", ended.append)
    monkeypatch.setattr(ray_cluster.ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="127.0.0.1:1"))
    monkeypatch.setattr(ray_cluster.ray.util, "get_node_ip_address", lambda: "127.0.0.2")
    threads = []
    hold_on_to = lifeline.hold_on_to
    monkeypatch.setattr(ray_cluster, "hold_on_to", lambda *arguments: threads.append(hold_on_to(*arguments)))
    for is_connected in (False, True):
        monkeypatch.setattr(ray_cluster.ray, "is_initialized", lambda is_connected=is_connected: is_connected)
        ray_cluster.hold_on_to_head()
        threads.pop().join(30)
        assert len(ended) == is_connected
