"""What becomes of a job whose client has waited as long as it may."""

from __future__ import annotations

import logging

from calotype.serving.api.state.gateway import Gateway
from calotype.serving.core.errors import CalotypeError, DependencyUnavailable, Overloaded
from calotype.serving.core.protocols import ModelStatus
from calotype.serving.jobs.outage import waiting_error
from calotype.serving.jobs.records import JobRecord

log = logging.getLogger(__name__)


async def given_up(gateway: Gateway, job: JobRecord) -> JobRecord:
    """The job, which is over now: it was too slow for its client.

    Raises:
        DependencyUnavailable: it waits itself, for a part or a model that is away. It goes on, and
            the same request sent again finds it.
    """
    now = gateway.database.clock.time()
    if job.deadline is None or job.deadline > now:
        waiting = waiting_error(job, now) or await _model_away(gateway, job)
        if waiting is not None:
            raise waiting
    await gateway.waits.time_out(job.id)
    return await gateway.waits.poll(job.id, 0)


async def refuse_in_vain(gateway: Gateway, model: str, seconds: float) -> None:
    """Tells a client at once that the model will be away for longer than it wants to wait.

    Raises:
        Overloaded: with the estimate.
    """
    status = await _status(gateway, model)
    away = None if status is None else status.away_seconds
    if away is None or away <= seconds:
        return
    raise Overloaded(
        f"The model {model} is expected back in about {away:.0f} s, and deadline_seconds is "
        f"{seconds:g}. Allow that much, try again later, or make a job without a deadline.",
        retry_after=away,
        details={"estimated_seconds": round(away, 1)},
    )


async def _model_away(gateway: Gateway, job: JobRecord) -> DependencyUnavailable | None:
    if job.status != "queued":
        return None
    found = await _status(gateway, job.model)
    if found is not None and found.ready:
        return None
    away = None if found is None else found.away_seconds
    return DependencyUnavailable(
        f"The model {job.model} is not ready. The job {job.id} waits for it. Send the same request "
        f"again to wait, too, or ask for the job by GET /v1/jobs/{job.id}.",
        code="model_not_ready",
        retry_after=away or 15,
        details={"reason": "model_unavailable", "job_id": job.id},
    )


async def _status(gateway: Gateway, model: str) -> ModelStatus | None:
    """None = nobody says how it is."""
    try:
        statuses = await gateway.backend.status()
    except (CalotypeError, OSError) as error:
        log.warning("nobody says how the model %s is: %s", model, error)
        return None
    return next((status for status in statuses if status.name == model), None)
