"""From a picture to the adapters that learnt from it, and on to what was drawn with those.

A picture whose consent was taken back (`revocations`) quarantines an adapter at once: nothing new
is drawn with it, and nobody is served what was. That follows from the tables alone, so it holds for
a job that ends in the same moment too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, Select, and_, select

from calotype.serving.core.errors import PermissionDenied
from calotype.serving.core.json_object import JsonObject
from calotype.serving.database.blob_refs import FILE
from calotype.serving.database.connection import reading, writing
from calotype.serving.database.repository import Repository, column_values, upsert
from calotype.serving.database.schema.review_tables import picture_places
from calotype.serving.database.schema.tables import assets, jobs
from calotype.serving.database.schema.training_tables import (
    adapter_draws,
    adapter_origins,
    revocations,
    trained_adapters,
)
from calotype.serving.jobs.lifecycle import OPEN
from calotype.serving.jobs.records import NewJob

_PAGE = 500
_LONGEST_DIGEST = 255


@dataclass(frozen=True, slots=True)
class TrainedAdapter:
    """An adapter whose origins are known: a row of ``trained_adapters``."""

    digest: str
    """As recipes name it."""
    name: str
    """When it was recorded."""
    dataset_digest: str
    command: str | None
    """That trained it; None = not told."""
    created: float


@dataclass(frozen=True, slots=True)
class OriginRecord:
    """A picture that an adapter learnt from: a row of ``adapter_origins``."""

    adapter_digest: str
    picture_sha256: str
    rights: JsonObject | None


def note_draws(connection: Connection, job: NewJob) -> None:
    """A job is drawn with these adapters.

    Raises:
        PermissionDenied: one of them is quarantined.
    """
    adapters = (job.recipe or {}).get("adapters", [])
    names = {str(one["digest"])[:_LONGEST_DIGEST]: str(one["name"]) for one in adapters}
    if not names:
        return
    revoked = sorted(revoked_among(connection, names))
    if revoked:
        raise PermissionDenied(
            f"The adapter '{names[revoked[0]]}' learnt from a picture whose rights were revoked; "
            "nothing is drawn with it until it was trained again without that picture.",
            code="rights_revoked",
            param="loras",
        )
    rows = [{"adapter_digest": digest, "job_id": job.id} for digest in sorted(names)]
    connection.execute(adapter_draws.insert(), rows)


def revoked_among(connection: Connection, digests: Collection[str]) -> set[str]:
    """Those of these adapters that are quarantined."""
    query = _revoked_origins(select(adapter_origins.c.adapter_digest).distinct())
    query = query.where(adapter_origins.c.adapter_digest.in_(sorted(digests)))
    return set(connection.execute(query).scalars())


def drawn_with_revoked(job_id: ColumnElement[str]) -> ColumnElement[bool]:
    """SQL: the job of this column was drawn with a quarantined adapter."""
    drawn = adapter_draws.alias()  # the column may be this very table's
    same = drawn.c.adapter_digest == adapter_origins.c.adapter_digest
    query = _revoked_origins(select(drawn.c.job_id).join(adapter_origins, same))
    return query.where(drawn.c.job_id == job_id).exists()


def is_quarantined(connection: Connection, job_id: str) -> bool:
    """Whether the job is drawn with a quarantined adapter."""
    query = select(adapter_draws.c.job_id).where(
        adapter_draws.c.job_id == job_id, drawn_with_revoked(adapter_draws.c.job_id)
    )
    return connection.execute(query.limit(1)).first() is not None


def _revoked_origins(query: Select[str]) -> Select[str]:
    taken_back = revocations.c.picture_sha256 == adapter_origins.c.picture_sha256
    return query.join(revocations, taken_back)


class AdapterOrigins(Repository):
    """Which pictures are behind which adapters, and what is quarantined by them."""

    def record(
        self,
        adapter_digest: str,
        name: str,
        dataset_digest: str,
        pictures: Iterable[tuple[str, JsonObject | None]],
        command: str | None = None,
    ) -> None:
        """Notes what an adapter learnt from; again is no error.

        Args:
            adapter_digest: as recipes name it.
            pictures: the sha256 of each file, and its rights.
            command: that trained it.
        """
        digest = adapter_digest[:_LONGEST_DIGEST]
        trained = TrainedAdapter(digest, name, dataset_digest, command, self.clock.time())
        with writing(self.engine, durable=True) as connection:
            upsert(connection, trained_adapters, column_values(trained), ["digest"])
            for sha256, rights in sorted(pictures, key=lambda one: one[0]):
                row = column_values(OriginRecord(digest, sha256, rights))
                upsert(connection, adapter_origins, row, ["adapter_digest", "picture_sha256"])

    def get_adapter(self, adapter_digest: str) -> TrainedAdapter | None:
        query = select(trained_adapters).where(trained_adapters.c.digest == adapter_digest)
        with reading(self.engine) as connection:
            row = connection.execute(query).mappings().first()
        return None if row is None else TrainedAdapter(**row)

    def origins_of(self, adapter_digest: str) -> list[OriginRecord]:
        """By the pictures' sha256."""
        query = select(adapter_origins).where(adapter_origins.c.adapter_digest == adapter_digest)
        with reading(self.engine) as connection:
            rows = connection.execute(query.order_by(adapter_origins.c.picture_sha256)).mappings()
            return [OriginRecord(**row) for row in rows]

    def quarantined_job(self, job_id: str) -> bool:
        """Whether nobody may see what the job drew."""
        with reading(self.engine) as connection:
            return is_quarantined(connection, job_id)

    def quarantined_file(self, file_id: str) -> bool:
        """Whether a file, such as the output of a batch, holds a quarantined picture."""
        held = and_(picture_places.c.holder == file_id, picture_places.c.kind == FILE)
        query = (
            select(assets.c.id)
            .join(picture_places, picture_places.c.sha256 == assets.c.sha256)
            .where(held, drawn_with_revoked(assets.c.job_id))
        )
        with reading(self.engine) as connection:
            return connection.execute(query.limit(1)).first() is not None

    def quarantined_open_jobs(self, limit: int = _PAGE) -> list[str]:
        """Open jobs that are drawn with quarantined adapters: to be ended."""
        query = select(jobs.c.id).where(
            jobs.c.status.in_(sorted(OPEN)), drawn_with_revoked(jobs.c.id)
        )
        with reading(self.engine) as connection:
            return list(connection.execute(query.limit(limit)).scalars())
