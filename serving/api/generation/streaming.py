"""OpenAI's streaming events of image routes (peers' wire: event equals data.type)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response

from calotype.serving.api.generation.giving_up import given_up
from calotype.serving.api.generation.responses import described, images_response, shown_images
from calotype.serving.api.http.events import KEEP_ALIVE, event_response, follow, frame, partial_data
from calotype.serving.api.http.failures import error_object, localized
from calotype.serving.api.http.job_object import usage_of
from calotype.serving.api.http.stored import StoredPictures, in_threads
from calotype.serving.api.state.gateway import Gateway
from calotype.serving.core.errors import CalotypeError, DeadlineExceeded
from calotype.serving.core.json_object import JsonObject
from calotype.serving.jobs.outage import waited_out, waiting_error
from calotype.serving.jobs.records import JobRecord

_EARLY_SECONDS = 2.0
"""A refusal within this time is a plain error answer; SDKs raise the same for both."""


async def images_stream(
    gateway: Gateway, request: Request, job: JobRecord, seconds: float, started: float
) -> Response:
    """The answer to ``stream: true``.

    Raises:
        CalotypeError: the job failed before the stream began, by the safety stage for instance.
    """
    job = await _until_prompt_checked(gateway, job)
    if job.over and job.status != "succeeded":
        # Raises the job's own error as the plain route does.
        return await images_response(
            gateway, request, job, round(1000 * (time.monotonic() - started))
        )
    headers = {"openai-version": "2020-10-01", "x-job-id": job.id}
    if job.recipe_hash is not None:
        headers["x-recipe-hash"] = job.recipe_hash
    language = request.headers.get("accept-language", "")
    parts = _while_connected(gateway, job, _frames(gateway, job, seconds, language))
    return event_response(parts, headers)


async def _until_prompt_checked(gateway: Gateway, job: JobRecord) -> JobRecord:
    """The job once its prompt was checked, or after a moment."""
    clock = asyncio.get_running_loop().time
    end = clock() + _EARLY_SECONDS
    while not job.over and job.status == "queued" and not job.moderation and clock() < end:
        job = await gateway.waits.poll(job.id, 0.05)
    return job


async def _while_connected(
    gateway: Gateway, job: JobRecord, frames: AsyncIterator[str | bytes]
) -> AsyncIterator[str | bytes]:
    """The frames; a client that leaves before the end leaves its job to the grace."""
    async with gateway.waits.client_waits(job.id) as answered:
        async with contextlib.aclosing(frames) as parts:  # type: ignore[type-var]
            async for part in parts:
                yield part
        answered()


async def _frames(
    gateway: Gateway, job: JobRecord, seconds: float, language: str
) -> AsyncIterator[str | bytes]:
    kind = "image_generation" if job.type == "image.generate" else "image_edit"
    sent: dict[int, int] = {}
    began = gateway.database.clock.time()
    yield KEEP_ALIVE  # headers and first byte at once: some clients give up without
    try:
        async with asyncio.timeout(seconds + 1):
            async for found in follow(gateway, job.id, None):
                if found is None:
                    yield KEEP_ALIVE
                    await _check_patience(gateway, job.id, began)
                    continue
                job, event = found
                if event.preview is not None:
                    pictures = StoredPictures(gateway.blobs)
                    data = _common(job) | partial_data(pictures, event.preview)
                    number = sent.get(event.preview.image_index, 0)
                    if number < int(job.input.get("partial_images", 0)):
                        sent[event.preview.image_index] = number + 1
                        name = f"{kind}.partial_image"
                        text = frame(name, {"type": name, **data, "partial_image_index": number})
                        async for part in in_threads(pictures.pieces(text)):
                            yield part
                elif event.terminal:
                    async for part in _completed(gateway, job, f"{kind}.completed"):
                        yield part
                    return
    except TimeoutError:
        try:
            await given_up(gateway, await gateway.waits.poll(job.id, 0))
        except CalotypeError as error:
            yield _error(localized(error, language))
        else:
            late = "The job was not finished within the time allowed for it."
            yield _error(DeadlineExceeded(late))
    except CalotypeError as error:
        yield _error(localized(error, language))


async def _check_patience(gateway: Gateway, job_id: str, began: float) -> None:
    """Raises DependencyUnavailable: the job waits for a part that is away, and has for long."""
    job, now = await gateway.waits.poll(job_id, 0), gateway.database.clock.time()
    waiting = waiting_error(job, now)
    patience = gateway.settings.outage_patience_seconds
    if waiting is not None and waited_out(job, began, now) > patience:
        raise waiting


async def _completed(gateway: Gateway, job: JobRecord, name: str) -> AsyncIterator[bytes]:
    """One event a picture; the whole usage is on the last one, the others have zeros."""
    images = await asyncio.to_thread(shown_images, gateway, job)
    whole, usage = described(job), usage_of(job)
    for place, image in enumerate(images):
        last = place == len(images) - 1
        pictures = StoredPictures(gateway.blobs)
        data: JsonObject = {
            "type": name,
            "b64_json": pictures.mark(image["blob_key"]),
            **_common(job),
            "image_index": image["index"],
            "seed": image["seed"],
            "flagged": image["flagged"],
            "usage": usage if last else _zeros(usage or {}),
            "job_id": job.id,
            "recipe_hash": job.recipe_hash,
        }
        for field in ("safety_identifier", "warnings", "moderation", "recipe_changes"):
            if last and field in whole:
                data[field] = whole[field]
        async for part in in_threads(pictures.pieces(frame(name, data))):
            yield part


def _common(job: JobRecord) -> JsonObject:
    return {
        "created_at": int(job.created),
        "size": job.input["size"],
        "quality": job.input["quality"],
        "background": "opaque",
        "output_format": job.input["output_format"],
    }


def _zeros(usage: JsonObject) -> JsonObject:
    return {k: _zeros(v) if isinstance(v, dict) else 0 for k, v in usage.items()}


def _error(error: CalotypeError) -> str:
    """The only form in which both of OpenAI's SDKs raise in the middle of a stream."""
    return frame("error", {"error": error_object(error)})
