"""The memory limit of a container: who goes beyond it is killed, as by the kernel's killer."""

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

ROUND_SECONDS = 1.0


async def watch(pid: int, limit: float, exceeded: Callable[[], None]) -> None:
    """Calls `exceeded` once the processes of a container (of its process 1) need more than `limit`
    bytes, shared pages counted by their share."""
    space = os.readlink(f"/proc/{pid}/ns/pid")
    while True:
        await asyncio.sleep(ROUND_SECONDS)
        processes = _processes(space)
        # Resident sizes are cheap to read and never less than the shares.
        if sum(_field(one / "status", "VmRSS") for one in processes) > limit:
            if sum(_field(one / "smaps_rollup", "Pss") for one in processes) > limit:
                exceeded()
                return


def _processes(space: str) -> list[Path]:
    found = []
    for one in Path("/proc").iterdir():
        if one.name.isdigit():
            with contextlib.suppress(OSError):
                if os.readlink(one / "ns/pid") == space:
                    found.append(one)
    return found


def _field(file: Path, name: str) -> int:
    """A number of bytes in a file of /proc; 0 where the process is gone."""
    with contextlib.suppress(OSError):
        for line in file.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0
