"""POST /v1/images/generations as OpenAI's SDKs call it: create a job, wait, answer."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from calotype.serving.api.answers import images_response
from calotype.serving.api.attendance import ClientGone
from calotype.serving.api.auth import allowed
from calotype.serving.api.body import read_json
from calotype.serving.api.creation import Terms, create_or_join
from calotype.serving.api.gateway import gateway_of
from calotype.serving.api.schemas import GenerationBody, parse_generation
from calotype.serving.jobs.records import KeyRecord

router = APIRouter(tags=["OpenAI"])

CLIENT_CLOSED_REQUEST = 499
"""nginx' status for a client that hung up; nobody reads it but the access log."""


def json_body(schema: type[GenerationBody]) -> dict[str, object]:
    """OpenAPI's description of a body that `read_json` reads."""
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": schema.model_json_schema()}},
        }
    }


@router.post("/v1/images/generations", openapi_extra=json_body(GenerationBody))
async def generate(
    request: Request, key: Annotated[KeyRecord, Depends(allowed("images"))]
) -> Response:
    """Draws pictures and answers with them."""
    started = time.monotonic()
    gateway = gateway_of(request)
    settings = gateway.settings
    raw = await read_json(request, settings.max_body_bytes)
    body = parse_generation(raw)
    seconds = min(settings.request_timeout, body.deadline_seconds or settings.request_timeout)
    terms = Terms(seconds, settings.asset_seconds, body.metadata)
    job = await create_or_join(gateway, request, key, body, raw, terms)
    try:
        job = await gateway.attendance.attend(job.id, request, seconds)
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if not job.over:
        await gateway.attendance.time_out(job.id)
        job = await gateway.attendance.poll(job.id, 0)
    return await images_response(gateway, request, job, round(1000 * (time.monotonic() - started)))
