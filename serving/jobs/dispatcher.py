"""Who draws which job: judges prompts, queues fairly, leases, fences, expires, gives up.

One dispatcher per model, in one event loop, without Ray. The store is the truth and every change
is a compare-and-set there; what is in memory here can be lost at any moment and is rebuilt by
`Dispatcher.start`. Generators pull with `lease`, report with `heartbeat`, end with `complete`,
`fail` or `release`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from calotype.serving.errors import (
    CalotypeError,
    NotFound,
    Overloaded,
    StorageFailed,
)
from calotype.serving.jobs.dispatch_policy import DispatchPolicy
from calotype.serving.jobs.endings import (
    Ending,
    blocked_ending,
    canceled_ending,
    drawn_ending,
    late_ending,
    poison_ending,
)
from calotype.serving.jobs.fair_queue import FairQueue, QueuedJob
from calotype.serving.jobs.judging import judge_patiently, refusal
from calotype.serving.jobs.leases import HeldLease, KnownJob, Lease, LeaseTable
from calotype.serving.jobs.predictor import WorkPredictor
from calotype.serving.jobs.records import JobRecord
from calotype.serving.jobs.result import GenerationResult
from calotype.serving.jobs.store import JobStore
from calotype.serving.protocols import Clock, SafetyStage

log = logging.getLogger(__name__)

T = TypeVar("T")


class Dispatcher:
    """The queue and the leases of one model.

    Args:
        model: only jobs of this model; None = of any.
        sleep: how pauses are made (tests put their own in).
    """

    def __init__(
        self,
        store: JobStore,
        safety: SafetyStage,
        clock: Clock,
        policy: DispatchPolicy | None = None,
        model: str | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.policy = policy or DispatchPolicy()
        self.predictor = WorkPredictor()
        self._store, self._safety, self._clock = store, safety, clock
        self._model, self._sleep = model, sleep
        self._queue, self._leases = FairQueue(), LeaseTable()
        self._known: dict[str, KnownJob] = {}
        self._ends: dict[str, asyncio.Event] = {}
        self._work = asyncio.Event()
        self._judges = asyncio.Semaphore(self.policy.judging_at_once)
        self._weighed: set[str] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._rescanned = clock.monotonic()

    # -- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Takes over what the store holds: queued jobs, and running ones of dead replicas."""
        for job in await self._sql(self._store.open_jobs, self._model, "running"):
            await self._adopt(job)
        for job in await self._sql(self._store.open_jobs, self._model, "queued"):
            await self._admit(job)
        if self.policy.sweep_seconds is not None:
            self._spawn(self._sweep_forever(self.policy.sweep_seconds))

    async def stop(self) -> None:
        """Ends the background tasks; jobs stay in the store for the next dispatcher."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- the gateway's side --------------------------------------------------------------------

    async def submit(self, job_id: str) -> None:
        """Takes a job that is queued in the store. Idempotent; returns before it is judged.

        Raises:
            NotFound: no such job.
            Overloaded: the queue is full; the job has failed with this error.
        """
        if job_id in self._known:
            return
        job = await self._sql(self._store.get_job, job_id)
        if job is None:
            raise NotFound(f"There is no job {job_id!r}.")
        if job.status != "queued" or job_id in self._known:
            return
        if len(self._known) >= self.policy.max_queue:
            full = Overloaded(
                f"The queue is full: {len(self._known)} jobs wait. Try again later.",
                code="queue_full",
                retry_after=min(60.0, max(1.0, self.backlog_seconds() / 10)),
            )
            await self._end(job_id, Ending("failed", error=full.to_payload()))
            raise full
        await self._admit(job)

    async def wait(self, job_id: str, wait_seconds: float) -> None:
        """Returns when the job is over, or after ``wait_seconds``."""
        end = self._ends.setdefault(job_id, asyncio.Event())
        if job_id not in self._known:
            job = await self._sql(self._store.get_job, job_id)
            if job is None or job.over:
                self._announce(job_id)
                return
            await self.submit(job_id)
        try:
            async with asyncio.timeout(wait_seconds):
                await end.wait()
        except TimeoutError:
            return

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
            # Nobody will run what was taken for a caller that is gone: back to the queue.
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
                await self._sql(self._store.renew_leases, replica, mine, expires)
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
        job = await self._sql(self._store.get_job, job_id)
        if job is None:
            return False
        ending = drawn_ending(job, parsed) if parsed.images else blocked_ending(job, parsed)
        if not await self._end(job_id, replace(ending, fence=fence)):
            job = await self._sql(self._store.get_job, job_id)
            return job is not None and job.status == "succeeded" and job.fence == fence
        self.predictor.learn(job.request, float(parsed.metrics.get("gpu_seconds", 0.0)))
        return True

    async def fail(self, job_id: str, fence: int, error: Mapping[str, Any]) -> bool:
        """Ends a leased job with ``CalotypeError.to_payload()``; False when the lease was lost."""
        return await self._end(job_id, Ending("failed", fence=fence, error=dict(error)))

    async def release(self, job_id: str, fence: int) -> bool:
        """Gives a job back unharmed, because the replica drains; counts as no attempt."""
        return await self._requeue(job_id, fence, count_attempt=False)

    # -- figures -------------------------------------------------------------------------------

    def backlog_seconds(self) -> float:
        """Predicted device seconds of everything that is not over."""
        done = {lease.job_id: lease.done for lease in self._leases}
        units = sum(job.units * (1 - done.get(id_, 0.0)) for id_, job in self._known.items())
        return units * self.predictor.seconds_per_unit

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
        if self._clock.monotonic() - self._rescanned >= self.policy.rescan_seconds:
            self._rescanned = self._clock.monotonic()
            await self._find_unannounced()

    async def _find_unannounced(self) -> None:
        for job_id in await self._sql(self._store.queued_job_ids, self._model):
            if job_id in self._known:
                continue
            if len(self._known) >= self.policy.max_queue:
                return  # they were accepted, so they wait in the store instead of failing
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
        expires = self._clock.monotonic() + self.policy.lease_seconds
        self._leases.grant(HeldLease(job.id, job.fence, job.lease_replica, expires))

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
            team = await self._sql(self._store.get_team, job.team_id)
            self._queue.set_weight(job.team_id, team.weight if team else 1.0)

    def _enqueue(self, job_id: str, *, charged: bool) -> None:
        known = self._known.get(job_id)
        if known is None:  # it ended while it was judged or taken back
            return
        seconds = known.units * self.predictor.seconds_per_unit
        self._queue.push(QueuedJob(job_id, known.team, seconds, known.priority, charged))
        self._work.set()

    async def _judge(self, job: JobRecord) -> None:
        try:
            await self._judge_once(job)
        except StorageFailed as error:
            # Forgotten here, still queued in the store: the next rescan judges it again.
            log.warning("a judgement could not be recorded: %s", error)
            self._known.pop(job.id, None)

    async def _judge_once(self, job: JobRecord) -> None:
        prompt = str(job.request["prompt"])
        try:
            async with self._judges:
                decision = await judge_patiently(
                    lambda: self._safety.judge_prompt(prompt), self.policy.judging, self._sleep
                )
        except CalotypeError as error:
            await self._end(job.id, Ending("failed", error=error.to_payload()))
            return
        moderation = {**(job.moderation or {}), "input": decision}
        blocked = refusal("input", decision, str(job.input.get("request_id", job.id)))
        if blocked is not None:
            payload = blocked.to_payload()
            await self._end(job.id, Ending("failed", error=payload, moderation=moderation))
            return
        await self._sql(self._store.record_moderation, job.id, moderation)
        self._enqueue(job.id, charged=job.fence > 0)

    async def _take(self, replica: str, limit: int, granted: list[Lease]) -> None:
        while len(granted) < limit:
            queued = self._queue.pop()
            if queued is None:
                return
            expires = self._clock.time() + self.policy.lease_seconds
            try:
                job = await self._sql(self._store.start_job, queued.job_id, replica, expires)
            except StorageFailed:
                self._enqueue(queued.job_id, charged=True)
                if granted:
                    return  # these are leased already and must reach their replica
                raise
            if job is None:
                self._announce(queued.job_id)
            elif queued.job_id in self._known:
                until = self._clock.monotonic() + self.policy.lease_seconds
                self._leases.grant(HeldLease(job.id, job.fence, replica, until))
                granted.append(Lease.of(job, expires))

    async def _give_back(self, taking: asyncio.Task[None], granted: list[Lease]) -> None:
        await asyncio.wait([taking])
        for lease in granted:
            await self.release(lease.job_id, lease.fence)

    async def _lose(self, lease: HeldLease) -> None:
        log.warning("replica %s lost job %s: no heartbeat", lease.replica, lease.job_id)
        job = await self._sql(self._store.get_job, lease.job_id)
        if job is not None and job.attempts >= self.policy.max_attempts:
            await self._end(lease.job_id, replace(poison_ending(job), fence=lease.fence))
        else:
            await self._requeue(lease.job_id, lease.fence, count_attempt=True)

    async def _requeue(self, job_id: str, fence: int, *, count_attempt: bool) -> bool:
        job = await self._sql(self._store.requeue_job, job_id, fence, count_attempt)
        self._leases.drop(job_id, fence)
        if job is None:
            return False
        await self._admit(job)
        return True

    async def _end(self, job_id: str, ending: Ending) -> bool:
        job = await self._sql(ending.write, self._store, job_id)
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
        end = self._ends.pop(job_id, None)
        if end is not None:
            end.set()

    async def _sql(self, call: Callable[..., T], *arguments: Any) -> T:
        for delay in self.policy.storage_delays:
            try:
                return await asyncio.to_thread(call, *arguments)
            except StorageFailed as error:
                log.warning("the job store is asked again: %s", error)
            await self._sleep(delay)
        return await asyncio.to_thread(call, *arguments)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
