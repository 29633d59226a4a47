"""Watching, by kopf: only low-level handlers, which hand events to an `EventSink`.

Kopf lists, watches and reconnects; it writes nothing to any object. What may be watched is found
out first (`find_scope`): a kind that is not installed, or a namespace that is gone or forbidden,
must not end the watching of the others. When kopf gives up all the same, or more can be watched
than before, watching begins anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import kopf

from calotype.operator.kube.client import ApiError, KubeClient
from calotype.operator.kube.labels import MANAGED_BY, OPERATOR
from calotype.operator.kube.login import read_login
from calotype.operator.kube.objects import Manifest
from calotype.operator.kube.resources import (
    CLAIMS,
    DEPLOYMENTS,
    JOBS,
    OWN,
    RAY,
    Resource,
)
from calotype.operator.runtime.metrics import Metrics
from calotype.operator.settings import OperatorSettings

log = logging.getLogger(__name__)

SCOPE_SECONDS = 60.0
"""Between two looks at what may be watched."""
STREAM = "watcher for "
"""How the names of kopf's streams begin."""
LABELLED = (DEPLOYMENTS, JOBS, CLAIMS)
"""Children that are watched by our label, so that those of others cost nothing."""


class EventSink(Protocol):
    """Gets every object and every change."""

    def observe(self, resource: Resource, obj: Manifest) -> None:
        """An object as it was listed or has become; before any `handle`."""

    def handle(self, resource: Resource, obj: Manifest, gone: bool) -> None:
        """Something is to be done about an object."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What may be watched: kinds, and namespaces (None = the whole cluster)."""

    resources: tuple[Resource, ...]
    namespaces: tuple[str, ...] | None

    @property
    def complete(self) -> bool:
        """Whether there is anything worth watching."""
        return all(resource in self.resources for resource in OWN) and self.namespaces != ()


async def find_scope(kube: KubeClient, settings: OperatorSettings) -> Scope:
    """What is installed and allowed at the moment."""
    wanted = (*OWN, *LABELLED, *RAY)
    found = [resource for resource in wanted if await kube.serves(resource)]
    if settings.all_namespaces:
        return Scope(tuple(found), None)
    allowed = [name for name in settings.watched if await _allowed(kube, found, name)]
    return Scope(tuple(found), tuple(allowed))


async def _allowed(kube: KubeClient, resources: list[Resource], namespace: str) -> bool:
    """Whether everything in a namespace may be listed."""
    try:
        for resource in resources:
            await kube.list(resource, namespace, {MANAGED_BY: "nobody"})
    except ApiError as error:
        if error.status == 403:
            log.warning("namespace %s is not watched: %s", namespace, error.message)
            return False
        raise
    return True


def build_registry(sink: EventSink, scope: Scope) -> kopf.OperatorRegistry:
    """Kopf's handlers: an index and an event handler for each kind."""
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def login(**_: Any) -> kopf.ConnectionInfo:
        return read_login()

    for resource in scope.resources:
        _register(registry, sink, resource)
    return registry


def _register(registry: kopf.OperatorRegistry, sink: EventSink, resource: Resource) -> None:
    where = (resource.group, resource.version, resource.plural)
    name = f"{resource.plural}.{resource.group}"

    # Kopf calls index handlers for everything that is listed before it calls any event handler:
    # so nothing is done before everything is known. Both are coroutines although they wait for
    # nothing: kopf would run plain functions in threads.
    @kopf.index(*where, registry=registry, id=f"{name}/known")
    async def known(body: kopf.Body, **_: Any) -> None:
        sink.observe(resource, _plain(body, resource))

    @kopf.on.event(*where, registry=registry, id=f"{name}/event")
    async def event(body: kopf.Body, type: str | None, **_: Any) -> None:  # noqa: A002
        sink.handle(resource, _plain(body, resource), type == "DELETED")


