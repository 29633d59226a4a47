"""A world in real time: the operator watches a fake API server over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

from calotype.operator.app import Operator
from calotype.operator.kube.client import HttpKubeClient
from calotype.operator.testing.apiserver import FakeApiServer
from calotype.operator.testing.cluster import FakeCluster

from .world import AnyWorld

T = TypeVar("T")

PATIENCE = 600.0
"""Seconds; a reconcile that fails five times in a row is tried again half a minute later."""


class LiveWorld(AnyWorld):
    """In real time, over HTTP."""

    def __init__(self, server: FakeApiServer) -> None:
        super().__init__(server, FakeCluster(server))
        self._running: asyncio.Task[None] | None = None

    async def start(self, **overrides: Any) -> Operator:
        """The operator, in this process; the very one that the image runs."""
        self.overrides |= overrides
        kube = HttpKubeClient()
        self.operator = operator = Operator(self.settings(), kube)

        async def run() -> None:
            async with kube:
                await operator.run()

        self._running = asyncio.create_task(run())
        await self.until(lambda: operator.watcher.scope, "watching began")
        return operator

    async def stop(self) -> None:
        if self.operator is not None and self._running is not None:
            self.operator.stop()
            await self._running
            self.operator = self._running = None

    async def kill(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
            self.operator = self._running = None

    async def until(self, holds: Callable[[], T], what: str) -> T:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                while True:
                    if self._running is not None and self._running.done():
                        self._running.result()
                    found = holds()
                    if found:
                        return found
                    await asyncio.sleep(0.02)
        raise AssertionError(f"not within {PATIENCE} s: {what}; {self.conditions()}")

    async def quiet(self, seconds: float = 0.6) -> None:
        loop = asyncio.get_running_loop()
        version, since = self.server.objects.version, loop.time()
        async with asyncio.timeout(PATIENCE):
            while loop.time() - since < seconds:
                await asyncio.sleep(0.05)
                if self.server.objects.version != version:
                    version, since = self.server.objects.version, loop.time()
