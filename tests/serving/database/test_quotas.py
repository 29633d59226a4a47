"""Quotas on both databases: reserved, settled, released; exact under races."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from calotype.serving.core.errors import (
    EngineError,
    InvalidRequest,
    Overloaded,
    PermissionDenied,
    QuotaExceeded,
)
from calotype.serving.database.accounts.queue_shares import QueueBound
from calotype.serving.database.database import Database
from calotype.serving.database.schema.tables import team_days, usage_records
from calotype.serving.jobs.endings import Ending
from calotype.serving.jobs.lease import LeaseProgress
from calotype.serving.jobs.records import JobRecord, NewJob
from calotype.serving.jobs.result import ImageResult, JobMetrics, JobOutput, TokenUsage
from calotype.serving.testing.in_memory import ManualClock

AddJob = Callable[..., JobRecord]


def taken(database: Database) -> tuple[float, float, float]:
    """(reserved, used, cost) of all days."""
    with database.engine.connect() as connection:
        rows = connection.execute(team_days.select()).mappings().all()
    return (
        sum(row["reserved_seconds"] for row in rows),
        sum(row["used_seconds"] for row in rows),
        sum(row["used_cost"] for row in rows),
    )


def finish(database: Database, job: JobRecord, seconds: float) -> None:
    leased = database.jobs.start_job(job.id, "r1", 0.0)
    assert leased is not None
    image = ImageResult("asset_1", "a/b.png", 0, 7, 64, 64, "image/png", "0" * 64)
    ending = Ending(
        "succeeded",
        fence=leased.fence,
        metrics=JobMetrics(gpu_seconds=seconds, megapixels=0.5),
        output=JobOutput([image]),
        usage=TokenUsage(3, 64),
    )
    assert database.jobs.finish_job(job.id, ending)


def test_a_quota_is_reserved_settled_and_released(database: Database, add_job: AddJob) -> None:
    database.teams.set_team("default", gpu_seconds_per_day=10.0)
    first = add_job(reserved_seconds=6.0, price=0.5)
    assert taken(database) == (6.0, 0.0, 0.0)
    with pytest.raises(QuotaExceeded, match=r"6\.0 of its 10 GPU-seconds") as caught:
        add_job(reserved_seconds=6.0)
    assert caught.value.code == "insufficient_quota"
    finish(database, first, 2.0)
    assert taken(database) == (0.0, 2.0, 1.0)
    second = add_job(reserved_seconds=6.0, price=0.5)
    assert database.jobs.finish_job(second.id, Ending("failed", error=EngineError("x")))
    assert taken(database) == (0.0, 2.0, 1.0), "what failed before it ran costs nothing"
    third = add_job(reserved_seconds=8.0)
    assert database.jobs.finish_job(third.id, Ending("canceled"))
    assert database.jobs.finish_job(third.id, Ending("canceled")) is None
    assert taken(database) == (0.0, 2.0, 1.0), "a release happens once"


def test_a_new_day_has_a_new_quota(database: Database, add_job: AddJob, clock: ManualClock) -> None:
    database.teams.set_team("default", gpu_seconds_per_day=10.0)
    add_job(reserved_seconds=10.0)
    with pytest.raises(QuotaExceeded):
        add_job(reserved_seconds=0.5)
    clock.advance(86_400)
    add_job(reserved_seconds=10.0)


def test_a_budget_counts_money_and_lasts_a_month(
    database: Database, add_job: AddJob, clock: ManualClock
) -> None:
    database.teams.set_team("default", budget_per_month=1.0)
    finish(database, add_job(reserved_seconds=1.0, price=0.4), 2.0)
    with pytest.raises(QuotaExceeded, match=r"spent 0\.80 of its budget of 1"):
        add_job(reserved_seconds=1.0, price=0.4)
    add_job(reserved_seconds=0.25, price=0.4)
    clock.advance(32 * 86_400)
    add_job(reserved_seconds=2.0, price=0.4)


def test_open_jobs_are_bounded(database: Database, add_job: AddJob) -> None:
    database.teams.set_team("default", concurrent_jobs=2)
    first = add_job()
    add_job()
    with pytest.raises(QuotaExceeded, match="2 open jobs"):
        add_job()
    add_job(team="other")
    database.jobs.finish_job(first.id, Ending("canceled"))
    add_job()


def test_a_rate_is_a_bucket_that_fills(
    database: Database, add_job: AddJob, clock: ManualClock
) -> None:
    database.teams.set_team("default", requests_per_minute=3)
    for _ in range(3):
        add_job()
    with pytest.raises(QuotaExceeded, match="3 requests a minute") as caught:
        add_job()
    assert caught.value.code == "rate_limit_exceeded"
    assert caught.value.retry_after == pytest.approx(20.0)
    clock.advance(20)
    add_job()
    with pytest.raises(QuotaExceeded):
        add_job()


def test_a_clock_that_jumps_back_gives_nothing_and_takes_nothing(
    database: Database, add_job: AddJob, clock: ManualClock
) -> None:
    database.teams.set_team("default", requests_per_minute=2)
    add_job()
    clock.advance(-3600)
    add_job()
    with pytest.raises(QuotaExceeded):
        add_job()
    clock.advance(30)
    add_job()


def test_racing_requests_cannot_overdraw(database: Database, add_job: AddJob) -> None:
    database.teams.set_team("default", requests_per_minute=5, gpu_seconds_per_day=100.0)
    made: list[JobRecord] = []
    refused: list[QuotaExceeded] = []

    def ask() -> None:
        try:
            made.append(add_job(reserved_seconds=1.0))
        except QuotaExceeded as error:
            refused.append(error)

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(made), len(refused)) == (5, 7)
    assert taken(database)[0] == 5.0


def test_a_repeated_idempotency_key_reserves_once(database: Database, add_job: AddJob) -> None:
    first = add_job(idempotency="k" * 64, reserved_seconds=3.0)
    assert add_job(idempotency="k" * 64, reserved_seconds=3.0).id == first.id
    assert taken(database)[0] == 3.0


def test_a_team_may_be_kept_to_some_models(database: Database, add_job: AddJob) -> None:
    database.teams.set_team("default", allowed_models=["flux-2-dev"])
    with pytest.raises(PermissionDenied, match="may use: flux-2-dev"):
        add_job()
    database.teams.set_team("default", allowed_models=None)
    add_job()


@pytest.mark.parametrize(
    ("field", "value"),
    [("requests_per_minute", -1), ("requests_per_minute", 1.5), ("weight", 0), ("weight", None),
     ("budget_per_month", float("nan")), ("concurrent_jobs", True), ("colour", 1)],
)  # fmt: skip
def test_a_limit_that_is_none_is_named(database: Database, field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        database.teams.set_team("default", **{field: value})
    assert caught.value.param == field


def test_usage_is_one_row_for_each_job_that_ended(
    database: Database, add_job: AddJob, clock: ManualClock
) -> None:
    now = clock.time()
    kept, broken = add_job(price=2.0, promised=now + 10), add_job(promised=now + 1)
    other = add_job(team="other")
    clock.advance(5)
    finish(database, kept, 1.5)
    finish(database, broken, 0.5)
    database.jobs.finish_job(other.id, Ending("canceled"))
    assert database.jobs.finish_job(kept.id, Ending("failed")) is None
    with database.engine.connect() as connection:
        rows = connection.execute(usage_records.select()).mappings().all()
    assert len(rows) == 3
    day = rows[0]["day"]
    mine = database.usage.report(kept.team_id, day, day, ["team", "model", "adapter", "day"])
    assert mine == [
        {
            **{"team": "default", "model": "shapes", "adapter": "", "day": day},
            **{"jobs": 2, "succeeded": 2, "images": 2, "megapixels": 1.0, "gpu_seconds": 2.0},
            **{"cost": 3.0, "input_tokens": 6, "output_tokens": 128},
        }
    ]
    assert [row["team"] for row in database.usage.report(None, day, day, ["team"])] == [
        "default",
        "other",
    ]
    assert database.usage.report(None, "2001-01-01", "2001-01-02") == []
    assert database.usage.promises() == [("shapes", 1, 1)]


def test_a_job_that_its_client_ends_costs_the_steps_that_were_done(
    database: Database, add_job: AddJob
) -> None:
    job = add_job(reserved_seconds=8.0, price=0.5)
    leased = database.jobs.start_job(job.id, "r1", 60.0)
    assert leased is not None
    database.jobs.renew_leases("r1", {job.id: LeaseProgress(leased.fence, 15, 20)}, 60.0)
    assert database.jobs.finish_job(job.id, Ending("canceled"))
    assert taken(database) == (0.0, 6.0, 3.0)


def test_racing_requests_share_a_full_queue_exactly(database: Database, add_job: AddJob) -> None:
    bound, made = QueueBound(6), list[str]()
    admit = database.jobs.admit_job

    def bounded(new: NewJob) -> JobRecord:
        return admit(new, bound)[0]

    database.jobs.create_job = bounded  # type: ignore[method-assign]

    def ask(team: str) -> None:
        try:
            made.append(add_job(team=team).team_id)
        except Overloaded as error:
            assert error.code == "queue_full"

    for team in ("greedy", "second"):
        database.teams.ensure_team(team)
        threads = [threading.Thread(target=ask, args=(team,)) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(Counter(made).values()) == [3, 6]
