"""Connections of clients that say nothing, say half, or do not read, end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

from fastapi import FastAPI
from starlette.responses import StreamingResponse

from calotype.serving.api.http.connections import ConnectionLimits
from calotype.serving.api.http.server import build_server

WHOLE = b"GET /short HTTP/1.1\r\nhost: gateway\r\n\r\n"


def application() -> FastAPI:
    app = FastAPI()

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(2**20)
            await asyncio.sleep(0)  # as reading from the disk does

    app.add_api_route("/short", lambda: "short")
    app.add_api_route("/endless", lambda: StreamingResponse(endless()), response_model=None)
    return app


@contextlib.asynccontextmanager
async def listening(limits: ConnectionLimits) -> AsyncIterator[tuple[str, int]]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = build_server(application(), 1, limits=limits)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield listener.getsockname()
    finally:
        server.should_exit = True
        await serving
        listener.close()


class Clients:
    """Connections to one address, closed at the end."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self.writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Clients:
        return self

    async def __aexit__(self, *error: object) -> None:
        for writer in self.writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def say(self, words: bytes = b"") -> asyncio.StreamReader:
        """A new connection that says so much."""
        reader, writer = await asyncio.open_connection(*self._address, limit=1024)
        self.writers.append(writer)
        writer.write(words)
        return reader


async def ended(reader: asyncio.StreamReader) -> bytes:
    """What comes until the server ends the connection."""
    async with asyncio.timeout(600):
        try:
            return await reader.read()
        except ConnectionError:
            return b""


async def test_who_sends_no_whole_head_is_cut_off() -> None:
    limits = ConnectionLimits(head_seconds=0.2, keep_alive_seconds=1.0)
    async with listening(limits) as address, Clients(address) as clients:
        silent = await clients.say()
        slow = await clients.say(WHOLE[:-2])
        again = await clients.say(WHOLE + WHOLE[:10])
        assert await ended(silent) == b""
        assert await ended(slow) == b""
        assert (await ended(again)).endswith(b'"short"'), "the answer came before"
        assert not limits.open


async def test_who_reads_nothing_is_cut_off() -> None:
    limits = ConnectionLimits(unread_seconds=0.2)
    async with listening(limits) as address, Clients(address) as clients:
        reader = await clients.say(b"GET /endless HTTP/1.1\r\nhost: gateway\r\n\r\n")
        assert b"200 OK" in await reader.readline()
        async with asyncio.timeout(600):
            while limits.open:
                await asyncio.sleep(0.01)


async def test_an_address_has_a_bounded_number_of_connections() -> None:
    limits = ConnectionLimits(per_address=3)
    async with listening(limits) as address, Clients(address) as clients:
        for reader in [await clients.say(WHOLE) for _ in range(3)]:
            assert b"200 OK" in await reader.readline()
        assert (await ended(await clients.say())).startswith(b"HTTP/1.1 503")
        clients.writers[0].close()
        async with asyncio.timeout(600):
            while sum(limits.open.values()) == 3:
                await asyncio.sleep(0.01)
        assert b"200 OK" in await (await clients.say(WHOLE)).readline()
