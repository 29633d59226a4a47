"""The socket of a service."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from calotype.serving.core.errors import InvalidRequest


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
