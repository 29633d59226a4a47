"""What a gateway does beside answering: sends webhooks, works on batches, removes what expired.

Every gateway of a service does so; the database keeps them from doing a thing twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from calotype.serving.api.background.batch_runner import BatchRunner
from calotype.serving.api.http.job_object import JobObject, describe_job
from calotype.serving.api.http.signing import content_url
from calotype.serving.api.state.gateway import Gateway
from calotype.serving.core.errors import CalotypeError
from calotype.serving.core.protocols import ListedBlobStore
from calotype.serving.jobs.records import JobRecord
from calotype.serving.observability import metrics
from calotype.serving.webhooks.sender import WebhookSender

log = logging.getLogger(__name__)

_LATE_SECONDS = 10.0
"""How long past its deadline a job is left to its dispatcher."""
_ORPHAN_SECONDS = 86_400.0
"""Age at which a file that no row names was left by a writer that died."""
_ORPHAN_SWEEPS = 60
"""The files are looked through once in so many sweeps: a listing of a bucket costs money."""
_PAGE = 200


@contextlib.asynccontextmanager
async def background_tasks(gateway: Gateway) -> AsyncIterator[None]:
    """Runs the gateway's background tasks while the context lasts."""
    settings = gateway.settings

    def describe(job: JobRecord) -> JobObject:
        base = gateway.base_url(None)
        return describe_job(job, base, lambda asset_id: content_url(gateway, base, asset_id))

    tasks: list[asyncio.Task[None]] = []
    if settings.webhook_seconds is not None:
        sender = WebhookSender(gateway.database, gateway.outbound, describe)
        tasks.append(asyncio.create_task(sender.run(settings.webhook_seconds)))
    if settings.batch_seconds is not None:
        tasks.append(asyncio.create_task(BatchRunner(gateway).run(settings.batch_seconds)))
    if settings.sweep_seconds is not None:
        tasks.append(asyncio.create_task(Sweeper(gateway).run(settings.sweep_seconds)))
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Sweeper:
    """Removes what has expired."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway, self._database = gateway, gateway.database
        self._sweeps = 0

    async def run(self, pause: float) -> None:
        while True:
            try:
                await self.sweep()
            except CalotypeError as error:  # a busy database or a full disk: the next one goes on
                log.warning("a sweep was cut short: %s", error)
            await asyncio.sleep(pause)

    async def sweep(self) -> None:
        """One round; each step is a short transaction and may be repeated."""
        database, now = self._database, self._database.clock.time()
        for job_id in await asyncio.to_thread(database.retention.overdue_jobs, now - _LATE_SECONDS):
            await self._gateway.waits.time_out(job_id)
        memory = self._gateway.settings.tombstone_seconds
        for kind, remove in (
            ("job", database.retention.purge_jobs),
            ("asset", database.files.expire_assets),
            ("file", database.files.expire_files),
            ("held", database.held_images.expire_held),
            ("tombstone", lambda: database.retention.forget_jobs(now - memory)),
            ("batch", lambda: database.retention.forget_batches(now - memory)),
        ):
            while removed := await asyncio.to_thread(remove):
                metrics.SWEPT.labels(kind).inc(removed)
        await self._delete_garbage(now)
        if self._sweeps % _ORPHAN_SWEEPS == 0:
            await asyncio.to_thread(self.note_orphans, now)
        self._sweeps += 1

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
