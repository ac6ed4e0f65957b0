"""Hosts made of Linux namespaces: enough of a machine for sshd and a Ray node, several on one kernel.

    with Network(folder) as network:
        head = network.add_host("head")
        head.run("hostname")         # as root on that host
        head.cut()                   # its link is down: it runs on, and nobody reaches it
        head.kill()                  # every process on it is gone, as in a power cut
        head.start()                 # and it boots again, with the same address and home

A host has its own network, process ids, mounts, name and shared memory. Of the file system it has its own /tmp, /run,
/etc, /dev/shm and home; all else is this machine's, the virtual environment that runs the tests included, and /mnt is a
folder that all hosts share. The switch between them is a namespace too, which forwards nothing: no packet leaves, and
this machine's own interfaces and routes are not touched. Nothing has a name outside the processes that hold it, so
all of it is gone when they are, even if the tests are killed.
"""

from __future__ import annotations

import ipaddress
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

REPOSITORY = Path(__file__).resolve().parents[2]

NEEDED = {
    "sshd": "openssh-server", "ssh": "openssh-client", "rsync": "rsync", "ip": "iproute2", "unshare": "util-linux",
    "nsenter": "util-linux", "setpriv": "util-linux",
}  # fmt: skip
"""Program -> Debian package."""

# Home is under /run, which is the host's own, since root's home holds the Python that all hosts run.
HOME = "/run/home"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# Runs as process 1 of the host. `mount --rbind / /mnt` keeps everything reachable while /tmp and /run are covered; what
# lies below them and is needed (the repository, Python, this host's files) is then bound back to where it was.
_BOOT = r"""
set -eu
name=$1 files=$2 shared=$3 cpus=$4; shift 4
common=$(dirname "$files")
mount --rbind / /mnt
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
for path in "$files" "$@"; do
    case $path in /tmp/*|/run/*) mkdir -p "$path"; mount --bind "/mnt$path" "$path";; esac
done
mkdir -p /run/home /run/sshd
mount --bind "$files/home" /run/home
cp -a /etc /run/etc
mount --bind /run/etc /etc
sed -i "s#^\(root:[^:]*:[^:]*:[^:]*:[^:]*\):.*#\1:/run/home:/bin/bash#" /etc/passwd
ln -sf "$common/hosts" /etc/hosts
echo "0-$((cpus - 1))" > /run/cpus
mount --bind /run/cpus /sys/devices/system/cpu/online
if [ -d /sys/fs/cgroup ]; then mount -t tmpfs tmpfs /sys/fs/cgroup; fi  # they tell of this machine's CPUs too
hostname "$name"
mkdir /run/shared
mount --bind "/mnt$shared" /run/shared
umount --lazy --recursive /mnt
mount --move /run/shared /mnt
echo mounted
read -r _  # until the network is there
(until (: < /dev/tcp/127.0.0.1/22) 2>/dev/null; do sleep 0.02; done; echo listening) &
exec /usr/sbin/sshd -D -f "$common/sshd_config" -E "$files/sshd.log"
"""


def find_missing() -> str | None:
    """Why hosts cannot be made here; None: they can."""
    if sys.platform != "linux":
        return "hosts are made of Linux namespaces"
    if os.geteuid() != 0:
        return "making hosts of namespaces needs root"
    missing = {package for program, package in NEEDED.items() if shutil.which(program, path=_PATH) is None}
    if missing:
        return f"needs Debian's {', '.join(sorted(missing))}: apt-get install {' '.join(sorted(missing))}"
    made = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True)
    return None if made.returncode == 0 else f"namespaces are not allowed here: {made.stderr.strip()}"


