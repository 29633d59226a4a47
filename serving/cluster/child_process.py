"""A child process in a session of its own, which can be told things and says how it is.

The session has all that the child starts, however deep: Ray's processes survive their parents, and
the next Ray must not meet those of the last one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import signal
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol

from pydantic import ValidationError

from calotype.serving.wire.ray_host import HostOrder, HostReport

LINE_BYTES = 1024 * 1024
KILL_ROUNDS = 20
KILL_PAUSE = 0.05
_PROCESSES = pathlib.Path("/proc")


class Child(Protocol):
    """One run of the process that holds Ray."""

    def order(self, order: HostOrder) -> None:
        """Tells it something; nothing happens when it is gone already."""
        ...

    def reports(self) -> AsyncIterator[HostReport]:
        """What it says, until it is gone."""
        ...

    async def wait(self) -> int:
        """Its exit status; negative = the signal that killed it."""
        ...

    def end(self) -> None:
        """Asks it to finish what it has begun and to end."""
        ...

    async def kill(self) -> None:
        """Ends it and everything that it has started, now."""
        ...


class ChildProcess:
    """A `Child` that is a process.

    Made by `start`. Its standard input stays open for as long as this process lives: its end tells
    the child that nobody is there any more.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reports: asyncio.StreamReader,
        pipe: asyncio.ReadTransport,
    ) -> None:
        self._process, self._reports, self._pipe = process, reports, pipe

    @classmethod
    async def start(
        cls, command: Sequence[str], listener: socket.socket, environment: Mapping[str, str]
    ) -> ChildProcess:
        """Starts a command.

        Args:
            command: ``--listener`` and ``--reports`` with the numbers of two open files are added.
            listener: the socket that the child shall answer on.
            environment: of the child, whole.
        """
        reading, writing = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                *("--listener", str(listener.fileno()), "--reports", str(writing)),
                stdin=asyncio.subprocess.PIPE,
                pass_fds=(listener.fileno(), writing),
                start_new_session=True,
                env=dict(environment),
            )
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        reports = asyncio.StreamReader(LINE_BYTES)
        pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reports), os.fdopen(reading, "rb")
        )
        return cls(process, reports, pipe)

    @property
    def pid(self) -> int:
        """Of the process, and the number of its session."""
        return self._process.pid

    def order(self, order: HostOrder) -> None:
        stdin = self._process.stdin
        if stdin is not None and not stdin.is_closing():
            stdin.write(order.model_dump_json().encode() + b"\n")

    async def reports(self) -> AsyncIterator[HostReport]:
        async for line in self._reports:
            with contextlib.suppress(ValidationError):  # the last line of a killed one is cut off
                yield HostReport.model_validate_json(line)

    async def wait(self) -> int:
        return await self._process.wait()

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    async def kill(self) -> None:
        stdin = self._process.stdin
        if stdin is not None and not stdin.is_closing():
            stdin.transport.abort()  # one that hangs reads nothing of what is left for it
            with contextlib.suppress(OSError):
                await stdin.wait_closed()
        self._pipe.close()
        for _ in range(KILL_ROUNDS):
            left = [pid for pid in session_members(self.pid) if _alive(pid)]
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not left:
                return
            await asyncio.sleep(KILL_PAUSE)


def session_members(leader: int) -> list[int]:
    """The processes of a session, also those whose parents are gone. Where there is no /proc, the
    leader alone."""
    names = os.listdir(_PROCESSES) if _PROCESSES.is_dir() else [str(leader)]
    found = []
    for name in names:
        with contextlib.suppress(ProcessLookupError, ValueError, PermissionError):
            if os.getsid(int(name)) == leader:
                found.append(int(name))
    return found


def _alive(pid: int) -> bool:
    """Whether there is something to kill. In a container this process inherits the orphans, and
    nobody else would take note of their end."""
    try:
        state = (_PROCESSES / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return not _PROCESSES.is_dir()
    if state == "Z":
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            if os.getsid(pid) != pid:  # asyncio waits for the leader
                os.waitpid(pid, os.WNOHANG)
    return state != "Z"
