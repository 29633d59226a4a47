"""/v1/jobs: the same jobs as on the OpenAI route, without having to hold a connection."""

from __future__ import annotations

import asyncio
import re
from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from calotype.serving.api.generation.creation import (
    Origin,
    Terms,
    create_or_join,
)
from calotype.serving.api.generation.kept_images import keep_images
from calotype.serving.api.generation.recipes import expand_recipe, recipe_images
from calotype.serving.api.generation.synchronous import PreparedRequest
from calotype.serving.api.generation.uploads import named_sources
from calotype.serving.api.http.auth import allowed
from calotype.serving.api.http.body import json_body, read_json, room_for_body
from calotype.serving.api.http.events import event_response, job_stream
from calotype.serving.api.http.job_object import JobObject, describe_job
from calotype.serving.api.http.pages import Page, list_object, page_size
from calotype.serving.api.http.schemas import (
    EditBody,
    GenerationBody,
    JobBody,
    VariationBody,
    parse,
    parse_generation,
)
from calotype.serving.api.http.signing import content_url
from calotype.serving.api.state.gateway import Gateway, gateway_of
from calotype.serving.core.errors import InvalidRequest, NotFound
from calotype.serving.jobs.events import parse_event_id
from calotype.serving.jobs.lifecycle import STATUSES
from calotype.serving.jobs.records import JobRecord, KeyRecord
from calotype.serving.webhooks.safe_http import check_url

router = APIRouter(tags=["jobs"])

Caller = Annotated[KeyRecord, Depends(allowed("jobs"))]

_PREFER_WAIT = re.compile(r"\bwait\s*=\s*(\d{1,5})\b")
_MAX_WAIT_SECONDS = 60
_MAX_FILTERS = 8
_SCHEMAS: dict[str, type[GenerationBody]] = {
    "image.generate": GenerationBody,
    "image.edit": EditBody,
    "image.variation": VariationBody,
}


@router.post("/v1/jobs", openapi_extra=json_body(JobBody))
async def create_job(request: Request, key: Caller) -> Response:
    """Makes a job; 202, or 200 when it is over within ``Prefer: wait=N``."""
    gateway = gateway_of(request)
    async with room_for_body(request, key.team_id, gateway.settings.max_body_bytes):
        prepared, terms = await _read_job(request, key)
    origin = Origin.of(request, key)
    job = await create_or_join(gateway, origin, prepared.body, prepared.digest, terms)
    wait = _PREFER_WAIT.search(request.headers.get("prefer", ""))
    if wait is not None and not job.over:
        job = await gateway.waits.poll(job.id, min(int(wait[1]), _MAX_WAIT_SECONDS))
    headers = {"location": f"{gateway.base_url(request)}/v1/jobs/{job.id}"}
    if not job.over:
        headers["retry-after"] = "1"
    if job.recipe_hash is not None:
        headers["x-recipe-hash"] = job.recipe_hash
    content = await with_estimate(gateway, request, job)
    return JSONResponse(content, status_code=200 if job.over else 202, headers=headers)


async def _read_job(request: Request, key: KeyRecord) -> tuple[PreparedRequest, Terms]:
    gateway = gateway_of(request)
    settings = gateway.settings
    raw = await read_json(request, settings.max_body_bytes, settings.body_seconds)
    body = parse(JobBody, raw)
    wanted = dict(body.input)
    if body.recipe is not None:
        wanted["recipe"] = body.recipe
    wanted, recipe = expand_recipe(wanted)
    schema = _SCHEMAS[body.type]
    wanted.setdefault("model", body.model)
    wanted.setdefault("priority", body.priority)
    generation = parse_generation(wanted, settings.features, schema)
    if generation.stream:
        raise InvalidRequest(
            "stream is for /v1/images; read the job's events instead.",
            code="unsupported_value",
            param="stream",
        )
    if body.webhook is not None:
        check_url(body.webhook.url, gateway.outbound, "webhook.url")
    kept = body.expires_after_seconds or settings.asset_seconds
    images = await recipe_images(gateway, key.team_id, recipe, kept)
    if images is None:
        sources = named_sources(gateway, key.team_id, generation)
        images = await keep_images(gateway, key.team_id, generation, sources, kept)
    asked = body.deadline_seconds or generation.deadline_seconds
    terms = Terms(
        deadline_seconds=asked or settings.job_deadline,
        wanted_seconds=asked,
        expires_seconds=kept,
        metadata=generation.metadata | body.metadata,
        webhook=None if body.webhook is None else body.webhook.model_dump(),
        images=images,
        recipe=recipe,
    )
    return PreparedRequest.of(generation, raw, images, recipe), terms


