"""What a gateway does beside answering: sends webhooks, works on batches, removes what expired.

Every gateway of a service does so; the database keeps them from doing a thing twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial

from calotype.serving.api.background.batch_runner import BatchRunner
from calotype.serving.api.http.job_object import JobObject, describe_job
from calotype.serving.api.http.signing import content_url
from calotype.serving.api.state.gateway import Gateway
from calotype.serving.core.protocols import ListedBlobStore
from calotype.serving.jobs.records import JobRecord
from calotype.serving.observability import metrics
from calotype.serving.observability.loops import Loop
from calotype.serving.webhooks.sender import WebhookSender

log = logging.getLogger(__name__)

_LATE_SECONDS = 10.0
"""How long past its deadline a job is left to its dispatcher."""
_ORPHAN_SECONDS = 86_400.0
"""Age at which a file that no row names was left by a writer that died."""
_ORPHAN_SWEEPS = 60
"""The files are looked through once in so many sweeps: a listing of a bucket costs money."""
_PAGE = 200

Step = Callable[[float], Awaitable[None]]
"""Part of a sweep; gets the time."""


@contextlib.asynccontextmanager
async def background_tasks(gateway: Gateway) -> AsyncIterator[None]:
    """Runs the gateway's background tasks while the context lasts."""
    settings = gateway.settings

    def describe(job: JobRecord) -> JobObject:
        base = gateway.base_url(None)
        return describe_job(job, base, lambda asset_id: content_url(gateway, base, asset_id))

    loops = gateway.loops
    loops.start(Loop("event_streams", gateway.change_poller.look))
    if settings.webhook_seconds is not None:
        sender = WebhookSender(gateway.database, gateway.outbound, describe)
        loops.start(Loop("webhooks", partial(sender.work, settings.webhook_seconds)))
    if settings.batch_seconds is not None:
        loops.start(Loop("batches", partial(BatchRunner(gateway).work, settings.batch_seconds)))
    if settings.sweep_seconds is not None:
        loops.start(Loop("sweeper", partial(Sweeper(gateway).work, settings.sweep_seconds)))
    try:
        yield
    finally:
        await loops.stop()


class Sweeper:
    """Removes what has expired."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway, self._database = gateway, gateway.database
        self._sweeps = 0

    async def work(self, pause: float) -> float:
        await self.sweep()
        return pause

    async def sweep(self) -> None:
        """One round; each step is a short transaction and may be repeated.

        Raises:
            CalotypeError, Exception: the first fault, when everything else was tried.
        """
        now, faults = self._database.clock.time(), list[Exception]()
        for step in (self._end_late, *self._removals(now), self._delete_garbage, self._orphans):
            try:
                await step(now)
            except Exception as error:
                log.warning("a step of a sweep failed: %r", error)
                faults.append(error)
        self._sweeps += 1
        if faults:
            raise faults[0]

    async def _end_late(self, now: float) -> None:
        """Jobs whose dispatcher is away."""
        late = self._database.retention.overdue_jobs
        faults: list[Exception] = []
        for job_id in await asyncio.to_thread(late, now - _LATE_SECONDS):
            try:
                await self._gateway.waits.time_out(job_id)
            except Exception as error:  # the others are not kept waiting by it
                log.warning("job %s could not be ended: %r", job_id, error)
                faults.append(error)
        if faults:
            raise faults[0]

    def _removals(self, now: float) -> Iterator[Step]:
        database = self._database
        memory = self._gateway.settings.tombstone_seconds
        for kind, remove in (
            ("job", database.retention.purge_jobs),
            ("asset", database.files.expire_assets),
            ("file", database.files.expire_files),
            ("held", database.held_images.expire_held),
            ("tombstone", lambda: database.retention.forget_jobs(now - memory)),
            ("batch", lambda: database.retention.forget_batches(now - memory)),
        ):
            yield partial(_removed, kind, remove)

    async def _orphans(self, now: float) -> None:
        if self._sweeps % _ORPHAN_SWEEPS == 0:
            await asyncio.to_thread(self.note_orphans, now)

    async def _delete_garbage(self, now: float) -> None:
        before = now - self._gateway.settings.garbage_seconds
        while keys := await asyncio.to_thread(self._database.files.garbage, before):
            for key in keys:
                await asyncio.to_thread(self._gateway.blobs.delete, key)
            await asyncio.to_thread(self._database.files.forget_garbage, keys)
            metrics.SWEPT.labels("blob").inc(len(keys))

    def note_orphans(self, now: float) -> int:
        """Deletes old files that no row has ever named; how many there were."""
        blobs = self._gateway.blobs
        entries = getattr(blobs, "entries", None)
        if entries is None:
            return 0
        listed: ListedBlobStore = blobs  # type: ignore[assignment]
        old = [key for key, at in listed.entries() if at <= now - _ORPHAN_SECONDS]
        deleted = 0
        for start in range(0, len(old), _PAGE):
            for key in self._database.files.unknown_blobs(old[start : start + _PAGE]):
                blobs.delete(key)
                deleted += 1
        if deleted:
            metrics.SWEPT.labels("orphan").inc(deleted)
            log.info("%d files of writers that died were deleted", deleted)
        return deleted


async def _removed(kind: str, remove: Callable[[], int], now: float) -> None:
    while removed := await asyncio.to_thread(remove):
        metrics.SWEPT.labels(kind).inc(removed)
