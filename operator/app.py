"""The operator, put together: client, store, queue, watching, probes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any

from calotype.operator.kube.client import ApiError, KubeClient
from calotype.operator.kube.resources import OWN
from calotype.operator.reconcilers.gateway import reconcile_gateway, reconcile_gateway_teams
from calotype.operator.reconcilers.image_model import reconcile_model
from calotype.operator.reconcilers.lora_adapter import reconcile_adapter
from calotype.operator.reconcilers.lora_training import reconcile_training
from calotype.operator.reconcilers.moderation_policy import reconcile_policy
from calotype.operator.reconcilers.report import reconcile_report
from calotype.operator.reconcilers.resync import (
    reconcile_models,
    reconcile_refusals,
    resync,
)
from calotype.operator.reconcilers.team import reconcile_team
from calotype.operator.runtime.context import Context
from calotype.operator.runtime.credentials import CredentialReader
from calotype.operator.runtime.event_router import EventRouter
from calotype.operator.runtime.fetch_runner import FetchRunner, FetchSlots
from calotype.operator.runtime.health import HealthServers
from calotype.operator.runtime.lease import Lease, LeaseLost
from calotype.operator.runtime.metrics import Metrics
from calotype.operator.runtime.model_app import ModelApps
from calotype.operator.runtime.store import Store
from calotype.operator.runtime.team_owners import TeamOwnersReader
from calotype.operator.runtime.watching import STREAM, Watcher
from calotype.operator.runtime.workqueue import Debounce, Key, WorkQueue
from calotype.operator.runtime.writers.children import ChildWriter
from calotype.operator.runtime.writers.events import EventWriter
from calotype.operator.runtime.writers.finalizers import Finalizers
from calotype.operator.runtime.writers.statuses import StatusWriter
from calotype.operator.settings import OperatorSettings

log = logging.getLogger(__name__)

FIRST_RESYNC_SECONDS = 20.0
LAST_ACT_SECONDS = 5.0

RECONCILERS: dict[str, Callable[[Context, Key], Awaitable[float | None]]] = {
    "ImageModel": reconcile_model,
    "LoRAAdapter": reconcile_adapter,
    "ModerationPolicy": reconcile_policy,
    "Team": reconcile_team,
    "LoRATraining": reconcile_training,
    "Gateway": reconcile_gateway,
    "GatewayTeams": reconcile_gateway_teams,
    "Report": reconcile_report,
    "Models": reconcile_models,
    "Refusals": reconcile_refusals,
    "Resync": resync,
}


class Operator:
    """One operator; ``run`` returns after SIGTERM or `stop`.

    Args:
        apps, clock: others for tests.
    """

    def __init__(
        self,
        settings: OperatorSettings,
        kube: KubeClient,
        apps: ModelApps | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings, self.kube = settings, kube
        self.metrics = Metrics()
        self.queue = WorkQueue(self._reconcile, self.metrics, workers=settings.workers, clock=clock)
        self.apps = apps or ModelApps(kube, settings)
        slots = FetchSlots(settings.max_fetch_jobs, self.queue.add)
        store, events = Store(settings), EventWriter(kube)
        children = ChildWriter(kube, self.metrics)
        self.context = Context(
            kube=kube,
            settings=settings,
            store=store,
            queue=self.queue,
            metrics=self.metrics,
            apps=self.apps,
            credentials=CredentialReader(kube, settings.secret_poll_seconds, clock),
            fetches=FetchRunner(kube, settings, slots, children),
            slots=slots,
            debounce=Debounce(settings.debounce_seconds, settings.debounce_at_most_seconds, clock),
            children=children,
            statuses=StatusWriter(kube, self.metrics, events),
            events=events,
            finalizers=Finalizers(kube, settings, self.metrics, store.terminating),
            team_owners=TeamOwnersReader(self.apps, settings, clock),
        )
        self.router = EventRouter(self.context)
        self.watcher = Watcher(kube, settings, self.router, self.metrics, self.schedule_all)
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        self._stopping.set()

    async def run(self) -> None:
        """Until it is stopped.

        Raises:
            LeaseLost: another operator acts; this one must not.
        """
        self._catch_signals()
        asyncio.get_running_loop().set_exception_handler(_ignore_stream_errors)
        health = HealthServers(
            self.metrics,
            lambda: time.monotonic() - self.queue.last_active,
            lambda: self.watcher.scope is not None,
        )
        await health.start(self.settings.health_port, self.settings.metrics_port)
        lease = Lease(self.kube, self.settings) if self.settings.lease else None
        try:
            await self._until_stopped(self._act(lease))
        finally:
            await health.stop()
            await self.apps.close()
            if lease is not None and self._stopping.is_set():
                with contextlib.suppress(ApiError):
                    await lease.release()

    async def _act(self, lease: Lease | None) -> None:
        async with asyncio.TaskGroup() as group:
            if lease is not None:
                waiting = group.create_task(self._stay_alive())
                await lease.acquire()
                waiting.cancel()
                group.create_task(lease.keep())
            group.create_task(self.watcher.run())
            group.create_task(self.queue.run())

    async def _stay_alive(self) -> None:
        """An operator that waits for the Lease is well."""
        while True:
            self.queue.last_active = time.monotonic()
            await asyncio.sleep(1.0)

    async def _until_stopped(self, work: Awaitable[None]) -> None:
        acting = asyncio.ensure_future(work)
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait([acting, stopping], return_when=asyncio.FIRST_COMPLETED)
            if acting.done():
                await _reraise(acting)
                return
        finally:
            stopping.cancel()
            acting.cancel()
            await asyncio.gather(acting, stopping, return_exceptions=True)
        with contextlib.suppress(ApiError, TimeoutError):
            async with asyncio.timeout(LAST_ACT_SECONDS):
                await self._release_if_terminating()

    def schedule_all(self) -> None:
        """Whenever watching begins: what no event of an object asks for is scheduled."""
        self._catch_signals()  # kopf takes them for itself
        self.context.wake_gateway(1.0)
        self.queue.add(Key("Resync", "", ""), FIRST_RESYNC_SECONDS)

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                loop.add_signal_handler(number, self.stop)

    async def _reconcile(self, key: Key) -> float | None:
        return await RECONCILERS[key.kind](self.context, key)

    async def _release_if_terminating(self) -> None:
        """Nobody will drain what is being deleted together with the operator's namespace."""
        namespace = self.settings.operator_namespace
        await self.context.refresh_namespace(namespace)
        if namespace in self.context.store.terminating:
            await release_all(self.context, [namespace])


async def release_all(context: Context, namespaces: list[str] | None) -> int:
    """Takes our finalizers off everything; says of how many objects. None = every namespace."""
    count = 0
    places: list[str | None] = [None] if namespaces is None else [*namespaces]
    for namespace in places:
        for resource in OWN:
            for obj in await context.kube.list(resource, namespace):
                full = {"apiVersion": resource.api_version, "kind": resource.kind, **obj}
                if full["metadata"].get("finalizers"):
                    await context.finalizers.remove(resource, full)
                    count += 1
    return count


def _ignore_stream_errors(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """When one watch of kopf's fails, all others fail with it, and nobody asks them why: the first
    one is in the log already."""
    task = context.get("future") or context.get("task")
    name = task.get_name() if isinstance(task, asyncio.Task) else ""
    if name.startswith(STREAM):
        log.debug("%s: %r", name, context.get("exception"))
    else:
        loop.default_exception_handler(context)


async def _reraise(task: asyncio.Future[None]) -> None:
    try:
        await task
    except BaseExceptionGroup as group:
        lost = group.subgroup(LeaseLost)
        if lost is not None:
            raise lost.exceptions[0] from None
        raise
