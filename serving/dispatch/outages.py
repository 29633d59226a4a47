"""Jobs that wait because a part which they need is away: given back, postponed, or given up."""

from __future__ import annotations

import logging

from calotype.serving.core.errors import CalotypeError, StorageFailed
from calotype.serving.core.protocols import Clock
from calotype.serving.database.jobs import Jobs
from calotype.serving.dispatch.open_jobs import OpenJobs
from calotype.serving.dispatch.outcomes import Outcomes
from calotype.serving.dispatch.retrying import RetryingCalls
from calotype.serving.jobs.outage import Outage, next_outage, outage_error
from calotype.serving.jobs.records import JobRecord

log = logging.getLogger(__name__)

_UNRECORDED_PAUSE = 5.0
"""Pause of a job whose outage the database could not be told."""


class Outages:
    """Of one dispatcher.

    Args:
        longest: seconds for which a job waits for one part; may be changed.
    """

    def __init__(
        self,
        jobs: Jobs,
        call: RetryingCalls,
        outcomes: Outcomes,
        open_jobs: OpenJobs,
        clock: Clock,
        longest: float,
    ) -> None:
        self._jobs, self._call, self._outcomes = jobs, call, outcomes
        self._open, self._clock, self.longest = open_jobs, clock, longest

    async def give_back(self, job_id: str, fence: int, error: CalotypeError) -> JobRecord | None:
        """Takes a lease back for a passing fault.

        Returns:
            The job, which is queued again; None when the lease was lost or the job is over now.

        Raises:
            StorageFailed: nothing was changed.
        """
        job = await self._call(self._jobs.get_job, job_id)
        if job is None or job.over or job.fence != fence:
            return None
        now = self._clock.time()
        outage = next_outage(job, error, now, self.longest, leased=True)
        if outage is None:
            await self._outcomes.failed(job_id, outage_error(job, error, now), fence=fence)
            return None
        log.warning("job %s waits for %s: %s", job_id, outage.part, error)
        return await self._call(self._jobs.requeue_job, job_id, fence, False, outage)

    async def postpone(self, job: JobRecord, error: CalotypeError) -> None:
        """Has a queued job wait for a part that was away when it was prepared."""
        now = self._clock.time()
        try:
            fresh = await self._call(self._jobs.get_job, job.id)
            if fresh is None or fresh.over:
                self._outcomes.forget(job.id)
                return
            outage = next_outage(fresh, error, now, self.longest, leased=False)
            if outage is None:
                await self._outcomes.failed(job.id, outage_error(fresh, error, now))
                return
            await self._call(self._jobs.postpone_job, job.id, outage)
            retry_at = outage.retry_at
        except StorageFailed as fault:
            log.warning("job %s waits for the job database: %s", job.id, fault)
            retry_at = now + _UNRECORDED_PAUSE
        self._wait(job.id, retry_at)

    def waits(self, job: JobRecord) -> bool:
        """Whether it is too early for a queued job; it is among the `due` ones later."""
        outage = Outage.of(job)
        if outage is None or outage.retry_at <= self._clock.time():
            return False
        self._wait(job.id, outage.retry_at)
        return True

    def due(self) -> list[str]:
        """The jobs that may be tried again; they are postponed until they are."""
        now = self._clock.time()
        return [job_id for job_id, at in self._open.postponed.items() if at <= now]

    def _wait(self, job_id: str, until: float) -> None:
        if job_id in self._open:
            self._open.postponed[job_id] = until
