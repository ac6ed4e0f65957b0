"""A real S3 server over HTTP, and a proxy in front of it that fails at chosen requests."""

from __future__ import annotations

import http.client
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_DEFAULT_REGION": "us-east-1",
}
BUCKET = "runs"
ERROR_BODY = "<?xml version='1.0'?><Error><Code>{}</Code><Message>injected</Message></Error>"
ERRORS = {"500": (500, "InternalError"), "503": (503, "SlowDown"), "403": (403, "AccessDenied")}


@dataclass(frozen=True)
class Fault:
    """What happens to requests number `first` to `first + count - 1` of those that match.

    kind: "500", "503", "403" (answered so, not passed on); "reset" (not passed on, connection reset); "dropped" (the
    connection breaks in the middle of what is sent); "unanswered" (passed on and done, then reset); "stall" (nothing
    comes back for `stall_s`); "truncated" (half of the answer, then reset).
    """

    kind: str
    first: int = 1
    count: int = 1
    method: str = ""
    path: str = ""
    stall_s: float = 30.0

    def matches(self, method: str, path: str) -> bool:
        return method.startswith(self.method) and re.search(self.path, path) is not None


@dataclass
class FaultProxy:
    """Counts requests, and passes them on to the S3 server at `upstream` unless a fault is due."""

    upstream: int
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    bytes_per_s: float | None = None
    before: Callable[[int], bool] | None = None  # told the number of the request, from 1; True: it is not passed on
    after: Callable[[int], object] | None = None  # told when the server has done it, before the answer

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[Fault, int] = {}
        self._closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def uri(self, prefix: str = "") -> str:
        return uri_at(self.port, prefix)

    def inject(self, *faults: Fault) -> None:
        """Replaces all faults, and counts requests from 1 again."""
        with self._lock:
            self.faults, self._seen = list(faults), {}
            self.requests.clear()

    def count(self, method: str, path: str) -> tuple[int, Fault | None]:
        with self._lock:
            self.requests.append((method, path))
            due = None
            for fault in self.faults:
                if fault.matches(method, path):
                    seen = self._seen[fault] = self._seen.get(fault, 0) + 1
                    if due is None and fault.first <= seen < fault.first + fault.count:
                        due = fault
            return len(self.requests), due

    def wait(self, seconds: float) -> None:
        self._closing.wait(seconds)

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *arguments: Any) -> None:
        """Tests look at `FaultProxy.requests`."""

    def _handle(self) -> None:
        number, fault = self.proxy.count(self.command, self.path)
        kind = fault.kind if fault is not None else ""
        if kind in ("reset", "dropped"):
            if kind == "dropped":
                self.rfile.read(min(int(self.headers.get("Content-Length") or 65536), 65536) // 2)
            return self._reset()
        body = self._read_body()
        if kind == "stall":
            self.proxy.wait(fault.stall_s)
            return self._reset()
        if kind in ERRORS:
            status, code = ERRORS[kind]
            return self._answer(status, [("Content-Type", "application/xml")], ERROR_BODY.format(code).encode())
        if self.proxy.before is not None and self.proxy.before(number):
            return self._reset()
        status, headers, answer = self._pass_on(body)
        if self.proxy.after is not None:
            self.proxy.after(number)
        if kind == "unanswered":
            return self._reset()
        self._answer(status, headers, answer, truncated=kind == "truncated")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle

    def _read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self._read_paced(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self._read_paced(int(self.headers.get("Content-Length") or 0))

    def _read_paced(self, size: int) -> bytes:
        """Reads no faster than `bytes_per_s`, as a connection of that bandwidth would."""
        if self.proxy.bytes_per_s is None:
            return self.rfile.read(size)
        pieces, started, read = [], time.monotonic(), 0
        while read < size:
            piece = self.rfile.read(min(1 << 16, size - read))
            pieces.append(piece)
            read += len(piece)
            self.proxy.wait(started + read / self.proxy.bytes_per_s - time.monotonic())
        return b"".join(pieces)

    def _pass_on(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        server = http.client.HTTPConnection("127.0.0.1", self.proxy.upstream)
        dropped = ("connection", "expect", "transfer-encoding", "content-length")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
        server.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
        response = server.getresponse()
        answer = response.read()
        server.close()
        return response.status, response.getheaders(), answer

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, truncated: bool = False) -> None:
        is_head = self.command == "HEAD"
        own = ("connection", "transfer-encoding") if is_head else ("connection", "transfer-encoding", "content-length")
        lines = [f"HTTP/1.1 {status} {http.client.responses.get(status, '')}"]
        lines += [f"{name}: {value}" for name, value in headers if name.lower() not in own]
        if not is_head:
            lines.append(f"Content-Length: {len(body)}")
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        self.wfile.write(head + (b"" if is_head else body[: len(body) // 2] if truncated else body))
        if truncated:
            self._reset()

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RD)
        # The reader and the writer of this handler hold the socket too; it is gone once all three are closed.
        self.rfile.close()
        self.connection.close()

    def finish(self) -> None:
        try:
            super().finish()
        except OSError:
            self.close_connection = True  # the client was gone first


S3_SERVER = """
import sys
from moto.server import ThreadedMotoServer
from werkzeug.serving import WSGIRequestHandler

WSGIRequestHandler.disable_nagle_algorithm = True  # it sends head and body apart, which costs 40 ms each time
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def s3_server() -> Iterator[int]:
    """The port of moto's server, with an empty bucket `BUCKET`. The server has a process of its own: what it holds
    belongs to its process, and moto's mocks of AWS, which other tests use, forget it."""
    os.environ.update(CREDENTIALS)
    command = [sys.executable, "-c", S3_SERVER]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("PUT", f"/{BUCKET}")
        assert connection.getresponse().status == 200
        connection.close()
        try:
            yield port
        finally:
            server.kill()


def uri_at(port: int, prefix: str = "") -> str:
    return f"s3://{BUCKET}/{prefix}?scheme=http&endpoint_override=127.0.0.1:{port}&region=us-east-1"
