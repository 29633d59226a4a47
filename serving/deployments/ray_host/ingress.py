"""The HTTP side of the model apps in this process: each answers below its route prefix.

Without Serve's proxy and without an ingress replica: two processes and one hop less.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Mapping

import uvicorn
from ray import serve
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send

from calotype.serving.cluster.model_ingress import build_ingress
from calotype.serving.cluster.stand_in import HEALTH_PATH
from calotype.serving.core.tls import TlsFiles
from calotype.serving.deployments.replicas.ingress import ServedModelApp

SHUTDOWN_SECONDS = 10


class HostIngress:
    """An ASGI application whose model apps may change while it runs.

    Args:
        token: what callers must show.
    """

    def __init__(self, token: str) -> None:
        self._token = token
        self._apps: dict[str, str] = {}
        self._router = self._built()

    def offer(self, apps: Mapping[str, str]) -> None:
        """Route prefix -> name of the Serve application that answers below it, from now on."""
        if dict(apps) != self._apps:
            self._apps = dict(apps)
            self._router = self._built()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._router(scope, receive, send)

    def _built(self) -> Starlette:
        mounts = [
            Mount(prefix.rstrip("/"), build_ingress(_looked_up(app), self._token))
            for prefix, app in sorted(self._apps.items(), reverse=True)
        ]
        return Starlette(routes=[Route(HEALTH_PATH, _healthy), *mounts])


class IngressServer(uvicorn.Server):
    """Serves until it is told to end; signals are for the process that it is in."""

    def __init__(self, ingress: HostIngress, tls: TlsFiles | None = None) -> None:
        config = uvicorn.Config(
            ingress,
            log_level="warning",
            lifespan="off",
            timeout_keep_alive=120,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            ssl_certfile=None if tls is None else tls.certificate,
            ssl_keyfile=None if tls is None else str(tls.key),
        )
        super().__init__(config)

    async def answer_on(self, listener: socket.socket) -> None:
        await self.serve(sockets=[listener])

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _looked_up(app: str) -> ServedModelApp:
    return ServedModelApp(
        serve.get_deployment_handle("Dispatcher", app),
        serve.get_deployment_handle("Moderator", app),
    )


async def _healthy(request: Request) -> Response:
    return JSONResponse({})
