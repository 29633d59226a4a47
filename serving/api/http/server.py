"""The HTTP server around the gateway: its socket, and an end that drains."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from calotype.serving.core.errors import InvalidRequest

SHUTDOWN_SECONDS = 60
"""How long open requests may go on after Ctrl-C; a second one ends it at once."""


class Server(uvicorn.Server):
    """Ends quietly: uvicorn's own raises the signal again, which would cut the draining short."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


def build_server(app: FastAPI, goodbye_seconds: int = SHUTDOWN_SECONDS) -> Server:
    """Args:
    goodbye_seconds: how long open requests may go on after a signal to end.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        timeout_graceful_shutdown=goodbye_seconds,
        timeout_keep_alive=30,
    )
    return Server(config)


@contextlib.contextmanager
def listening_socket(host: str, port: int) -> Iterator[socket.socket]:
    """The socket of the service, taken before anything slow begins.

    Raises:
        InvalidRequest: the port cannot be used.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Inherited by every connection. asyncio sets it only where a socket names its protocol, and
    # without it an answer's body waits 40 ms for the client to acknowledge its head.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        listener.bind((host, port))
        listener.listen(512)
    except OSError as error:
        listener.close()
        raise InvalidRequest(
            f"Port {port} on {host} cannot be used ({error.strerror}); "
            "choose another one with --port."
        ) from None
    with listener:
        yield listener
