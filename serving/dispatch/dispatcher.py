"""Decides who draws which job: checks prompts, queues fairly, leases, fences, expires, gives up.

One dispatcher per model, in one event loop, without Ray. The database is the truth and every change
is a compare-and-set there; what is in memory here can be lost at any moment and is rebuilt by
`Dispatcher.start`. Generators pull with `lease`, report with `heartbeat`, end with `complete`,
`fail` or `release`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping

from calotype.serving.core.errors import CalotypeError, NotFound, StorageFailed
from calotype.serving.core.protocols import Clock, SafetyStage
from calotype.serving.database.database import Database
from calotype.serving.dispatch.admission import Admission
from calotype.serving.dispatch.background_tasks import BackgroundTasks
from calotype.serving.dispatch.estimator import Estimator
from calotype.serving.dispatch.lease_table import GrantedLease
from calotype.serving.dispatch.open_jobs import DispatcherState, OpenJobs, wait_for
from calotype.serving.dispatch.outages import Outages
from calotype.serving.dispatch.outcomes import Outcomes
from calotype.serving.dispatch.policy import DispatchPolicy
from calotype.serving.dispatch.prompt_checks import PromptChecks
from calotype.serving.dispatch.retrying import RetryingCalls
from calotype.serving.jobs.endings import canceled_ending, late_ending
from calotype.serving.jobs.lease import Lease, LeaseProgress
from calotype.serving.jobs.lifecycle import Status
from calotype.serving.jobs.outage import part_at_fault
from calotype.serving.jobs.records import Checkpoint, JobRecord, PreviewRecord
from calotype.serving.jobs.result import GenerationResult
from calotype.serving.observability.loops import Loop, Loops

log = logging.getLogger(__name__)

_AWAY_SECONDS = 2.0
"""Pause of a start and of sweeps whose database is away."""


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
        self.outages = Outages(
            *(database.jobs, self._call, self._outcomes, self._open, clock),
            policy.max_outage_seconds,
        )
        checks = PromptChecks(
            *(safety, database.jobs, self._call, self._outcomes),
            *(policy.check_retries, policy.checks_at_once, sleep),
        )
        self._work = asyncio.Event()
        self._admission = Admission(
            *(database, self._call, clock, self._open),
            *(self._outcomes, self.outages, checks, self._estimator),
            max_fences=policy.max_fences,
            queued=self._work.set,
        )
        self._rescanned = self._polled = self._swept = clock.monotonic()
        self.loops = Loops()
        """For whoever asks how this process is."""

    # -- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Takes over what the database holds: queued jobs, and running ones of dead replicas.

        Waits for a database that is away.
        """
        while True:
            try:
                await self._take_over()
                break
            except CalotypeError as error:  # also where the gateways do not know the model yet
                log.warning("the dispatcher waits for the job database: %s", error)
                await self._sleep(_AWAY_SECONDS)
        if self.policy.sweep_seconds is not None:
            loop = Loop(
                "dispatcher",
                self._sweep_round,
                clock=self._clock,
                sleep=self._sleep,
                longest_pause=_AWAY_SECONDS,
            )
            self.loops.start(loop)

    async def stop(self) -> None:
        """Ends the background tasks; jobs stay in the database for the next dispatcher."""
        await self.loops.stop()
        await self._admission.stop()
        await self._tasks.stop()

    # -- the gateway's side --------------------------------------------------------------------

    async def submit(self, job_id: str) -> None:
        """Takes a job that is queued in the database. Idempotent; returns before it is checked.

        Raises:
            NotFound: no such job.
        """
        if job_id in self._open:
            return
        job = await self._call(self._database.jobs.get_job, job_id)
        if job is None:
            raise NotFound(f"There is no job {job_id!r}.")
        if job.status != "queued" or job_id in self._open:
            return
        await self._admission.admit(job)

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
        """Up to ``limit`` jobs; waits ``wait_seconds`` or `longest_poll` for the first."""
        try:
            async with asyncio.timeout(min(wait_seconds, self.policy.longest_poll)):
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
            self._tasks.start(self._release_all(taking, granted))
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
        ended = await self._outcomes.drawn(job_id, fence, result)
        if ended is None:
            await self._give_back(job_id, fence, None)
        return bool(ended)

    async def fail(self, job_id: str, fence: int, error: CalotypeError) -> bool:
        """Ends a leased job with an error; False when the lease was lost.

        A passing fault of a part that the job needs gives it back instead: it is tried again.
        """
        if part_at_fault(error) is None:
            return await self._outcomes.failed(job_id, error, fence=fence)
        return await self._give_back(job_id, fence, error)

    async def release(self, job_id: str, fence: int) -> bool:
        """Gives a job back unharmed, because the replica drains; counts as no attempt."""
        return await self._give_back(job_id, fence, None)

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
        return self._open.state(self.backlog_seconds())

    # -- sweeping ------------------------------------------------------------------------------

    async def sweep(self) -> None:
        """Takes expired leases back, ends jobs past their deadline, finds unannounced jobs."""
        for lease in self._leases.expired(self._clock.monotonic()):
            await self._admission.guarded(lease.job_id, self._take_back(lease))
        now = self._clock.time()
        for job_id in self._open.late(now):
            await self._admission.guarded(job_id, self._outcomes.end(job_id, late_ending()))
        for job_id in self.outages.due():
            await self._admission.guarded(job_id, self._admission.try_again(job_id))
        monotonic = self._clock.monotonic()
        if monotonic - self._rescanned >= self.policy.rescan_seconds:
            self._rescanned = self._polled = monotonic
            await self._find_unannounced(None)
            await self._find_unleased(now)
        elif monotonic - self._polled >= self.policy.poll_seconds:
            self._polled = monotonic
            await self._find_unannounced(now - self.policy.rescan_seconds)
        forecast = self._estimator.changed_forecast(self.policy.rescan_seconds)
        if forecast is not None:
            await self._call(self._database.forecasts.save_forecast, forecast)

    async def _find_unannounced(self, made_after: float | None) -> None:
        for job_id in await self._call(self._database.jobs.queued_job_ids, self._model, made_after):
            if job_id not in self._open:
                await self._admission.guarded(job_id, self.submit(job_id))

    async def _find_unleased(self, now: float) -> None:
        """Running rows of no lease: one was begun, and the database's answer was lost."""
        for job in await self._call(self._database.jobs.expired_leases, self._model, now):
            if job.id not in self._leases:
                await self._admission.guarded(job.id, self._resume_running(job))

    async def _sweep_round(self) -> float:
        now = self._clock.monotonic()
        if now - self._swept > self.policy.lease_seconds / 2:
            # It was this process that stood still, so that no heartbeat was heard.
            self._leases.extend(now + self.policy.lease_seconds)
        try:
            await self.sweep()
        finally:
            self._swept = self._clock.monotonic()
        return self.policy.sweep_seconds or 1.0

    # -- inside --------------------------------------------------------------------------------

    async def _take_over(self) -> None:
        ways: dict[Status, Callable[[JobRecord], Awaitable[None]]] = {
            "running": self._resume_running,
            "queued": self._admission.admit,
        }
        for status, take in ways.items():
            for job in await self._call(self._database.jobs.open_jobs, self._model, status):
                if job.id not in self._open:
                    await self._admission.guarded(job.id, take(job))

    async def _resume_running(self, job: JobRecord) -> None:
        """A running row of a former dispatcher: its replica may live and go on, or be gone."""
        await self._admission.remember(job)
        if job.lease_replica is None or (job.lease_expires or 0.0) <= self._clock.time():
            # Not this job's fault as far as anyone saw, so no attempt is counted, within bounds.
            await self._give_back(job.id, job.fence, None)
            return
        self._grant(job.id, job.fence, job.lease_replica)

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
                self._admission.enqueue(queued.job_id, charged=True)
                if granted:
                    return  # these are leased already and must reach their replica
                raise
            if job is None:
                self._outcomes.forget(queued.job_id)
            elif queued.job_id not in self._open:
                await self._give_back(job.id, job.fence, None)
            else:
                self._grant(job.id, job.fence, replica)
                checkpoint = await self._checkpoint_of(job)
                try:
                    granted.append(Lease.from_job(job, expires, checkpoint))
                except Exception as error:
                    log.error("job %s cannot be leased: %r", job.id, error, exc_info=error)
                    await self._admission.set_aside(job.id, error)

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

    async def _release_all(self, taking: asyncio.Task[None], granted: list[Lease]) -> None:
        await asyncio.wait([taking])
        for lease in granted:
            with contextlib.suppress(StorageFailed):  # the next sweep does it
                await self.release(lease.job_id, lease.fence)

    async def _take_back(self, lease: GrantedLease) -> None:
        """The lease has expired, or was given back while the database was away."""
        if lease.returned:
            await self._give_back(lease.job_id, lease.fence, lease.fault)
            return
        log.warning("replica %s lost job %s: no heartbeat", lease.replica, lease.job_id)
        job = await self._call(self._database.jobs.get_job, lease.job_id)
        if job is not None and job.attempts >= self.policy.max_attempts:
            await self._outcomes.given_up(job, lease.fence)
        else:
            requeue = self._database.jobs.requeue_job
            job = await self._call(requeue, lease.job_id, lease.fence)
            await self._again(lease.job_id, lease.fence, job)

    async def _give_back(self, job_id: str, fence: int, fault: CalotypeError | None) -> bool:
        """A lease comes back through no fault of its job: its replica drains, or a part is away."""
        try:
            if fault is None:
                requeue = self._database.jobs.requeue_job
                job = await self._call(requeue, job_id, fence, False)
            else:
                job = await self.outages.give_back(job_id, fence, fault)
        except StorageFailed:
            lease = self._leases.get(job_id, fence)
            if lease is not None:  # the next sweep tries again
                lease.returned, lease.fault = True, fault
                lease.expires = self._clock.monotonic()
            raise
        return await self._again(job_id, fence, job)

    async def _again(self, job_id: str, fence: int, job: JobRecord | None) -> bool:
        self._leases.remove(job_id, fence)
        if job is None:
            if job_id not in self._leases and job_id not in self._queue:
                # Over, or queued by a call whose answer was lost: the next rescan finds it then.
                self._open.forget(job_id)
            return False
        await self._admission.admit(job)
        return True
