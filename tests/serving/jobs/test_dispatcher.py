"""Leases, fences, deaths, refusals: every job ends once, whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from calotype.serving.errors import InvalidRequest, ModerationUnavailable, Overloaded
from calotype.serving.jobs.dispatch_policy import DispatchPolicy
from calotype.serving.jobs.dispatcher import Dispatcher
from calotype.serving.jobs.judging import JudgingPolicy
from calotype.serving.jobs.leases import Lease
from calotype.serving.jobs.records import JobRecord
from calotype.serving.jobs.result import (
    BlockedImage,
    GenerationResult,
    ImageResult,
    openai_usage,
)
from calotype.serving.jobs.store import JobStore
from calotype.serving.request import ImageSize
from calotype.serving.testing import ManualClock, ScriptedSafety, decision

AddJob = Callable[..., JobRecord]

POLICY = DispatchPolicy(
    sweep_seconds=None, max_queue=5, judging=JudgingPolicy(delays=(0.0, 0.0, 0.0))
)


async def no_pause(seconds: float) -> None:
    await asyncio.sleep(0)


@pytest.fixture
def safety() -> ScriptedSafety:
    return ScriptedSafety()


@pytest.fixture
async def dispatcher(
    store: JobStore, safety: ScriptedSafety, clock: ManualClock
) -> AsyncIterator[Dispatcher]:
    dispatcher = Dispatcher(store, safety, clock, POLICY, sleep=no_pause)
    await dispatcher.start()
    yield dispatcher
    await dispatcher.stop()


def drawn(lease: Lease) -> dict[str, Any]:
    image = ImageResult(
        asset_id=f"asset_{lease.job_id}_{lease.fence}",
        blob_key="a/b.png",
        index=0,
        seed=7,
        width=128,
        height=128,
        content_type="image/png",
        sha256="0" * 64,
    )
    usage = openai_usage(3, [ImageSize(128, 128)])
    return GenerationResult([image], metrics={"gpu_seconds": 0.5}, usage=usage).to_payload()


async def take(dispatcher: Dispatcher, replica: str = "r1", limit: int = 1) -> Lease:
    [lease] = await dispatcher.lease(replica, limit, 5)
    return lease


def status(store: JobStore, job: JobRecord) -> str:
    found = store.get_job(job.id)
    assert found is not None
    return found.status


def error(store: JobStore, job: JobRecord) -> dict[str, Any]:
    found = store.get_job(job.id)
    assert found is not None and found.error is not None
    return found.error


async def test_a_job_is_leased_drawn_and_over(
    dispatcher: Dispatcher, store: JobStore, add_job: AddJob, clock: ManualClock
) -> None:
    job = add_job()
    await dispatcher.submit(job.id)
    clock.advance(2)
    lease = await take(dispatcher)
    assert lease.request["prompt"] == "a dog"
    assert Lease.from_payload(lease.to_payload()) == lease
    running = store.get_job(job.id)
    assert running is not None
    assert (running.status, running.attempts, running.fence) == ("running", 1, lease.fence)
    assert await dispatcher.complete(job.id, lease.fence, drawn(lease))
    over = store.get_job(job.id)
    assert over is not None and over.status == "succeeded" and over.metrics is not None
    assert over.metrics["queue_ms"] == 2000
    assert over.metrics["gpu_seconds"] == 0.5
    assert over.progress == 100
    asset = store.get_asset(f"asset_{job.id}_{lease.fence}")
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
    waiting = asyncio.create_task(dispatcher.lease("r1", 4, 30))
    await asyncio.sleep(0)
    await dispatcher.submit(add_job().id)
    assert len(await asyncio.wait_for(waiting, 10)) == 1


async def test_a_silent_replica_loses_its_lease_and_its_late_word_is_refused(
    dispatcher: Dispatcher, store: JobStore, add_job: AddJob, clock: ManualClock
) -> None:
    job = add_job()
    await dispatcher.submit(job.id)
    zombie = await take(dispatcher, "r1")
    clock.advance(POLICY.lease_seconds + 1)
    await dispatcher.sweep()
    assert status(store, job) == "queued"
    assert not await dispatcher.complete(job.id, zombie.fence, drawn(zombie))
    second = await take(dispatcher, "r2")
    assert second.fence > zombie.fence
    assert await dispatcher.heartbeat("r1", {job.id: [zombie.fence, 3, 20]}) == [job.id]
    assert not await dispatcher.complete(job.id, zombie.fence, drawn(zombie))
    assert not await dispatcher.fail(job.id, zombie.fence, {"message": "late"})
    assert not await dispatcher.release(job.id, zombie.fence)
    assert await dispatcher.complete(job.id, second.fence, drawn(second))
    assert store.get_asset(f"asset_{job.id}_{zombie.fence}") is None
    assert status(store, job) == "succeeded"


async def test_a_heartbeat_keeps_the_lease_and_records_progress(
    dispatcher: Dispatcher, store: JobStore, add_job: AddJob, clock: ManualClock
) -> None:
    job = add_job()
    await dispatcher.submit(job.id)
    lease = await take(dispatcher)
    for step in (5, 10, 15):
        clock.advance(POLICY.lease_seconds - 1)
        assert await dispatcher.heartbeat("r1", {job.id: [lease.fence, step, 20]}) == []
        await dispatcher.sweep()
    found = store.get_job(job.id)
    assert found is not None and (found.status, found.progress) == ("running", 75)
    assert await dispatcher.heartbeat("r2", {job.id: [lease.fence, 16, 20]}) == [job.id]


async def test_a_job_over_which_two_replicas_died_is_given_up(
    dispatcher: Dispatcher, store: JobStore, add_job: AddJob, clock: ManualClock
) -> None:
    job, other = add_job(), add_job()
    await dispatcher.submit(job.id)
    for replica in ("r1", "r2"):
        await take(dispatcher, replica)
        clock.advance(POLICY.lease_seconds + 1)
        await dispatcher.sweep()
    assert error(store, job)["class"] == "EngineError"
    assert error(store, job)["details"] == {"reason": "worker_died", "attempts": 2}
    await dispatcher.submit(other.id)
    lease = await take(dispatcher, "r3")
    assert lease.job_id == other.id


async def test_a_draining_replica_gives_jobs_back_without_a_death(
    dispatcher: Dispatcher, store: JobStore, add_job: AddJob
) -> None:
    job = add_job()
    await dispatcher.submit(job.id)
    for _ in range(4):
        lease = await take(dispatcher)
        assert await dispatcher.release(job.id, lease.fence)
    found = store.get_job(job.id)
    assert found is not None and (found.status, found.attempts) == ("queued", 0)


async def test_completing_twice_says_true_twice_and_ends_once(
    dispatcher: Dispatcher, store: JobStore, add_job: AddJob
) -> None:
    job = add_job()
    await dispatcher.submit(job.id)
    lease = await take(dispatcher)
    assert await dispatcher.complete(job.id, lease.fence, drawn(lease))
    assert await dispatcher.complete(job.id, lease.fence, drawn(lease))
    assert not await dispatcher.fail(job.id, lease.fence, {"message": "no"})
    assert not await dispatcher.cancel(job.id)
    assert status(store, job) == "succeeded"


async def test_every_way_to_end_at_once_ends_a_job_once(
    dispatcher: Dispatcher, store: JobStore, add_job: AddJob
) -> None:
    for _ in range(5):
        job = add_job()
        await dispatcher.submit(job.id)
        lease = await take(dispatcher)
        ended = await asyncio.gather(
            dispatcher.cancel(job.id),
            dispatcher.complete(job.id, lease.fence, drawn(lease)),
            dispatcher.fail(job.id, lease.fence, {"message": "x"}),
            dispatcher.cancel(job.id),
        )
        assert sum(ended) == 1
        assert status(store, job) in ("canceled", "succeeded", "failed")


async def test_a_canceled_job_is_not_leased_and_a_running_one_is_called_back(
    dispatcher: Dispatcher, store: JobStore, add_job: AddJob
) -> None:
    queued, running = add_job(), add_job()
    await dispatcher.submit(running.id)
    lease = await take(dispatcher)
    await dispatcher.submit(queued.id)
    assert await dispatcher.cancel(queued.id)
    assert await dispatcher.cancel(running.id)
    assert await dispatcher.lease("r2", 1, 0.05) == []
    assert await dispatcher.heartbeat("r1", {running.id: [lease.fence, 1, 20]}) == [running.id]
    assert not await dispatcher.complete(running.id, lease.fence, drawn(lease))
    assert status(store, running) == status(store, queued) == "canceled"


async def test_a_blocked_prompt_is_never_leased(
    dispatcher: Dispatcher, store: JobStore, safety: ScriptedSafety, add_job: AddJob
) -> None:
    safety.prompt = lambda text: decision("input", blocked=["sexual", "hate"])
    job = add_job()
    await dispatcher.submit(job.id)
    await dispatcher.wait(job.id, 10)
    payload = error(store, job)
    assert payload["class"] == "ContentBlocked"
    assert payload["code"] == "moderation_blocked"
    assert payload["details"]["moderation_details"] == {
        "moderation_stage": "input",
        "categories": ["hate", "sexual"],
    }
    assert "request ID req_1. safety_violations=[hate,sexual]." in payload["message"]
    found = store.get_job(job.id)
    assert found is not None and found.moderation is not None
    assert found.moderation["input"]["verdict"] == "BLOCK"
    assert found.attempts == 0


async def test_judging_is_repeated_while_the_moderator_is_restarted(
    dispatcher: Dispatcher, safety: ScriptedSafety, add_job: AddJob
) -> None:
    answers: list[Any] = [ConnectionError("gone"), ModerationUnavailable("loading")]

    def prompt(text: str) -> dict[str, Any]:
        if answers:
            raise answers.pop()
        return decision("input")

    safety.prompt = prompt
    await dispatcher.submit(add_job().id)
    await take(dispatcher)
    assert answers == []


@pytest.mark.parametrize(
    "broken",
    [
        ConnectionError("gone"),
        ModerationUnavailable("no classifier"),
        ValueError("a bug in a classifier"),
        InvalidRequest("a refusal that no repetition cures"),
        decision("input", unavailable=True),
        {},
    ],
    ids=["connection", "unavailable", "bug", "final", "error-verdict", "no-decision"],
)
async def test_what_cannot_be_judged_fails_closed(
    dispatcher: Dispatcher, store: JobStore, safety: ScriptedSafety, add_job: AddJob, broken: Any
) -> None:
    def prompt(text: str) -> dict[str, Any]:
        if isinstance(broken, Exception):
            raise broken
        return dict(broken)

    safety.prompt = prompt
    job = add_job()
    await dispatcher.submit(job.id)
    await dispatcher.wait(job.id, 10)
    assert error(store, job)["class"] == "ModerationUnavailable"


async def test_slow_judging_of_one_job_does_not_hold_up_another(
    dispatcher: Dispatcher, safety: ScriptedSafety, add_job: AddJob
) -> None:
    may_go_on = asyncio.Event()

    class Slow:
        async def judge_prompt(self, text: str) -> dict[str, Any]:
            if text == "slow":
                await may_go_on.wait()
            return decision("input")

        async def judge_image(self, pixels: Any) -> dict[str, Any]:
            return decision("output")

    dispatcher._safety = Slow()
    slow, quick = add_job("slow"), add_job("quick")
    await dispatcher.submit(slow.id)
    await dispatcher.submit(quick.id)
    assert (await take(dispatcher)).job_id == quick.id
    assert dispatcher.snapshot()["judging"] == 1
    may_go_on.set()
    assert (await take(dispatcher)).job_id == slow.id


async def test_a_wholly_blocked_batch_ends_as_blocked(
    dispatcher: Dispatcher, store: JobStore, add_job: AddJob
) -> None:
    job = add_job()
    await dispatcher.submit(job.id)
    lease = await take(dispatcher)
    result = GenerationResult([], [BlockedImage(0, ["sexual"], "dec_1", "default@1")])
    assert await dispatcher.complete(job.id, lease.fence, result.to_payload())
    details = error(store, job)["details"]
    assert details["moderation_details"]["moderation_stage"] == "output"
    assert details["moderation"] == {"decision_id": "dec_1", "policy": "default@1"}


async def test_a_full_queue_refuses_and_the_refused_job_is_over(
    dispatcher: Dispatcher, store: JobStore, add_job: AddJob
) -> None:
    for _ in range(POLICY.max_queue):
        await dispatcher.submit(add_job().id)
    job = add_job()
    with pytest.raises(Overloaded) as caught:
        await dispatcher.submit(job.id)
    assert caught.value.code == "queue_full"
    assert error(store, job)["code"] == "queue_full"


@pytest.mark.parametrize("leased", [False, True], ids=["queued", "running"])
async def test_a_job_past_its_deadline_ends_as_such(
    dispatcher: Dispatcher, store: JobStore, add_job: AddJob, clock: ManualClock, leased: bool
) -> None:
    job = add_job(deadline=clock.time() + 10)
    await dispatcher.submit(job.id)
    lease = await take(dispatcher) if leased else None
    clock.advance(11)
    await dispatcher.sweep()
    assert error(store, job)["code"] == "generation_timeout"
    assert await dispatcher.lease("r2", 1, 0.05) == []
    if lease:
        assert not await dispatcher.complete(job.id, lease.fence, drawn(lease))


async def test_waiting_returns_when_the_job_ends_or_the_time_is_over(
    dispatcher: Dispatcher, add_job: AddJob
) -> None:
    job = add_job()
    await dispatcher.submit(job.id)
    await dispatcher.wait(job.id, 0.01)
    waiting = asyncio.create_task(dispatcher.wait(job.id, 60))
    lease = await take(dispatcher)
    await dispatcher.complete(job.id, lease.fence, drawn(lease))
    await asyncio.wait_for(waiting, 10)
    await asyncio.wait_for(dispatcher.wait(job.id, 60), 10)
    await asyncio.wait_for(dispatcher.wait("job_unknown", 60), 10)


async def test_waiting_for_a_job_that_nobody_announced_announces_it(
    dispatcher: Dispatcher, add_job: AddJob
) -> None:
    job = add_job()
    waiting = asyncio.create_task(dispatcher.wait(job.id, 60))
    lease = await take(dispatcher)
    await dispatcher.complete(job.id, lease.fence, drawn(lease))
    await asyncio.wait_for(waiting, 10)


async def test_a_rescan_finds_jobs_that_nobody_announced(
    dispatcher: Dispatcher, add_job: AddJob, clock: ManualClock
) -> None:
    job = add_job()
    clock.advance(POLICY.rescan_seconds)
    await dispatcher.sweep()
    assert (await take(dispatcher)).job_id == job.id


async def test_a_new_dispatcher_takes_over_what_the_store_holds(
    dispatcher: Dispatcher, store: JobStore, add_job: AddJob, clock: ManualClock
) -> None:
    alive, dead, queued = add_job("alive"), add_job("dead"), add_job("queued")
    await dispatcher.submit(dead.id)
    dead_lease = await take(dispatcher, "r-dead")
    clock.advance(POLICY.lease_seconds - 1)
    await dispatcher.submit(alive.id)
    alive_lease = await take(dispatcher, "r-alive")
    clock.advance(2)  # dead's lease is over, alive's is not
    await dispatcher.stop()

    calls: list[str] = []
    safety = ScriptedSafety(lambda text: calls.append(text) or decision("input"))  # type: ignore[func-returns-value]
    second = Dispatcher(store, safety, clock, POLICY, sleep=no_pause)
    await second.start()
    try:
        assert await second.heartbeat("r-alive", {alive.id: [alive_lease.fence, 9, 20]}) == []
        assert await second.heartbeat("r-dead", {dead.id: [dead_lease.fence, 9, 20]}) == [dead.id]
        leases = {lease.job_id: lease for lease in [await take(second), await take(second)]}
        assert set(leases) == {dead.id, queued.id}
        assert leases[dead.id].fence > dead_lease.fence
        assert calls == ["queued"], "a prompt that was judged is not judged again"
        assert await second.complete(alive.id, alive_lease.fence, drawn(alive_lease))
    finally:
        await second.stop()


async def test_a_lease_call_that_is_abandoned_gives_its_jobs_back(
    dispatcher: Dispatcher, store: JobStore, add_job: AddJob
) -> None:
    job = add_job()
    await dispatcher.submit(job.id)
    while not dispatcher.snapshot()["queued"]:
        await asyncio.sleep(0)
    asking = asyncio.create_task(dispatcher.lease("gone", 1, 30))
    while dispatcher.snapshot()["queued"]:
        await asyncio.sleep(0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    lease = await take(dispatcher, "r2")
    found = store.get_job(job.id)
    assert found is not None and (lease.job_id, found.attempts) == (job.id, 1)


async def test_two_teams_share_whatever_one_of_them_has_queued(
    store: JobStore, safety: ScriptedSafety, clock: ManualClock, add_job: AddJob
) -> None:
    policy = DispatchPolicy(sweep_seconds=None, judging=POLICY.judging)
    dispatcher = Dispatcher(store, safety, clock, policy, sleep=no_pause)
    first = [add_job(team="a") for _ in range(8)]
    for job in first:
        await dispatcher.submit(job.id)
    while dispatcher.snapshot()["judging"]:
        await asyncio.sleep(0)
    taken = [await take(dispatcher) for _ in range(3)]
    late = [add_job(team="b") for _ in range(2)]
    for job in late:
        await dispatcher.submit(job.id)
    while dispatcher.snapshot()["judging"]:
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
    await dispatcher.complete(first.id, lease.fence, drawn(lease))
    pair = add_job(n=2)
    await dispatcher.submit(pair.id)
    assert dispatcher.backlog_seconds() == pytest.approx(1.0)
    lease = await take(dispatcher)
    await dispatcher.heartbeat("r1", {pair.id: [lease.fence, 10, 20]})
    assert dispatcher.backlog_seconds() == pytest.approx(0.5)
