"""What probes and Prometheus ask: two small HTTP servers."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from calotype.operator.runtime.metrics import Metrics

STUCK_SECONDS = 60.0
"""A queue that has not looked for work for longer hangs."""


class HealthServers:
    """``/healthz`` (the loop turns), ``/readyz`` (the cluster is watched) and ``/metrics``."""

    def __init__(
        self, metrics: Metrics, idle_seconds: Callable[[], float], watching: Callable[[], bool]
    ) -> None:
        self._metrics, self._idle, self._watching = metrics, idle_seconds, watching
        self._runners: list[web.AppRunner] = []

    async def start(self, health_port: int, metrics_port: int) -> None:
        """Port 0 = not at all; the same port = one server."""
        await self._serve(health_port, health=True, metrics=metrics_port == health_port)
        if metrics_port != health_port:
            await self._serve(metrics_port, health=False, metrics=True)

    async def stop(self) -> None:
        for runner in self._runners:
            await runner.cleanup()

    async def _serve(self, port: int, *, health: bool, metrics: bool) -> None:
        if port == 0:
            return
        app = web.Application()
        if health:
            app.router.add_get("/healthz", self._healthz)
            app.router.add_get("/readyz", self._readyz)
        if metrics:
            app.router.add_get("/metrics", self._metrics_text)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, None, port).start()
        self._runners.append(runner)

    async def _healthz(self, request: web.Request) -> web.Response:
        idle = self._idle()
        if idle > STUCK_SECONDS:
            return web.Response(status=500, text=f"the queue has been stuck for {idle:.0f} s\n")
        return web.Response(text="ok\n")

    async def _readyz(self, request: web.Request) -> web.Response:
        if not self._watching():
            return web.Response(status=503, text="the cluster is not watched yet\n")
        return web.Response(text="ok\n")

    async def _metrics_text(self, request: web.Request) -> web.Response:
        body = generate_latest(self._metrics.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})
