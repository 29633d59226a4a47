"""Answers on the socket of a model app while there is none: 503, and when it is expected back.

Callers then hear at once what they would else wait for. Takes connections only while it is open;
the socket itself stays, so that the model app can take over without a gap.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable
from http import HTTPStatus

from calotype.serving.api.http.failures import wire
from calotype.serving.core.errors import CalotypeError
from calotype.serving.core.tls import TlsFiles

MAX_HEAD_BYTES = 64 * 1024
HEAD_SECONDS = 5.0
HEALTH_PATH = "/-/healthz"


class StandIn:
    """Args:
    listener: the model app's socket, which listens already.
    problem: what callers are told.
    healthy: the answer to GET /-/healthz, which the kubelet asks.
    tls: it speaks HTTPS with them; None = plain HTTP.
    """

    def __init__(
        self,
        listener: socket.socket,
        problem: Callable[[], CalotypeError],
        healthy: Callable[[], bool] = lambda: False,
        tls: TlsFiles | None = None,
    ) -> None:
        self._listener, self._problem, self._healthy = listener, problem, healthy
        self._tls = None if tls is None else tls.context()
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Takes connections from now on."""
        if self._server is None:
            self._server = await asyncio.start_server(
                self._answer,
                sock=self._listener.dup(),
                limit=MAX_HEAD_BYTES,
                ssl=self._tls,
                ssl_handshake_timeout=None if self._tls is None else HEAD_SECONDS,
            )

    def close(self) -> None:
        """Takes no connection any more."""
        server, self._server = self._server, None
        if server is not None:
            server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A cancelled handler, too: asyncio would log the end of the loop as an error.
        with contextlib.suppress(
            OSError, ValueError, asyncio.IncompleteReadError, asyncio.CancelledError
        ):
            try:
                async with asyncio.timeout(HEAD_SECONDS):
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(self._response(head.split(b"\r\n", 1)[0]))
                    if writer.can_write_eof():  # TLS has no half of an end
                        writer.write_eof()
                    # A connection that is closed while the caller still sends is reset, and the
                    # answer is lost.
                    while await reader.read(MAX_HEAD_BYTES):
                        pass
            finally:
                writer.close()
            await writer.wait_closed()

    def _response(self, request_line: bytes) -> bytes:
        if request_line.split(b" ")[1:2] == [HEALTH_PATH.encode()] and self._healthy():
            return _response(HTTPStatus.OK, "{}")
        error = self._problem()
        return _response(HTTPStatus(wire(error).status), json.dumps({"error": error.to_payload()}))


def _response(status: HTTPStatus, body: str) -> bytes:
    data = body.encode()
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(data)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + data
