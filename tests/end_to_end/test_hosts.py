"""The hosts themselves: what a test of node faults relies on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.hosts import Host, Network, find_missing


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    missing = find_missing()
    if missing is not None:
        pytest.skip(missing)
    with Network(tmp_path / "network") as network:
        yield network


def reaches(one: Host, other: Host) -> bool:
    return "reached" in one.run(f"timeout 2 bash -c '</dev/tcp/{other.name}/22' && echo reached", check=False)


def interfaces() -> str:
    return subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout


def test_hosts_are_machines_of_their_own(network: Network) -> None:
    one, two = network.add_host("one"), network.add_host("two", cpus=2)
    one.run("touch /tmp/mine /dev/shm/mine ~/mine; echo shared > /mnt/ours")
    assert two.run("ls /tmp/mine /dev/shm/mine ~/mine 2>/dev/null; cat /mnt/ours", check=False) == "shared\n"
    assert (network.shared / "ours").read_text() == "shared\n"
    assert two.run("hostname; ps -e -o comm | head -2 | tail -1") == "two\nsshd\n"
    count = "python3 -c 'import os; print(os.cpu_count())'"
    assert (one.run(count), two.run(count)) == ("1\n", "2\n")
    options = f"-i {network.folder}/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    assert two.run(f"ssh {options} one 'hostname; echo ~'") == "one\n/run/home\n"


def test_a_host_that_is_cut_off_runs_on(network: Network) -> None:
    one, two = network.add_host("one"), network.add_host("two")
    assert reaches(one, two)
    two.cut()
    assert not reaches(one, two)
    assert two.run("hostname") == "two\n"
    two.restore()
    assert reaches(one, two)


def test_a_killed_host_comes_back_with_its_home(network: Network) -> None:
    one, two = network.add_host("one"), network.add_host("two")
    assert reaches(one, two)
    two.run("echo kept > ~/file; echo lost > /tmp/file")
    two.kill()
    assert not reaches(one, two)
    two.start()
    assert two.run("cat ~/file; ls /tmp/file 2>/dev/null", check=False) == "kept\n"
    assert reaches(one, two)


def test_nothing_is_left(tmp_path: Path) -> None:
    missing = find_missing()
    if missing is not None:
        pytest.skip(missing)
    before = interfaces()
    with Network(tmp_path / "network") as network:
        host = network.add_host("one")
        host.run("(setsid sleep 1000 &)")  # a daemon of the host, with no tie to the test
        assert interfaces() == before
        inside = Path(f"/proc/{host.pid}/ns/net").readlink()
    assert interfaces() == before
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
    namespaces = subprocess.run(["lsns", "--noheadings", "--output", "NS"], capture_output=True, text=True, check=True)
    assert str(inside).strip("net:[]") not in namespaces.stdout.split()


def test_a_command_that_fails_or_hangs_says_what_it_printed(network: Network) -> None:
    host = network.add_host("one")
    with pytest.raises(AssertionError, match=r"ended with 3:\nwords"):
        host.run("echo words; exit 3")
    with pytest.raises(AssertionError, match=r"took over 1 s:\nwords"):
        host.run("echo words; sleep 100", timeout_s=1)
