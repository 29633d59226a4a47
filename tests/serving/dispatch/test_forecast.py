"""Estimates are true: positions, ends and promises against what then really happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from calotype.serving.database.database import Database
from calotype.serving.dispatch.dispatcher import Dispatcher
from calotype.serving.dispatch.policy import DispatchPolicy
from calotype.serving.jobs.forecast import Forecast, promise
from calotype.serving.jobs.lease import Lease, LeaseProgress
from calotype.serving.jobs.predictor import Work
from calotype.serving.jobs.records import JobRecord
from calotype.serving.testing.in_memory import ManualClock, ScriptedSafety, drawn_result

AddJob = Callable[..., JobRecord]
SECONDS = {1: 2.0, 2: 4.5, 4: 8.0}
"""Device seconds of a job by its number of pictures; beside them each takes a fifth more."""


@pytest.fixture
def database(file_database: Database) -> Database:
    """Estimates do not depend on the database; `test_forecasts` has one stored in both."""
    return file_database


@pytest.fixture
async def dispatcher(database: Database, clock: ManualClock) -> AsyncIterator[Dispatcher]:
    policy = DispatchPolicy(sweep_seconds=None, lease_seconds=1e6)
    dispatcher = Dispatcher(database, ScriptedSafety(), clock, policy, model="shapes")
    await dispatcher.start()
    yield dispatcher
    await dispatcher.stop()


async def submit(dispatcher: Dispatcher, *jobs: JobRecord) -> None:
    for job in jobs:
        await dispatcher.submit(job.id)
    while dispatcher.snapshot().checking:
        await asyncio.sleep(0.001)


async def draw(dispatcher: Dispatcher, clock: ManualClock, slots: int = 1) -> list[Lease]:
    """Draws up to ``slots`` jobs that share the device; the clock goes on as they would take."""
    leases = await dispatcher.lease("r1", slots, 1)
    left = {lease.job_id: 1.2 * SECONDS[lease.request.n] for lease in leases}
    by_id = {lease.job_id: lease for lease in leases}
    while left:
        job_id = min(left, key=lambda name: left[name])
        share = left[job_id]
        clock.advance(share * len(left))
        left = {name: rest - share for name, rest in left.items() if name != job_id}
        lease = by_id[job_id]
        result = drawn_result(lease, gpu_seconds=SECONDS[lease.request.n])
        assert await dispatcher.complete(job_id, lease.fence, result)
    return leases


async def learn(dispatcher: Dispatcher, add_job: AddJob, clock: ManualClock) -> None:
    for _ in range(2):
        jobs = [add_job(n=n) for n in SECONDS]
        await submit(dispatcher, *jobs)
        for _ in jobs:
            await draw(dispatcher, clock)


async def test_positions_and_estimates_are_true_within_a_quarter(
    dispatcher: Dispatcher, database: Database, add_job: AddJob, clock: ManualClock
) -> None:
    await learn(dispatcher, add_job, clock)
    sizes = [1, 2, 4, 1, 1, 2, 4, 4, 1, 2, 1, 4]
    jobs = [add_job(n=n, team="ab"[i % 2]) for i, n in enumerate(sizes)]
    await submit(dispatcher, *jobs)
    await dispatcher.sweep()
    told, began = database.forecasts.get_forecast("shapes"), clock.time()
    assert told.measured and told.queued == len(jobs)
    order: list[str] = []
    while len(order) < len(jobs):
        for lease in await draw(dispatcher, clock):
            took = clock.time() - began
            assert told.positions[lease.job_id] == len(order)
            assert told.ends[lease.job_id] == pytest.approx(took, rel=0.25)
            order.append(lease.job_id)
    await dispatcher.sweep()
    assert database.forecasts.get_forecast("shapes").backlog_seconds == 0


async def test_estimates_hold_when_jobs_share_a_device(
    dispatcher: Dispatcher, database: Database, add_job: AddJob, clock: ManualClock
) -> None:
    await learn(dispatcher, add_job, clock)
    jobs = [add_job(n=2) for _ in range(16)]
    await submit(dispatcher, *jobs)
    await draw(dispatcher, clock, slots=4)
    await dispatcher.sweep()
    told, began = database.forecasts.get_forecast("shapes"), clock.time()
    while dispatcher.snapshot().queued:
        leases = await draw(dispatcher, clock, slots=4)
        took = clock.time() - began
        for lease in leases:
            assert told.ends[lease.job_id] == pytest.approx(took, rel=0.25, abs=12)
    assert told.backlog_seconds == pytest.approx(clock.time() - began, rel=0.25)


async def test_a_new_job_stands_behind_the_backlog(
    dispatcher: Dispatcher, database: Database, add_job: AddJob, clock: ManualClock
) -> None:
    await learn(dispatcher, add_job, clock)
    await submit(dispatcher, *[add_job(n=1) for _ in range(10)])
    await dispatcher.sweep()
    told = database.forecasts.get_forecast("shapes")
    work = Work.from_request(add_job(n=4).request)
    assert told.device_seconds(work) == pytest.approx(8.0, rel=0.1)
    assert told.new_job_seconds(work) == pytest.approx(1.2 * (10 * 2.0 + 8.0), rel=0.25)


async def test_work_that_is_half_done_counts_half(
    dispatcher: Dispatcher, database: Database, add_job: AddJob, clock: ManualClock
) -> None:
    await learn(dispatcher, add_job, clock)
    job = add_job(n=4)
    await submit(dispatcher, job)
    [lease] = await dispatcher.lease("r1", 1, 600)
    await dispatcher.heartbeat("r1", {job.id: LeaseProgress(lease.fence, 10, 20)})
    await dispatcher.sweep()
    assert database.forecasts.get_forecast("shapes").ends[job.id] == pytest.approx(
        1.2 * 4.0, rel=0.25
    )


async def test_an_unmeasured_model_says_so(database: Database) -> None:
    assert not database.forecasts.get_forecast("never served").measured
    assert Forecast("x").seconds_left("job_1", 0.0) is None


def test_a_promise_leaves_a_quarter() -> None:
    assert promise(100.0) >= 125.0


async def test_two_equal_teams_get_equal_time_whatever_they_ask_for(
    dispatcher: Dispatcher, add_job: AddJob, clock: ManualClock
) -> None:
    await learn(dispatcher, add_job, clock)
    await submit(dispatcher, *[add_job(n=1, team="a") for _ in range(90)])
    await draw(dispatcher, clock)
    late = [add_job(n=4, team="b") for _ in range(22)]
    await submit(dispatcher, *late)
    seconds = {"a": 0.0, "b": 0.0}
    first_of_b = None
    teams = {job.id for job in late}
    for place in range(100):
        for lease in await draw(dispatcher, clock):
            team = "b" if lease.job_id in teams else "a"
            seconds[team] += SECONDS[lease.request.n]
            first_of_b = place if team == "b" and first_of_b is None else first_of_b
        if not teams - {"done"} or seconds["b"] >= 160:
            break
    assert first_of_b is not None and first_of_b < 2, "it starts within two leases"
    assert abs(seconds["a"] - seconds["b"]) <= 0.1 * max(seconds.values())
