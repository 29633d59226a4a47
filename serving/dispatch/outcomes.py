"""How jobs end: one compare-and-set in the database, after which the dispatcher forgets the job."""

from __future__ import annotations

import logging
from dataclasses import replace

from calotype.serving.core.errors import CalotypeError, Conflict
from calotype.serving.database.jobs import Jobs
from calotype.serving.dispatch.estimator import Estimator
from calotype.serving.dispatch.open_jobs import OpenJobs
from calotype.serving.dispatch.retrying import RetryingCalls
from calotype.serving.jobs.endings import (
    Ending,
    blocked_ending,
    drawn_ending,
    poison_ending,
)
from calotype.serving.jobs.moderation_record import ModerationRecord
from calotype.serving.jobs.records import JobRecord
from calotype.serving.jobs.result import GenerationResult

log = logging.getLogger(__name__)


class Outcomes:
    """Ends the jobs of one dispatcher. Every method raises StorageFailed."""

    def __init__(
        self, jobs: Jobs, call: RetryingCalls, open_jobs: OpenJobs, estimator: Estimator
    ) -> None:
        self._jobs, self._call = jobs, call
        self._open, self._estimator = open_jobs, estimator

    async def end(self, job_id: str, ending: Ending) -> bool:
        """Whether the job was ended so: False when it was over, or the ending's lease was lost."""
        job = await self._call(self._jobs.finish_job, job_id, ending)
        if job is not None or ending.fence is None:
            self.forget(job_id)
        else:
            self._open.leases.remove(job_id, ending.fence)
        return job is not None

    async def drawn(self, job_id: str, fence: int, result: GenerationResult) -> bool | None:
        """Ends a drawn job; False when the lease was lost, True again on a repeated call.

        None where something was taken down since its images were checked: it must be drawn again.
        """
        job = await self._call(self._jobs.get_job, job_id)
        if job is None:
            return False
        ending = drawn_ending(job, result) if result.images else blocked_ending(job, result)
        lease = self._open.leases.get(job_id, fence)
        try:
            ended = await self.end(job_id, replace(ending, fence=fence))
        except Conflict as error:
            log.info("job %s is drawn again: %s", job_id, error.message)
            return None
        if not ended:
            job = await self._call(self._jobs.get_job, job_id)
            return job is not None and job.status == "succeeded" and job.fence == fence
        self._estimator.ended(job, lease, result.metrics.drawing_seconds)
        return True

    async def failed(
        self,
        job_id: str,
        error: CalotypeError,
        *,
        fence: int | None = None,
        moderation: ModerationRecord | None = None,
    ) -> bool:
        return await self.end(job_id, Ending("failed", fence, error=error, moderation=moderation))

    async def given_up(self, job: JobRecord, fence: int | None = None) -> bool:
        """Too many generators died over it."""
        return await self.end(job.id, replace(poison_ending(job), fence=fence))

    def forget(self, job_id: str) -> None:
        """The job is over, whoever ended it."""
        self._open.end(job_id)
        if not len(self._open):
            self._estimator.throughput.stopped()
