"""The synchronous routes: create or join a job, wait for it, answer."""

from __future__ import annotations

import time
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from calotype.serving.api.generation.creation import (
    Origin,
    Terms,
    body_digest,
    create_or_join,
)
from calotype.serving.api.generation.giving_up import given_up
from calotype.serving.api.generation.responses import images_response
from calotype.serving.api.generation.streaming import images_stream
from calotype.serving.api.generation.uploads import Images
from calotype.serving.api.http.schemas import GenerationBody
from calotype.serving.api.state.disconnects import ClientGone
from calotype.serving.api.state.gateway import gateway_of
from calotype.serving.core.json_object import JsonObject
from calotype.serving.jobs.records import KeyRecord

_SOURCES = ("images", "mask", "reference_images")
"""Fields of a body that may hold whole pictures."""
CLIENT_CLOSED_REQUEST = 499
"""nginx' status for a client that hung up; nobody reads it but the access log."""


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request of a synchronous route that was read, without the pictures that came with it.

    It is kept for as long as its client waits, so it must not hold what was sent.
    """

    body: GenerationBody
    digest: str
    """Of what was sent (`body_digest`)."""
    images: Images | None
    """Where its pictures are stored."""
    recipe: JsonObject | None

    @classmethod
    def of(
        cls, body: GenerationBody, raw: JsonObject, images: Images | None, recipe: JsonObject | None
    ) -> PreparedRequest:
        sources = {name: None for name in _SOURCES if getattr(body, name, None)}
        return cls(body.model_copy(update=sources), body_digest(raw), images, recipe)


async def answer(
    request: Request, key: KeyRecord, prepared: PreparedRequest, started: float
) -> Response:
    """Creates or joins the job of a synchronous request, waits and answers."""
    gateway = gateway_of(request)
    settings = gateway.settings
    body = prepared.body
    seconds = min(settings.request_timeout, body.deadline_seconds or settings.request_timeout)
    # Without a deadline of the client's own a job may wait for a part that is away, also when the
    # client has given up: a repetition of the request finds it.
    waits = 0.0 if body.deadline_seconds else settings.max_outage_seconds
    terms = Terms(
        seconds + waits,
        settings.asset_seconds,
        body.metadata,
        wanted_seconds=body.deadline_seconds,
        images=prepared.images,
        recipe=prepared.recipe,
    )
    job = await create_or_join(gateway, Origin.of(request, key), body, prepared.digest, terms)
    if body.stream:
        return await images_stream(gateway, request, job, seconds, started)
    try:
        job = await gateway.waits.wait_while_connected(job.id, request, seconds)
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if not job.over:
        job = await given_up(gateway, job)
    return await images_response(gateway, request, job, round(1000 * (time.monotonic() - started)))
