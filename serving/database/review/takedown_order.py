"""Which takedowns a picture was checked after: nothing checked before one is stored after it.

Takedowns are numbered. Whoever stores a drawn picture says the number of the newest one that the
safety stage knew, and is refused where there is a newer one; the picture is then checked again.
"""

from __future__ import annotations

from sqlalchemy import Connection, func, select, text

from calotype.serving.core.errors import Conflict
from calotype.serving.database.schema.review_tables import taken_down

CHECKED_TOO_EARLY = "checked_before_takedown"
"""Code of the error."""
_POSTGRES_LOCK = 0x63616C71


def newest_takedown(connection: Connection) -> int:
    """Its number; 0 where nothing is taken down."""
    return int(connection.execute(select(func.max(taken_down.c.number))).scalar_one() or 0)


def check_order(connection: Connection, seen: int) -> None:
    """No takedown comes between this and the end of the transaction.

    Args:
        seen: the newest takedown that was known when the picture was checked.

    Raises:
        Conflict: there is a newer one.
    """
    _lock(connection, "pg_advisory_xact_lock_shared")
    if newest_takedown(connection) > seen:
        raise Conflict(
            "Something was taken down since the picture was checked; it is checked again.",
            code=CHECKED_TOO_EARLY,
        )


def begin_takedown(connection: Connection) -> None:
    """Waits for whoever stores a picture just now."""
    _lock(connection, "pg_advisory_xact_lock")


def _lock(connection: Connection, function: str) -> None:
    if connection.dialect.name == "postgresql":  # SQLite has one writer at a time
        connection.execute(text(f"SELECT {function}({_POSTGRES_LOCK})"))
