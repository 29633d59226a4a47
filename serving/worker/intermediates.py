"""What a lease leaves behind while it is drawn: checkpoints for a successor, previews for clients.

Neither holds up the steps: storing and judging go on beside them. That something of it fails costs
a successor some steps or a client a preview, never a picture.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from typing import Any, Protocol

from calotype.serving.core.errors import CalotypeError
from calotype.serving.core.protocols import BlobStore, SafetyStage
from calotype.serving.core.request import Checkpoint, GenerationRequest, Preview
from calotype.serving.images.encode import encode_image
from calotype.serving.jobs.judging import scope_of
from calotype.serving.jobs.lease import Lease
from calotype.serving.jobs.result import CONTENT_TYPES
from calotype.serving.storage import content_key
from calotype.serving.worker.postprocess import image_format

log = logging.getLogger(__name__)

PREVIEW_PATIENCE = 5.0
"""Seconds that a finished picture waits for previews that are still being judged."""


class IntermediatesKeeper(Protocol):
    """Who is told of it: `jobs.dispatcher.Dispatcher`."""

    async def checkpoint(self, job_id: str, fence: int, step: int, blob_key: str) -> bool: ...

    async def preview(self, job_id: str, fence: int, preview: Mapping[str, Any]) -> bool: ...


class Intermediates:
    """Takes the checkpoints and previews of one lease, in their order.

    Of checkpoints that come faster than they can be stored only the newest is.
    """

    def __init__(
        self,
        lease: Lease,
        request: GenerationRequest,
        keeper: IntermediatesKeeper,
        safety: SafetyStage,
        blobs: BlobStore,
    ) -> None:
        self._lease, self._request = lease, request
        self._keeper, self._safety, self._blobs = keeper, safety, blobs
        self._waiting: list[Preview | Checkpoint] = []
        self._task: asyncio.Task[None] | None = None
        self._keys: list[str] = [lease.checkpoint["blob_key"]] if lease.checkpoint else []
        """Checkpoints that are stored; the job's row names one of them."""

    def note(self, event: Preview | Checkpoint) -> None:
        if isinstance(event, Checkpoint):
            self._drop_waiting_checkpoints()
        self._waiting.append(event)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())

    async def finish(self) -> None:
        """The picture is drawn: no checkpoint is needed any more, previews are waited for."""
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
        if await self._keeper.checkpoint(lease.job_id, lease.fence, checkpoint.step, key):
            # This lease is the current one, so nobody else was told of an older one.
            old, self._keys = self._keys[:-1], [key]
        else:  # another replica has the job
            old, self._keys = [key], []
        for name in old:
            await self._delete(name)

    async def _show(self, preview: Preview) -> None:
        if self._lease.hold is not None:
            return
        decision = await self._safety.check_image(
            preview.pixels,
            str(self._lease.request["prompt"]),
            scope=scope_of(self._lease.input),
        )
        if decision.get("blocked", True):
            return
        lease, kind = self._lease, image_format(self._lease)
        compression = lease.input.get("output_compression")
        data = await asyncio.to_thread(encode_image, preview.pixels, kind, compression)
        key = content_key(lease.team_id, data, kind)
        await asyncio.to_thread(self._blobs.put, key, data)
        shown = {
            "image_index": preview.index,
            "partial_index": preview.step // self._request.preview_every - 1,
            "step": preview.step,
            "blob_key": key,
            "content_type": CONTENT_TYPES[kind],
        }
        await self._keeper.preview(lease.job_id, lease.fence, shown)

    async def _delete(self, key: str) -> None:
        with contextlib.suppress(CalotypeError):  # the sweeper finds it
            await asyncio.to_thread(self._blobs.delete, key)
