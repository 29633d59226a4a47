"""Around every request: its path in one spelling, its id, its metrics, and an answer when a bug of
ours escapes."""

from __future__ import annotations

import logging
import math
import re
import secrets
import time
from collections.abc import Callable, Collection
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from calotype.serving.observability import metrics, tracing

log = logging.getLogger(__name__)

_UNTRACED = frozenset({"/healthz", "/readyz", "/metrics"})
"""Asked for every few seconds by machines."""
_SLASHES = re.compile(r"/{2,}")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


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


class RequestFrame:
    """Pure ASGI, outermost of ours.

    Args:
        on_bug: the answer to an exception that no handler knows.
    """

    def __init__(self, app: ASGIApp, on_bug: Callable[[], Response]) -> None:
        self.app = app
        self.on_bug = on_bug

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"] in _UNTRACED:
            await self._answer(scope, receive, send, None)
            return
        with tracing.span("request", _traceparent(scope), server=True) as span:
            await self._answer(scope, receive, send, tracing.trace_id())
            span.update_name(f"{_method(scope)} {_route(scope)}")
            span.set_attribute("calotype.request_id", scope["state"]["request_id"])

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, trace_id: str | None
    ) -> None:
        started = time.perf_counter()
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_framed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                del headers["x-request-id"]
                if trace_id is not None:
                    headers["x-trace-id"] = trace_id
                headers["x-request-id"] = request_id
                for rate in scope["state"].get("rates", ()):
                    headers["x-ratelimit-limit-requests"] = str(rate.limit)
                    headers["x-ratelimit-remaining-requests"] = str(rate.remaining)
                    headers["x-ratelimit-reset-requests"] = _duration(rate.reset_seconds)
            await send(message)

        try:
            await self.app(scope, receive, send_framed)
        except Exception:
            log.exception("request %s failed by a bug", request_id)
            if status:
                raise  # the answer has begun; the server must break the connection
            await self.on_bug()(scope, receive, send_framed)
        finally:
            route = _route(scope)
            elapsed = time.perf_counter() - started
            metrics.HTTP_REQUESTS.labels(route, _method(scope), str(status)).inc()
            metrics.HTTP_SECONDS.labels(route).observe(elapsed)


def _duration(seconds: float) -> str:
    """``1s`` or ``6m0s``, as OpenAI writes it."""
    whole = math.ceil(seconds)
    return f"{whole // 60}m{whole % 60}s" if whole >= 60 else f"{whole}s"


def _request_id(scope: Scope) -> str:
    """The caller's id when there is exactly one and it is harmless, else a new one."""
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]):
        return str(given[0].decode("ascii"))
    return f"req_{secrets.token_hex(12)}"


def _traceparent(scope: Scope) -> str | None:
    """The caller's trace, so that ours is part of it."""
    given = [value for name, value in scope["headers"] if name == b"traceparent"]
    return str(given[0].decode("latin-1")) if len(given) == 1 else None


def _route(scope: Scope) -> str:
    route: Any = scope.get("route")
    return str(getattr(route, "path", "other"))


def _method(scope: Scope) -> str:
    method = str(scope["method"])
    return method if method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS") else "other"
