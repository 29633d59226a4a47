"""Parts that jobs need go away and come back: no job is lost, none is called poison."""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from servers.job_rows import add_job_row

from calotype.serving.core.errors import (
    CalotypeError,
    ModerationUnavailable,
    OutOfMemory,
    Overloaded,
    StorageFailed,
)
from calotype.serving.database.connection import sqlite_url
from calotype.serving.database.database import Database
from calotype.serving.dispatch.dispatcher import Dispatcher
from calotype.serving.dispatch.policy import DispatchPolicy
from calotype.serving.jobs.lease import Lease, LeaseProgress
from calotype.serving.jobs.moderation_checks import CheckRetries
from calotype.serving.jobs.records import JobRecord
from calotype.serving.jobs.result import BlockedImage, GenerationResult, JobMetrics
from calotype.serving.testing.in_memory import (
    ManualClock,
    ScriptedSafety,
    decision,
    drawn_result,
)

AWAY = {
    "text_encoder": Overloaded("The text encoder is away.", details={"part": "text_encoder"}),
    "safety_stage": ModerationUnavailable("The safety stage is away."),
    "storage": StorageFailed("The bucket is away."),
}


async def no_pause(seconds: float) -> None:
    await asyncio.sleep(0)


@dataclass
class Rig:
    database: Database
    dispatcher: Dispatcher
    safety: ScriptedSafety
    clock: ManualClock

    def job(self, prompt: str = "a dog", **more: Any) -> JobRecord:
        return add_job_row(self.database, {"prompt": prompt}, **more)

    async def take(self) -> Lease:
        async with asyncio.timeout(600):
            while not (found := await self.dispatcher.lease("r1", 1, 0.0)):
                await asyncio.sleep(0)
        return found[0]

    async def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)
        await self.dispatcher.sweep()
        while self.dispatcher.snapshot().checking:
            await asyncio.sleep(0)

    def row(self, job: JobRecord) -> JobRecord:
        found = self.database.jobs.get_job(job.id)
        assert found is not None
        return found

    def charged(self) -> float:
        day = "2027-01-15"
        [row] = self.database.usage.report(None, day, day, ("team",))
        return float(row["gpu_seconds"])


@pytest.fixture
def database(tmp_path: pathlib.Path) -> Iterator[Database]:
    database = Database.open(sqlite_url(tmp_path), ManualClock())
    yield database
    database.close()


def new_dispatcher(database: Database, safety: ScriptedSafety) -> Dispatcher:
    policy = DispatchPolicy(
        sweep_seconds=None,
        storage_delays=(0.0,),
        check_retries=CheckRetries(delays=(0.0,)),
    )
    return Dispatcher(database, safety, database.clock, policy, sleep=no_pause)


@pytest.fixture
async def rig(database: Database) -> AsyncIterator[Rig]:
    safety, clock = ScriptedSafety(), database.clock
    assert isinstance(clock, ManualClock)
    dispatcher = new_dispatcher(database, safety)
    await dispatcher.start()
    yield Rig(database, dispatcher, safety, clock)
    await dispatcher.stop()


@pytest.mark.parametrize("part", AWAY)
async def test_a_part_that_is_away_for_ten_minutes_costs_time_and_nothing_else(
    rig: Rig, part: str
) -> None:
    job = rig.job()
    await rig.dispatcher.submit(job.id)
    begun, faults = rig.clock.time(), 0
    while rig.clock.time() - begun < 600:
        lease = await rig.take()
        assert await rig.dispatcher.fail(job.id, lease.fence, AWAY[part])
        faults += 1
        row = rig.row(job)
        assert (row.status, row.attempts) == ("queued", 0)
        assert row.outage is not None and row.outage["part"] == part
        await rig.pass_time(row.outage["retry_at"] - rig.clock.time())
    assert 20 <= faults <= 40, "the pauses grow, but not beyond half a minute"
    lease = await rig.take()
    assert await rig.dispatcher.complete(job.id, lease.fence, drawn_result(lease))
    assert rig.row(job).status == "succeeded"


async def test_a_job_waits_in_no_lease_while_its_pause_lasts(rig: Rig) -> None:
    job = rig.job()
    await rig.dispatcher.submit(job.id)
    lease = await rig.take()
    await rig.dispatcher.fail(job.id, lease.fence, AWAY["storage"])
    assert await rig.dispatcher.lease("r1", 1, 0.01) == []
    assert rig.dispatcher.snapshot().postponed == 1
    assert rig.database.jobs.count_waiting() == {("shapes", "storage"): 1}
    await rig.pass_time(1.0)
    assert (await rig.take()).job_id == job.id


