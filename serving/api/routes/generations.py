"""POST /v1/images/generations as OpenAI's SDKs call it: create a job, wait, answer."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from calotype.serving.api.generation.recipes import expand_recipe, recipe_images
from calotype.serving.api.generation.synchronous import answer
from calotype.serving.api.generation.uploads import input_seconds, read_images
from calotype.serving.api.http.auth import allowed
from calotype.serving.api.http.body import json_body, read_json
from calotype.serving.api.http.schemas import GenerationBody, parse_generation
from calotype.serving.api.state.gateway import gateway_of
from calotype.serving.jobs.records import KeyRecord

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/images/generations", openapi_extra=json_body(GenerationBody))
async def generate(
    request: Request, key: Annotated[KeyRecord, Depends(allowed("images"))]
) -> Response:
    """Draws pictures and answers with them, or streams them as they come."""
    gateway = gateway_of(request)
    started = time.monotonic()
    raw = await read_json(request, gateway.settings.max_body_bytes, gateway.settings.body_seconds)
    wanted, recipe = expand_recipe(raw)
    body = parse_generation(wanted, gateway.settings.features)
    images = await recipe_images(gateway, key.team_id, recipe)
    if images is None:
        images = await read_images(gateway, key.team_id, body, input_seconds(gateway))
    return await answer(request, key, body, raw, images=images, recipe=recipe, started=started)
