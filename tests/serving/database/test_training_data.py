"""Data sets, origins of adapters and revoked consent, in both databases."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy

from calotype.serving.core.errors import NotFound, PermissionDenied, StorageFailed
from calotype.serving.database.connection import create_database_engine
from calotype.serving.database.database import Database
from calotype.serving.database.schema.upgrade import upgrade_database
from calotype.serving.database.training.datasets import DatasetRecord
from calotype.serving.jobs.endings import drawn_ending
from calotype.serving.jobs.lease import Lease
from calotype.serving.jobs.records import FileRecord, JobRecord
from calotype.serving.testing.in_memory import ManualClock, drawn_result

AddJob = Callable[..., JobRecord]
PICTURE, OTHER = "a" * 64, "b" * 64
ADAPTER = "sha256:" + "1" * 64
RIGHTS = {"basis": "consent", "holder": "Grace", "evidence": "paper"}


def recipe(*digests: str) -> dict[str, Any]:
    adapters = [{"name": f"lora-{d[-1]}", "digest": d, "scale": 1.0} for d in digests]
    return {"version": 1, "adapters": adapters}


def finish(database: Database, job: JobRecord) -> tuple[JobRecord, str]:
    """Ends a job with one picture: the job as it ended, and the picture's id."""
    started = database.jobs.start_job(job.id, "one", database.clock.time() + 60)
    assert started is not None
    result = drawn_result(Lease.from_job(started, 0.0))
    ended = database.jobs.finish_job(job.id, drawn_ending(started, result))
    assert ended is not None
    return ended, result.images[0].asset_id


def test_a_revocation_reaches_adapters_and_pictures_at_once(
    database: Database, add_job: AddJob
) -> None:
    pictures = [(PICTURE, RIGHTS), (OTHER, None)]
    database.origins.record(ADAPTER, "toy", "d" * 64, pictures)
    database.origins.record(ADAPTER, "toy", "d" * 64, pictures)  # again is no error
    database.origins.record("sha256:unrelated", "other", "e" * 64, [(OTHER, None)])
    drawn, mine = finish(database, add_job(recipe=recipe(ADAPTER)))
    free, theirs = finish(database, add_job(recipe=recipe("sha256:unrelated")))
    plain, _ = finish(database, add_job())
    running, queued = add_job(recipe=recipe(ADAPTER)), add_job(recipe=recipe(ADAPTER))
    tried = database.revocations.affected(PICTURE)
    assert not database.origins.quarantined_job(drawn.id)

    found = database.revocations.revoke(PICTURE, "asked", "key_1")
    assert found == tried
    (adapter,) = found.adapters
    assert (adapter.digest, adapter.name, adapter.pictures) == (ADAPTER, "toy", 2)
    assert adapter.rights == RIGHTS
    assert (found.assets, found.asset_count, found.jobs) == ((mine,), 1, 3)
    assert set(found.open_jobs) == {running.id, queued.id}
    assert set(database.origins.quarantined_open_jobs()) == {running.id, queued.id}
    assert database.origins.quarantined_job(drawn.id)
    assert not database.origins.quarantined_job(free.id)
    assert not database.origins.quarantined_job(plain.id)
    assert theirs not in found.assets

    # What ends in this moment is not stored, and nothing new begins.
    ended, asset = finish(database, running)
    assert ended.status == "failed" and ended.error is not None
    assert ended.error["code"] == "rights_revoked"
    assert database.files.get_asset(asset) is None
    with pytest.raises(PermissionDenied, match="lora-1") as refused:
        add_job(recipe=recipe(ADAPTER))
    assert refused.value.code == "rights_revoked"
    add_job(recipe=recipe("sha256:unrelated"))
    (action,) = database.reviewer_audit.actions()
    assert (action["action"], action["subject"]) == ("rights.revoked", PICTURE)
    assert action["details"]["adapters"] == [ADAPTER]


def test_a_revocation_can_be_lifted(database: Database, add_job: AddJob) -> None:
    database.origins.record(ADAPTER, "toy", "d" * 64, [(PICTURE, RIGHTS)])
    job, _ = finish(database, add_job(recipe=recipe(ADAPTER)))
    database.revocations.revoke(PICTURE, "asked", "key_1")
    (listed,) = database.revocations.list_revocations()
    assert (listed.picture_sha256, listed.reason) == (PICTURE, "asked")
    database.revocations.lift(PICTURE, "key_2")
    assert not database.origins.quarantined_job(job.id)
    add_job(recipe=recipe(ADAPTER))
    with pytest.raises(NotFound):
        database.revocations.lift(PICTURE, "key_2")
    assert [row["action"] for row in database.reviewer_audit.actions()] == [
        "rights.revoked",
        "rights.restored",
    ]


def test_a_picture_that_nobody_learnt_from_can_be_revoked_before(
    database: Database, add_job: AddJob
) -> None:
    found = database.revocations.revoke(PICTURE, "asked", "key_1")
    assert (found.adapters, found.assets) == ((), ())
    database.origins.record(ADAPTER, "toy", "d" * 64, [(PICTURE, None)])
    with pytest.raises(PermissionDenied):
        add_job(recipe=recipe(ADAPTER))


