"""Where processes of a test cluster run: on this machine, or in a network namespace of their own.

In a namespace pods have addresses, Services have addresses, and nothing that runs there can reach
anything outside. The test process stays outside; a forward gives it a loopback port for an address
inside, so that any client (kubectl, an SDK, a browser) can be used with an ordinary URL.
"""

import asyncio
import ctypes
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

from controlplane.child_process import dies_with_parent

CLONE_NEWNET = 0x40000000
POD_RANGE, GATEWAY, SERVICE_RANGE = "10.244.0.0/16", "10.244.0.1", "10.96.0.0/16"
BRIDGE = "pods"
# A route of type local lets a process bind any Service address without adding it to a device.
SETUP = f"""set -e
mount --make-rprivate /
ip link set lo up
ip link add {BRIDGE} type bridge
ip addr add {GATEWAY}/16 dev {BRIDGE}
ip link set {BRIDGE} up
ip route add local {SERVICE_RANGE} dev lo
# A pod's call to the outside is then refused at once instead of being lost.
echo 1 > /proc/sys/net/ipv4/ip_forward
mount -t tmpfs -o size=6g tmpfs "$1"
mkdir -p "$1/pods"
printf '127.0.0.1 localhost\\n' > "$1/hosts"
mount --bind "$1/hosts" /etc/hosts
touch "$1/ready"
exec sleep infinity
"""
_libc = ctypes.CDLL(None, use_errno=True)
T = TypeVar("T")


class Network(Protocol):
    """The network in which a control plane runs."""

    @property
    def prefix(self) -> Sequence[str]:
        """The words before a command that start it in this network."""

    def call(self, function: Callable[[], T]) -> T:
        """Runs a function whose sockets belong to this network."""

    def forward(self, host: str, port: int) -> int:
        """The loopback port by which the test process reaches an address of this network."""


class HostNetwork:
    """This machine, with its own loopback device."""

    prefix: Sequence[str] = ()

    def call(self, function: Callable[[], T]) -> T:
        return function()

    def forward(self, host: str, port: int) -> int:
        return port


class NetworkNamespace:
    """A network and mount namespace; `scratch` is a file system in memory that only it sees."""

    def __init__(self, scratch: Path, log: Path) -> None:
        if why := refusal():
            raise PermissionError(why)
        scratch.mkdir(parents=True, exist_ok=True)
        self.scratch = scratch
        with log.open("ab") as output:
            self.holder = subprocess.Popen(
                ["unshare", "-n", "-m", "sh", "-c", SETUP, "sh", str(scratch)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=dies_with_parent(signal.SIGKILL),
            )
        deadline = time.monotonic() + 60
        while not Path(f"/proc/{self.holder.pid}/root{scratch}/ready").exists():
            if self.holder.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no network namespace:\n{log.read_text(errors='replace')}")
            time.sleep(0.01)
        self._entry = os.open(f"/proc/{self.holder.pid}/ns/net", os.O_RDONLY)
        self._threads = ThreadPoolExecutor(8, "namespace", initializer=self._enter)
        self._forwards: dict[tuple[str, int], int] = {}
        self._servers: list[asyncio.Server] = []
        self._joins: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._forwarder = threading.Thread(target=self._serve, name="forwards", daemon=True)
        self._forwarder.start()

    @property
    def prefix(self) -> Sequence[str]:
        return ("nsenter", "-t", str(self.holder.pid), "-n", "-m", "--")

    def call(self, function: Callable[[], T]) -> T:
        return self._threads.submit(function).result()

    def forward(self, host: str, port: int) -> int:
        if (host, port) not in self._forwards:
            listener = socket.create_server(("127.0.0.1", 0))  # made by this thread: outside
            outside = int(listener.getsockname()[1])

            def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                task = self._loop.create_task(_connect(reader, writer, host, port))
                self._joins.add(task)
                task.add_done_callback(self._joins.discard)

            start = asyncio.start_server(answer, sock=listener)
            server = asyncio.run_coroutine_threadsafe(start, self._loop).result(10)
            self._servers.append(server)
            self._forwards[host, port] = outside
        return self._forwards[host, port]

    def close(self) -> None:
        """Ends what this object holds; the namespace goes with its last process."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._forwarder.join(10)
        self._threads.shutdown(wait=True, cancel_futures=True)
        os.close(self._entry)
        self.holder.kill()
        self.holder.wait()

    def _enter(self) -> None:
        if _libc.setns(self._entry, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns to the network namespace of the test cluster")

    def _serve(self) -> None:
        self._enter()
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.run_until_complete(self._end())
        self._loop.close()

    async def _end(self) -> None:
        for server in self._servers:
            server.close()
        for task in self._joins:
            task.cancel()
        await asyncio.gather(*self._joins, return_exceptions=True)
        await asyncio.sleep(0)  # a transport closes its socket in the round after


async def _connect(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int
) -> None:
    """Carries one connection to `host:port`; refuses it where nothing answers there."""
    try:
        inner_reader, inner_writer = await asyncio.open_connection(host, port)
    except OSError:
        writer.transport.abort()
        return
    await join((reader, writer), (inner_reader, inner_writer))


async def join(
    one: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    other: tuple[asyncio.StreamReader, asyncio.StreamWriter],
) -> None:
    """Carries what comes on either connection to the other until both have ended; closes them."""
    try:
        await asyncio.gather(_carry(one[0], other[1]), _carry(other[0], one[1]))
    finally:
        for writer in (one[1], other[1]):
            writer.close()


async def _carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    """Copies until the source ends, and closes the sink's direction then."""
    try:
        while data := await source.read(1 << 16):
            sink.write(data)
            await sink.drain()
        if sink.can_write_eof():
            sink.write_eof()
    except (OSError, RuntimeError):
        sink.transport.abort()


def refusal() -> str | None:
    """Why this machine cannot make a namespace with pods, in one sentence; None where it can."""
    if os.geteuid():
        return "pods as processes need root: network namespaces with other users' ids are made"
    probe = subprocess.run(
        ["unshare", "-n", "-m", "ip", "link", "add", "probe", "type", "bridge"],
        capture_output=True,
        text=True,
    )
    if probe.returncode:
        return f"pods as processes need network namespaces with bridges: {probe.stderr.strip()}"
    return None


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on at this moment."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()