@router.get("/v1/jobs")
async def list_jobs(
    request: Request,
    key: Caller,
    limit: str = "20",
    after: str | None = None,
    status: str | None = None,
    created_after: str | None = None,
) -> Page[JobObject]:
    """The team's jobs, newest first; ``metadata[k]=v`` keeps those that carry it."""
    gateway = gateway_of(request)
    if status is not None and status not in STATUSES:
        raise InvalidRequest(f"status must be one of {', '.join(STATUSES)}.", param="status")
    if created_after is not None and not re.fullmatch(r"\d{1,12}(\.\d{1,9})?", created_after):
        raise InvalidRequest("created_after must be seconds since 1970.", param="created_after")
    count = page_size(limit)
    page = await asyncio.to_thread(
        lambda: gateway.database.jobs.list_jobs(
            key.team_id,
            limit=count + 1,  # one more than asked tells whether there is a next page
            after=after,
            status=status,
            created_after=None if created_after is None else float(created_after),
            metadata=_wanted_metadata(request),
        )
    )
    shown = [await with_estimate(gateway, request, job) for job in page[:count]]
    return list_object(shown, len(page) > count)


@router.get("/v1/jobs/{job_id}")
async def get_job(request: Request, job_id: str, key: Caller) -> JobObject:
    gateway = gateway_of(request)
    return await with_estimate(gateway, request, await _find(gateway, job_id, key))


@router.post("/v1/jobs/{job_id}/cancel")
async def cancel_job(request: Request, job_id: str, key: Caller) -> JobObject:
    """Ends the job if it is not over, and answers with it either way."""
    gateway = gateway_of(request)
    job = await _find(gateway, job_id, key)
    if not job.over:
        await gateway.waits.cancel(job_id)
        job = await _find(gateway, job_id, key)
    return await with_estimate(gateway, request, job)


@router.get("/v1/jobs/{job_id}/events")
async def stream_events(request: Request, job_id: str, key: Caller) -> Response:
    """What happens to the job, as server-sent events; goes on after ``Last-Event-ID``."""
    gateway = gateway_of(request)
    await _find(gateway, job_id, key)
    last = parse_event_id(request.headers.get("last-event-id"))
    parts = job_stream(
        gateway, request, job_id, last, lambda job: job_object(gateway, request, job)
    )
    return event_response(parts, {})


def _wanted_metadata(request: Request) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name.startswith("metadata[") and name.endswith("]"):
            found[name[len("metadata[") : -1]] = value
    if len(found) > _MAX_FILTERS:
        raise InvalidRequest(f"At most {_MAX_FILTERS} metadata filters.", param="metadata")
    return found


async def _find(gateway: Gateway, job_id: str, key: KeyRecord) -> JobRecord:
    job = await asyncio.to_thread(gateway.database.jobs.get_job, job_id, key.team_id)
    if job is None:
        raise NotFound(f"There is no job '{job_id[:80]}'.")
    if job.purged is not None:
        raise NotFound(f"The job '{job_id}' has expired.", code="expired")
    return job


async def with_estimate(gateway: Gateway, request: Request, job: JobRecord) -> JobObject:
    """`job_object` with what is known of the time to come."""
    estimates = await gateway.estimates.of_job(job)
    found = job_object(gateway, request, job)
    found["queue_position"] = estimates.queue_position
    if estimates.estimated_seconds is not None:
        found["estimated_seconds"] = round(estimates.estimated_seconds, 1)
    return found


def job_object(gateway: Gateway, request: Request, job: JobRecord) -> JobObject:
    """The job as clients see it; pictures are addresses."""
    base = gateway.base_url(request)
    language = request.headers.get("accept-language", "")
    return describe_job(job, base, lambda asset_id: content_url(gateway, base, asset_id), language)
