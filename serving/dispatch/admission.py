"""From a queued row to a place in the queue: deadlines, outages and the prompt's check."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from calotype.serving.core.errors import EngineError, ModerationUnavailable, StorageFailed
from calotype.serving.core.protocols import Clock
from calotype.serving.database.database import Database
from calotype.serving.dispatch.background_tasks import BackgroundTasks
from calotype.serving.dispatch.estimator import Estimator
from calotype.serving.dispatch.fair_queue import QueuedJob
from calotype.serving.dispatch.open_jobs import OpenJobs
from calotype.serving.dispatch.outages import Outages
from calotype.serving.dispatch.outcomes import Outcomes
from calotype.serving.dispatch.prompt_checks import PromptChecks
from calotype.serving.dispatch.retrying import RetryingCalls
from calotype.serving.jobs.endings import late_ending
from calotype.serving.jobs.outage import Outage
from calotype.serving.jobs.records import JobRecord
from calotype.serving.observability.repeated_faults import RepeatedFaults

log = logging.getLogger(__name__)


class Admission:
    """Of one dispatcher.

    Args:
        max_fences: see `DispatchPolicy`.
        queued: called when a job came into the queue.
    """

    def __init__(
        self,
        database: Database,
        call: RetryingCalls,
        clock: Clock,
        open_jobs: OpenJobs,
        outcomes: Outcomes,
        outages: Outages,
        checks: PromptChecks,
        estimator: Estimator,
        *,
        max_fences: int,
        queued: Callable[[], None],
    ) -> None:
        self._database, self._call, self._clock = database, call, clock
        self._open, self._outcomes, self._outages = open_jobs, outcomes, outages
        self._checks, self._estimator = checks, estimator
        self._max_fences, self._queued = max_fences, queued
        self._tasks = BackgroundTasks()
        self._weighed: set[str] = set()  # teams whose weight the queue knows
        self._faulty = RepeatedFaults("job")

    async def stop(self) -> None:
        await self._tasks.stop()

    async def admit(self, job: JobRecord) -> None:
        """Has a queued job checked and queued, or ends it. Raises StorageFailed."""
        await self.remember(job)
        if job.deadline is not None and job.deadline <= self._clock.time():
            await self._outcomes.end(job.id, late_ending())
        elif _fences(job) >= self._max_fences:
            await self._outcomes.given_up(job)
        elif self._outages.waits(job):
            return  # `try_again` comes for it
        elif (job.moderation or {}).get("input"):
            self.enqueue(job.id, charged=job.fence > 0)
        else:
            self._tasks.start(self._check_prompt(job))

    async def try_again(self, job_id: str) -> None:
        """A postponed job is due. Raises StorageFailed."""
        job = await self._call(self._database.jobs.get_job, job_id)
        self._open.postponed.pop(job_id, None)
        if job is None or job.over:
            self._outcomes.forget(job_id)
        elif job.status == "queued" and job_id not in self._open.queue:
            await self.admit(job)

    async def remember(self, job: JobRecord) -> None:
        self._open.add(job)
        if job.team_id not in self._weighed:
            team = await self._call(self._database.teams.get_team, job.team_id)
            self._open.queue.set_weight(job.team_id, team.weight if team else 1.0)
            self._weighed.add(job.team_id)

    def enqueue(self, job_id: str, *, charged: bool) -> None:
        job = self._open.get(job_id)
        if job is None:  # it ended while it was checked or taken back
            return
        seconds = self._estimator.predictor.predict(job.work)
        place = QueuedJob(job_id, job.team, seconds, job.priority, charged, job.created)
        self._open.queue.push(place)
        self._queued()

    async def guarded(self, job_id: str, work: Awaitable[object]) -> None:
        """One job's fault does not keep the others waiting; a job that always fails is ended.

        Raises:
            StorageFailed: no job's fault.
        """
        try:
            await work
        except StorageFailed:
            raise
        except Exception as error:
            log.error("job %s could not be worked on: %r", job_id, error, exc_info=error)
            self._open.forget(job_id)  # the next rescan finds it again
            if self._faulty.note(job_id):
                await self.set_aside(job_id, error)

    async def set_aside(self, job_id: str, error: Exception) -> None:
        """Ends a job that the dispatcher cannot handle. Raises StorageFailed."""
        fault = EngineError(
            f"The job cannot be worked on ({type(error).__name__}). Other requests are not "
            "affected; please report this one.",
            details={"reason": "set_aside"},
        )
        try:
            await self._outcomes.failed(job_id, fault)
        except StorageFailed:
            raise
        except Exception:  # its deadline ends it, if that is possible at all
            log.exception("job %s could not be ended", job_id)

    async def _check_prompt(self, job: JobRecord) -> None:
        try:
            await self.guarded(job.id, self._checked(job))
        except StorageFailed as error:  # the job could not be ended: it is tried again later
            log.warning("job %s waits for the job database: %s", job.id, error)
            self._open.forget(job.id)

    async def _checked(self, job: JobRecord) -> None:
        try:
            if await self._checks.passes(job):
                self.enqueue(job.id, charged=job.fence > 0)
        except (ModerationUnavailable, StorageFailed) as error:
            await self._outages.postpone(job, error)


def _fences(job: JobRecord) -> int:
    """Fences of leases that were not given back for a passing fault: each of those took two."""
    outage = Outage.of(job)
    return job.fence - 2 * (outage.leases if outage else 0)
