"""Held pictures in both databases: with the job's end, once, and never lost."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from calotype.serving.core.errors import Conflict, NotFound
from calotype.serving.database.database import Database
from calotype.serving.database.review.cases import CaseRecord, Reviewer
from calotype.serving.database.review.held_images import HELD_SECONDS
from calotype.serving.dispatch.dispatcher import Dispatcher
from calotype.serving.jobs.records import JobRecord
from calotype.serving.jobs.result import GenerationResult, HeldImage, JobMetrics
from calotype.serving.testing.in_memory import ManualClock, ScriptedSafety, decision

AddJob = Callable[..., JobRecord]


def held_image(job: JobRecord, index: int = 0) -> HeldImage:
    asset = f"asset_{job.id[4:]}_{index}"
    return HeldImage(
        *(asset, f"{job.team_id}/held/{asset}.sealed", f"seal {index}", index, 7, 128, 128),
        *("image/png", "0" * 64),
        categories=["violence"],
    )


ANNA, BERTA = Reviewer("anna", "safety"), Reviewer("berta", "safety")


async def ended(
    dispatcher: Dispatcher, database: Database, job: JobRecord, indices: Sequence[int] = (0,)
) -> tuple[JobRecord, list[CaseRecord]]:
    """The job, whose pictures of these numbers are held, and the cases about them."""
    await dispatcher.submit(job.id)
    (lease,) = await dispatcher.lease("one", 1, 600)
    held = [held_image(job, index) for index in indices]
    result = GenerationResult([], metrics=JobMetrics(gpu_seconds=0.5), held=held)
    assert await dispatcher.complete(job.id, lease.fence, result)
    assert not await dispatcher.complete(job.id, lease.fence, result), "a job ends once"
    found = database.jobs.get_job(job.id)
    assert found is not None
    return found, database.cases.list_cases()


async def test_the_end_of_a_job_opens_a_case_for_each_held_picture(
    dispatcher: Dispatcher, database: Database, add_job: AddJob
) -> None:
    job, cases = await ended(dispatcher, database, add_job(n=2), (0, 1))
    assert (job.status, (job.error or {})["code"]) == ("failed", "held_for_review")
    assert {case.kind for case in cases} == {"review"} and len(cases) == 2
    told = (job.moderation or {})["held"]
    assert {entry["case_id"] for entry in told} == {case.id for case in cases}
    for entry in told:
        held = database.held_images.get_held(entry["asset_id"])
        assert held is not None and held.seal == f"seal {held.position}"
    keys = [held_image(job, index).blob_key for index in (0, 1)]
    assert database.files.unknown_blobs(keys) == [], "no sweeper takes them away"


@pytest.mark.parametrize("approved", [True, False])
async def test_a_case_is_decided_once_by_whoever_holds_it(
    dispatcher: Dispatcher, database: Database, add_job: AddJob, approved: bool
) -> None:
    job, (case,) = await ended(dispatcher, database, add_job())

    def decide(reviewer: Reviewer) -> str:
        try:
            if approved:
                database.held_images.release_held(
                    case, reviewer, "", f"{job.team_id}/ab/picture.png", 0
                )
            else:
                database.held_images.reject_held(case, reviewer, "")
        except (Conflict, NotFound) as error:
            return type(error).__name__
        return "done"

    assert decide(Reviewer("nobody", "safety")) == "Conflict"
    assert database.held_images.get_held(case.subject) is not None, "nothing happened"
    assert database.cases.take_case(ANNA) is not None
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        outcomes = list(pool.map(decide, [ANNA] * 4 + [BERTA] * 2))
    assert sorted(outcomes) == ["Conflict"] * 5 + ["done"]
    assert database.held_images.get_held(case.subject) is None
    asset = database.files.get_asset(case.subject, job.team_id)
    assert (asset is not None) is approved
    now = database.jobs.get_job(job.id)
    assert now is not None and now.status == "failed"
    assert (now.moderation or {})["held"][0]["status"] == ("released" if approved else "rejected")
    sealed = held_image(job).blob_key
    assert database.files.garbage(database.clock.time()) == [sealed]


async def test_a_released_picture_lives_as_long_as_others_also_after_its_job(
    dispatcher: Dispatcher, database: Database, add_job: AddJob, clock: ManualClock
) -> None:
    made = add_job(expires=clock.time() + 3600)
    job, (case,) = await ended(dispatcher, database, made)
    clock.advance(7200)
    assert database.retention.purge_jobs() == 1
    assert database.cases.take_case(ANNA) is not None
    database.held_images.release_held(case, ANNA, "", f"{job.team_id}/ab/picture.png", 0)
    asset = database.files.get_asset(case.subject)
    assert asset is not None and asset.expires == pytest.approx(clock.time() + 3600, abs=1)
    assert database.files.expire_assets() == 0


async def test_what_nobody_decides_on_ends_in_time(
    dispatcher: Dispatcher, database: Database, add_job: AddJob, clock: ManualClock
) -> None:
    job, (case,) = await ended(dispatcher, database, add_job())
    clock.advance(HELD_SECONDS - 60)
    assert database.held_images.expire_held() == 0
    clock.advance(120)
    assert (database.held_images.expire_held(), database.held_images.expire_held()) == (1, 0)
    assert database.cases.get_case(case.id).status == "rejected"
    assert database.cases.take_case(ANNA) is None
    now = database.jobs.get_job(job.id)
    assert now is not None and (now.moderation or {})["held"][0]["status"] == "rejected"


async def test_a_prompt_that_is_held_is_leased_with_the_reason(
    dispatcher: Dispatcher, database: Database, safety: ScriptedSafety, add_job: AddJob
) -> None:
    review: dict[str, Any] = decision("input", blocked=["public_figure"]) | {"verdict": "REVIEW"}
    safety.prompt = lambda text: review
    job = add_job()
    await dispatcher.submit(job.id)
    (lease,) = await dispatcher.lease("one", 1, 600)
    assert lease.review_categories == ("public_figure",)