async def test_an_outage_that_does_not_end_ends_the_job_with_its_reason(rig: Rig) -> None:
    job = rig.job()
    await rig.dispatcher.submit(job.id)
    begun = rig.clock.time()
    while not rig.row(job).over:
        lease = await rig.take()
        await rig.dispatcher.fail(job.id, lease.fence, AWAY["text_encoder"])
        await rig.pass_time(30.0)
    limit = rig.dispatcher.policy.max_outage_seconds
    assert limit <= rig.clock.time() - begun <= limit + 60
    error = rig.row(job).error
    assert error is not None
    assert (error["class"], error["code"]) == ("DependencyUnavailable", "dependency_unavailable")
    assert error["details"]["reason"] == "text_encoder_unavailable"


async def test_a_deadline_ends_a_job_that_waits(rig: Rig) -> None:
    job = rig.job(deadline=rig.clock.time() + 60)
    await rig.dispatcher.submit(job.id)
    lease = await rig.take()
    await rig.dispatcher.fail(job.id, lease.fence, AWAY["text_encoder"])
    await rig.pass_time(61)
    error = rig.row(job).error
    assert error is not None and error["code"] == "generation_timeout"


async def test_memory_that_others_hold_is_waited_for_and_a_request_too_large_is_not(
    rig: Rig,
) -> None:
    small, large = rig.job(), rig.job()
    await rig.dispatcher.submit(small.id)
    lease = await rig.take()
    crowded = OutOfMemory("no room", details={"part": "device_memory"})
    await rig.dispatcher.fail(small.id, lease.fence, crowded)
    assert rig.row(small).status == "queued"
    await rig.dispatcher.submit(large.id)
    lease = await rig.take()
    await rig.dispatcher.fail(large.id, lease.fence, OutOfMemory("no room"))
    assert (rig.row(large).error or {})["code"] == "resolution_too_large"


async def test_a_text_that_classifiers_hang_over_is_refused_as_itself(rig: Rig) -> None:
    asked: list[str] = []

    def check(text: str) -> dict[str, Any]:
        if text != "hang":
            return decision("input")
        asked.append(text)
        return {**decision("input", unavailable=True), "timed_out": True}

    rig.safety.prompt = check
    hanging, other = rig.job(prompt="hang"), rig.job()
    for job in (hanging, other):
        await rig.dispatcher.submit(job.id)
    assert (await rig.take()).job_id == other.id
    await rig.pass_time(0)
    assert rig.database.jobs.count_waiting() == {("shapes", "safety_check"): 1}, "in the metrics"
    for _ in range(20):
        await rig.pass_time(30)
    row = rig.row(hanging)
    assert (row.error or {})["details"]["reason"] == "safety_check_unavailable"
    assert len(asked) == 3, "not one moderator after the other, for as long as an outage may last"


async def test_a_restarted_dispatcher_keeps_the_pause_and_the_count(rig: Rig) -> None:
    job = rig.job()
    await rig.dispatcher.submit(job.id)
    for _ in range(3):
        lease = await rig.take()
        await rig.dispatcher.fail(job.id, lease.fence, AWAY["text_encoder"])
        await rig.pass_time((rig.row(job).outage or {})["retry_at"] - rig.clock.time())
    lease = await rig.take()
    await rig.dispatcher.fail(job.id, lease.fence, AWAY["text_encoder"])
    await rig.dispatcher.stop()
    rig.dispatcher = new_dispatcher(rig.database, rig.safety)
    await rig.dispatcher.start()
    assert await rig.dispatcher.lease("r1", 1, 0.01) == []
    await rig.pass_time(8.0)
    assert (await rig.take()).job_id == job.id
    assert (rig.row(job).outage or {})["faults"] == 4


