"""Images that wait for a person: nobody's asset until they are approved, gone if they are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy import Connection, Engine, bindparam, delete, insert, select, update

from calotype.serving.core.errors import NotFound
from calotype.serving.core.protocols import Clock
from calotype.serving.database.blob_refs import add_ref, discard
from calotype.serving.database.connection import reading, writing
from calotype.serving.database.repository import Repository, column_values
from calotype.serving.database.review.cases import CaseRecord, Cases, Reviewer
from calotype.serving.database.review.reviewer_audit import append_action
from calotype.serving.database.review.takedown_order import check_order
from calotype.serving.database.schema.review_tables import cases, held_images
from calotype.serving.database.schema.tables import assets, jobs
from calotype.serving.database.webhooks import announce
from calotype.serving.jobs.events import RELEASED_EVENT
from calotype.serving.jobs.moderation_record import HeldStatus, ModerationRecord
from calotype.serving.jobs.records import HeldRecord, JobRecord

HELD_SECONDS = 14 * 86_400.0
"""What nobody decides on for so long is rejected."""
_PAGE = 200
_LATE = (
    select(held_images).where(held_images.c.expires <= bindparam("now")).limit(bindparam("most"))
)


def add_held(
    connection: Connection, held: Sequence[HeldRecord], reasons: Sequence[str], now: float
) -> None:
    """Stores images of a job that ends, and opens a case for each.

    Args:
        reasons: one for each, for the reviewer.
    """
    for image, reason in zip(held, reasons, strict=True):
        connection.execute(
            insert(cases).values(
                id=image.case_id,
                kind="review",
                team_id=image.team_id,
                subject=image.asset_id,
                owner_team_id=image.team_id,
                reason=reason,
                status="open",
                created=now,
            )
        )
        values = column_values(image) | {"created": now, "expires": now + HELD_SECONDS}
        connection.execute(insert(held_images).values(values))
    add_ref(connection, [image.blob_key for image in held])


def held_reasons(moderation: ModerationRecord | None) -> list[str]:
    """What a reviewer reads of each held image, by the job's moderation."""
    return [
        f"The policy holds this picture for {', '.join(entry.categories) or 'review'}."
        for entry in (() if moderation is None else moderation.held)
    ]


class HeldImages(Repository):
    """Images that wait for a reviewer."""

    def __init__(self, engine: Engine, clock: Clock, cases: Cases) -> None:
        super().__init__(engine, clock)
        self._cases = cases

    def get_held(self, asset_id: str) -> HeldRecord | None:
        query = select(held_images).where(held_images.c.asset_id == asset_id)
        with reading(self.engine) as connection:
            row = connection.execute(query).mappings().first()
        return None if row is None else HeldRecord(**row)

    def release_held(
        self, case: CaseRecord, reviewer: Reviewer, note: str, blob_key: str, newest_takedown: int
    ) -> CaseRecord:
        """Ends the case as approved: the image becomes an asset of its team, which is told.

        Args:
            blob_key: where the unsealed file is.
            newest_takedown: of those that it was compared with.

        Raises:
            Conflict: see `decide_case`; or something was taken down since it was compared.
            NotFound: the image is not held any more, or its job is forgotten.
        """

        def release(connection: Connection) -> None:
            check_order(connection, newest_takedown)
            now = self.clock.time()
            held = _taken(connection, case.subject)
            job = _job(connection, held.job_id)
            kept = (job.expires or now) - job.created
            connection.execute(
                insert(assets).values(
                    id=held.asset_id,
                    job_id=held.job_id,
                    team_id=held.team_id,
                    blob_key=blob_key,
                    content_type=held.content_type,
                    width=held.width,
                    height=held.height,
                    seed=held.seed,
                    sha256=held.sha256,
                    created=now,
                    expires=now + kept if job.expires is not None else None,
                )
            )
            add_ref(connection, [blob_key])
            job = _with_status(connection, job, held.asset_id, "released")
            announce(connection, job, now, RELEASED_EVENT)

        return self._cases.decide_case(case.id, reviewer, "approved", note, release)

    def reject_held(self, case: CaseRecord, reviewer: Reviewer, note: str) -> CaseRecord:
        """Ends the case as rejected: the image is gone. Raises Conflict: see `decide_case`."""

        def reject(connection: Connection) -> None:
            held = _taken(connection, case.subject)
            _tell(connection, held, "rejected")

        return self._cases.decide_case(case.id, reviewer, "rejected", note, reject)

    def expire_held(self, limit: int = _PAGE) -> int:
        """Rejects what nobody has decided on in time; how many there were."""
        now = self.clock.time()
        wanted = {"now": now, "most": limit}
        if not self.finds(_LATE, wanted):
            return 0
        with writing(self.engine) as connection:
            late = [HeldRecord(**row) for row in connection.execute(_LATE, wanted).mappings()]
            for held in late:
                drop_held(connection, held.asset_id, "Nobody decided in time.", now)
                details = {"verdict": "rejected"}
                append_action(connection, now, "nobody", "case.expired", held.case_id, details)
        return len(late)


def drop_held(connection: Connection, asset_id: str, note: str, now: float) -> HeldRecord:
    """Rejects an image without a reviewer. Raises NotFound: it is not held any more."""
    held = _taken(connection, asset_id)
    connection.execute(
        update(cases)
        .where(cases.c.id == held.case_id, cases.c.status == "open")
        .values(status="rejected", note=note, decided=now)
    )
    _tell(connection, held, "rejected")
    return held


def _tell(connection: Connection, held: HeldRecord, status: HeldStatus) -> None:
    job = _find_job(connection, held.job_id)
    if job is not None:
        _with_status(connection, job, held.asset_id, status)


def _taken(connection: Connection, asset_id: str) -> HeldRecord:
    """Removes the row with the key, without which no copy of the file can be read."""
    gone = delete(held_images).where(held_images.c.asset_id == asset_id)
    row = connection.execute(gone.returning(held_images)).mappings().first()
    if row is None:
        raise NotFound(f"The picture '{asset_id[:80]}' is not held any more.")
    discard(connection, [row["blob_key"]])
    return HeldRecord(**row)


def _job(connection: Connection, job_id: str) -> JobRecord:
    found = _find_job(connection, job_id)
    if found is None:
        raise NotFound(f"The job '{job_id}' of the held picture is forgotten: reject it.")
    return found


def _find_job(connection: Connection, job_id: str) -> JobRecord | None:
    row = connection.execute(select(jobs).where(jobs.c.id == job_id)).mappings().first()
    return None if row is None else JobRecord(**row)


def _with_status(
    connection: Connection, job: JobRecord, asset_id: str, status: HeldStatus
) -> JobRecord:
    """Writes the new state of one of a job's held images."""
    if job.moderation is None:  # expired meanwhile: nothing tells of its images any more
        return job
    record = ModerationRecord.from_payload(job.moderation).with_status(asset_id, status)
    moderation = record.to_payload()
    connection.execute(update(jobs).where(jobs.c.id == job.id).values(moderation=moderation))
    return replace(job, moderation=moderation)
