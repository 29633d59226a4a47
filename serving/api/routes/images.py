"""POST /v1/images/generations, /edits and /variations as OpenAI's SDKs call them.

Each makes a job, waits for it and answers. Edits and variations come as multipart or JSON.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from calotype.serving.api.generation.access import check_open
from calotype.serving.api.generation.estimating import estimate_of, priced, shape_of
from calotype.serving.api.generation.kept_images import keep_images, measure_images
from calotype.serving.api.generation.planning import plan_generation
from calotype.serving.api.generation.recipes import expand_recipe, recipe_images
from calotype.serving.api.generation.synchronous import PreparedRequest, answer
from calotype.serving.api.generation.uploads import (
    input_seconds,
    named_sources,
    sent_sources,
)
from calotype.serving.api.http.auth import allowed
from calotype.serving.api.http.body import json_body, read_json, room_for_body
from calotype.serving.api.http.multipart import FORM_COPIES, Form, is_multipart, read_form
from calotype.serving.api.http.schemas import (
    EditBody,
    GenerationBody,
    VariationBody,
    parse_generation,
)
from calotype.serving.api.state.gateway import gateway_of, request_id_of
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.json_object import JsonObject
from calotype.serving.jobs.records import KeyRecord

router = APIRouter(tags=["OpenAI"])

Caller = Annotated[KeyRecord, Depends(allowed("images"))]


def form_body(schema: type[EditBody]) -> dict[str, object]:
    """OpenAPI's description of a body that may be multipart or JSON."""
    described = schema.model_json_schema()
    parts = {
        "image": {
            "type": "array",
            "items": {"type": "string", "format": "binary"},
            "description": "png, jpeg, webp, avif, gif, bmp or tiff; also image[] and image[0].",
        },
        "mask": {"type": "string", "format": "binary", "description": "Transparent = draw anew."},
    }
    properties = {k: v for k, v in described["properties"].items() if k not in ("images", "mask")}
    multipart = described | {"properties": properties | parts, "required": ["image"]}
    return {
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {"schema": multipart},
                "application/json": {"schema": described},
            },
        }
    }


@router.post("/v1/images/generations", openapi_extra=json_body(GenerationBody))
async def generate(request: Request, key: Caller) -> Response:
    """Draws pictures and answers with them, or streams them as they come."""
    started = time.monotonic()
    return await answer(request, key, await _read_generation(request, key), started)


@router.post("/v1/images/edits", openapi_extra=form_body(EditBody))
async def edit(request: Request, key: Caller) -> Response:
    """Draws anew what a mask marks, or a new picture that looks at those that are sent."""
    started = time.monotonic()
    return await answer(request, key, await _read_edit(request, key, EditBody, "edits"), started)


@router.post("/v1/images/variations", openapi_extra=form_body(VariationBody))
async def vary(request: Request, key: Caller) -> Response:
    """Draws pictures that resemble the one that is sent."""
    started = time.monotonic()
    prepared = await _read_edit(request, key, VariationBody, "variations")
    return await answer(request, key, prepared, started)


@router.post("/v1/images/estimates", openapi_extra=json_body(GenerationBody))
async def estimate(request: Request, key: Caller) -> JsonObject:
    """What a generation with these parameters would cost; nothing is drawn or kept."""
    gateway = gateway_of(request)
    settings = gateway.settings
    async with room_for_body(request, key.team_id, settings.max_json_upload_bytes):
        raw = await read_json(request, settings.max_json_upload_bytes, settings.body_seconds)
        body = parse_generation(raw, settings.features)
        images, seen = await measure_images(gateway, key.team_id, body)
    team = await asyncio.to_thread(gateway.database.teams.get_team, key.team_id)
    check_open(gateway.catalog, team)
    plan = plan_generation(
        gateway.catalog, body, "estimate", request_id_of(request), settings.features, images, team
    )
    found = estimate_of(plan.request, shape_of(plan.model), seen)
    return await priced(gateway, plan.model, plan.request, found)


async def _read_generation(request: Request, key: KeyRecord) -> PreparedRequest:
    gateway = gateway_of(request)
    settings = gateway.settings
    async with room_for_body(request, key.team_id, settings.max_body_bytes):
        raw = await read_json(request, settings.max_body_bytes, settings.body_seconds)
        wanted, recipe = expand_recipe(raw)
        body = parse_generation(wanted, settings.features)
        images = await recipe_images(gateway, key.team_id, recipe, input_seconds(gateway))
        if images is None:
            sources = named_sources(gateway, key.team_id, body)
            images = await keep_images(gateway, key.team_id, body, sources, input_seconds(gateway))
        return PreparedRequest.of(body, raw, images, recipe)


async def _read_edit(
    request: Request, key: KeyRecord, schema: type[EditBody], feature: str
) -> PreparedRequest:
    settings = gateway_of(request).settings
    if not is_multipart(request):
        async with room_for_body(request, key.team_id, settings.max_json_upload_bytes):
            raw = await read_json(request, settings.max_json_upload_bytes, settings.body_seconds)
            return await _prepare_edit(request, key, schema, feature, raw, None)
    async with room_for_body(request, key.team_id, settings.max_upload_bytes, FORM_COPIES):
        form = await read_form(request, settings.max_upload_bytes, settings.body_seconds)
        return await _prepare_edit(request, key, schema, feature, form.fields, form)


async def _prepare_edit(
    request: Request,
    key: KeyRecord,
    schema: type[EditBody],
    feature: str,
    given: JsonObject,
    form: Form | None,
) -> PreparedRequest:
    gateway = gateway_of(request)
    wanted, recipe = expand_recipe(given)
    body = parse_generation(wanted, gateway.settings.features, schema, form=form is not None)
    _check_feature(gateway.settings.features, feature)
    images = await recipe_images(gateway, key.team_id, recipe, input_seconds(gateway))
    if images is None:
        if form is not None and form.files:
            sources = sent_sources(form)
        else:
            sources = named_sources(gateway, key.team_id, body)
        images = await keep_images(gateway, key.team_id, body, sources, input_seconds(gateway))
    raw = given if form is None else given | {"files": _digests(form)}
    return PreparedRequest.of(body, raw, images, recipe)


def _check_feature(features: frozenset[str], feature: str) -> None:
    if feature not in features:
        raise InvalidRequest(
            f"This service cannot make {feature} yet; it draws pictures from prompts "
            "(/v1/images/generations).",
            code="unsupported_value",
            param="image",
        )


def _digests(form: Form) -> list[list[str]]:
    """What tells two uploads apart without keeping them."""
    return [[file.name, hashlib.sha256(file.data).hexdigest()] for file in form.files]
