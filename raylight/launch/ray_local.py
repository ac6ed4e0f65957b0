"""The Ray that raylight starts on the driver's machine if there is none."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import ray

_AGENTS = ("dashboard/agent.py", "runtime_env/agent/main.py", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
_MONITORS = ("log_monitor.py", "monitor.py", "dashboard.py")
_HELPER_NICENESS = 10


class LocalRay:
    """The Ray that raylight started on this machine, if it did."""

    def __init__(self) -> None:
        self._num_cpus = 0
        self._gpus: tuple[int, ...] = ()
        self._session: str | None = None
        self._thread: threading.Thread | None = None
        self._ending = threading.Event()

    @property
    def is_running(self) -> bool:
        return self._session is not None and ray.is_initialized() and session_name() == self._session

    def fits(self, num_cpus: int, gpus: tuple[int, ...]) -> bool:
        """Whether it has as many logical CPUs, and these GPUs of the machine; none named: all."""
        return not self.is_running or (num_cpus <= self._num_cpus and gpus == self._gpus)

    def start(self, num_cpus: int, gpus: tuple[int, ...] = ()) -> None:
        self._gpus = gpus
        self._num_cpus = max(num_cpus, os.cpu_count() or 1)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray gives its workers a niceness of 15: less of a busy machine than torchrun's get, and than Ray's own agents.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # Else Ray warns on every start that it hides GPUs from workers that asked for none, and that this will change.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        if 2 * num_cpus >= self._num_cpus:
            # The processes that Ray starts with itself, one for each CPU, import torch before there is an actor for
            # them: a second less. If there are many more CPUs than workers, that would be for nothing.
            os.environ.setdefault("RAY_preload_python_modules", "torch")
            # c10d writes a stack trace into a log for each peer that is lost, and reads this when torch is imported.
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        if threading.current_thread() is threading.main_thread():
            self._init()
        else:
            self._init_in_a_thread_that_stays()
        silence()
        self._session = session_name()
        _put_helpers_behind(self._session)

    def stop(self) -> None:
        if not self.is_running:
            return
        self._session = None
        if self._thread is None:
            ray.shutdown()
        else:
            self._ending.set()
            self._thread.join()
            self._thread = None

    def _init(self) -> None:
        with _showing(self._gpus):
            ray.init(
                address="local",
                num_cpus=self._num_cpus,
                include_dashboard=False,  # costs 2 s of start-up
                log_to_driver=False,
                logging_level=logging.ERROR,
            )

    def _init_in_a_thread_that_stays(self) -> None:
        """Ray's daemons end with the thread that started them."""
        started, errors = threading.Event(), list[BaseException]()
        self._ending.clear()

        def live() -> None:
            try:
                self._init()
            except BaseException as error:
                errors.append(error)
                return
            finally:
                started.set()
            self._ending.wait()
            ray.shutdown()

        self._thread = threading.Thread(target=live, name="raylight local Ray", daemon=True)
        self._thread.start()
        started.wait()
        if errors:
            self._thread = None
            raise errors[0]


@contextlib.contextmanager
def _showing(gpus: tuple[int, ...]) -> Iterator[None]:
    """Ray takes the GPUs that it sees when it starts. Indices count those that this process sees."""
    name, before = "CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES")
    if not gpus:
        yield
        return
    seen = before.split(",") if before else [str(index) for index in range(max(gpus) + 1)]
    os.environ[name] = ",".join(seen[index] for index in gpus)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _put_helpers_behind(session: str) -> None:
    """Ray's agents and monitors import for seconds while workers begin; on the driver's machine they can wait."""
    if sys.platform != "linux":
        return
    processes = list(_processes())
    raylets = {pid for pid, _, command in processes if session in command and "/raylet " in command}
    for pid, parent, command in processes:
        is_agent = parent in raylets and any(name in command for name in _AGENTS)
        if is_agent or (session in command and any(name in command for name in _MONITORS) and pid not in raylets):
            with contextlib.suppress(OSError):  # it has ended, or a sandbox forbids it
                os.setpriority(os.PRIO_PROCESS, pid, _HELPER_NICENESS)


def _processes() -> Iterator[tuple[int, int, str]]:
    """Number, parent's number and command line of each."""
    for entry in os.scandir("/proc"):
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                with open(f"/proc/{entry.name}/stat") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
                with open(f"/proc/{entry.name}/cmdline", "rb") as file:
                    yield int(entry.name), parent, file.read().replace(b"\0", b" ").decode(errors="replace")


def silence() -> None:
    """Ray prints a page for every process and node that dies, whatever log_to_driver says; raylight tells it itself."""
    ray._private.worker._worker_logs_enabled = False


def session_name() -> str:
    """Tells one Ray from the next."""
    node: Any = ray._private.worker.global_worker.node
    return node.session_name
