"""Data sets of teams: an uploaded archive, what is asked of it, and the report of its check."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import and_, delete, or_, select, update

from calotype.serving.core.errors import CalotypeError, NotFound
from calotype.serving.core.json_object import JsonObject
from calotype.serving.database.connection import reading, writing
from calotype.serving.database.repository import Repository, column_values
from calotype.serving.database.schema.training_tables import datasets

CHECKING, READY, REFUSED = "checking", "ready", "refused"
"""States of a data set; refused: it cannot be learnt from as it is."""


@dataclass(frozen=True, slots=True)
class DatasetRecord:
    """A row of the table ``datasets``."""

    id: str
    team_id: str
    name: str
    file_id: str
    sha256: str
    """Of the archive."""
    settings: JsonObject
    status: str
    created: float
    report: JsonObject | None = None
    error: JsonObject | None = None
    checked: float | None = None
    claimed_until: float | None = None


class Datasets(Repository):
    """Data sets, and who checks them."""

    def add_dataset(self, record: DatasetRecord) -> None:
        with writing(self.engine, durable=True) as connection:
            connection.execute(datasets.insert().values(column_values(record)))

    def get_dataset(self, dataset_id: str, team_id: str | None = None) -> DatasetRecord:
        """Raises NotFound when the team has no such data set."""
        query = select(datasets).where(datasets.c.id == dataset_id)
        if team_id is not None:
            query = query.where(datasets.c.team_id == team_id)
        with reading(self.engine) as connection:
            row = connection.execute(query).mappings().first()
        if row is None:
            raise _unknown(dataset_id)
        return DatasetRecord(**row)

    def list_datasets(
        self, team_id: str, *, limit: int, after: str | None = None
    ) -> list[DatasetRecord]:
        """Newest first; ``after`` is the last id of the page before."""
        query = select(datasets).where(datasets.c.team_id == team_id)
        rows = self.page(query, datasets, team_id, "data set", limit=limit, after=after)
        return [DatasetRecord(**row) for row in rows]

    def delete_dataset(self, dataset_id: str, team_id: str) -> DatasetRecord:
        """Forgets a data set; its file is the caller's to delete. Raises NotFound."""
        mine = and_(datasets.c.id == dataset_id, datasets.c.team_id == team_id)
        with writing(self.engine, durable=True) as connection:
            gone = connection.execute(delete(datasets).where(mine).returning(datasets))
            row = gone.mappings().first()
        if row is None:
            raise _unknown(dataset_id)
        return DatasetRecord(**row)

    def claim_unchecked(self, claim_seconds: float) -> DatasetRecord | None:
        """Takes one data set that must be checked; nobody else gets it for so long."""
        now = self.clock.time()
        free = or_(datasets.c.claimed_until.is_(None), datasets.c.claimed_until <= now)
        query = (
            select(datasets)
            .where(datasets.c.status == CHECKING, free)
            .order_by(datasets.c.created)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        with writing(self.engine) as connection:
            row = connection.execute(query).mappings().first()
            if row is None:
                return None
            connection.execute(
                update(datasets)
                .where(datasets.c.id == row["id"])
                .values(claimed_until=now + claim_seconds)
            )
        return DatasetRecord(**row)

    def release_claim(self, dataset_id: str) -> None:
        """It could not be checked for now: somebody else may try."""
        with writing(self.engine) as connection:
            mine = update(datasets).where(datasets.c.id == dataset_id)
            connection.execute(mine.values(claimed_until=None))

    def finish_check(self, dataset_id: str, found: JsonObject | CalotypeError) -> None:
        """Notes the report (`DatasetReport.to_payload`), or why nothing could be read."""
        if isinstance(found, CalotypeError):
            values: JsonObject = {"status": REFUSED, "error": found.to_payload()}
        else:
            values = {"status": READY if found["ok"] else REFUSED, "report": found}
        with writing(self.engine, durable=True) as connection:
            connection.execute(
                update(datasets)
                .where(datasets.c.id == dataset_id, datasets.c.status == CHECKING)
                .values(checked=self.clock.time(), claimed_until=None, **values)
            )


def _unknown(dataset_id: str) -> NotFound:
    return NotFound(f"There is no data set '{dataset_id[:80]}'.")
