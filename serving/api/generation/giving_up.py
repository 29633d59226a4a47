"""What becomes of a job whose client has waited as long as it may."""

from __future__ import annotations

import logging

from calotype.serving.api.state.gateway import Gateway
from calotype.serving.core.errors import CalotypeError, DependencyUnavailable
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


async def _model_away(gateway: Gateway, job: JobRecord) -> DependencyUnavailable | None:
    if job.status != "queued":
        return None
    statuses: list[ModelStatus] = []
    try:
        statuses = await gateway.backend.status()
    except (CalotypeError, OSError) as error:
        log.warning("nobody says how the model of job %s is: %s", job.id, error)
    if any(status.name == job.model and status.ready for status in statuses):
        return None
    return DependencyUnavailable(
        f"The model {job.model} is not ready. The job {job.id} waits for it. Send the same request "
        f"again to wait, too, or ask for the job by GET /v1/jobs/{job.id}.",
        code="model_not_ready",
        retry_after=15,
        details={"reason": "model_unavailable", "job_id": job.id},
    )
