"""A world in virtual time: no HTTP, no watches, and nothing is waited for.

The operator's queue and the API server share a clock that is set forward to whatever is due next.
"""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Callable
from typing import Any, TypeVar

from calotype.operator.app import Operator
from calotype.operator.kube.labels import MANAGED_BY, OPERATOR, model_of
from calotype.operator.kube.resources import (
    OWN,
    RAY,
)
from calotype.operator.runtime.model_app import ModelApps, NoAnswer
from calotype.operator.runtime.watching import LABELLED
from calotype.operator.settings import OperatorSettings
from calotype.operator.testing.apiserver import FakeApiServer
from calotype.operator.testing.client import DirectKubeClient
from calotype.operator.testing.cluster import FakeCluster
from calotype.operator.testing.objects import Change
from calotype.serving.wire.team_owners import TEAMS_PATH

from .world import AnyWorld

T = TypeVar("T")

PATIENCE = 600.0
"""Virtual seconds that `World.until` goes on for."""
SETTLED_TURNS = 5
"""Turns of the event loop in which nothing is due or at work, before the clock is set forward."""


class Clock:
    """A clock that stands still until it is set forward."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = datetime.datetime(2026, 11, 23, 9, tzinfo=datetime.UTC)
        self.skew = datetime.timedelta()
        """By how much the API server's clock is ahead of the operator's."""

    def monotonic(self) -> float:
        return self.seconds

    def now(self) -> datetime.datetime:
        return self._began + datetime.timedelta(seconds=self.seconds) + self.skew


class DirectModelApps(ModelApps):
    """Asks the fake model apps without HTTP."""

    def __init__(
        self, kube: DirectKubeClient, settings: OperatorSettings, cluster: FakeCluster
    ) -> None:
        super().__init__(kube, settings)
        self._cluster = cluster

    async def get(self, url: str, token: Callable[[str], str] | None = None) -> bytes:
        if url.endswith(TEAMS_PATH):
            if self._cluster.apps.owners is None:
                raise NoAnswer(f"{url} answers 503.")
            return self._cluster.apps.owners.to_json().encode()
        _, _, path = url.partition("/apps/")
        namespace, service, *_ = path.split("/")
        status = self._cluster.apps.answer(namespace, model_of(service.removesuffix("-serve-svc")))
        if status is None:
            raise NoAnswer(f"{url} answers 503.")
        return status.to_json().encode()


class World(AnyWorld):
    """In virtual time."""

    def __init__(self) -> None:
        self.clock = Clock()
        server = FakeApiServer()
        server.objects.clock = self.clock.now
        super().__init__(server, FakeCluster(server, sleep=lambda seconds: asyncio.sleep(0)))
        self._running: asyncio.Task[None] | None = None
        server.objects.listeners.append(self._publish)

    async def start(self, **overrides: Any) -> Operator:
        self.overrides |= overrides
        settings, kube = self.settings(), DirectKubeClient(self.server)
        apps = DirectModelApps(kube, settings, self.cluster)
        self.operator = operator = Operator(settings, kube, apps, self.clock.monotonic)
        seen = [
            (resource, obj)
            for resource in (*OWN, *LABELLED, *RAY)
            for obj in self.server.objects.all(resource).values()
        ]
        for resource, obj in seen:
            operator.router.observe(resource, obj)
        for resource, obj in seen:
            operator.router.handle(resource, obj, gone=False)
        operator.schedule_all()
        self._running = asyncio.create_task(operator.queue.run())
        return operator

    async def stop(self) -> None:
        await self.settle()
        await self.kill()

    async def kill(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
            self.operator = self._running = None

    async def settle(self) -> None:
        """Goes on without time passing until nothing is due or at work."""
        idle = 0
        while idle < SETTLED_TURNS:
            await asyncio.sleep(0)
            busy = self.operator is not None and self.operator.queue.depth > 0
            idle = 0 if busy else idle + 1

    async def until(self, holds: Callable[[], T], what: str) -> T:
        began = self.clock.seconds
        while True:
            await self.settle()
            if self._running is not None and self._running.done():
                self._running.result()
            found = holds()
            if found:
                return found
            if not self._forward(began + PATIENCE):
                raise AssertionError(f"it never came true: {what}; {self.conditions()}")

    async def quiet(self, seconds: float = 0.6) -> None:
        began = self.clock.seconds
        version, end = self.server.objects.version, began + seconds
        await self.settle()
        while self._forward(end):
            await self.settle()
            if self.server.objects.version != version:
                version, end = self.server.objects.version, self.clock.seconds + seconds
            assert self.clock.seconds - began < PATIENCE, "it is never quiet"
        self.clock.seconds = max(self.clock.seconds, end)

    async def go_on(self, seconds: float) -> None:
        """Lets the operator work for so long."""
        end = self.clock.seconds + seconds
        await self.settle()
        while self._forward(end):
            await self.settle()
        self.clock.seconds = max(self.clock.seconds, end)

    def _forward(self, end: float) -> bool:
        """Sets the clock to what is due next; False where that is after ``end``."""
        if self.operator is None:
            return False
        due = self.operator.queue.next_due
        if due is None or due > end:
            return False
        # A little later: what is left of a pause may be too small to be added to the clock.
        self.clock.seconds = max(self.clock.seconds, due + 1e-6)
        self.operator.queue.wake()
        return True

    def _publish(self, change: Change) -> None:
        """What a watch would tell the operator, at once."""
        resource, obj = change.resource, change.obj
        if self.operator is None or resource not in (*OWN, *LABELLED, *RAY):
            return
        labels = obj["metadata"].get("labels") or {}
        if resource in LABELLED and labels.get(MANAGED_BY) != OPERATOR:
            return
        gone = change.type == "DELETED"
        if not gone:
            self.operator.router.observe(resource, obj)
        self.operator.router.handle(resource, obj, gone)
