"""A worker whose head is out of reach ends; one whose head only pauses does not."""

from __future__ import annotations

import queue
import socket

import pytest

from raylight.launch import lifeline


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
