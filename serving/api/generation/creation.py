"""From a checked request to a durable job: made once, or joined when it is a repetition."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import logging
from dataclasses import dataclass, field

from starlette.requests import Request

from calotype.serving.api.generation.access import check_open, scope_for
from calotype.serving.api.generation.fallback import find_fallback
from calotype.serving.api.generation.giving_up import refuse_in_vain
from calotype.serving.api.generation.origins import note_origins
from calotype.serving.api.generation.planning import PlannedGeneration, plan_generation
from calotype.serving.api.generation.uploads import Images
from calotype.serving.api.http.schemas import GenerationBody
from calotype.serving.api.state.eta import check_deadline, promised_by
from calotype.serving.api.state.gateway import Gateway, request_id_of
from calotype.serving.core.errors import (
    CalotypeError,
    Conflict,
    InvalidRequest,
    NotFound,
    Overloaded,
    QuotaExceeded,
    error_from_payload,
)
from calotype.serving.core.json_object import JsonObject
from calotype.serving.database.accounts.queue_shares import QueueBound
from calotype.serving.database.accounts.quotas import RateState, rate_state
from calotype.serving.jobs.predictor import Work
from calotype.serving.jobs.recipe import changes, recipe_hash
from calotype.serving.jobs.records import JobRecord, KeyRecord, NewJob, TeamRecord, new_id
from calotype.serving.observability import metrics, tracing

log = logging.getLogger(__name__)

_KEY_SECONDS = 24 * 3600.0
_RETRY_SECONDS = 600.0
_MAX_KEY_CHARS = 255
_MAX_LANGUAGE_CHARS = 200
_LONGEST_PAUSE = 60.0
"""Seconds after which a client that finds the queue full is told to come back, at most."""


@dataclass(frozen=True, slots=True)
class Terms:
    """How long a job may take and what it carries; differs between the routes."""

    deadline_seconds: float
    expires_seconds: float
    metadata: dict[str, str]
    wanted_seconds: float | None = None
    """The deadline that the client itself set: refused when it cannot be met."""
    webhook: JsonObject | None = None
    images: Images | None = None
    recipe: JsonObject | None = None
    """What is asked to be drawn again."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a request for a job comes from."""

    key: KeyRecord
    request_id: str
    idempotency: str | None = None
    """Hash of key, route and Idempotency-Key."""
    retried: bool = False
    """An SDK says that it sends the request again."""
    language: str = ""
    """The request's ``Accept-Language``."""
    batch_id: str | None = None
    rates: list[RateState] = field(default_factory=list)
    """Filled with the state of the team's rate limit, if it has one."""

    @classmethod
    def of(cls, request: Request, key: KeyRecord) -> Origin:
        """Raises InvalidRequest when the Idempotency-Key is too long."""
        origin = cls(
            key,
            request_id_of(request),
            _idempotency(request, key),
            request.headers.get("x-stainless-retry-count", "0") != "0",
            request.headers.get("accept-language", "")[:_MAX_LANGUAGE_CHARS],
        )
        request.state.rates = origin.rates
        return origin


