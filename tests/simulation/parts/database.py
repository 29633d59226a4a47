"""The real job database on SQLite in memory, emptied for each run, with faults at its commits.

Triggers write down every change of a job's state beside the production tables, in the same
transaction: what really happened, whatever the service believes.
"""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine, create_engine
from sqlalchemy.pool import StaticPool

from calotype.serving.database import connection as production
from calotype.serving.database.schema import upgrade
from calotype.serving.database.schema.training_tables import metadata

Strike = Callable[[str, sqlite3.Connection | None], None]
"""Called at ``begin``, ``before commit`` and ``after commit``; raises what goes wrong there."""

_NOTES = """
CREATE TABLE simulated_changes (
    number INTEGER PRIMARY KEY, job_id TEXT, before TEXT, after TEXT, fence INTEGER,
    lease_replica TEXT, seconds REAL, time REAL
);
CREATE TRIGGER simulated_job AFTER UPDATE OF status, fence ON jobs
WHEN old.status <> new.status OR old.fence <> new.fence BEGIN
    INSERT INTO simulated_changes (job_id, before, after, fence, lease_replica, seconds)
    VALUES (new.id, old.status, new.status, new.fence, new.lease_replica, new.gpu_seconds);
END;
CREATE TRIGGER simulated_over BEFORE UPDATE OF output, gpu_seconds, attempts ON jobs
WHEN old.status IN ('succeeded', 'failed', 'canceled') AND old.purged IS NULL
    AND new.purged IS NULL AND (new.output IS NOT old.output OR new.attempts <> old.attempts
    OR new.gpu_seconds <> old.gpu_seconds) BEGIN
    INSERT INTO simulated_changes (job_id, before, after, fence)
    VALUES (new.id, 'over', 'changed', new.fence);
END;
CREATE TRIGGER simulated_preview AFTER INSERT ON previews BEGIN
    INSERT INTO simulated_changes (job_id, before, after, fence)
    SELECT new.job_id, 'preview', status, new.fence - jobs.fence FROM jobs WHERE id = new.job_id;
END;
CREATE TRIGGER simulated_checkpoint AFTER INSERT ON checkpoints BEGIN
    INSERT INTO simulated_changes (job_id, before, after, fence)
    SELECT new.job_id, 'checkpoint', status, new.fence - jobs.fence FROM jobs
    WHERE id = new.job_id;
END;
"""


class _Connection(sqlite3.Connection):
    """Says before and after each commit that it comes."""

    strike: Strike | None = None

    def commit(self) -> None:
        if self.strike is None or not self.in_transaction:
            super().commit()
            return
        try:
            self.strike("before commit", self)
        except BaseException:
            self.rollback()  # as the driver does, or the end of the process
            raise
        super().commit()
        self.strike("after commit", self)

    def close(self) -> None:
        """The pool gives a connection up whose process was killed; the database stays."""
        if self.in_transaction:
            self.rollback()


class SimulatedDatabase:
    """One database for all runs of this process: its compiled statements are kept."""

    def __init__(self) -> None:
        self.raw = sqlite3.connect(":memory:", factory=_Connection, check_same_thread=False)
        self.raw.isolation_level = None  # transactions are begun below, as in production
        self.raw.execute("PRAGMA foreign_keys = ON")
        self.engine = create_engine(
            "sqlite://", creator=lambda: self.raw, poolclass=StaticPool, pool_reset_on_return=None
        )
        # Not an event: an engine with any listener asks for all of them at every statement.
        self.engine.dialect.do_begin = self._begin  # type: ignore[method-assign]
        self.raw.strike = None
        self._upgrade()
        self.raw.executescript(_NOTES)
        self._tables = [*(table.name for table in reversed(metadata.sorted_tables))]
        self._tables.append("simulated_changes")
        self._rows: list[tuple[str, list[Any]]] = []

    def keep(self) -> None:
        """What is in the tables now is what every run begins with."""
        self._rows = []
        for table in reversed(self._tables):
            rows = self.raw.execute(f"SELECT * FROM {table}").fetchall()
            if rows:
                places = ", ".join("?" * len(rows[0]))
                self._rows.append((f"INSERT INTO {table} VALUES ({places})", rows))

    def reset(self, strike: Strike | None) -> None:
        self.raw.strike = None
        if self.raw.in_transaction:
            self.raw.rollback()
        self.raw.execute("BEGIN")
        for table in self._tables:
            self.raw.execute(f"DELETE FROM {table}")
        for statement, rows in self._rows:
            self.raw.executemany(statement, rows)
        self.raw.commit()
        self.raw.strike = strike

    def quiet(self) -> None:
        """No faults any more."""
        self.raw.strike = None

    def rows(self, query: str, *values: object) -> list[sqlite3.Row]:
        """What the tables say now."""
        cursor = self.raw.cursor()
        cursor.row_factory = sqlite3.Row
        return cursor.execute(query, values).fetchall()

    def _begin(self, connection: object) -> None:
        if self.raw.strike is not None:
            self.raw.strike("begin", None)
        self.raw.execute("BEGIN")

    def _upgrade(self) -> None:
        made = production.create_database_engine
        try:
            upgrade.create_database_engine = lambda url: _undisposed(self.engine)
            upgrade.upgrade_database("sqlite://")
        finally:
            upgrade.create_database_engine = made


def _undisposed(engine: Engine) -> Engine:
    engine.dispose = lambda close=True: None  # type: ignore[method-assign]
    return engine


def failed() -> sqlite3.OperationalError:
    """As the driver says it of a disk that fails."""
    return sqlite3.OperationalError("disk I/O error")


@functools.cache
def simulated_database() -> SimulatedDatabase:
    return SimulatedDatabase()
