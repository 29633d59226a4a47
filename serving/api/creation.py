"""From a checked request to a durable job: made once, or joined when it is a repetition."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from calotype.serving import metrics
from calotype.serving.api.gateway import Gateway, request_id_of
from calotype.serving.api.planning import plan_generation
from calotype.serving.api.schemas import GenerationBody
from calotype.serving.errors import (
    CalotypeError,
    Conflict,
    InvalidRequest,
    error_from_payload,
)
from calotype.serving.jobs.records import JobRecord, KeyRecord, NewJob, new_id

log = logging.getLogger(__name__)

_KEY_SECONDS = 24 * 3600.0
_RETRY_SECONDS = 600.0
_MAX_KEY_CHARS = 255


@dataclass(frozen=True, slots=True)
class Terms:
    """How long a job may take and what it carries; differs between the routes."""

    deadline_seconds: float
    expires_seconds: float
    metadata: dict[str, str]


async def create_or_join(
    gateway: Gateway,
    request: Request,
    key: KeyRecord,
    body: GenerationBody,
    raw: Mapping[str, Any],
    terms: Terms,
) -> JobRecord:
    """The job of this request, submitted to the backend.

    Raises:
        InvalidRequest, NotFound: see `plan_generation`.
        Conflict: the Idempotency-Key was used for another body.
        StorageFailed: the job could not be recorded, so there is none.
        Overloaded: the queue is full; the job has failed.
    """
    job_id = new_id("job")
    plan = plan_generation(gateway.catalog, body, job_id, request_id_of(request))
    digest = hashlib.sha256(json.dumps(raw, sort_keys=True).encode("utf-8")).hexdigest()
    idempotency = _idempotency(request, key)
    joined = await asyncio.to_thread(_find, gateway, request, key, digest, idempotency)
    if joined is not None:
        return joined
    now = gateway.store.clock.time()
    new = NewJob(
        id=job_id,
        team_id=key.team_id,
        api_key_id=key.id,
        model=plan.model.name,
        input=plan.input,
        request=plan.request.to_payload(),
        metadata=terms.metadata,
        priority=plan.request.priority,
        deadline=now + terms.deadline_seconds,
        expires=now + terms.expires_seconds,
        body_sha256=digest,
        idempotency=idempotency,
    )
    job = await asyncio.to_thread(gateway.store.create_job, new)
    if job.id != job_id:  # another request with the same Idempotency-Key was a moment earlier
        return _same_body(job, digest)
    await _submit(gateway, job_id)
    return job


async def _submit(gateway: Gateway, job_id: str) -> None:
    try:
        await gateway.backend.submit(job_id)
    except CalotypeError as error:
        if error.code == "queue_full":
            raise
        # The row is there: the dispatcher finds it when it is back.
        log.warning("job %s waits in the store, the backend cannot be told: %s", job_id, error)
    except OSError as error:
        log.warning("job %s waits in the store, the backend cannot be told: %s", job_id, error)


def _idempotency(request: Request, key: KeyRecord) -> str | None:
    given = request.headers.get("idempotency-key")
    if given is None:
        return None
    if not given or len(given) > _MAX_KEY_CHARS:
        raise InvalidRequest(
            f"Idempotency-Key must have 1 to {_MAX_KEY_CHARS} characters.",
            param="Idempotency-Key",
        )
    scope = json.dumps([key.id, request.url.path, given])
    return hashlib.sha256(scope.encode("utf-8", "surrogatepass")).hexdigest()


def _find(
    gateway: Gateway, request: Request, key: KeyRecord, digest: str, idempotency: str | None
) -> JobRecord | None:
    store, now = gateway.store, gateway.store.clock.time()
    if idempotency is not None:
        first = store.find_idempotent(idempotency)
        if first is None:
            return None
        if now - first.created > _KEY_SECONDS or _worth_repeating(first):
            store.forget_idempotency(first.id)
            return None
        metrics.ATTACHED.labels("key").inc()
        return _same_body(first, digest)
    retried = request.headers.get("x-stainless-retry-count", "0")
    if not gateway.settings.attach_retries or retried == "0":
        return None
    first = store.find_same_body(key.id, digest, now - _RETRY_SECONDS)
    if first is None or first.status in ("failed", "canceled"):
        return None
    metrics.ATTACHED.labels("sdk_retry").inc()
    return first


def _worth_repeating(job: JobRecord) -> bool:
    """A job that ended through no fault of its own may be made again under its key."""
    if job.status == "canceled":
        return True
    return job.status == "failed" and error_from_payload(job.error or {}).retryable


def _same_body(job: JobRecord, digest: str) -> JobRecord:
    if job.body_sha256 != digest:
        raise Conflict(
            "This Idempotency-Key was used for a request with another body; use a new key.",
            param="Idempotency-Key",
        )
    return job
