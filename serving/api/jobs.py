"""/v1/jobs: the same jobs as on the OpenAI route, without having to hold a connection."""

from __future__ import annotations

import asyncio
import re
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from calotype.serving.api.auth import allowed
from calotype.serving.api.body import read_json
from calotype.serving.api.creation import Terms, create_or_join
from calotype.serving.api.failures import error_object
from calotype.serving.api.gateway import Gateway, gateway_of
from calotype.serving.api.schemas import JobBody, parse, parse_generation
from calotype.serving.api.signing import content_url
from calotype.serving.errors import InvalidRequest, NotFound, error_from_payload
from calotype.serving.jobs.lifecycle import STATUSES
from calotype.serving.jobs.records import JobRecord, KeyRecord

router = APIRouter(tags=["jobs"])

Caller = Annotated[KeyRecord, Depends(allowed("jobs"))]

_PREFER_WAIT = re.compile(r"\bwait\s*=\s*(\d{1,5})\b")
_MAX_WAIT_SECONDS = 60
_MAX_PAGE = 100


@router.post("/v1/jobs")
async def create_job(request: Request, key: Caller) -> Response:
    """Makes a job; 202, or 200 when it is over within ``Prefer: wait=N``."""
    gateway = gateway_of(request)
    settings = gateway.settings
    raw = await read_json(request, settings.max_body_bytes)
    body = parse(JobBody, raw)
    if body.webhook is not None:
        raise InvalidRequest(
            "webhook is not supported by this service yet; poll the job instead.",
            code="unsupported_value",
            param="webhook",
        )
    wanted = dict(body.input)
    wanted.setdefault("model", body.model)
    wanted.setdefault("priority", body.priority)
    generation = parse_generation(wanted)
    terms = Terms(
        deadline_seconds=body.deadline_seconds
        or generation.deadline_seconds
        or settings.job_deadline,
        expires_seconds=body.expires_after_seconds or settings.asset_seconds,
        metadata=generation.metadata | body.metadata,
    )
    job = await create_or_join(gateway, request, key, generation, raw, terms)
    wait = _PREFER_WAIT.search(request.headers.get("prefer", ""))
    if wait is not None and not job.over:
        job = await gateway.attendance.poll(job.id, min(int(wait[1]), _MAX_WAIT_SECONDS))
    headers = {"location": f"{gateway.base_url(request)}/v1/jobs/{job.id}"}
    if not job.over:
        headers["retry-after"] = "1"
    content = job_object(gateway, request, job)
    return JSONResponse(content, status_code=200 if job.over else 202, headers=headers)


@router.get("/v1/jobs")
async def list_jobs(
    request: Request,
    key: Caller,
    limit: str = "20",
    after: str | None = None,
    status: str | None = None,
    created_after: str | None = None,
) -> dict[str, Any]:
    """The team's jobs, newest first."""
    gateway = gateway_of(request)
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:6]) <= _MAX_PAGE):
        raise InvalidRequest(f"limit must be 1 to {_MAX_PAGE}.", param="limit")
    if status is not None and status not in STATUSES:
        raise InvalidRequest(f"status must be one of {', '.join(STATUSES)}.", param="status")
    if created_after is not None and not re.fullmatch(r"\d{1,12}(\.\d{1,9})?", created_after):
        raise InvalidRequest("created_after must be seconds since 1970.", param="created_after")
    page = await asyncio.to_thread(
        lambda: gateway.store.list_jobs(
            key.team_id,
            limit=int(limit) + 1,  # one more than asked tells whether there is a next page
            after=after,
            status=status,
            created_after=None if created_after is None else float(created_after),
        )
    )
    shown = page[: int(limit)]
    return {
        "object": "list",
        "data": [job_object(gateway, request, job) for job in shown],
        "has_more": len(page) > len(shown),
        "first_id": shown[0].id if shown else None,
        "last_id": shown[-1].id if shown else None,
    }


@router.get("/v1/jobs/{job_id}")
async def get_job(request: Request, job_id: str, key: Caller) -> dict[str, Any]:
    gateway = gateway_of(request)
    return job_object(gateway, request, await _find(gateway, job_id, key))


@router.post("/v1/jobs/{job_id}/cancel")
async def cancel_job(request: Request, job_id: str, key: Caller) -> dict[str, Any]:
    """Ends the job if it is not over, and answers with it either way."""
    gateway = gateway_of(request)
    job = await _find(gateway, job_id, key)
    if not job.over:
        await gateway.attendance.cancel(job_id)
        job = await _find(gateway, job_id, key)
    return job_object(gateway, request, job)


async def _find(gateway: Gateway, job_id: str, key: KeyRecord) -> JobRecord:
    job = await asyncio.to_thread(gateway.store.get_job, job_id, key.team_id)
    if job is None:
        raise NotFound(f"There is no job '{job_id[:80]}'.")
    return job


def job_object(gateway: Gateway, request: Request, job: JobRecord) -> dict[str, Any]:
    """The job as clients see it; pictures are addresses."""
    here = f"{gateway.base_url(request)}/v1/jobs/{job.id}"
    return {
        "id": job.id,
        "object": "image.job",
        "type": job.type,
        "model": job.model,
        "status": job.status,
        "progress": job.progress,
        "created_at": int(job.created),
        "started_at": _seconds(job.started),
        "completed_at": _seconds(job.completed),
        "expires_at": _seconds(job.expires),
        "input": job.input,
        "output": _output(gateway, request, job),
        "error": error_object(error_from_payload(job.error)) if job.error else None,
        "moderation": _moderation(job),
        "usage": job.usage,
        "metrics": job.metrics,
        "metadata": job.metadata,
        "urls": {"get": here, "cancel": f"{here}/cancel"},
    }


def _output(gateway: Gateway, request: Request, job: JobRecord) -> dict[str, Any] | None:
    if job.output is None:
        return None
    return {
        "images": [
            {
                "asset_id": image["asset_id"],
                "url": content_url(gateway, request, image["asset_id"]),
                "index": image["index"],
                "seed": image["seed"],
                "width": image["width"],
                "height": image["height"],
                "content_type": image["content_type"],
                "sha256": image["sha256"],
                "flagged": image["flagged"],
            }
            for image in job.output["images"]
        ]
    }


def _moderation(job: JobRecord) -> dict[str, Any] | None:
    """What was decided, without scores: those would teach how to get around the policy."""
    if job.moderation is None:
        return None
    stages = {"input": [job.moderation.get("input")], "output": job.moderation.get("output") or []}
    return {
        stage: [
            {
                "decision_id": decision.get("id"),
                "policy": decision.get("policy"),
                "verdict": decision.get("verdict"),
                "categories": decision.get("categories", []),
            }
            for decision in decisions
            if decision
        ]
        for stage, decisions in stages.items()
    }


def _seconds(moment: float | None) -> int | None:
    return None if moment is None else int(moment)
