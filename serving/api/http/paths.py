"""Other spellings of our paths, as base URLs are typed: without /v1, with slashes too many."""

from __future__ import annotations

import re
from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

_SLASHES = re.compile(r"/{2,}")


class PlainPaths:
    """Pure ASGI: one spelling of each path. Nothing is redirected, for a POST would lose its body.

    Args:
        resources: what follows ``/v1/`` in the application's paths.
    """

    def __init__(self, app: ASGIApp, resources: Collection[str]) -> None:
        self.app = app
        self.resources = frozenset(resources)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = self.plain(scope["path"])
            if path != scope["path"]:
                scope["path"] = path  # in place: the route is read from this scope afterwards
                scope["raw_path"] = path.encode("utf-8", "surrogateescape")
        await self.app(scope, receive, send)

    def plain(self, path: str) -> str:
        """The path as the routes have it."""
        path = _SLASHES.sub("/", path)
        if len(path) > 1:
            path = path.removesuffix("/")
        first = path.removeprefix("/").partition("/")[0]
        return f"/v1{path}" if first in self.resources else path
