"""A machine's clock that is set while jobs run: nothing is lost and nobody is paid twice."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest

from calotype.serving.database.database import Database
from calotype.serving.dispatch.dispatcher import Dispatcher
from calotype.serving.dispatch.policy import DispatchPolicy
from calotype.serving.jobs.lease import LeaseProgress
from calotype.serving.jobs.records import JobRecord
from calotype.serving.testing.in_memory import ManualClock, ScriptedSafety, drawn_result

AddJob = Callable[..., JobRecord]
DAY = 86_400.0


class SetClock(ManualClock):
    """A wall clock that somebody sets; the other one goes on as before."""

    offset = 0.0

    def time(self) -> float:
        return super().time() + self.offset


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
async def dispatcher(database: Database, clock: SetClock) -> AsyncIterator[Dispatcher]:
    policy = DispatchPolicy(sweep_seconds=None)
    dispatcher = Dispatcher(database, ScriptedSafety(), clock, policy)
    await dispatcher.start()
    yield dispatcher
    await dispatcher.stop()


@pytest.mark.parametrize("jump", [DAY, -DAY], ids=["forward", "back"])
async def test_a_running_job_keeps_its_lease_and_ends_once(
    dispatcher: Dispatcher, database: Database, add_job: AddJob, clock: SetClock, jump: float
) -> None:
    running, waiting = add_job(), add_job()
    for job in (running, waiting):
        await dispatcher.submit(job.id)
    [lease] = await dispatcher.lease("r1", 1, 600)
    clock.offset = jump
    await dispatcher.sweep()
    assert await dispatcher.heartbeat("r1", {lease.job_id: LeaseProgress(lease.fence, 3, 20)}) == []
    clock.advance(1)
    await dispatcher.sweep()
    assert await dispatcher.complete(lease.job_id, lease.fence, drawn_result(lease))
    [other] = await dispatcher.lease("r2", 1, 600)
    assert {lease.job_id, other.job_id} == {running.id, waiting.id}
    assert await dispatcher.complete(other.job_id, other.fence, drawn_result(other))
    assert database.jobs.count_jobs() == {("shapes", "succeeded"): 2}


@pytest.mark.parametrize("jump", [DAY, -DAY], ids=["forward", "back"])
async def test_a_silent_replica_loses_its_lease_all_the_same(
    dispatcher: Dispatcher, database: Database, add_job: AddJob, clock: SetClock, jump: float
) -> None:
    job = add_job()
    await dispatcher.submit(job.id)
    await dispatcher.lease("r1", 1, 600)
    clock.offset = jump
    clock.advance(dispatcher.policy.lease_seconds + 1)
    await dispatcher.sweep()
    [lease] = await dispatcher.lease("r2", 1, 600)
    assert lease.job_id == job.id and lease.fence > 1


async def test_a_dispatcher_that_starts_after_the_jump_takes_every_job_over(
    dispatcher: Dispatcher, database: Database, add_job: AddJob, clock: SetClock
) -> None:
    jobs = [add_job() for _ in range(3)]
    for job in jobs:
        await dispatcher.submit(job.id)
    await dispatcher.lease("r1", 1, 600)
    await dispatcher.stop()
    clock.offset = -DAY  # the lease in the row now seems to last for a day
    successor = Dispatcher(database, ScriptedSafety(), clock, DispatchPolicy(sweep_seconds=None))
    await successor.start()
    clock.advance(successor.policy.lease_seconds + 1)
    await successor.sweep()
    found = await successor.lease("r2", 3, 600)
    assert {lease.job_id for lease in found} == {job.id for job in jobs}
    await successor.stop()


async def test_a_deadline_that_a_jump_passes_is_a_typed_end(
    dispatcher: Dispatcher, database: Database, add_job: AddJob, clock: SetClock
) -> None:
    job = add_job(deadline=clock.time() + 60)
    await dispatcher.submit(job.id)
    clock.offset = DAY
    await dispatcher.sweep()
    ended = database.jobs.get_job(job.id)
    assert ended is not None and ended.status == "failed"
    assert (ended.error or {})["code"] == "generation_timeout"
