"""What a client may hold of a gateway without asking for anything: connections, for a while.

uvicorn waits for ever for the head of a request, and for a client that does not read. Here a
connection ends when no whole head came in time or nothing was read for long, and an address has a
bounded number of them.
"""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nretry-after: 5\r\n"
    b"connection: close\r\n\r\n"
)


@dataclass(slots=True)
class ConnectionLimits:
    """Limits of one server.

    Args:
        per_address: connections of one client address at once. Proxies gather many clients.
        head_seconds: from the connection, or the end of an answer's idle time, to the end of the
            next request's head.
        unread_seconds: for which a client may read nothing of an answer.
    """

    per_address: int = 1024
    head_seconds: float = 15.0
    unread_seconds: float = 120.0
    keep_alive_seconds: float = 30.0
    open: Counter[str] = field(default_factory=Counter)
    """By address."""


def bounded_protocol(limits: ConnectionLimits) -> Callable[..., asyncio.Protocol]:
    """What uvicorn makes for each connection (``uvicorn.Config(http=...)``)."""
    return functools.partial(BoundedProtocol, limits)


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, limits: ConnectionLimits, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._limits = limits
        self._address: str | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        address = str(peer[0]) if isinstance(peer, tuple) else "local"
        if self._limits.open[address] >= self._limits.per_address:
            transport.write(_REFUSAL)
            transport.close()
            return
        self._address = address
        self._limits.open[address] += 1
        self._expect_head(self._limits.head_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop(self._head_timer)
        self._stop(self._read_timer)
        if self._address is not None:
            self._limits.open[self._address] -= 1
            if not self._limits.open[self._address]:
                del self._limits.open[self._address]
            self._address = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._address is not None:  # else it was refused
            super().data_received(data)

    def on_headers_complete(self) -> None:
        self._stop(self._head_timer)
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # Idle for as long as it may be kept alive, and then a head like the first one.
        self._expect_head(self._limits.keep_alive_seconds + self._limits.head_seconds)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop(self._read_timer)
        self._read_timer = self.loop.call_later(self._limits.unread_seconds, self._abort)

    def resume_writing(self) -> None:
        self._stop(self._read_timer)
        super().resume_writing()

    def _expect_head(self, seconds: float) -> None:
        self._stop(self._head_timer)
        if not self.transport.is_closing():
            self._head_timer = self.loop.call_later(seconds, self._end_idle)

    def _end_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def _abort(self) -> None:
        self.transport.abort()

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()
