"""What a lease leaves while it is drawn: checkpoints to go on from, previews for clients.

Best effort, beside the steps: a failure loses a resume point or a preview, never the image.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from calotype.serving.core.errors import CalotypeError
from calotype.serving.core.protocols import BlobStore, SafetyStage
from calotype.serving.core.request import Checkpoint, Preview
from calotype.serving.images.encode import encode_image
from calotype.serving.jobs.lease import Lease
from calotype.serving.jobs.moderation_checks import CheckRetries
from calotype.serving.jobs.records import Checkpoint as CheckpointRecord
from calotype.serving.jobs.records import PreviewRecord
from calotype.serving.jobs.result import CONTENT_TYPES
from calotype.serving.storage import new_key
from calotype.serving.worker.lease_source import IntermediatesSink
from calotype.serving.worker.output_check import Sources, check_output

log = logging.getLogger(__name__)

_ONCE = CheckRetries(delays=())
"""A preview that could not be checked is not shown: nothing waits for it."""
PREVIEW_PATIENCE = 5.0
"""Seconds that a finished image waits for previews that are still being checked."""


class Intermediates:
    """Takes the checkpoints and previews of one lease, in their order.

    Of checkpoints that come faster than they can be stored only the newest is.
    """

    def __init__(
        self,
        lease: Lease,
        sink: IntermediatesSink,
        safety: SafetyStage,
        blobs: BlobStore,
    ) -> None:
        self._lease, self._sink = lease, sink
        self._safety, self._blobs = safety, blobs
        self._waiting: list[Preview | Checkpoint] = []
        self._sources: Sources | None = None
        self._task: asyncio.Task[None] | None = None
        self._keys: list[str] = [lease.checkpoint.blob_key] if lease.checkpoint else []
        """Checkpoints that are stored; the job's row names one of them."""

    def draws_from(self, sources: Sources) -> None:
        """Says what the images are drawn from. No preview is shown before that is known."""
        self._sources = sources

    def note(self, event: Preview | Checkpoint) -> None:
        if isinstance(event, Checkpoint):
            self._drop_waiting_checkpoints()
        self._waiting.append(event)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())

    async def finish(self) -> None:
        """The image is drawn: no checkpoint is needed any more, previews are waited for."""
        self._drop_waiting_checkpoints()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=PREVIEW_PATIENCE)

    async def close(self) -> None:
        """Drops what waits."""
        self._waiting.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def forget(self) -> None:
        """The job is over: deletes its checkpoint, which no row names any more."""
        keys, self._keys = self._keys, []
        for key in keys:
            await self._delete(key)

    def _drop_waiting_checkpoints(self) -> None:
        self._waiting = [event for event in self._waiting if isinstance(event, Preview)]

    async def _work(self) -> None:
        while self._waiting:
            event = self._waiting.pop(0)
            try:
                if isinstance(event, Checkpoint):
                    await self._save(event)
                else:
                    await self._show(event)
            except CalotypeError as error:
                log.warning("job %s goes on without it: %s", self._lease.job_id, error)
            except Exception:  # a bug of ours, or whatever a connection died of
                log.exception("job %s goes on without it", self._lease.job_id)

    async def _save(self, checkpoint: Checkpoint) -> None:
        lease = self._lease
        # Named after the job: no other may share the blob, because it is deleted when it is old.
        place = f"{lease.team_id}/checkpoints/{lease.job_id}"
        key = f"{place}-{lease.fence}-{checkpoint.step}.checkpoint"
        await asyncio.to_thread(self._blobs.put, key, checkpoint.data)
        self._keys.append(key)
        record = CheckpointRecord(lease.job_id, lease.fence, checkpoint.step, key)
        if await self._sink.checkpoint(record):
            # This lease is the current one, so nobody else was told of an older one.
            old, self._keys = self._keys[:-1], [key]
        else:  # another replica has the job
            old, self._keys = [key], []
        for name in old:
            await self._delete(name)

    async def _show(self, preview: Preview) -> None:
        lease, options = self._lease, self._lease.options
        if lease.review_categories is not None or self._sources is None:
            return
        decision = await check_output(self._safety, lease, preview.pixels, self._sources, _ONCE)
        # By a newer policy the prompt has not been checked yet; the finished image is, as a whole.
        if decision.blocked or lease.prompt_policy not in (None, decision.version):
            return
        kind = options.output_format
        data = await asyncio.to_thread(
            encode_image, preview.pixels, kind, options.output_compression
        )
        key = new_key(lease.team_id, data, kind)
        await asyncio.to_thread(self._blobs.put, key, data)
        await self._sink.preview(
            PreviewRecord(
                job_id=lease.job_id,
                image_index=preview.index,
                partial_index=preview.step // lease.request.preview_every - 1,
                fence=lease.fence,
                step=preview.step,
                blob_key=key,
                content_type=CONTENT_TYPES[kind],
            )
        )

    async def _delete(self, key: str) -> None:
        with contextlib.suppress(CalotypeError):  # the sweeper finds it
            await asyncio.to_thread(self._blobs.delete, key)
