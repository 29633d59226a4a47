"""The network of one pod: a namespace with an address of its own, held by a sleeping process."""

import asyncio
import contextlib
import os
import signal
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from pathlib import Path

from controlplane.child_process import dies_with_parent

NAMESPACES = ("net", "uts", "ipc")
# Its words: device, bridge, holder, hostname, address, gateway.
WIRE = """
ip link add "$1" type veth peer name eth0 netns "$3"
ip link set "$1" master "$2" up
nsenter -t "$3" -n -u sh -ec '
hostname "$1"
ip link set lo up
ip addr add "$2"/16 dev eth0
ip link set eth0 up
ip route add default via "$3"
' sh "$4" "$5" "$6"
"""


class Sandbox:
    """Made by `open`; `holder` is the process whose namespaces the pod's containers join."""

    def __init__(self, hostname: str, address: str, gateway: str, bridge: str) -> None:
        self.hostname, self.address = hostname[:63], address
        self._gateway, self._bridge = gateway, bridge
        self._process: Process | None = None

    @property
    def holder(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def open(self) -> None:
        """RuntimeError with the commands' words when the network cannot be made."""
        self._process = await asyncio.create_subprocess_exec(
            *("unshare", "-n", "-u", "-i", "sleep", "infinity"),
            stdin=DEVNULL,
            preexec_fn=dies_with_parent(signal.SIGKILL),
        )
        while any(_link("self", name) == _link(str(self.holder), name) for name in NAMESPACES):
            await asyncio.sleep(0.005)
        words = [f"pod{self.holder}", self._bridge, str(self.holder)]
        words += [self.hostname, self.address, self._gateway]
        wire = await asyncio.create_subprocess_exec(
            *("sh", "-ec", WIRE, "sh", *words), stdin=DEVNULL, stdout=PIPE, stderr=STDOUT
        )
        output = (await wire.communicate())[0].decode()
        if wire.returncode:
            raise RuntimeError(f"no network for {self.hostname}: {output.strip()}")

    async def close(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


def _link(process: str, name: str) -> str:
    return os.readlink(Path("/proc", process, "ns", name))