def test_a_file_that_holds_a_quarantined_picture_is_known(
    database: Database, add_job: AddJob
) -> None:
    database.origins.record(ADAPTER, "toy", "d" * 64, [(PICTURE, None)])
    job, asset = finish(database, add_job(recipe=recipe(ADAPTER)))
    file = FileRecord(
        *("file_1", job.team_id, "batch_output", "o.jsonl", "application/jsonl", 1, "c" * 64),
        *("k/1.jsonl", database.clock.time(), None),
    )
    database.files.add_file(file, [asset])
    database.files.add_file(replace(file, id="file_2", blob_key="k/2.jsonl"))
    assert not database.origins.quarantined_file("file_1")
    database.revocations.revoke(PICTURE, "asked", "key_1")
    assert database.origins.quarantined_file("file_1")
    assert not database.origins.quarantined_file("file_2")


def test_a_forgotten_job_leaves_no_trace(
    database: Database, add_job: AddJob, clock: ManualClock
) -> None:
    database.origins.record(ADAPTER, "toy", "d" * 64, [(PICTURE, None)])
    finish(database, add_job(recipe=recipe(ADAPTER), expires=clock.time() + 10))
    clock.advance(20)
    assert database.retention.purge_jobs() == 1
    assert database.retention.forget_jobs(clock.time()) == 1
    assert database.revocations.affected(PICTURE).jobs == 0


def record(database: Database, team: str = "default", **more: Any) -> DatasetRecord:
    found = DatasetRecord(
        more.pop("id", "dataset_1"),
        database.teams.ensure_team(team).id,
        *("toys", "file_1", "f" * 64, {"resolution": 128}, "checking", database.clock.time()),
        **more,
    )
    database.datasets.add_dataset(found)
    return found


def test_a_data_set_belongs_to_its_team(database: Database, clock: ManualClock) -> None:
    mine = record(database)
    clock.advance(1)
    newer = record(database, id="dataset_2")
    other = database.teams.ensure_team("other").id
    assert database.datasets.get_dataset("dataset_1", mine.team_id) == mine
    assert database.datasets.list_datasets(mine.team_id, limit=10) == [newer, mine]
    page = database.datasets.list_datasets(mine.team_id, limit=10, after="dataset_2")
    assert page == [mine]
    for call in (database.datasets.get_dataset, database.datasets.delete_dataset):
        with pytest.raises(NotFound, match="dataset_1"):
            call("dataset_1", other)
    assert database.datasets.delete_dataset("dataset_1", mine.team_id) == mine
    with pytest.raises(NotFound):
        database.datasets.get_dataset("dataset_1")


def test_a_data_set_is_checked_by_one_gateway_and_again_when_that_dies(
    database: Database, clock: ManualClock
) -> None:
    record(database)
    claimed = database.datasets.claim_unchecked(60)
    assert claimed is not None and claimed.id == "dataset_1"
    assert database.datasets.claim_unchecked(60) is None
    clock.advance(61)
    assert database.datasets.claim_unchecked(60) is not None
    database.datasets.finish_check("dataset_1", {"ok": True, "digest": "d"})
    found = database.datasets.get_dataset("dataset_1")
    assert (found.status, found.report) == ("ready", {"ok": True, "digest": "d"})
    database.datasets.finish_check("dataset_1", StorageFailed("late"))
    assert database.datasets.get_dataset("dataset_1").status == "ready"
    assert database.datasets.claim_unchecked(60) is None


def test_jobs_from_before_are_found_by_their_recipes(new_database: Callable[[], str]) -> None:
    url = new_database()
    upgrade_database(url, "0012")
    engine = create_database_engine(url)
    with engine.begin() as connection:
        connection.execute(
            sqlalchemy.text(
                "INSERT INTO teams (id, name, weight, created, prompt_in_files) "
                "VALUES ('team_1', 'a', 1, 0, false)"
            )
        )
        for number, found in enumerate([recipe(ADAPTER), None, {"version": 1}]):
            connection.execute(
                sqlalchemy.text(
                    "INSERT INTO jobs (id, team_id, type, model, status, input, request, metadata, "
                    "priority, fence, attempts, step, steps, created, reserved_seconds, price, "
                    "recipe) VALUES (:id, 'team_1', 'image.generate', 'shapes', 'succeeded', "
                    "'{}', '{}', '{}', 0, 0, 0, 0, 20, 0, 0, 0, :recipe)"
                ),
                {"id": f"job_{number}", "recipe": found and json.dumps(found)},
            )
    engine.dispose()
    upgrade_database(url)
    database = Database.connect(url)
    database.origins.record(ADAPTER, "toy", "d" * 64, [(PICTURE, None)])
    assert database.revocations.revoke(PICTURE, "asked", "key_1").jobs == 1
    assert database.origins.quarantined_job("job_0")
    database.close()