class Network:
    """A switch and the hosts on it. `folder` is empty and takes their files; `folder/shared` is /mnt on each host."""

    def __init__(self, folder: Path, subnet: str = "10.213.7.0/24"):
        self.folder = folder
        self.shared = folder / "shared"
        self.subnet = ipaddress.ip_network(subnet)
        self.hosts: dict[str, Host] = {}
        self._switch: subprocess.Popen[str] | None = None

    def __enter__(self) -> Network:
        self.shared.mkdir(parents=True)
        self._write_files()
        # `cat` ends when its input does: at the latest when this process is no more.
        command = ["unshare", "--net", "sh", "-c", "echo made; exec cat"]
        self._switch = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        _expect(self._switch, "made")
        self.configure("link add switch type bridge")
        self.configure(f"address add {self.subnet[-2]}/{self.subnet.prefixlen} dev switch")
        self.configure("link set switch up")
        return self

    def __exit__(self, *exception: object) -> None:
        for host in self.hosts.values():
            host.kill()
        assert self._switch is not None
        self._switch.communicate()

    def add_host(self, name: str, cpus: int = 1) -> Host:
        """Boots a host that says it has `cpus` CPUs; at most nine characters of name, since interfaces have it too."""
        address = self.subnet[len(self.hosts) + 1]
        with (self.folder / "hosts").open("a") as names:
            names.write(f"{address} {name}\n")
        host = self.hosts[name] = Host(self, name, str(address), cpus)
        host.start()
        return host

    def configure(self, arguments: str) -> None:
        """`ip` in the switch's namespace."""
        assert self._switch is not None
        _configure(self._switch.pid, arguments)

    def _write_files(self) -> None:
        for key in ("host_key", "key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / key], check=True)
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
        (self.folder / "sshd_config").write_text(
            f"HostKey {self.folder}/host_key\nAuthorizedKeysFile {self.folder}/key.pub\nStrictModes no\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\nUsePAM no\nPidFile none\nUseDNS no\n"
            "MaxStartups 100\nSubsystem sftp internal-sftp\n"
        )


class Host:
    """One host of a network. Commands on it run as root, with nothing of this process's environment."""

    def __init__(self, network: Network, name: str, address: str, cpus: int):
        self.network, self.name, self.address, self.cpus = network, name, address, cpus
        self.files = network.folder / name
        self.home = self.files / "home"
        """The host's home as seen from here; it outlives a kill, as a disk does."""
        self._boot: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Boots, until sshd takes connections. The home is as it was; /tmp, /run and /dev/shm are empty."""
        self.home.mkdir(parents=True, exist_ok=True)
        kept = [REPOSITORY, sys.prefix, sys.base_prefix, self.network.folder]
        # setpriv: the host dies with this process, however that ends; --kill-child: with unshare dies all of it.
        command = [
            "setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork",
            "--kill-child", "--mount-proc", "bash", "-c", _BOOT, "boot", self.name, self.files, self.network.shared,
            str(self.cpus), *kept,
        ]  # fmt: skip
        with (self.files / "boot.log").open("a") as log:
            self._boot = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
            )
        _expect(self._boot, "mounted")
        self._connect()
        assert self._boot.stdin is not None
        self._boot.stdin.write("connected\n")
        self._boot.stdin.close()
        _expect(self._boot, "listening")

    def kill(self) -> None:
        """Ends every process of the host at once, as a power cut does. A host that is dead stays dead."""
        if self._boot is None:
            return
        if self._boot.poll() is None:
            # The cable first, else the kernel would tell the other side of every connection that it is closed.
            self.network.configure(f"link delete {self._port}")
            os.kill(self.pid, signal.SIGKILL)
        self._boot.wait()  # until process 1 is gone, which the kernel keeps until all others are
        for pipe in (self._boot.stdin, self._boot.stdout):
            assert pipe is not None
            pipe.close()
        self._boot = None

    def cut(self) -> None:
        """Takes the link down: the host runs on, packets in both directions are dropped."""
        self.network.configure(f"link set {self._port} down")

    def restore(self) -> None:
        self.network.configure(f"link set {self._port} up")

    def add_card(self, address: str) -> None:
        """A second network card, eth1, on the same switch, with another address (as `192.0.2.1/24`)."""
        assert self._boot is not None
        port = f"more-{self.name}"
        self.network.configure(f"link add {port} type veth peer name eth1 netns {self._boot.pid}")
        self.network.configure(f"link set {port} master switch up")
        options = " nodad" if ":" in address else ""
        _configure(self._boot.pid, f"address add {address} dev eth1{options}")
        _configure(self._boot.pid, "link set eth1 up")

    def run(self, command: str, check: bool = True, timeout_s: float = 120, **variables: str) -> str:
        """Runs a shell command on the host; what it printed, stderr included.

        Raises AssertionError, with the output, where it takes longer, or fails and `check` is set.
        """
        # A file, since a pipe would stay open for as long as a daemon that the command started has it.
        with tempfile.TemporaryFile("w+") as output:
            process = self.spawn(command, output, **variables)
            try:
                status = process.wait(timeout_s)
                wrong = f"ended with {status}" if check and status else ""
            except subprocess.TimeoutExpired:
                wrong = f"took over {timeout_s:g} s"
            end(process)
            output.seek(0)
            printed = output.read()
        assert not wrong, f"on {self.name}, {command!r} {wrong}:\n{printed}"
        return printed

    def spawn(self, command: str, output: IO[str] | int = subprocess.DEVNULL, **variables: str) -> subprocess.Popen:
        """Starts a shell command on the host, to be ended with `end`; stdout and stderr go to `output`."""
        environment = {"HOME": HOME, "USER": "root", "PATH": _PATH, "LANG": "C.UTF-8", "TERM": "dumb", **variables}
        inside = ["nsenter", f"--target={self.pid}", "--all", f"--wdns={HOME}", "bash", "-c", command]
        return subprocess.Popen(
            inside, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        """The host's process 1, as numbered here."""
        assert self._boot is not None, f"{self.name} is not running"
        children = Path(f"/proc/{self._boot.pid}/task/{self._boot.pid}/children").read_text()
        return int(children)

    @property
    def _port(self) -> str:
        """The switch's end of the cable."""
        return f"port-{self.name}"

    def _connect(self) -> None:
        """A cable from the switch. The default route leads to the switch, and ends there: without one, Ray takes
        127.0.0.1 for the node's address."""
        assert self._boot is not None
        pid, subnet = self._boot.pid, self.network.subnet
        # The same card after each boot: the others remember the address of the one that they last talked to.
        card = ":".join(f"{byte:02x}" for byte in b"\x02\x00" + ipaddress.ip_address(self.address).packed[-4:])
        self.network.configure(f"link add {self._port} type veth peer name eth0 address {card} netns {pid}")
        self.network.configure(f"link set {self._port} master switch up")
        _configure(pid, "link set lo up")
        _configure(pid, f"address add {self.address}/{subnet.prefixlen} dev eth0")
        _configure(pid, "link set eth0 up")
        _configure(pid, f"route add default via {subnet[-2]}")


def end(process: subprocess.Popen) -> None:
    """Kills what `Host.spawn` started, and all that it started in turn and that did not become a daemon."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        assert process.poll() is not None
    process.wait()


def wait_until(condition: Callable[[], bool], limit_s: float, what: str) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        time.sleep(0.2)


def _configure(pid: int, arguments: str) -> None:
    command = ["nsenter", f"--target={pid}", "--net", "ip", *shlex.split(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"ip {arguments}: {done.stderr}"


def _expect(process: subprocess.Popen[Any], line: str) -> None:
    """Waits until the process says `line`."""
    assert process.stdout is not None
    said = process.stdout.readline()
    assert said == f"{line}\n", f"expected {line!r}, got {said!r}; what failed is in the host's boot.log"
