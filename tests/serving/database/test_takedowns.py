"""Takedowns in both databases: whole, in order with what is stored at the same time."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from dataclasses import replace

import pytest

from calotype.moderation.policy.categories import Category
from calotype.serving.core.decision import NEWEST_TAKEDOWN, Decision
from calotype.serving.core.errors import Conflict
from calotype.serving.database.connection import reading
from calotype.serving.database.database import Database
from calotype.serving.database.review.image_index import Fingerprint
from calotype.serving.database.review.takedown_order import CHECKED_TOO_EARLY, newest_takedown
from calotype.serving.database.review.takedowns import TakedownOrder
from calotype.serving.jobs.endings import drawn_ending
from calotype.serving.jobs.lease import Lease
from calotype.serving.jobs.records import FileRecord, JobRecord, PreviewRecord
from calotype.serving.testing.in_memory import decision, drawn_result

AddJob = Callable[..., JobRecord]


def order(*asset_ids: str, sha256s: tuple[str, ...] = ()) -> TakedownOrder:
    return TakedownOrder(Fingerprint(None, None), Category.HARASSMENT, "reason", asset_ids, sha256s)


def newest(database: Database) -> int:
    with reading(database.engine) as connection:
        return newest_takedown(connection)


def finish(database: Database, job: JobRecord, sha256: str, seen: int | None = None) -> str | None:
    """Ends a job with one picture; its asset, None where it was not ended so."""
    started = database.jobs.start_job(job.id, "one", database.clock.time() + 60)
    assert started is not None
    preview = PreviewRecord(job.id, 0, 0, started.fence, 1, f"{job.id}.preview", "image/png")
    assert database.intermediates.add_preview(preview)
    result = drawn_result(Lease.from_job(started, 0.0))
    image = replace(result.images[0], sha256=sha256)
    known = {} if seen is None else {NEWEST_TAKEDOWN: seen}
    found = Decision.from_payload(decision("output") | known)
    ending = drawn_ending(started, replace(result, images=[image], decisions=[found]))
    ended = database.jobs.finish_job(job.id, ending)
    return image.asset_id if ended is not None and ended.status == "succeeded" else None


def test_the_table_of_places_leads_to_previews_files_and_what_was_drawn_from_it(
    database: Database, add_job: AddJob
) -> None:
    job, digest = add_job(), "a" * 64
    asset = finish(database, job, digest)
    assert asset is not None
    file = FileRecord(
        *("file_1", job.team_id, "batch_output", "o.jsonl", "application/jsonl", 1, "b" * 64),
        *("k/1.jsonl", database.clock.time(), None),
    )
    database.files.add_file(file, [asset])
    source = f"{job.team_id}/aa/{digest}-0123456789abcdef.png"
    # A picture drawn from the picture, and one drawn from that.
    for key, made in ((source, "c" * 64), (f"t/cc/{'c' * 64}.png", "d" * 64)):
        assert finish(database, add_job(image=key), made) is not None
    record, removal = database.takedowns.take_down(order(asset), "key_1")
    assert len(removal.assets) == 3 and removal.files == {"file_1"} and removal.previews == 3
    assert record.team_ids == [job.team_id]
    assert set(removal.blobs) == set(database.files.garbage(0.0)) and len(removal.blobs) == 7
    assert database.files.get_file("file_1", job.team_id) is None
    (action,) = database.reviewer_audit.actions()
    assert action["details"]["assets"] == sorted(removal.assets)


def test_a_picture_is_stored_only_after_the_newest_takedown_was_known(
    database: Database, add_job: AddJob
) -> None:
    first = finish(database, add_job(), "a" * 64, seen=0)
    assert first is not None
    database.takedowns.take_down(order(first), "key_1")
    late = add_job()
    with pytest.raises(Conflict) as caught:
        finish(database, late, "b" * 64, seen=0)
    assert caught.value.code == CHECKED_TOO_EARLY
    found = database.jobs.get_job(late.id)
    assert found is not None and found.status == "running", "nothing is written"
    assert finish(database, add_job(), "b" * 64, seen=newest(database)) is not None


def test_takedowns_and_endings_at_once_leave_nothing_behind(
    database: Database, add_job: AddJob
) -> None:
    """Whatever comes first: no picture is stored that a takedown should have found."""
    digest = "a" * 64
    jobs = [add_job(team=f"team {n}") for n in range(6)]

    def end(job: JobRecord) -> str | None:
        try:
            return finish(database, job, digest, seen=0)
        except Conflict:
            return None

    def take_down(number: int) -> None:
        database.takedowns.take_down(order(sha256s=(digest,)), f"key_{number}")

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        ended = [pool.submit(end, job) for job in jobs[:3]]
        taken = [pool.submit(take_down, number) for number in range(3)]
        ended += [pool.submit(end, job) for job in jobs[3:]]
        stored = [future.result() for future in ended]
        for future in taken:
            future.result()
    left = [name for name in stored if name and database.files.get_asset(name)]
    assert left == []
    actions = list(database.reviewer_audit.actions())
    assert [row["action"] for row in actions] == ["takedown.made"] * 3, "one chain"


def test_the_place_of_a_source_is_held_while_its_job_ends(
    database: Database, add_job: AddJob
) -> None:
    digest = "a" * 64
    jobs = [add_job(image=f"t/aa/{digest}-00.png") for _ in range(4)]
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        ended = [pool.submit(finish, database, job, str(n) * 64) for n, job in enumerate(jobs)]
        taken = pool.submit(database.takedowns.take_down, order(sha256s=(digest,)), "key_1")
        stored = [future.result() for future in ended]
        taken.result()
    assert not [name for name in stored if name and database.files.get_asset(name)]
