"""The HTTP server around the gateway: its socket, its certificate, and an end that drains."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from calotype.serving.api.http.connections import ConnectionLimits, bounded_protocol
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.tls import TlsFiles

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


def build_server(
    app: FastAPI,
    shutdown_seconds: int = SHUTDOWN_SECONDS,
    tls: TlsFiles | None = None,
    limits: ConnectionLimits | None = None,
) -> Server:
    """Args:
    shutdown_seconds: how long open requests may go on after a signal to end.
    tls: it speaks HTTPS with them; None = plain HTTP.
    limits: of its connections; None = the usual ones.
    """
    limits = limits or ConnectionLimits()
    config = uvicorn.Config(
        app,
        log_level="warning",
        timeout_graceful_shutdown=shutdown_seconds,
        timeout_keep_alive=round(limits.keep_alive_seconds),
        http=bounded_protocol(limits),  # type: ignore[arg-type]  # it is called like a class
        ssl_certfile=None if tls is None else tls.certificate,
        ssl_keyfile=None if tls is None else str(tls.key),
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
