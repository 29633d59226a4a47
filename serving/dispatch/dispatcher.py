"""Decides who draws which job: checks prompts, queues fairly, leases, fences, expires, gives up.

One dispatcher per model, in one event loop, without Ray. The database is the truth and every change
is a compare-and-set there; what is in memory here can be lost at any moment and is rebuilt by
`Dispatcher.start`. Generators pull with `lease`, report with `heartbeat`, end with `complete`,
`fail` or `release`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from calotype.serving.core.errors import CalotypeError, NotFound, Overloaded, StorageFailed
from calotype.serving.core.protocols import Clock, SafetyStage
from calotype.serving.database.database import Database
from calotype.serving.dispatch.background_tasks import BackgroundTasks
from calotype.serving.dispatch.estimator import Estimator
from calotype.serving.dispatch.fair_queue import QueuedJob
from calotype.serving.dispatch.lease_table import GrantedLease
from calotype.serving.dispatch.open_jobs import OpenJobs, wait_for
from calotype.serving.dispatch.outcomes import Outcomes
from calotype.serving.dispatch.policy import DispatchPolicy
from calotype.serving.dispatch.prompt_checks import PromptChecks
from calotype.serving.dispatch.retrying import RetryingCalls
from calotype.serving.jobs.endings import canceled_ending, late_ending
from calotype.serving.jobs.lease import Lease, LeaseProgress
from calotype.serving.jobs.records import Checkpoint, JobRecord, PreviewRecord
from calotype.serving.jobs.result import GenerationResult

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DispatcherState:
    """Figures for autoscaling, ``ModelStatus`` and metrics."""

    queued: int
    running: int
    checking: int
    """Jobs whose prompts are being checked."""
    backlog_seconds: float
    """Predicted device seconds of everything that is not over."""


class Dispatcher:
    """The queue and the leases of one model.

    Args:
        model: only jobs of this model; None = of any.
        sleep: how pauses are made (tests put their own in).
        forecast_as: the model whose forecast it writes, where it has jobs of any.
    """

    def __init__(
        self,
        database: Database,
        safety: SafetyStage,
        clock: Clock,
        policy: DispatchPolicy | None = None,
        model: str | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        forecast_as: str | None = None,
    ) -> None:
        self.policy = policy = policy or DispatchPolicy()
        self._database, self._clock, self._sleep = database, clock, sleep
        self._model = model
        self._call = RetryingCalls(policy.storage_delays, sleep)
        self._tasks = BackgroundTasks()
        self._open = OpenJobs()
        self._queue, self._leases = self._open.queue, self._open.leases
        self._estimator = Estimator(forecast_as or model, clock, self._open, policy.max_forecast)
        self._outcomes = Outcomes(database.jobs, self._call, self._open, self._estimator)
        self._checks = PromptChecks(
            *(safety, database.jobs, self._call, self._outcomes),
            *(policy.check_retries, policy.checks_at_once, sleep),
        )
        self._work = asyncio.Event()
        self._weighed: set[str] = set()  # teams whose weight the queue knows
        self._rescanned = self._polled = clock.monotonic()

    # -- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Takes over what the database holds: queued jobs, and running ones of dead replicas."""
        for job in await self._call(self._database.jobs.open_jobs, self._model, "running"):
            await self._resume_running(job)
        for job in await self._call(self._database.jobs.open_jobs, self._model, "queued"):
            await self._admit(job)
        if self.policy.sweep_seconds is not None:
            self._tasks.start(self._sweep_forever(self.policy.sweep_seconds))

    async def stop(self) -> None:
        """Ends the background tasks; jobs stay in the database for the next dispatcher."""
        await self._tasks.stop()

    # -- the gateway's side --------------------------------------------------------------------

    async def submit(self, job_id: str) -> None:
        """Takes a job that is queued in the database. Idempotent; returns before it is checked.

        Raises:
            NotFound: no such job.
            Overloaded: the queue is full; the job has failed with this error.
        """
        if job_id in self._open:
            return
        job = await self._call(self._database.jobs.get_job, job_id)
        if job is None:
            raise NotFound(f"There is no job {job_id!r}.")
        if job.status != "queued" or job_id in self._open:
            return
        if len(self._open) >= self.policy.max_queue:
            text = f"The queue is full: {len(self._open)} jobs wait. Try again later."
            pause = min(60.0, max(1.0, self.backlog_seconds() / 10))
            full = Overloaded(text, code="queue_full", retry_after=pause)
            await self._outcomes.failed(job_id, full)
            raise full
        await self._admit(job)

    async def wait(self, job_id: str, wait_seconds: float) -> None:
        """Returns when the job is over, or in time."""
        ended = self._open.on_end(job_id)
        if job_id not in self._open:
            job = await self._call(self._database.jobs.get_job, job_id)
            if job is None or job.over:
                self._outcomes.forget(job_id)
                return
            await self.submit(job_id)
        await wait_for(ended, wait_seconds)

    async def cancel(self, job_id: str) -> bool:
        """Ends an open job as canceled; its replica hears of it with the next heartbeat."""
        return await self._outcomes.end(job_id, canceled_ending())

    # -- the generators' side ------------------------------------------------------------------

    async def lease(self, replica: str, limit: int, wait_seconds: float) -> list[Lease]:
        """Up to ``limit`` jobs for ``replica``; waits up to ``wait_seconds`` for the first."""
        try:
            async with asyncio.timeout(wait_seconds):
                while not len(self._queue):
                    self._work.clear()
                    await self._work.wait()
        except TimeoutError:
            return []
        granted: list[Lease] = []
        taking = asyncio.create_task(self._take(replica, limit, granted))
        try:
            await asyncio.shield(taking)
        except asyncio.CancelledError:
            self._tasks.start(self._give_back(taking, granted))
            raise
        return granted

    async def heartbeat(self, replica: str, progress: Mapping[str, LeaseProgress]) -> list[str]:
        """Renews the leases of a replica; ``progress`` by job ID.

        Returns:
            The jobs that are canceled, over or another replica's: stop before the next step.
        """
        renewed: dict[str, LeaseProgress] = {}
        lost: list[str] = []
        for job_id, reached in progress.items():
            lease = self._leases.get(job_id, reached.fence, replica)
            if lease is None:
                lost.append(job_id)
                continue
            lease.expires = self._clock.monotonic() + self.policy.lease_seconds
            lease.done = reached.share
            renewed[job_id] = reached
        if renewed:
            expires = self._clock.time() + self.policy.lease_seconds
            try:
                await self._call(self._database.jobs.renew_leases, replica, renewed, expires)
            except StorageFailed as error:
                # The lease here counts; the row only serves a restart and the progress display.
                log.warning("progress could not be recorded: %s", error)
        return lost

    async def complete(self, job_id: str, fence: int, result: GenerationResult) -> bool:
        """Ends a drawn job with its images.

        Returns:
            False when the lease was lost: delete the images. True again on a repeated call.
        """
        return await self._outcomes.drawn(job_id, fence, result)

    async def fail(self, job_id: str, fence: int, error: CalotypeError) -> bool:
        """Ends a leased job with an error; False when the lease was lost."""
        return await self._outcomes.failed(job_id, error, fence=fence)

    async def release(self, job_id: str, fence: int) -> bool:
        """Gives a job back unharmed, because the replica drains; counts as no attempt."""
        return await self._requeue(job_id, fence, count_attempt=False)

    async def checkpoint(self, checkpoint: Checkpoint) -> bool:
        """Records where another replica could go on; False when the lease was lost."""
        if self._leases.get(checkpoint.job_id, checkpoint.fence) is None:
            return False
        return await self._call(self._database.intermediates.save_checkpoint, checkpoint)

    async def drop_checkpoint(self, job_id: str, fence: int) -> bool:
        """The lease's checkpoint could not be used: it is removed, the job begins anew."""
        if self._leases.get(job_id, fence) is None:
            return False
        await self._call(self._database.intermediates.drop_checkpoint, job_id)
        return True

    async def preview(self, preview: PreviewRecord) -> bool:
        """Takes a preview that the safety stage has let pass; False = not wanted."""
        if self._leases.get(preview.job_id, preview.fence) is None:
            return False
        return await self._call(self._database.intermediates.add_preview, preview)

    # -- figures -------------------------------------------------------------------------------

    def backlog_seconds(self) -> float:
        """Predicted device seconds of everything that is not over."""
        return self._estimator.backlog_seconds()

    def snapshot(self) -> DispatcherState:
        queued, running = len(self._queue), len(self._leases)
        checking = max(0, len(self._open) - queued - running)
        return DispatcherState(queued, running, checking, self.backlog_seconds())

    # -- sweeping ------------------------------------------------------------------------------

    async def sweep(self) -> None:
        """Takes expired leases back, ends jobs past their deadline, finds unannounced jobs."""
        for lease in self._leases.expired(self._clock.monotonic()):
            await self._take_back(lease)
        now = self._clock.time()
        for job_id in self._open.late(now):
            await self._outcomes.end(job_id, late_ending())
        monotonic = self._clock.monotonic()
        if monotonic - self._rescanned >= self.policy.rescan_seconds:
            self._rescanned = self._polled = monotonic
            await self._find_unannounced(None)
        elif monotonic - self._polled >= self.policy.poll_seconds:
            self._polled = monotonic
            await self._find_unannounced(now - self.policy.rescan_seconds)
        forecast = self._estimator.changed_forecast(self.policy.rescan_seconds)
        if forecast is not None:
            await self._call(self._database.forecasts.save_forecast, forecast)

    async def _find_unannounced(self, made_after: float | None) -> None:
        for job_id in await self._call(self._database.jobs.queued_job_ids, self._model, made_after):
            if job_id in self._open:
                continue
            if len(self._open) >= self.policy.max_queue:
                return  # they were accepted, so they wait in the database instead of failing
            await self.submit(job_id)

    async def _sweep_forever(self, pause: float) -> None:
        while True:
            await self._sleep(pause)
            try:
                await self.sweep()
            except CalotypeError as error:  # a busy disk or a full queue: the next sweep goes on
                log.warning("a sweep was cut short: %s", error)

    # -- inside --------------------------------------------------------------------------------

    async def _resume_running(self, job: JobRecord) -> None:
        """A running row of a former dispatcher: its replica may live and go on, or be gone."""
        await self._remember(job)
        if job.lease_replica is None or (job.lease_expires or 0.0) <= self._clock.time():
            # Not this job's fault as far as anyone saw, so no attempt is counted, within bounds.
            await self._requeue(job.id, job.fence, count_attempt=False)
            return
        self._grant(job.id, job.fence, job.lease_replica)

    async def _admit(self, job: JobRecord) -> None:
        await self._remember(job)
        if job.deadline is not None and job.deadline <= self._clock.time():
            await self._outcomes.end(job.id, late_ending())
        elif job.fence >= self.policy.max_fences:
            await self._outcomes.given_up(job)
        elif (job.moderation or {}).get("input"):
            self._enqueue(job.id, charged=job.fence > 0)
        else:
            self._tasks.start(self._check_prompt(job))

    async def _remember(self, job: JobRecord) -> None:
        self._open.add(job)
        if job.team_id not in self._weighed:
            self._weighed.add(job.team_id)
            team = await self._call(self._database.teams.get_team, job.team_id)
            self._queue.set_weight(job.team_id, team.weight if team else 1.0)

    def _enqueue(self, job_id: str, *, charged: bool) -> None:
        job = self._open.get(job_id)
        if job is None:  # it ended while it was checked or taken back
            return
        seconds = self._estimator.predictor.predict(job.work)
        self._queue.push(QueuedJob(job_id, job.team, seconds, job.priority, charged, job.created))
        self._work.set()

    async def _check_prompt(self, job: JobRecord) -> None:
        passes = await self._checks.passes(job)
        if passes:
            self._enqueue(job.id, charged=job.fence > 0)
        elif passes is None:
            # Still queued in the database: the next rescan has it checked again.
            self._open.forget(job.id)

    async def _take(self, replica: str, limit: int, granted: list[Lease]) -> None:
        while len(granted) < limit:
            queued = self._queue.pop()
            if queued is None:
                return
            expires = self._clock.time() + self.policy.lease_seconds
            start = self._database.jobs.start_job
            try:
                job = await self._call(start, queued.job_id, replica, expires)
            except StorageFailed:
                self._enqueue(queued.job_id, charged=True)
                if granted:
                    return  # these are leased already and must reach their replica
                raise
            if job is None:
                self._outcomes.forget(queued.job_id)
            elif queued.job_id in self._open:
                self._grant(job.id, job.fence, replica)
                granted.append(Lease.from_job(job, expires, await self._checkpoint_of(job)))

    def _grant(self, job_id: str, fence: int, replica: str) -> None:
        now = self._clock.monotonic()
        alone, until = self._estimator.started(now), now + self.policy.lease_seconds
        self._leases.grant(GrantedLease(job_id, fence, replica, until, granted=now, alone=alone))

    async def _checkpoint_of(self, job: JobRecord) -> Checkpoint | None:
        if job.fence == 1:
            return None
        try:
            return await self._call(self._database.intermediates.get_checkpoint, job.id)
        except StorageFailed:  # it begins anew: slower, but nothing is lost
            return None

    async def _give_back(self, taking: asyncio.Task[None], granted: list[Lease]) -> None:
        await asyncio.wait([taking])
        for lease in granted:
            await self.release(lease.job_id, lease.fence)

    async def _take_back(self, lease: GrantedLease) -> None:
        """The lease has expired."""
        log.warning("replica %s lost job %s: no heartbeat", lease.replica, lease.job_id)
        job = await self._call(self._database.jobs.get_job, lease.job_id)
        if job is not None and job.attempts >= self.policy.max_attempts:
            await self._outcomes.given_up(job, lease.fence)
        else:
            await self._requeue(lease.job_id, lease.fence, count_attempt=True)

    async def _requeue(self, job_id: str, fence: int, *, count_attempt: bool) -> bool:
        job = await self._call(self._database.jobs.requeue_job, job_id, fence, count_attempt)
        self._leases.remove(job_id, fence)
        if job is None:
            return False
        await self._admit(job)
        return True
