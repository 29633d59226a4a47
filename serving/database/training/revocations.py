"""Consent that was taken back: which adapters learnt from a picture, and what was drawn with them.

A revocation deletes nothing: it quarantines, and it can be lifted. What must be gone for good is
taken down (`database.review.takedowns`).
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, delete, func, select

from calotype.serving.core.errors import NotFound
from calotype.serving.core.json_object import JsonObject
from calotype.serving.database.connection import reading, writing
from calotype.serving.database.repository import Repository, column_values, upsert
from calotype.serving.database.review.reviewer_audit import append_action
from calotype.serving.database.schema.tables import assets, jobs
from calotype.serving.database.schema.training_tables import (
    adapter_draws,
    adapter_origins,
    revocations,
    trained_adapters,
)
from calotype.serving.jobs.lifecycle import OPEN

SHOWN = 1000
"""Pictures that are listed; all are counted and quarantined."""


@dataclass(frozen=True, slots=True)
class RevocationRecord:
    """A picture that may not be learnt from any more: a row of ``revocations``."""

    picture_sha256: str
    reason: str
    actor: str
    created: float


@dataclass(frozen=True, slots=True)
class AffectedAdapter:
    """An adapter that learnt from the picture."""

    digest: str
    name: str
    dataset_digest: str
    command: str | None
    """That trained it."""
    rights: JsonObject | None
    """By which it was learnt from."""
    pictures: int
    """All that it learnt from."""

    def retraining(self, picture_sha256: str) -> str | None:
        """The command that trains it again without the picture; None = not told.

        In a folder of its own: the old run's checkpoints have seen the picture.
        """
        if self.command is None:
            return None
        work = f"without-{picture_sha256[:8]}.training"
        return f"{self.command} --without {picture_sha256} --work {work}"


@dataclass(frozen=True, slots=True)
class Affected:
    """What a revocation quarantines."""

    adapters: tuple[AffectedAdapter, ...]
    assets: tuple[str, ...]
    """Stored pictures, the newest first; at most `SHOWN`."""
    asset_count: int
    jobs: int
    """That were, or are being, drawn with these adapters."""
    open_jobs: tuple[str, ...]
    """To be ended."""


class Revocations(Repository):
    """Pictures whose consent was taken back."""

    def affected(self, picture_sha256: str) -> Affected:
        """What `revoke` would quarantine; nothing is."""
        with reading(self.engine) as connection:
            return _affected(connection, picture_sha256)

    def revoke(self, picture_sha256: str, reason: str, actor: str) -> Affected:
        """From now on nothing is drawn with these adapters, and nobody is served what was.

        With its record in the log of what people do. What is left is to end ``open_jobs``.
        """
        now = self.clock.time()
        record = RevocationRecord(picture_sha256, reason, actor, now)
        with writing(self.engine, durable=True) as connection:
            upsert(connection, revocations, column_values(record), ["picture_sha256"])
            found = _affected(connection, picture_sha256)
            details = {
                "reason": reason,
                "adapters": [one.digest for one in found.adapters],
                "pictures": found.asset_count,
            }
            append_action(connection, now, actor, "rights.revoked", picture_sha256, details)
        return found

    def lift(self, picture_sha256: str, actor: str) -> None:
        """Consent was given again. Raises NotFound: it was not taken back."""
        mine = revocations.c.picture_sha256 == picture_sha256
        with writing(self.engine, durable=True) as connection:
            if not connection.execute(delete(revocations).where(mine)).rowcount:
                raise NotFound(f"The rights of the picture {picture_sha256} were not revoked.")
            append_action(connection, self.clock.time(), actor, "rights.restored", picture_sha256)

    def list_revocations(self) -> list[RevocationRecord]:
        """The oldest first."""
        query = select(revocations).order_by(revocations.c.created, revocations.c.picture_sha256)
        with reading(self.engine) as connection:
            return [RevocationRecord(**row) for row in connection.execute(query).mappings()]


def _affected(connection: Connection, picture_sha256: str) -> Affected:
    query = (
        select(trained_adapters, adapter_origins.c.rights)
        .join(adapter_origins, adapter_origins.c.adapter_digest == trained_adapters.c.digest)
        .where(adapter_origins.c.picture_sha256 == picture_sha256)
        .order_by(trained_adapters.c.created, trained_adapters.c.digest)
    )
    rows = connection.execute(query).mappings().all()
    digests = [row["digest"] for row in rows]
    counted = select(adapter_origins.c.adapter_digest, func.count()).where(
        adapter_origins.c.adapter_digest.in_(digests)
    )
    grouped = connection.execute(counted.group_by(adapter_origins.c.adapter_digest))
    counts = {digest: int(pictures) for digest, pictures in grouped}
    drawn = select(adapter_draws.c.job_id).where(adapter_draws.c.adapter_digest.in_(digests))
    drawn = drawn.distinct()
    mine = assets.c.job_id.in_(drawn)
    shown = select(assets.c.id).where(mine).order_by(assets.c.created.desc(), assets.c.id)
    count = select(func.count()).select_from(assets).where(mine)
    still = select(jobs.c.id).where(jobs.c.id.in_(drawn), jobs.c.status.in_(sorted(OPEN)))
    return Affected(
        tuple(
            AffectedAdapter(
                row["digest"],
                row["name"],
                row["dataset_digest"],
                row["command"],
                row["rights"],
                counts[row["digest"]],
            )
            for row in rows
        ),
        tuple(connection.execute(shown.limit(SHOWN)).scalars()),
        int(connection.execute(count).scalar_one()),
        int(connection.execute(select(func.count()).select_from(drawn.subquery())).scalar_one()),
        tuple(connection.execute(still.order_by(jobs.c.id)).scalars()),
    )
