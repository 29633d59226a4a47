"""A second port of a gateway, for the pods of models alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

import uvicorn
from fastapi import FastAPI

from calotype.serving.api.http.listener import listening_socket

SHUTDOWN_SECONDS = 5


class _Server(uvicorn.Server):
    """Signals are for the server of the public port, which ends this one with itself."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def serving_internally(app: FastAPI, host: str, port: int) -> AsyncIterator[None]:
    """Serves ``app`` for as long as the context is open.

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
        )
        server = _Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield
        finally:
            server.should_exit = True
            await asyncio.gather(serving, return_exceptions=True)
