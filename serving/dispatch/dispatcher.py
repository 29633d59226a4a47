"""Who draws which job: judges prompts, queues fairly, leases, fences, expires, gives up.

One dispatcher per model, in one event loop, without Ray. The database is the truth and every change
is a compare-and-set there; what is in memory here can be lost at any moment and is rebuilt by
`Dispatcher.start`. Generators pull with `lease`, report with `heartbeat`, end with `complete`,
`fail` or `release`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from calotype.serving.core.errors import CalotypeError, NotFound, Overloaded, StorageFailed
from calotype.serving.core.protocols import Clock, SafetyStage
from calotype.serving.database.database import Database
from calotype.serving.dispatch.estimator import Estimator
from calotype.serving.dispatch.fair_queue import FairQueue, QueuedJob
from calotype.serving.dispatch.policy import DispatchPolicy
from calotype.serving.dispatch.retrying import RetryingTasks
from calotype.serving.jobs.endings import (
    Ending,
    blocked_ending,
    canceled_ending,
    drawn_ending,
    late_ending,
    poison_ending,
)
from calotype.serving.jobs.judging import judge_job
from calotype.serving.jobs.lease import HeldLease, KnownJob, Lease, LeaseTable
from calotype.serving.jobs.records import Checkpoint, JobRecord, PreviewRecord
from calotype.serving.jobs.result import GenerationResult

log = logging.getLogger(__name__)


class Dispatcher(RetryingTasks):
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
        self.policy = policy or DispatchPolicy()
        super().__init__(self.policy.storage_delays, sleep)
        self._database, self._safety, self._clock = database, safety, clock
        self._model = model
        self._queue, self._leases = FairQueue(), LeaseTable()
        self._known: dict[str, KnownJob] = {}
        self._ends: dict[str, asyncio.Event] = {}
        self._work = asyncio.Event()
        self._judges = asyncio.Semaphore(self.policy.judging_at_once)
        self._weighed: set[str] = set()  # teams whose weight the queue knows
        self._rescanned = self._polled = clock.monotonic()
        self.estimator = Estimator(
            *(forecast_as or model, clock, self._known, self._leases, self._queue),
            most=self.policy.max_forecast,
        )

    # -- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Takes over what the database holds: queued jobs, and running ones of dead replicas."""
        for job in await self._sql(self._database.jobs.open_jobs, self._model, "running"):
            await self._adopt(job)
        for job in await self._sql(self._database.jobs.open_jobs, self._model, "queued"):
            await self._admit(job)
        if self.policy.sweep_seconds is not None:
            self._spawn(self._sweep_forever(self.policy.sweep_seconds))

    # -- the gateway's side --------------------------------------------------------------------

    async def submit(self, job_id: str) -> None:
        """Takes a job that is queued in the database. Idempotent; returns before it is judged.

        Raises:
            NotFound: no such job.
            Overloaded: the queue is full; the job has failed with this error.
        """
        if job_id in self._known:
            return
        job = await self._sql(self._database.jobs.get_job, job_id)
        if job is None:
            raise NotFound(f"There is no job {job_id!r}.")
        if job.status != "queued" or job_id in self._known:
            return
        if len(self._known) >= self.policy.max_queue:
            text = f"The queue is full: {len(self._known)} jobs wait. Try again later."
            pause = min(60.0, max(1.0, self.backlog_seconds() / 10))
            full = Overloaded(text, code="queue_full", retry_after=pause)
            await self._end(job_id, Ending("failed", error=full.to_payload()))
            raise full
        await self._admit(job)

    async def wait(self, job_id: str, wait_seconds: float) -> None:
        """Returns when the job is over, or in time."""
        end = self._ends.setdefault(job_id, asyncio.Event())
        if job_id not in self._known:
            job = await self._sql(self._database.jobs.get_job, job_id)
            if job is None or job.over:
                self._announce(job_id)
                return
            await self.submit(job_id)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_seconds):
                await end.wait()

    async def cancel(self, job_id: str) -> bool:
        """Ends an open job as canceled; its replica hears of it with the next heartbeat."""
        return await self._end(job_id, canceled_ending())

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
            self._spawn(self._give_back(taking, granted))
            raise
        return granted

    async def heartbeat(self, replica: str, progress: Mapping[str, Sequence[int]]) -> list[str]:
        """Renews the leases ``job_id -> (fence, step, steps)``.

        Returns:
            The jobs that are canceled, over or somebody else's: drop them before the next step.
        """
        mine: dict[str, Sequence[int]] = {}
        lost: list[str] = []
        for job_id, (fence, step, steps) in progress.items():
            lease = self._leases.held(job_id, fence, replica)
            if lease is None:
                lost.append(job_id)
                continue
            lease.expires = self._clock.monotonic() + self.policy.lease_seconds
            lease.done = min(1.0, step / steps) if steps else 0.0
            mine[job_id] = (fence, step, steps)
        if mine:
            expires = self._clock.time() + self.policy.lease_seconds
            try:
                await self._sql(self._database.jobs.renew_leases, replica, mine, expires)
            except StorageFailed as error:
                # The lease here counts; the row only serves a restart and the progress display.
                log.warning("progress could not be recorded: %s", error)
        return lost

    async def complete(self, job_id: str, fence: int, result: Mapping[str, Any]) -> bool:
        """Ends a drawn job with its pictures (`GenerationResult`).

        Returns:
            False when the lease was lost: delete the pictures. True again on a repeated call.
        """
        parsed = GenerationResult.from_payload(result)
        job = await self._sql(self._database.jobs.get_job, job_id)
        if job is None:
            return False
        ending = drawn_ending(job, parsed) if parsed.images else blocked_ending(job, parsed)
        lease = self._leases.held(job_id, fence)
        if not await self._end(job_id, replace(ending, fence=fence)):
            job = await self._sql(self._database.jobs.get_job, job_id)
            return job is not None and job.status == "succeeded" and job.fence == fence
        self.estimator.ended(job, lease, parsed.drawing_seconds)
        return True

    async def fail(self, job_id: str, fence: int, error: Mapping[str, Any]) -> bool:
        """Ends a leased job with ``CalotypeError.to_payload()``; False when the lease was lost."""
        return await self._end(job_id, Ending("failed", fence=fence, error=dict(error)))

    async def release(self, job_id: str, fence: int) -> bool:
        """Gives a job back unharmed, because the replica drains; counts as no attempt."""
        return await self._requeue(job_id, fence, count_attempt=False)

    async def checkpoint(self, job_id: str, fence: int, step: int, blob_key: str) -> bool:
        """Notes where another replica could go on; False when the lease was lost."""
        if self._leases.held(job_id, fence) is None:
            return False
        left = Checkpoint(job_id, fence, step, blob_key)
        return await self._sql(self._database.intermediates.save_checkpoint, left)

    async def spoiled(self, job_id: str, fence: int) -> bool:
        """The lease's checkpoint could not be used: it is forgotten, the job begins anew."""
        if self._leases.held(job_id, fence) is None:
            return False
        await self._sql(self._database.intermediates.drop_checkpoint, job_id)
        return True

    async def preview(self, job_id: str, fence: int, preview: Mapping[str, Any]) -> bool:
        """Takes a judged preview (`PreviewRecord` without job and fence); False = not wanted."""
        if self._leases.held(job_id, fence) is None:
            return False
        record = PreviewRecord(job_id=job_id, fence=fence, **preview)
        return await self._sql(self._database.intermediates.add_preview, record)

    # -- figures -------------------------------------------------------------------------------

    def backlog_seconds(self) -> float:
        """Predicted device seconds of everything that is not over."""
        return self.estimator.backlog_seconds()

    def snapshot(self) -> dict[str, float]:
        """Figures for autoscaling, ``ModelStatus`` and metrics."""
        return {
            "queued": len(self._queue),
            "running": len(self._leases),
            "judging": max(0, len(self._known) - len(self._queue) - len(self._leases)),
            "backlog_seconds": self.backlog_seconds(),
        }

    # -- sweeping ------------------------------------------------------------------------------

    async def sweep(self) -> None:
        """Takes expired leases back, ends jobs past their deadline, finds unannounced jobs."""
        for lease in self._leases.expired(self._clock.monotonic()):
            await self._lose(lease)
        now = self._clock.time()
        late = [id_ for id_, job in self._known.items() if job.deadline and job.deadline <= now]
        for job_id in late:
            await self._end(job_id, late_ending())
        monotonic = self._clock.monotonic()
        if monotonic - self._rescanned >= self.policy.rescan_seconds:
            self._rescanned = self._polled = monotonic
            await self._find_unannounced(None)
        elif monotonic - self._polled >= self.policy.poll_seconds:
            self._polled = monotonic
            await self._find_unannounced(now - self.policy.rescan_seconds)
        news = self.estimator.news(self.policy.rescan_seconds)
        if news is not None:
            await self._sql(self._database.forecasts.save_forecast, news)

    async def _find_unannounced(self, made_after: float | None) -> None:
        for job_id in await self._sql(self._database.jobs.queued_job_ids, self._model, made_after):
            if job_id in self._known:
                continue
            if len(self._known) >= self.policy.max_queue:
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

    async def _adopt(self, job: JobRecord) -> None:
        """A running row of a former dispatcher: its replica may live and go on, or be gone."""
        now = self._clock.time()
        await self._remember(job)
        if job.lease_replica is None or (job.lease_expires or 0.0) <= now:
            # Not this job's fault as far as anyone saw, so no attempt is counted, within bounds.
            await self._requeue(job.id, job.fence, count_attempt=False)
            return
        self._grant(job.id, job.fence, job.lease_replica)

    async def _admit(self, job: JobRecord) -> None:
        await self._remember(job)
        if job.deadline is not None and job.deadline <= self._clock.time():
            await self._end(job.id, late_ending())
        elif job.fence >= self.policy.max_fences:
            await self._end(job.id, poison_ending(job))
        elif (job.moderation or {}).get("input"):
            self._enqueue(job.id, charged=job.fence > 0)
        else:
            self._spawn(self._judge(job))

    async def _remember(self, job: JobRecord) -> None:
        self._known[job.id] = KnownJob.of(job)
        if job.team_id not in self._weighed:
            self._weighed.add(job.team_id)
            team = await self._sql(self._database.teams.get_team, job.team_id)
            self._queue.set_weight(job.team_id, team.weight if team else 1.0)

    def _enqueue(self, job_id: str, *, charged: bool) -> None:
        known = self._known.get(job_id)
        if known is None:  # it ended while it was judged or taken back
            return
        seconds = self.estimator.predictor.predict(known.request)
        self._queue.push(
            QueuedJob(job_id, known.team, seconds, known.priority, charged, known.created)
        )
        self._work.set()

    async def _judge(self, job: JobRecord) -> None:
        try:
            async with self._judges:
                moderation, error = await judge_job(
                    self._safety, job, self.policy.judging, self._sleep
                )
            if error is not None:
                payload = error.to_payload()
                await self._end(job.id, Ending("failed", error=payload, moderation=moderation))
                return
            await self._sql(self._database.jobs.record_moderation, job.id, moderation)
        except StorageFailed as error:
            # Forgotten here, still queued in the database: the next rescan judges it again.
            log.warning("a judgement could not be recorded: %s", error)
            self._known.pop(job.id, None)
        else:
            self._enqueue(job.id, charged=job.fence > 0)

    async def _take(self, replica: str, limit: int, granted: list[Lease]) -> None:
        while len(granted) < limit:
            queued = self._queue.pop()
            if queued is None:
                return
            expires = self._clock.time() + self.policy.lease_seconds
            try:
                job = await self._sql(
                    self._database.jobs.start_job, queued.job_id, replica, expires
                )
            except StorageFailed:
                self._enqueue(queued.job_id, charged=True)
                if granted:
                    return  # these are leased already and must reach their replica
                raise
            if job is None:
                self._announce(queued.job_id)
            elif queued.job_id in self._known:
                self._grant(job.id, job.fence, replica)
                granted.append(Lease.of(job, expires, await self._checkpoint_of(job)))

    def _grant(self, job_id: str, fence: int, replica: str) -> None:
        now = self._clock.monotonic()
        alone, until = self.estimator.started(now), now + self.policy.lease_seconds
        self._leases.grant(HeldLease(job_id, fence, replica, until, granted=now, alone=alone))

    async def _checkpoint_of(self, job: JobRecord) -> Checkpoint | None:
        if job.fence == 1:
            return None
        try:
            return await self._sql(self._database.intermediates.get_checkpoint, job.id)
        except StorageFailed:  # it begins anew: slower, but nothing is lost
            return None

    async def _give_back(self, taking: asyncio.Task[None], granted: list[Lease]) -> None:
        await asyncio.wait([taking])
        for lease in granted:
            await self.release(lease.job_id, lease.fence)

    async def _lose(self, lease: HeldLease) -> None:
        log.warning("replica %s lost job %s: no heartbeat", lease.replica, lease.job_id)
        job = await self._sql(self._database.jobs.get_job, lease.job_id)
        if job is not None and job.attempts >= self.policy.max_attempts:
            await self._end(lease.job_id, replace(poison_ending(job), fence=lease.fence))
        else:
            await self._requeue(lease.job_id, lease.fence, count_attempt=True)

    async def _requeue(self, job_id: str, fence: int, *, count_attempt: bool) -> bool:
        job = await self._sql(self._database.jobs.requeue_job, job_id, fence, count_attempt)
        self._leases.drop(job_id, fence)
        if job is None:
            return False
        await self._admit(job)
        return True

    async def _end(self, job_id: str, ending: Ending) -> bool:
        job = await self._sql(self._database.jobs.finish_job, job_id, ending)
        if job is not None or ending.fence is None:
            self._announce(job_id)
        else:
            self._leases.drop(job_id, ending.fence)
        return job is not None

    def _announce(self, job_id: str) -> None:
        """The job is over: forget it and wake who waits."""
        self._known.pop(job_id, None)
        self._queue.remove(job_id)
        self._leases.drop(job_id)
        if not self._known:
            self.estimator.throughput.stopped()
        end = self._ends.pop(job_id, None)
        if end is not None:
            end.set()
