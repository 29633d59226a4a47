"""What the repositories share: the connection pool, the clock, paging and upserts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Engine, RowMapping, Select, Table, and_, or_, select
from sqlalchemy.dialects import postgresql, sqlite

from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.protocols import Clock
from calotype.serving.database.connection import reading

ColumnValues = dict[str, Any]
"""Column -> value or SQL expression, for an insert or an update."""


def column_values(record: Any) -> ColumnValues:
    """The fields of a dataclass that is a row, for an insert."""
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


class Repository:
    """Base of the repositories.

    Raises:
        StorageFailed: from every method, when the database cannot be read or written.
    """

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self.engine, self.clock = engine, clock

    def finds(self, query: Select[Any], values: ColumnValues) -> bool:
        """Whether a query has any row.

        Asked by whoever looks now and then for work that there mostly is none of: a write
        transaction, for which others wait, is begun only where there is.
        """
        with reading(self.engine) as connection:
            return connection.execute(query, values).first() is not None

    def page(
        self,
        query: Select[Any],
        table: Table,
        team_id: str,
        noun: str,
        *,
        limit: int,
        after: str | None,
        oldest_first: bool = False,
    ) -> Sequence[RowMapping]:
        """One page of a team's rows by the key (created, id), the newest first by default.

        Args:
            query: selects rows of ``table``.
            noun: what a row is, for the error.
            after: the last id of the page before.

        Raises:
            InvalidRequest: ``after`` names no row of the team.
        """
        created, row_id = table.c.created, table.c.id
        with reading(self.engine) as connection:
            if after is not None:
                own = and_(row_id == after, table.c.team_id == team_id)
                last = connection.execute(select(created).where(own)).scalar_one_or_none()
                if last is None:
                    message = f"after names no {noun}: {after[:80]!r}."
                    raise InvalidRequest(message, param="after")
                beyond = created > last if oldest_first else created < last
                same = row_id > after if oldest_first else row_id < after
                query = query.where(or_(beyond, and_(created == last, same)))
            order = (created, row_id) if oldest_first else (created.desc(), row_id.desc())
            return connection.execute(query.order_by(*order).limit(limit)).mappings().all()


def upsert(connection: Connection, table: Table, values: ColumnValues, keys: Sequence[str]) -> None:
    """Inserts a row, or overwrites the one that has the same ``keys``."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    insert: Any = dialect.insert(table).values(values)
    changes = {name: insert.excluded[name] for name in values if name not in keys}
    connection.execute(insert.on_conflict_do_update(index_elements=list(keys), set_=changes))
