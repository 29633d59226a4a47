"""Server-sent events: how they are written, and the stream of one job."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping

from starlette.requests import Request
from starlette.responses import StreamingResponse
from typing_extensions import TypedDict

from calotype.serving.api.http.job_object import JobObject
from calotype.serving.api.http.stored import StoredPictures, in_threads
from calotype.serving.api.state.gateway import Gateway
from calotype.serving.core.errors import NotFound, StorageFailed
from calotype.serving.jobs.events import JobEvent, events_since
from calotype.serving.jobs.records import JobRecord, PreviewRecord
from calotype.serving.observability import metrics

KEEP_ALIVE = ": keep-alive\n\n"
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


class PartialImage(TypedDict):
    """A preview in an event."""

    image_index: int
    partial_image_index: int
    b64_json: str
    output_format: str


def frame(event: str, data: Mapping[str, object], number: int | None = None) -> str:
    """One event as it goes over the wire."""
    head = "" if number is None else f"id: {number}\n"
    return f"{head}event: {event}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"


def event_response(parts: AsyncIterator[str | bytes], headers: dict[str, str]) -> StreamingResponse:
    async def counted() -> AsyncIterator[str | bytes]:
        metrics.STREAMS.inc()
        try:
            async for part in parts:
                yield part
        finally:
            metrics.STREAMS.dec()

    return StreamingResponse(counted(), media_type="text/event-stream", headers=HEADERS | headers)


async def follow(
    gateway: Gateway, job_id: str, last_id: int | None
) -> AsyncIterator[tuple[JobRecord, JobEvent] | None]:
    """A job's events after ``last_id`` as they happen, None when there was nothing for a while.

    Ends after the terminal event. A database that is away for a moment only delays it.
    """
    quiet = gateway.settings.keep_alive_seconds
    async with gateway.change_poller.changes(job_id) as changed:
        while True:
            changed.clear()
            try:
                job, previews = await asyncio.to_thread(_look, gateway, job_id)
            except StorageFailed:
                yield None
                await asyncio.sleep(1)
                continue
            for event in events_since(job, previews, last_id):
                last_id = event.id
                yield job, event
                if event.terminal:
                    return
            if job.over:
                return  # the client has seen its end already
            try:
                await asyncio.wait_for(changed.wait(), quiet)
            except TimeoutError:
                yield None


def _look(gateway: Gateway, job_id: str) -> tuple[JobRecord, list[PreviewRecord]]:
    job = gateway.database.jobs.get_job(job_id)
    if job is None:
        raise NotFound(f"There is no job '{job_id}'.")
    # A job that was not asked for previews has none, and costs no second look.
    shown = job.request.get("preview_every") and job.status in ("running", "succeeded")
    if shown and (job.recipe or {}).get("adapters"):
        shown = not gateway.database.origins.quarantined_job(job_id)
    return job, gateway.database.intermediates.list_previews(job_id) if shown else []


async def job_stream(
    gateway: Gateway,
    request: Request,
    job_id: str,
    last_id: int | None,
    describe: Callable[[JobRecord], JobObject],
) -> AsyncIterator[str | bytes]:
    """The frames of GET /v1/jobs/{id}/events."""
    async for found in follow(gateway, job_id, last_id):
        if found is None:
            yield KEEP_ALIVE
            continue
        job, event = found
        pictures = StoredPictures(gateway.blobs)
        if event.terminal:
            data: Mapping[str, object] = describe(job)
        elif event.preview is not None:
            data = {**partial_data(pictures, event.preview), "job_id": job.id}
        else:
            estimates = await gateway.estimates.of_job(job)
            data = {
                "job_id": job.id,
                "status": job.status,
                "progress": job.progress,
                "step": job.step,
                "total_steps": job.steps,
                "queue_position": estimates.queue_position,
            }
        async for part in in_threads(pictures.pieces(frame(f"job.{event.kind}", data, event.id))):
            yield part


def partial_data(pictures: StoredPictures, preview: PreviewRecord) -> PartialImage:
    return {
        "image_index": preview.image_index,
        "partial_image_index": preview.partial_index,
        "b64_json": pictures.mark(preview.blob_key),
        "output_format": preview.content_type.removeprefix("image/"),
    }
