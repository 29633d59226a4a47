"""Nothing is drawn that was not judged, and nothing that was refused is shown."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from calotype.serving.core.errors import InvalidRequest, ModerationUnavailable
from calotype.serving.database.database import Database
from calotype.serving.dispatch.dispatcher import Dispatcher
from calotype.serving.jobs.lease import Lease
from calotype.serving.jobs.records import JobRecord
from calotype.serving.jobs.result import (
    BlockedImage,
    GenerationResult,
)
from calotype.serving.testing.in_memory import ScriptedSafety, decision

AddJob = Callable[..., JobRecord]


async def take(dispatcher: Dispatcher, replica: str = "r1", limit: int = 1) -> Lease:
    [lease] = await dispatcher.lease(replica, limit, 5)
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
    await dispatcher.wait(job.id, 10)
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
    dispatcher: Dispatcher, database: Database, safety: ScriptedSafety, add_job: AddJob, broken: Any
) -> None:
    def prompt(text: str) -> dict[str, Any]:
        if isinstance(broken, Exception):
            raise broken
        return dict(broken)

    safety.prompt = prompt
    job = add_job()
    await dispatcher.submit(job.id)
    await dispatcher.wait(job.id, 10)
    assert error(database, job)["class"] == "ModerationUnavailable"


async def test_slow_judging_of_one_job_does_not_hold_up_another(
    dispatcher: Dispatcher, safety: ScriptedSafety, add_job: AddJob
) -> None:
    may_go_on = asyncio.Event()

    class Slow:
        async def check_prompt(self, text: str, scope: Any = None) -> dict[str, Any]:
            if text == "slow":
                await may_go_on.wait()
            return decision("input")

        async def check_image(self, pixels: Any) -> dict[str, Any]:
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
    dispatcher: Dispatcher, database: Database, add_job: AddJob
) -> None:
    job = add_job()
    await dispatcher.submit(job.id)
    lease = await take(dispatcher)
    result = GenerationResult([], [BlockedImage(0, ["sexual"], "dec_1", "default@1")])
    assert await dispatcher.complete(job.id, lease.fence, result.to_payload())
    details = error(database, job)["details"]
    assert details["moderation_details"]["moderation_stage"] == "output"
    assert details["moderation"] == {
        "decision_id": "dec_1",
        "policy": "default@1",
        "appeal_url": "/v1/moderation/appeals",
        "user_message": "Sexual or nude content is not made here.",
    }
