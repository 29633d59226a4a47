"""Batches in the database: many requests in one file, answered in another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import bindparam, func, or_, select, update

from calotype.serving.core.errors import NotFound
from calotype.serving.database.connection import reading, writing
from calotype.serving.database.repository import Repository
from calotype.serving.database.schema.tables import batch_lines, batches
from calotype.serving.jobs.records import BatchLine, BatchRecord

WORKING = ("in_progress", "cancelling")
"""States in which a batch needs somebody to work on it."""

# Built once: SQLAlchemy takes longer to put a statement together than SQLite to run it.
_BATCH = select(batches).where(batches.c.id == bindparam("batch"))
_FREE = (
    select(batches)
    .where(
        batches.c.status.in_(WORKING),
        or_(batches.c.claimed_until.is_(None), batches.c.claimed_until <= bindparam("now")),
    )
    .order_by(batches.c.claimed_until.is_not(None), batches.c.claimed_until)
    .limit(1)
)
_CLAIM = _FREE.with_for_update(skip_locked=True)
_CHANGE = update(batches).where(batches.c.id == bindparam("batch"))
_STATUS_CODE = batch_lines.c.answer["status_code"].as_integer()
_COUNTS = (
    select(
        batch_lines.c.batch_id,
        func.count(),
        func.count().filter(batch_lines.c.answer.is_not(None), _STATUS_CODE == 200),
        func.count().filter(batch_lines.c.answer.is_not(None), _STATUS_CODE != 200),
    )
    .where(batch_lines.c.batch_id.in_(bindparam("wanted", expanding=True)))
    .group_by(batch_lines.c.batch_id)
)


class Batches(Repository):
    """Batches and their lines."""

    def add_batch(self, batch: BatchRecord, lines: Sequence[BatchLine]) -> None:
        values = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
        with writing(self.engine, durable=True) as connection:
            connection.execute(batches.insert().values(values))
            rows = [{n: getattr(line, n) for n in line.__dataclass_fields__} for line in lines]
            if rows:
                connection.execute(batch_lines.insert(), rows)

    def get_batch(self, batch_id: str, team_id: str | None = None) -> BatchRecord:
        """Raises NotFound when the team has no such batch."""
        with reading(self.engine) as connection:
            row = connection.execute(_BATCH, {"batch": batch_id}).mappings().first()
        if row is None or team_id not in (None, row["team_id"]):
            raise NotFound(f"There is no batch '{batch_id[:80]}'.")
        return BatchRecord(**row)

    def list_batches(
        self, team_id: str, *, limit: int, after: str | None = None
    ) -> list[BatchRecord]:
        """Newest first; ``after`` is the last id of the page before."""
        query = select(batches).where(batches.c.team_id == team_id)
        rows = self.page(query, batches, team_id, "batch", limit=limit, after=after)
        return [BatchRecord(**row) for row in rows]

    def change_batch(
        self, batch_id: str, status: str, only_from: Sequence[str] = WORKING, **values: Any
    ) -> BatchRecord:
        """Moves a batch on; one that is not in ``only_from`` any more stays as it is."""
        with writing(self.engine) as connection:
            found = connection.execute(
                select(batches).where(batches.c.id == batch_id).with_for_update()
            )
            row = found.mappings().one()
            if row["status"] in only_from:
                moments = {**row["moments"], status: self.clock.time()}
                connection.execute(
                    update(batches)
                    .where(batches.c.id == batch_id)
                    .values(status=status, moments=moments, **values)
                )
        return self.get_batch(batch_id)

    def claim_batch(self, claim_seconds: float) -> BatchRecord | None:
        """Takes one batch that needs work; nobody else gets it for so long."""
        now = self.clock.time()
        if not self.finds(_FREE, {"now": now}):
            return None
        with writing(self.engine) as connection:
            row = connection.execute(_CLAIM, {"now": now}).mappings().first()
            if row is None:
                return None
            values = {"batch": row["id"], "claimed_until": now + claim_seconds}
            connection.execute(_CHANGE, values)
        return BatchRecord(**row)

    def rest_batch(self, batch_id: str, seconds: float) -> None:
        """Nothing to do for it for a moment."""
        with writing(self.engine) as connection:
            values = {"batch": batch_id, "claimed_until": self.clock.time() + seconds}
            connection.execute(_CHANGE, values)

    def batch_counts(self, batch_ids: Sequence[str]) -> dict[str, tuple[int, int, int]]:
        """batch id -> (lines, answered well, answered with an error)."""
        with reading(self.engine) as connection:
            rows = connection.execute(_COUNTS, {"wanted": list(batch_ids)})
            return {row[0]: (row[1], row[2], row[3]) for row in rows}

    def unanswered_lines(
        self, batch_id: str, *, started: bool, limit: int, bodies: bool = False
    ) -> list[BatchLine]:
        """Lines without an answer, with a job (``started``) or without one, in order."""
        lines = batch_lines.c
        begun = lines.job_id.is_not(None) if started else lines.job_id.is_(None)
        query = (
            select(batch_lines)
            .where(lines.batch_id == batch_id, lines.answer.is_(None), begun)
            .order_by(lines.line)
            .limit(limit)
        )
        return self._lines(query, bodies=bodies)

    def answered_lines(self, batch_id: str, after: int, limit: int) -> list[BatchLine]:
        """Lines with an answer, in order, from the one behind ``after`` on."""
        lines = batch_lines.c
        query = (
            select(batch_lines)
            .where(lines.batch_id == batch_id, lines.answer.is_not(None), lines.line > after)
            .order_by(lines.line)
            .limit(limit)
        )
        return self._lines(query)

    def set_line(self, line: BatchLine, **values: Any) -> None:
        """Notes the job of a line, or its answer."""
        with writing(self.engine) as connection:
            connection.execute(
                update(batch_lines)
                .where(batch_lines.c.batch_id == line.batch_id, batch_lines.c.line == line.line)
                .values(values)
            )

    def _lines(self, query: Any, *, bodies: bool = False) -> list[BatchLine]:
        """Without ``bodies``, which have up to a megabyte each, those are empty."""
        if not bodies:
            plain = [column for column in batch_lines.c if column.name != "body"]
            query = query.with_only_columns(*plain)
        with reading(self.engine) as connection:
            rows = connection.execute(query).mappings()
            return [BatchLine(**({"body": {}} | dict(row))) for row in rows]
