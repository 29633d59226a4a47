"""The synchronous routes: create or join a job, wait for it, answer."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import Response

from calotype.serving.api.generation.creation import Origin, Terms, create_or_join
from calotype.serving.api.generation.responses import images_response
from calotype.serving.api.generation.streaming import images_stream
from calotype.serving.api.generation.uploads import Images
from calotype.serving.api.http.schemas import GenerationBody
from calotype.serving.api.state.disconnects import ClientGone
from calotype.serving.api.state.gateway import gateway_of
from calotype.serving.core.json_object import JsonObject
from calotype.serving.jobs.records import KeyRecord

CLIENT_CLOSED_REQUEST = 499
"""nginx' status for a client that hung up; nobody reads it but the access log."""


async def answer(
    request: Request,
    key: KeyRecord,
    body: GenerationBody,
    raw: JsonObject,
    *,
    images: Images | None = None,
    recipe: JsonObject | None = None,
    started: float,
) -> Response:
    """Creates or joins the job of a synchronous request, waits and answers."""
    gateway = gateway_of(request)
    settings = gateway.settings
    seconds = min(settings.request_timeout, body.deadline_seconds or settings.request_timeout)
    terms = Terms(
        seconds,
        settings.asset_seconds,
        body.metadata,
        wanted_seconds=body.deadline_seconds,
        images=images,
        recipe=recipe,
    )
    job = await create_or_join(gateway, Origin.of(request, key), body, raw, terms)
    if body.stream:
        return await images_stream(gateway, request, job, seconds, started)
    try:
        job = await gateway.waits.wait_while_connected(job.id, request, seconds)
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if not job.over:
        await gateway.waits.time_out(job.id)
        job = await gateway.waits.poll(job.id, 0)
    return await images_response(gateway, request, job, round(1000 * (time.monotonic() - started)))