def _plain(body: kopf.Body, resource: Resource) -> Manifest:
    """Items of a list do not say what they are."""
    found = dict(body)
    return {"apiVersion": resource.api_version, "kind": resource.kind, **found}


def kopf_settings(scope: Scope) -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.scanning.disabled = True
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.watching.server_timeout = 300
    settings.watching.connect_timeout = 30
    settings.watching.chunk_size = 250
    settings.networking.connect_timeout = 10
    settings.networking.request_timeout = 60
    # Kopf's own retries are long; watching that begins anew finds out what has changed.
    settings.networking.error_backoffs = [0.3, 1, 2, 3]
    settings.persistence.finalizer = "calotype.dev/kopf-unused"
    settings.process.ultimate_exiting_timeout = None
    for resource in LABELLED:
        if resource in scope.resources:
            key = (resource.group, resource.version, resource.plural)
            settings.watching.label_selectors[key] = f"{MANAGED_BY}={OPERATOR}"
    return settings


class Watcher:
    """Watches for ever."""

    def __init__(
        self,
        kube: KubeClient,
        settings: OperatorSettings,
        sink: EventSink,
        metrics: Metrics,
        began: Callable[[], None],
    ) -> None:
        self._kube, self._settings, self._sink = kube, settings, sink
        self._metrics, self._began = metrics, began
        self.scope: Scope | None = None
        """What is watched now; None while nothing is."""

    async def run(self) -> None:
        pause = 0.5
        while True:
            scope = await self._wait_for_scope()
            self.scope = scope
            loop = asyncio.get_running_loop()
            started = loop.time()
            self._metrics.watch_restarts.inc()
            await self._watch(scope)
            self.scope = None
            # What worked for a while may begin anew at once.
            pause = 0.5 if loop.time() - started > 60 else min(pause * 2, 15.0)
            await asyncio.sleep(pause)

    async def _wait_for_scope(self) -> Scope:
        while True:
            try:
                scope = await find_scope(self._kube, self._settings)
                if scope.complete:
                    return scope
                missing = [r.plural for r in OWN if r not in scope.resources]
                log.warning("waiting: kinds %s, namespaces %s", missing, scope.namespaces)
            except ApiError as error:
                log.warning("the API server is asked again: %s", error)
            await asyncio.sleep(2.0)

    async def _watch(self, scope: Scope) -> None:
        """Until kopf ends, or something else may be watched."""
        tasks = await kopf.spawn_tasks(
            registry=build_registry(self._sink, scope),
            settings=kopf_settings(scope),
            clusterwide=scope.namespaces is None,
            namespaces=scope.namespaces or (),
        )
        self._began()
        changed = asyncio.create_task(self._changed(scope))
        try:
            done, _ = await asyncio.wait([*tasks, changed], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {changed}:
                error = None if task.cancelled() else task.exception()
                log.warning("watching ended: %s: %r", task.get_name(), error)
        finally:
            for task in (changed, *tasks):
                task.cancel()
            await asyncio.gather(changed, *tasks, return_exceptions=True)
            await _end_streams()

    async def _changed(self, scope: Scope) -> None:
        """Returns when there is more or less to watch than there was."""
        while True:
            await asyncio.sleep(SCOPE_SECONDS)
            try:
                now = await find_scope(self._kube, self._settings)
            except ApiError as error:
                log.warning("what may be watched is not known: %s", error)
                continue
            if now != scope and now.complete:
                log.info("watching begins anew, for another set of kinds or namespaces")
                return


async def _end_streams() -> None:
    """When one stream of kopf's fails, it forgets the others, which would go on for ever.

    They are ended one by one and not with everything else: a stream whose helper is cancelled in
    the same moment takes that for a pause and begins anew.
    """
    for _ in range(30):
        left = [t for t in asyncio.all_tasks() if t.get_name().startswith(STREAM)]
        if not left:
            return
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=0.5)
    log.error("%d streams could not be ended", len(left))