async def create_or_join(
    gateway: Gateway,
    origin: Origin,
    body: GenerationBody,
    digest: str,
    terms: Terms,
) -> JobRecord:
    """The job of this request, submitted to the backend.

    Args:
        digest: of what was sent (`body_digest`); equal requests are told by it.

    Raises:
        InvalidRequest, NotFound: see `plan_generation`.
        PermissionDenied: the team may not draw, or not with this model.
        Conflict: the Idempotency-Key was used for another body.
        QuotaExceeded: a limit of the team is reached.
        StorageFailed: the job could not be recorded, so there is none.
        Overloaded: the queue is full, the deadline cannot be met, or the model is away for longer.
    """
    job_id, key = new_id("job"), origin.key
    team, joined = await asyncio.to_thread(_look_up, gateway, origin, digest)
    check_open(gateway.catalog, team)
    try:
        plan = _planned(gateway, body, job_id, origin, terms, team)
    except NotFound:
        if not await gateway.refresh():
            raise
        plan = _planned(gateway, body, job_id, origin, terms, team)
    if joined is not None:
        return joined
    if terms.recipe is None:  # what is drawn again is drawn by the same model
        plan = await _plan_with_fallback(gateway, plan, body, origin, terms, team)
    if terms.wanted_seconds is not None:
        await refuse_in_vain(gateway, plan.model.name, terms.wanted_seconds)
    now = gateway.database.clock.time()
    request = plan.request.to_payload()
    forecast = await gateway.estimates.forecast(plan.model.name)
    work = Work.from_request(request)
    estimate = gateway.estimates.estimate(forecast, work)
    try:
        check_deadline(estimate, terms.wanted_seconds)
        details: JsonObject = {"traceparent": tracing.traceparent()}
        if origin.language:
            details["language"] = origin.language
        if team is not None and team.prompt_in_files:
            details["prompt_in_files"] = True
        used = plan.request.adapter_names
        scope = scope_for(gateway.catalog, plan.model.name, used, team, plan.requested_level)
        if scope is not None:
            details["scope"] = scope
        if terms.recipe is not None:
            details["recipe_changes"] = changes(terms.recipe, plan.recipe)
        new = NewJob(
            id=job_id,
            team_id=key.team_id,
            api_key_id=key.id,
            type=f"image.{plan.recipe['operation']}",
            model=plan.model.name,
            input=plan.input | details,
            request=request,
            metadata=terms.metadata,
            priority=plan.request.priority,
            deadline=now + terms.deadline_seconds,
            expires=now + terms.expires_seconds,
            body_sha256=digest,
            idempotency=origin.idempotency,
            recipe=plan.recipe,
            recipe_hash=recipe_hash(plan.recipe),
            reserved_seconds=forecast.device_seconds(work) if forecast.measured else 0.0,
            price=gateway.settings.gpu_second_price,
            promised=promised_by(now, estimate),
            webhook=terms.webhook,
            batch_id=origin.batch_id,
        )
        pause = max(1.0, forecast.backlog_seconds / 10) if estimate is not None else 10.0
        bound = QueueBound(gateway.settings.max_queue, min(_LONGEST_PAUSE, pause))
        if used:
            await asyncio.to_thread(note_origins, gateway, plan.model.name, used)
        job, rate = await asyncio.to_thread(gateway.database.jobs.admit_job, new, bound)
    except (QuotaExceeded, Overloaded) as error:
        metrics.LIMITED.labels(error.code).inc()
        state = None if team is None else rate_state(team, now)
        origin.rates.extend([] if state is None else [state])
        raise
    if rate is not None:
        origin.rates.append(rate)
    if job.id != job_id:  # another request with the same Idempotency-Key was a moment earlier
        return _same_body(job, digest)
    await _submit(gateway, job_id)
    return job


def body_digest(raw: JsonObject) -> str:
    """What tells two requests apart without keeping them."""
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode("utf-8")).hexdigest()


def _planned(
    gateway: Gateway,
    body: GenerationBody,
    job_id: str,
    origin: Origin,
    terms: Terms,
    team: TeamRecord | None,
) -> PlannedGeneration:
    return plan_generation(
        gateway.catalog,
        body,
        job_id,
        origin.request_id,
        gateway.settings.features,
        terms.images,
        team,
    )


async def _plan_with_fallback(
    gateway: Gateway,
    plan: PlannedGeneration,
    body: GenerationBody,
    origin: Origin,
    terms: Terms,
    team: TeamRecord | None,
) -> PlannedGeneration:
    """The plan, or the one for its model's fallback when that shall and can draw it."""
    fallback = await find_fallback(gateway, plan.model, team)
    if fallback is None:
        return plan
    try:
        same = body.model_copy(update={"model": fallback.model.name})
        other = _planned(gateway, same, plan.request.id, origin, terms, team)
    except CalotypeError as error:  # it lacks an adapter or cannot draw that large: wait, then
        log.info("%s: %s cannot draw instead: %s", plan.request.id, fallback.model.name, error)
        return plan
    warnings = [*other.input.get("warnings", []), fallback.warning]
    return dataclasses.replace(other, input=other.input | {"warnings": warnings})


async def _submit(gateway: Gateway, job_id: str) -> None:
    try:
        await gateway.backend.submit(job_id)
    except (CalotypeError, OSError) as error:
        # The row is there: the dispatcher finds it when it is back.
        log.warning("job %s waits in the database, the backend cannot be told: %s", job_id, error)


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


def _look_up(
    gateway: Gateway, origin: Origin, digest: str
) -> tuple[TeamRecord | None, JobRecord | None]:
    """The team that asks, and the job that it repeats, if it does."""
    return gateway.database.teams.get_team(origin.key.team_id), _find(gateway, origin, digest)


def _find(gateway: Gateway, origin: Origin, digest: str) -> JobRecord | None:
    database, now = gateway.database, gateway.database.clock.time()
    if origin.idempotency is not None:
        first = database.jobs.find_idempotent(origin.idempotency)
        if first is None:
            return None
        if now - first.created > _KEY_SECONDS or _worth_repeating(first):
            database.jobs.forget_idempotency(first.id)
            return None
        metrics.ATTACHED.labels("key").inc()
        return _same_body(first, digest)
    if not gateway.settings.attach_retries or not origin.retried:
        return None
    first = database.jobs.find_same_body(origin.key.id, digest, now - _RETRY_SECONDS)
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
