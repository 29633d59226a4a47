"""A second port of a gateway, for the pods of models alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

import uvicorn
from fastapi import FastAPI

from calotype.serving.api.http.server import listening_socket
from calotype.serving.core.tls import TlsFiles

SHUTDOWN_SECONDS = 5


class _Server(uvicorn.Server):
    """Signals are for the server of the public port, which ends this one with itself."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def serving_internally(
    app: FastAPI, host: str, port: int, tls: TlsFiles | None = None
) -> AsyncIterator[None]:
    """Serves ``app`` for as long as the context is open.

    Args:
        tls: it speaks HTTPS with them; None = plain HTTP.

    Raises:
        InvalidRequest: the port is taken.
    """
    with listening_socket(host, port) as listener:
        config = uvicorn.Config(
            app,
            log_level="warning",
            lifespan="off",
            access_log=False,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            ssl_certfile=None if tls is None else tls.certificate,
            ssl_keyfile=None if tls is None else str(tls.key),
        )
        server = _Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield
        finally:
            server.should_exit = True
            await asyncio.gather(serving, return_exceptions=True)
