"""Nothing is drawn whose prompt was not checked, and nothing that was refused is shown."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from calotype.serving.core.decision import CheckScope, Decision
from calotype.serving.core.errors import InvalidRequest, ModerationUnavailable
from calotype.serving.database.database import Database
from calotype.serving.dispatch.dispatcher import Dispatcher
from calotype.serving.dispatch.policy import DispatchPolicy
from calotype.serving.jobs.lease import Lease
from calotype.serving.jobs.records import JobRecord
from calotype.serving.jobs.result import (
    BlockedImage,
    GenerationResult,
)
from calotype.serving.testing.in_memory import ManualClock, ScriptedSafety, decision

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


async def test_a_blocked_prompt_is_never_leased(
    dispatcher: Dispatcher, database: Database, safety: ScriptedSafety, add_job: AddJob
) -> None:
    safety.prompt = lambda text: decision("input", blocked=["sexual", "hate"])
    job = add_job()
    await dispatcher.submit(job.id)
    await dispatcher.wait(job.id, 600)
    payload = error(database, job)
    assert payload["class"] == "ContentBlocked"
    assert payload["code"] == "moderation_blocked"
    assert payload["details"]["moderation_details"] == {
        "moderation_stage": "input",
        "categories": ["hate", "sexual"],
    }
    assert "request ID req_1. safety_violations=[hate,sexual]." in payload["message"]
    found = database.jobs.get_job(job.id)
    assert found is not None and found.moderation is not None
    assert found.moderation["input"]["verdict"] == "BLOCK"
    assert found.attempts == 0


async def test_checking_is_repeated_while_the_moderator_is_restarted(
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
        decision("input", unavailable=True),
        {},
    ],
    ids=["connection", "unavailable", "bug", "error-verdict", "no-decision"],
)
async def test_what_cannot_be_checked_waits_and_is_never_drawn(
    dispatcher: Dispatcher,
    database: Database,
    safety: ScriptedSafety,
    clock: ManualClock,
    add_job: AddJob,
    broken: Any,
) -> None:
    def prompt(text: str) -> dict[str, Any]:
        if isinstance(broken, Exception):
            raise broken
        return dict(broken)

    safety.prompt = prompt
    job = add_job()
    await dispatcher.submit(job.id)
    while not dispatcher.snapshot().postponed:
        await asyncio.sleep(0)
    assert status(database, job) == "queued"
    assert await dispatcher.lease("r1", 1, 0.05) == []
    for _ in range(60):
        clock.advance(30)
        await dispatcher.sweep()
        while dispatcher.snapshot().checking:
            await asyncio.sleep(0)
    payload = error(database, job)
    assert payload["class"] == "DependencyUnavailable"
    assert payload["details"]["reason"] == "safety_stage_unavailable"


async def test_a_fault_that_no_repetition_cures_ends_the_job_at_once(
    dispatcher: Dispatcher, database: Database, safety: ScriptedSafety, add_job: AddJob
) -> None:
    def prompt(text: str) -> dict[str, Any]:
        raise InvalidRequest("a refusal that no repetition cures")

    safety.prompt = prompt
    job = add_job()
    await dispatcher.submit(job.id)
    await dispatcher.wait(job.id, 600)
    assert error(database, job)["class"] == "ModerationUnavailable"


class WaitingSafety(ScriptedSafety):
    """Decides on the prompt "slow" only once it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may_decide = asyncio.Event()

    async def check_prompt(self, text: str, scope: CheckScope | None = None) -> Decision:
        if text == "slow":
            await self.may_decide.wait()
        return await super().check_prompt(text, scope)


async def test_a_slow_check_of_one_job_does_not_delay_another(
    database: Database, clock: ManualClock, add_job: AddJob
) -> None:
    safety = WaitingSafety()
    dispatcher = Dispatcher(database, safety, clock, DispatchPolicy(sweep_seconds=None))
    slow, quick = add_job("slow"), add_job("quick")
    await dispatcher.submit(slow.id)
    await dispatcher.submit(quick.id)
    assert (await take(dispatcher)).job_id == quick.id
    assert dispatcher.snapshot().checking == 1
    safety.may_decide.set()
    assert (await take(dispatcher)).job_id == slow.id
    await dispatcher.stop()


async def test_teams_take_turns_at_the_safety_stage(
    database: Database, clock: ManualClock, add_job: AddJob
) -> None:
    safety, checked = WaitingSafety(), list[str]()
    safety.prompt = lambda text: checked.append(text) or decision("input")  # type: ignore[func-returns-value]
    policy = DispatchPolicy(sweep_seconds=None, checks_at_once=1)
    dispatcher = Dispatcher(database, safety, clock, policy)
    await dispatcher.submit(add_job("slow", team="greedy").id)
    for number in range(5):
        await dispatcher.submit(add_job(f"greedy {number}", team="greedy").id)
    await dispatcher.submit(add_job("mine", team="idle").id)
    safety.may_decide.set()
    while dispatcher.snapshot().checking:
        await asyncio.sleep(0)
    assert checked.index("mine") <= 2, checked
    await dispatcher.stop()


async def test_a_wholly_blocked_batch_ends_as_blocked(
    dispatcher: Dispatcher, database: Database, add_job: AddJob
) -> None:
    job = add_job()
    await dispatcher.submit(job.id)
    lease = await take(dispatcher)
    result = GenerationResult([], [BlockedImage(0, ["sexual"], "dec_1", "default@1")])
    assert await dispatcher.complete(job.id, lease.fence, result)
    details = error(database, job)["details"]
    assert details["moderation_details"]["moderation_stage"] == "output"
    assert details["moderation"] == {
        "decision_id": "dec_1",
        "policy": "default@1",
        "appeal_url": "/v1/moderation/appeals",
        "user_message": "Sexual or nude content is not made here.",
    }