def away(calls: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """``real``, which is away for so many calls."""
    left = [calls]

    def sometimes(*arguments: Any, **named: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise StorageFailed("The job database is away.")
        return real(*arguments, **named)

    return sometimes


@pytest.mark.parametrize("way", ["release", "fail"])
async def test_a_lease_that_is_given_back_while_the_database_is_away_is_no_death(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    job = rig.job()
    await rig.dispatcher.submit(job.id)
    for _ in range(4):
        lease = await rig.take()
        jobs = rig.database.jobs
        with monkeypatch.context() as patch:
            patch.setattr(jobs, "requeue_job", away(2, jobs.requeue_job))
            with pytest.raises(StorageFailed):
                if way == "release":
                    await rig.dispatcher.release(job.id, lease.fence)
                else:
                    await rig.dispatcher.fail(job.id, lease.fence, AWAY["storage"])
        await rig.pass_time(rig.dispatcher.policy.lease_seconds + 1)
        await rig.pass_time(31)
    row = rig.row(job)
    assert (row.status, row.attempts) == ("queued", 0)


@pytest.mark.parametrize("lost", ["start_job", "requeue_job"])
async def test_an_answer_of_the_database_that_is_lost_loses_no_job(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """The change was committed, and the connection broke before that was said."""
    job = rig.job()
    await rig.dispatcher.submit(job.id)
    while not rig.dispatcher.snapshot().queued:
        await asyncio.sleep(0)
    real = getattr(rig.database.jobs, lost)
    broken = [True]

    def once(*arguments: Any) -> Any:
        answer = real(*arguments)
        if broken and broken.pop():
            raise StorageFailed("The connection broke.")
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(rig.database.jobs, lost, once)
        if lost == "requeue_job":
            lease = await rig.take()
            await rig.dispatcher.release(job.id, lease.fence)
        else:
            assert await rig.dispatcher.lease("r1", 1, 0.01) == []
    await rig.pass_time(rig.dispatcher.policy.lease_seconds + rig.dispatcher.policy.rescan_seconds)
    lease = await rig.take()
    assert await rig.dispatcher.complete(job.id, lease.fence, drawn_result(lease))
    assert rig.row(job).status == "succeeded"


async def wait_until_given_up(rig: Rig, job: JobRecord, lease: Lease) -> None:
    while True:
        await rig.dispatcher.fail(job.id, lease.fence, AWAY["storage"])
        if rig.row(job).over:
            return
        await rig.pass_time(30)
        lease = await rig.take()
        await rig.dispatcher.heartbeat("r1", {job.id: LeaseProgress(lease.fence, 15, 20, 7.5)})


ENDINGS: dict[str, Callable[[Rig, JobRecord, Lease], Any]] = {
    "cancel": lambda rig, job, lease: rig.dispatcher.cancel(job.id),
    "deadline": lambda rig, job, lease: rig.pass_time(2000),
    "failure": lambda rig, job, lease: rig.dispatcher.fail(
        job.id, lease.fence, CalotypeError("a bug")
    ),
    "refused output": lambda rig, job, lease: rig.dispatcher.complete(
        job.id,
        lease.fence,
        GenerationResult([], [BlockedImage(0, ["sexual"])], JobMetrics(gpu_seconds=7.5)),
    ),
    "outage": wait_until_given_up,
}


@pytest.mark.parametrize("ending", ENDINGS)
async def test_every_ending_settles_what_was_measured(rig: Rig, ending: str) -> None:
    job = rig.job(deadline=rig.clock.time() + 1900, price=2.0, reserved_seconds=100.0)
    await rig.dispatcher.submit(job.id)
    lease = await rig.take()
    await rig.dispatcher.fail(job.id, lease.fence, AWAY["storage"])
    await rig.pass_time(5)
    lease = await rig.take()
    await rig.dispatcher.heartbeat("r1", {job.id: LeaseProgress(lease.fence, 15, 20, 7.5)})
    await ENDINGS[ending](rig, job, lease)
    assert rig.row(job).over
    assert rig.charged() == 7.5


async def test_a_dispatcher_that_stood_still_takes_no_lease_away(database: Database) -> None:
    clock = database.clock
    assert isinstance(clock, ManualClock)
    pauses: asyncio.Queue[float] = asyncio.Queue()
    rounds = 0

    async def sleep(seconds: float) -> None:
        """Lets so much time pass as the test says, whatever was wished."""
        nonlocal rounds
        rounds += 1
        clock.advance(await pauses.get())

    async def pass_time(seconds: float) -> None:
        before = rounds
        pauses.put_nowait(seconds)
        while rounds == before:
            await asyncio.sleep(0)

    policy = DispatchPolicy(sweep_seconds=1.0, lease_seconds=12.0)
    dispatcher = Dispatcher(database, ScriptedSafety(), clock, policy, sleep=sleep)
    await dispatcher.start()
    rig = Rig(database, dispatcher, ScriptedSafety(), clock)
    job = rig.job()
    await dispatcher.submit(job.id)
    lease = await rig.take()
    beat = {job.id: LeaseProgress(lease.fence, 1, 20)}
    await pass_time(60)
    assert await dispatcher.heartbeat("r1", beat) == []
    for _ in range(14):
        await pass_time(1)
    assert await dispatcher.heartbeat("r1", beat) == [job.id]
    await dispatcher.stop()
