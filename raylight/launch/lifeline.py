"""Ends processes whose node was cut off from the cluster: nobody hears them any more, and others take their place."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable

DEFAULT_LIMIT_S = 60.0
"""As long as Ray's own processes look for a head that is gone. Those of a node whose cable is cut do not notice it for
many minutes: their connections stay open, and silent."""
LIMIT_VARIABLE = "RAY_gcs_rpc_server_reconnect_timeout_s"


def hold_on_to(address: str, on_loss: Callable[[str], None]) -> threading.Thread:
    """Has a thread open a connection to the head now and then, a few times within the limit; `on_loss` is called when
    that has failed for so long."""
    limit_s = float(os.environ.get(LIMIT_VARIABLE) or DEFAULT_LIMIT_S)
    arguments = (address, limit_s, on_loss)
    thread = threading.Thread(target=_watch, args=arguments, name="raylight lifeline", daemon=True)
    thread.start()
    return thread


def _watch(address: str, limit_s: float, on_loss: Callable[[str], None]) -> None:
    reached_at = time.monotonic()
    while time.monotonic() - reached_at < limit_s:
        time.sleep(limit_s / 6)
        if answers(address, limit_s / 6):
            reached_at = time.monotonic()
    on_loss(f"raylight: the head of the cluster ({address}) was out of reach for {limit_s:g} s; this process ends")


def answers(address: str, timeout_s: float) -> bool:
    """Whether something takes connections at `address`."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()
    except OSError:
        return False
    return True


def end_process(text: str) -> None:
    """At once: the other threads may wait for peers that they cannot reach either."""
    print(text, file=sys.stderr, flush=True)
    os._exit(1)
