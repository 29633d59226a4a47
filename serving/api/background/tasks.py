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
from calotype.serving.api.background.dataset_checker import DatasetChecker
from calotype.serving.api.background.head_signer import HeadSigner, head_key
from calotype.serving.api.http.job_object import JobObject, describe_job
from calotype.serving.api.http.signing import content_url
from calotype.serving.api.review.removal import delete_blobs, end_jobs
from calotype.serving.api.review.stored_images import index_stored, marking_keys
from calotype.serving.api.state.gateway import Gateway
from calotype.serving.core.errors import StorageFailed
from calotype.serving.core.protocols import ListedBlobStore
from calotype.serving.jobs.endings import rights_revoked_ending
from calotype.serving.jobs.records import JobRecord
from calotype.serving.observability import metrics
from calotype.serving.observability.loops import Loop
from calotype.serving.storage import HEADS_PREFIX
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

    loops, sender = gateway.loops, None
    loops.start(Loop("event_streams", gateway.change_poller.look, longest_pause=5.0))
    if settings.webhook_seconds is not None:
        sender = WebhookSender(gateway.database, gateway.outbound, describe)
        loops.start(Loop("webhooks", partial(sender.work, settings.webhook_seconds)))
    if settings.batch_seconds is not None:
        loops.start(Loop("batches", partial(BatchRunner(gateway).work, settings.batch_seconds)))
    if settings.dataset_seconds is not None:
        checker = DatasetChecker(gateway)
        loops.start(Loop("datasets", partial(checker.work, settings.dataset_seconds)))
    if settings.sweep_seconds is not None:
        loops.start(Loop("sweeper", partial(Sweeper(gateway).work, settings.sweep_seconds)))
    if settings.audit_seconds is not None:
        key = await asyncio.to_thread(head_key, settings.data_dir, make=True)
        if key is not None:
            signer = HeadSigner(gateway.database, gateway.blobs, key)
            loops.start(Loop("audit_heads", partial(signer.work, settings.audit_seconds)))
    try:
        yield
    finally:
        await loops.stop()
        if sender is not None:
            await sender.close()


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
        for step in (self._end_late, *self._removals(now), *self._rest):
            try:
                await step(now)
            except Exception as error:
                log.warning("a step of a sweep failed: %r", error)
                faults.append(error)
        self._sweeps += 1
        if faults:
            raise faults[0]

    @property
    def _rest(self) -> tuple[Step, ...]:
        return self._finish_takedowns, self._delete_garbage, self._orphans

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

    async def _finish_takedowns(self, now: float) -> None:
        """Ends jobs of what was taken down or revoked, and compares what was stored since."""
        gateway, takedowns = self._gateway, self._database.takedowns
        forbidden = await asyncio.to_thread(takedowns.forbidden_jobs)
        await asyncio.to_thread(end_jobs, gateway, forbidden)
        revoked = await asyncio.to_thread(self._database.origins.quarantined_open_jobs)
        await asyncio.to_thread(end_jobs, gateway, revoked, rights_revoked_ending())
        if not await asyncio.to_thread(takedowns.unsettled):
            return
        if not await asyncio.to_thread(index_stored, gateway, marking_keys(gateway)):
            await asyncio.to_thread(takedowns.settle)

    async def _delete_garbage(self, now: float) -> None:
        """Raises StorageFailed: some could not be deleted; all others were."""
        before, failed = now - self._gateway.settings.garbage_seconds, set[str]()
        garbage = self._database.files.garbage
        while keys := await asyncio.to_thread(garbage, before, _PAGE, failed):
            gone = await asyncio.to_thread(delete_blobs, self._gateway, keys)
            failed |= set(keys) - set(gone)
            metrics.SWEPT.labels("blob").inc(len(gone))
            if len(failed) >= _PAGE:  # the store is away
                break
        if failed:
            raise StorageFailed(f"{len(failed)} files could not be deleted, {min(failed)} for one.")

    def note_orphans(self, now: float) -> int:
        """Deletes old files that no row has ever named; how many there were."""
        blobs = self._gateway.blobs
        entries = getattr(blobs, "entries", None)
        if entries is None:
            return 0
        listed: ListedBlobStore = blobs  # type: ignore[assignment]
        old = [
            key
            for key, at in listed.entries()
            if at <= now - _ORPHAN_SECONDS and not key.startswith(HEADS_PREFIX)
        ]
        deleted = 0
        for start in range(0, len(old), _PAGE):
            unknown = self._database.files.unknown_blobs(old[start : start + _PAGE])
            deleted += len(delete_blobs(self._gateway, unknown))
        if deleted:
            metrics.SWEPT.labels("orphan").inc(deleted)
            log.info("%d files of writers that died were deleted", deleted)
        return deleted


async def _removed(kind: str, remove: Callable[[], int], now: float) -> None:
    while removed := await asyncio.to_thread(remove):
        metrics.SWEPT.labels(kind).inc(removed)
