"""Leases, fences, deaths, refusals: every job ends once, whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import text

from calotype.serving.core.errors import EngineError
from calotype.serving.database.database import Database
from calotype.serving.dispatch.dispatcher import Dispatcher
from calotype.serving.dispatch.policy import DispatchPolicy
from calotype.serving.jobs.lease import Lease, LeaseProgress
from calotype.serving.jobs.records import JobRecord
from calotype.serving.testing.in_memory import ManualClock, ScriptedSafety, decision, drawn_result

AddJob = Callable[..., JobRecord]


async def take(dispatcher: Dispatcher, replica: str = "r1", limit: int = 1) -> Lease:
    [lease] = await dispatcher.lease(replica, limit, 600)
    return lease


def status(database: Database, job: JobRecord) -> str:
    found = database.jobs.get_job(job.id)
    assert found is not None
    return found.status


def error(database: Database, job: JobRecord) -> dict[str, Any]:
    found = database.jobs.get_job(job.id)
    assert found is not None and found.error is not None
    return found.error


async def test_a_job_is_leased_drawn_and_over(
    dispatcher: Dispatcher, database: Database, add_job: AddJob, clock: ManualClock
) -> None:
    job = add_job()
    await dispatcher.submit(job.id)
    clock.advance(2)
    lease = await take(dispatcher)
    assert lease.request.prompt == "a dog"
    assert Lease.from_payload(lease.to_payload()) == lease
    running = database.jobs.get_job(job.id)
    assert running is not None
    assert (running.status, running.attempts, running.fence) == ("running", 1, lease.fence)
    assert await dispatcher.complete(job.id, lease.fence, drawn_result(lease))
    over = database.jobs.get_job(job.id)
    assert over is not None and over.status == "succeeded" and over.metrics is not None
    assert over.metrics["queue_ms"] == 2000
    assert over.metrics["gpu_seconds"] == 0.5
    assert over.progress == 100
    asset = database.files.get_asset(f"asset_{job.id}_{lease.fence}")
    assert asset is not None and asset.team_id == job.team_id
    assert dispatcher.backlog_seconds() == 0


async def test_submitting_twice_leases_once(dispatcher: Dispatcher, add_job: AddJob) -> None:
    job = add_job()
    await asyncio.gather(*(dispatcher.submit(job.id) for _ in range(5)))
    await take(dispatcher)
    assert await dispatcher.lease("r2", 1, 0.05) == []


async def test_a_waiting_replica_is_woken_by_a_submission(
    dispatcher: Dispatcher, add_job: AddJob
) -> None:
    waiting = asyncio.create_task(dispatcher.lease("r1", 4, 6000))
    await asyncio.sleep(0)
    await dispatcher.submit(add_job().id)
    assert len(await asyncio.wait_for(waiting, 600)) == 1


async def test_a_silent_replica_loses_its_lease_and_its_late_word_is_refused(
    dispatcher: Dispatcher, database: Database, add_job: AddJob, clock: ManualClock
) -> None:
    job = add_job()
    await dispatcher.submit(job.id)
    zombie = await take(dispatcher, "r1")
    clock.advance(dispatcher.policy.lease_seconds + 1)
    await dispatcher.sweep()
    assert status(database, job) == "queued"
    assert not await dispatcher.complete(job.id, zombie.fence, drawn_result(zombie))
    second = await take(dispatcher, "r2")
    assert second.fence > zombie.fence
    assert await dispatcher.heartbeat("r1", {job.id: LeaseProgress(zombie.fence, 3, 20)}) == [
        job.id
    ]
    assert not await dispatcher.complete(job.id, zombie.fence, drawn_result(zombie))
    assert not await dispatcher.fail(job.id, zombie.fence, EngineError("late"))
    assert not await dispatcher.release(job.id, zombie.fence)
    assert await dispatcher.complete(job.id, second.fence, drawn_result(second))
    assert database.files.get_asset(f"asset_{job.id}_{zombie.fence}") is None
    assert status(database, job) == "succeeded"


async def test_a_heartbeat_keeps_the_lease_and_records_progress(
    dispatcher: Dispatcher, database: Database, add_job: AddJob, clock: ManualClock
) -> None:
    job = add_job()
    await dispatcher.submit(job.id)
    lease = await take(dispatcher)
    for step in (5, 10, 15):
        clock.advance(dispatcher.policy.lease_seconds - 1)
        assert (
            await dispatcher.heartbeat("r1", {job.id: LeaseProgress(lease.fence, step, 20)}) == []
        )
        await dispatcher.sweep()
    found = database.jobs.get_job(job.id)
    assert found is not None and (found.status, found.progress) == ("running", 75)
    assert await dispatcher.heartbeat("r2", {job.id: LeaseProgress(lease.fence, 16, 20)}) == [
        job.id
    ]


async def test_a_job_over_which_two_replicas_died_is_given_up(
    dispatcher: Dispatcher, database: Database, add_job: AddJob, clock: ManualClock
) -> None:
    job, other = add_job(), add_job()
    await dispatcher.submit(job.id)
    for replica in ("r1", "r2"):
        await take(dispatcher, replica)
        clock.advance(dispatcher.policy.lease_seconds + 1)
        await dispatcher.sweep()
    assert error(database, job)["class"] == "EngineError"
    assert error(database, job)["details"] == {"reason": "worker_died", "attempts": 2}
    await dispatcher.submit(other.id)
    lease = await take(dispatcher, "r3")
    assert lease.job_id == other.id


async def test_a_draining_replica_gives_jobs_back_without_a_death(
    dispatcher: Dispatcher, database: Database, add_job: AddJob
) -> None:
    job = add_job()
    await dispatcher.submit(job.id)
    for _ in range(4):
        lease = await take(dispatcher)
        assert await dispatcher.release(job.id, lease.fence)
    found = database.jobs.get_job(job.id)
    assert found is not None and (found.status, found.attempts) == ("queued", 0)


async def test_completing_twice_says_true_twice_and_ends_once(
    dispatcher: Dispatcher, database: Database, add_job: AddJob
) -> None:
    job = add_job()
    await dispatcher.submit(job.id)
    lease = await take(dispatcher)
    assert await dispatcher.complete(job.id, lease.fence, drawn_result(lease))
    assert await dispatcher.complete(job.id, lease.fence, drawn_result(lease))
    assert not await dispatcher.fail(job.id, lease.fence, EngineError("no"))
    assert not await dispatcher.cancel(job.id)
    assert status(database, job) == "succeeded"


async def test_every_way_to_end_at_once_ends_a_job_once(
    dispatcher: Dispatcher, database: Database, add_job: AddJob
) -> None:
    for _ in range(5):
        job = add_job()
        await dispatcher.submit(job.id)
        lease = await take(dispatcher)
        ended = await asyncio.gather(
            dispatcher.cancel(job.id),
            dispatcher.complete(job.id, lease.fence, drawn_result(lease)),
            dispatcher.fail(job.id, lease.fence, EngineError("x")),
            dispatcher.cancel(job.id),
        )
        assert sum(ended) == 1
        assert status(database, job) in ("canceled", "succeeded", "failed")


async def test_a_canceled_job_is_not_leased_and_a_running_one_is_called_back(
    dispatcher: Dispatcher, database: Database, add_job: AddJob
) -> None:
    queued, running = add_job(), add_job()
    await dispatcher.submit(running.id)
    lease = await take(dispatcher)
    await dispatcher.submit(queued.id)
    assert await dispatcher.cancel(queued.id)
    assert await dispatcher.cancel(running.id)
    assert await dispatcher.lease("r2", 1, 0.05) == []
    assert await dispatcher.heartbeat("r1", {running.id: LeaseProgress(lease.fence, 1, 20)}) == [
        running.id
    ]
    assert not await dispatcher.complete(running.id, lease.fence, drawn_result(lease))
    assert status(database, running) == status(database, queued) == "canceled"


@pytest.mark.parametrize("leased", [False, True], ids=["queued", "running"])
async def test_a_job_past_its_deadline_ends_as_such(
    dispatcher: Dispatcher, database: Database, add_job: AddJob, clock: ManualClock, leased: bool
) -> None:
    job = add_job(deadline=clock.time() + 10)
    await dispatcher.submit(job.id)
    lease = await take(dispatcher) if leased else None
    clock.advance(11)
    await dispatcher.sweep()
    assert error(database, job)["code"] == "generation_timeout"
    assert await dispatcher.lease("r2", 1, 0.05) == []
    if lease:
        assert not await dispatcher.complete(job.id, lease.fence, drawn_result(lease))


async def test_a_job_that_comes_after_its_deadline_ends_at_once(
    dispatcher: Dispatcher, database: Database, add_job: AddJob, clock: ManualClock
) -> None:
    job = add_job(deadline=clock.time())
    await dispatcher.submit(job.id)
    assert error(database, job)["code"] == "generation_timeout"


@pytest.mark.parametrize("fence", [49, 50])
async def test_a_job_that_was_leased_too_often_is_given_up(
    dispatcher: Dispatcher, database: Database, add_job: AddJob, fence: int
) -> None:
    job = add_job()
    with database.engine.begin() as connection:
        connection.execute(text("UPDATE jobs SET fence = :fence"), {"fence": fence})
    await dispatcher.submit(job.id)
    if fence < DispatchPolicy().max_fences:
        assert (await take(dispatcher)).job_id == job.id
    else:
        assert status(database, job) == "failed"


async def test_waiting_returns_when_the_job_ends_or_the_time_is_over(
    dispatcher: Dispatcher, add_job: AddJob
) -> None:
    job = add_job()
    await dispatcher.submit(job.id)
    await dispatcher.wait(job.id, 0.01)
    waiting = asyncio.create_task(dispatcher.wait(job.id, 6000))
    lease = await take(dispatcher)
    await dispatcher.complete(job.id, lease.fence, drawn_result(lease))
    await asyncio.wait_for(waiting, 600)
    await asyncio.wait_for(dispatcher.wait(job.id, 6000), 600)
    await asyncio.wait_for(dispatcher.wait("job_unknown", 6000), 600)


async def test_waiting_for_a_job_that_nobody_announced_announces_it(
    dispatcher: Dispatcher, add_job: AddJob
) -> None:
    job = add_job()
    waiting = asyncio.create_task(dispatcher.wait(job.id, 6000))
    lease = await take(dispatcher)
    await dispatcher.complete(job.id, lease.fence, drawn_result(lease))
    await asyncio.wait_for(waiting, 600)


async def test_a_rescan_finds_jobs_that_nobody_announced(
    dispatcher: Dispatcher, add_job: AddJob, clock: ManualClock
) -> None:
    job = add_job()
    clock.advance(dispatcher.policy.rescan_seconds)
    await dispatcher.sweep()
    assert (await take(dispatcher)).job_id == job.id


async def test_a_new_dispatcher_takes_over_what_the_database_holds(
    dispatcher: Dispatcher, database: Database, add_job: AddJob, clock: ManualClock
) -> None:
    alive, dead, queued = add_job("alive"), add_job("dead"), add_job("queued")
    await dispatcher.submit(dead.id)
    dead_lease = await take(dispatcher, "r-dead")
    clock.advance(dispatcher.policy.lease_seconds - 1)
    await dispatcher.submit(alive.id)
    alive_lease = await take(dispatcher, "r-alive")
    clock.advance(2)  # dead's lease is over, alive's is not
    await dispatcher.stop()

    calls: list[str] = []
    safety = ScriptedSafety(lambda text: calls.append(text) or decision("input"))  # type: ignore[func-returns-value]
    second = Dispatcher(database, safety, clock, dispatcher.policy)
    await second.start()
    try:
        assert (
            await second.heartbeat("r-alive", {alive.id: LeaseProgress(alive_lease.fence, 9, 20)})
            == []
        )
        assert await second.heartbeat(
            "r-dead", {dead.id: LeaseProgress(dead_lease.fence, 9, 20)}
        ) == [dead.id]
        leases = {lease.job_id: lease for lease in [await take(second), await take(second)]}
        assert set(leases) == {dead.id, queued.id}
        assert leases[dead.id].fence > dead_lease.fence
        assert calls == ["queued"], "a prompt that was checked is not checked again"
        assert await second.complete(alive.id, alive_lease.fence, drawn_result(alive_lease))
    finally:
        await second.stop()


async def test_a_lease_call_that_is_abandoned_gives_its_jobs_back(
    dispatcher: Dispatcher, database: Database, add_job: AddJob
) -> None:
    job = add_job()
    await dispatcher.submit(job.id)
    while not dispatcher.snapshot().queued:
        await asyncio.sleep(0)
    asking = asyncio.create_task(dispatcher.lease("gone", 1, 6000))
    while dispatcher.snapshot().queued:
        await asyncio.sleep(0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    lease = await take(dispatcher, "r2")
    found = database.jobs.get_job(job.id)
    assert found is not None and (lease.job_id, found.attempts) == (job.id, 1)


async def test_two_teams_share_whatever_one_of_them_has_queued(
    database: Database, safety: ScriptedSafety, clock: ManualClock, add_job: AddJob
) -> None:
    policy = DispatchPolicy(sweep_seconds=None)
    dispatcher = Dispatcher(database, safety, clock, policy)
    first = [add_job(team="a") for _ in range(8)]
    for job in first:
        await dispatcher.submit(job.id)
    while dispatcher.snapshot().checking:
        await asyncio.sleep(0)
    taken = [await take(dispatcher) for _ in range(3)]
    late = []
    for _ in range(2):
        clock.advance(0.001)
        late.append(add_job(team="b"))
        await dispatcher.submit(late[-1].id)
    while dispatcher.snapshot().checking:
        await asyncio.sleep(0)
    taken = [await take(dispatcher) for _ in range(4)]
    assert {job.id for job in late} <= {lease.job_id for lease in taken[:4]}
    assert taken[0].job_id == late[0].id or taken[1].job_id == late[0].id
    await dispatcher.stop()


async def test_the_backlog_is_predicted_from_what_was_measured(
    dispatcher: Dispatcher, add_job: AddJob
) -> None:
    first = add_job()
    await dispatcher.submit(first.id)
    lease = await take(dispatcher)
    await dispatcher.complete(first.id, lease.fence, drawn_result(lease))
    pair = add_job(n=2)
    await dispatcher.submit(pair.id)
    assert dispatcher.backlog_seconds() == pytest.approx(1.0)
    lease = await take(dispatcher)
    await dispatcher.heartbeat("r1", {pair.id: LeaseProgress(lease.fence, 10, 20)})
    assert dispatcher.backlog_seconds() == pytest.approx(0.5)


async def test_nobody_waits_for_work_for_as_long_as_a_lease_lasts(dispatcher: Dispatcher) -> None:
    dispatcher.policy = DispatchPolicy(lease_seconds=0.3)
    assert dispatcher.policy.longest_poll < dispatcher.policy.lease_seconds
    async with asyncio.timeout(60):
        assert await dispatcher.lease("r1", 1, 10_000) == []
