"""The job table: compare-and-set, pages, faults of the disk, restarts."""

from __future__ import annotations

import os
import pathlib
import sqlite3
import threading
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy

from calotype.serving.core.errors import EngineError, InvalidRequest, StorageFailed
from calotype.serving.database.connection import sqlite_url
from calotype.serving.database.database import Database
from calotype.serving.jobs.endings import Ending
from calotype.serving.jobs.lifecycle import STATUSES, TERMINAL, may_follow, sources
from calotype.serving.jobs.outage import Outage
from calotype.serving.jobs.records import JobRecord
from calotype.serving.testing.in_memory import ManualClock

AddJob = Callable[..., JobRecord]


def test_a_terminal_state_has_no_successor_and_every_state_can_end() -> None:
    for before in STATUSES:
        followers = [after for after in STATUSES if may_follow(before, after)]
        assert (not followers) == (before in TERMINAL)
    assert sources("succeeded") == {"running"}
    assert sources("canceled") == {"queued", "running"}


def test_a_queued_job_cannot_succeed(database: Database, add_job: AddJob) -> None:
    assert database.jobs.finish_job(add_job().id, Ending("succeeded")) is None


def test_exactly_one_of_many_threads_starts_and_ends_a_job(
    database: Database, add_job: AddJob
) -> None:
    job = add_job()

    def race(call: Callable[[int], Any]) -> int:
        results: list[Any] = []
        threads = [
            threading.Thread(target=lambda i=i: results.append(call(i)))  # type: ignore[misc]
            for i in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(result is not None for result in results)

    assert race(lambda i: database.jobs.start_job(job.id, f"r{i}", 0.0)) == 1
    assert (
        race(
            lambda i: database.jobs.finish_job(job.id, Ending("failed", error=EngineError(str(i))))
        )
        == 1
    )


def test_jobs_are_listed_newest_first_in_pages_of_one_team(
    database: Database, add_job: AddJob, clock: ManualClock
) -> None:
    made = []
    for _ in range(5):
        made.append(add_job().id)
        clock.advance(1)
    add_job(team="other")
    team = database.teams.ensure_team("default").id
    first = database.jobs.list_jobs(team, limit=2)
    rest = database.jobs.list_jobs(team, limit=10, after=first[-1].id)
    assert [job.id for job in first + rest] == made[::-1]
    assert database.jobs.list_jobs(team, status="running") == []
    assert len(database.jobs.list_jobs(team, created_after=clock.time() - 2.5)) == 2
    with pytest.raises(InvalidRequest, match="names no job"):
        database.jobs.list_jobs(team, after="job_none")


def test_another_teams_job_is_not_there(database: Database, add_job: AddJob) -> None:
    job = add_job()
    assert database.jobs.get_job(job.id, "team_other") is None
    assert database.jobs.get_job(job.id, job.team_id) is not None


def test_two_jobs_of_one_idempotency_are_one(database: Database, add_job: AddJob) -> None:
    first = add_job(idempotency="k" * 64)
    assert add_job(idempotency="k" * 64).id == first.id
    database.jobs.forget_idempotency(first.id)
    assert add_job(idempotency="k" * 64).id != first.id


def test_a_lock_that_is_held_for_a_moment_is_waited_for(
    file_database: Database, add_to_file: AddJob, tmp_path: pathlib.Path
) -> None:
    file_database.teams.ensure_team("default")
    other = sqlite3.connect(tmp_path / "calotype.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    made: list[JobRecord] = []
    writer = threading.Thread(target=lambda: made.append(add_to_file()))
    writer.start()
    assert file_database.jobs.count_jobs() == {}, "reading goes on meanwhile"
    other.execute("COMMIT")
    writer.join(600)
    other.close()
    assert made[0].status == "queued"


def test_a_full_disk_is_a_typed_error_and_the_next_write_works(
    file_database: Database, add_to_file: AddJob
) -> None:
    kept = add_to_file()
    with file_database.engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()

    def limit_pages(connection: Any, record: Any) -> None:
        connection.execute(f"PRAGMA max_page_count = {pages}")

    sqlalchemy.event.listen(file_database.engine, "connect", limit_pages)
    file_database.engine.dispose()
    with pytest.raises(StorageFailed, match="full"):
        add_to_file("x" * 200_000)
    sqlalchemy.event.remove(file_database.engine, "connect", limit_pages)
    file_database.engine.dispose()
    assert add_to_file("x" * 200_000).status == "queued"
    assert file_database.jobs.get_job(kept.id) is not None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a place that only root may not write: /proc")
def test_a_folder_that_cannot_be_made_is_a_typed_error() -> None:
    with pytest.raises(StorageFailed, match="cannot be made"):
        Database.open(sqlite_url(pathlib.Path("/proc/no/folder")))


def test_a_file_that_is_no_database_is_a_typed_error(tmp_path: pathlib.Path) -> None:
    (tmp_path / "calotype.db").write_bytes(b"not a database, but long enough to be read " * 40)
    with pytest.raises(StorageFailed, match="not a database"):
        Database.open(sqlite_url(tmp_path))


@pytest.mark.parametrize("url", ["nonsense", "nosuch://host/db"])
def test_a_database_url_that_cannot_be_used_is_named(url: str) -> None:
    with pytest.raises(InvalidRequest, match="database URL"):
        Database.open(url)


def test_a_service_secret_is_made_once(database: Database) -> None:
    assert len(database.secrets.service_secret("urls")) == 32
    assert database.secrets.service_secret("urls") == database.secrets.service_secret("urls")
    assert database.secrets.service_secret("urls") != database.secrets.service_secret("other")


def test_jobs_that_wait_are_counted_by_what_is_away(database: Database, add_job: AddJob) -> None:
    outage = Outage("text_encoder", 1.0, 1, 2.0, "It is away.")
    for _ in range(2):
        database.jobs.postpone_job(add_job().id, outage)
    add_job()
    running = add_job()
    database.jobs.postpone_job(running.id, outage)
    assert database.jobs.start_job(running.id, "r1", 5.0)
    assert database.jobs.count_waiting() == {("shapes", "text_encoder"): 2}
    found = database.jobs.get_job(running.id)
    assert found is not None and Outage.of(found) == outage


def test_who_looks_for_work_in_vain_waits_for_no_writer(tmp_path: pathlib.Path) -> None:
    database = Database.open(sqlite_url(tmp_path))
    busy = sqlite3.connect(tmp_path / "calotype.db", isolation_level=None)
    busy.execute("BEGIN IMMEDIATE")
    try:
        files, retention, now = database.files, database.retention, database.clock.time()
        assert retention.purge_jobs() == 0
        assert retention.forget_jobs(now) == 0
        assert retention.forget_batches(now) == 0
        assert files.expire_assets() == files.expire_files() == 0
        assert files.garbage(now) == []
        assert database.held_images.expire_held() == 0
        assert database.batches.claim_batch(30.0) is None
        assert database.webhooks.claim_deliveries(8, 30.0) == []
    finally:
        busy.close()
        database.close()
