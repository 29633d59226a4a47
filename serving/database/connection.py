"""Connections to the job database: SQLite in WAL mode, or PostgreSQL.

SQLite serves several processes here (gateway, dispatcher, command line). Writers start with
``BEGIN IMMEDIATE`` so that they queue for the lock instead of failing when a read turns into a
write, and wait up to `BUSY_SECONDS` for it. What a client was promised is on the disk before it is
told (`write_ahead`); the rest may be lost in a power cut, and is then done again.
"""

from __future__ import annotations

import contextlib
import pathlib
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    NoSuchModuleError,
    SQLAlchemyError,
)

from calotype.serving.core.errors import InvalidRequest, StorageFailed
from calotype.serving.database.write_ahead import WriteAheadLog

BUSY_SECONDS = 10.0
_PREPARED = "prepared_statements"
_TURNS: weakref.WeakKeyDictionary[Engine, threading.Lock] = weakref.WeakKeyDictionary()
"""Writers of one process to one SQLite file take turns. SQLite itself lets those that wait sleep
and look again, up to a tenth of a second at a time: threads of a busy gateway would starve."""
_LOGS: weakref.WeakKeyDictionary[Engine, WriteAheadLog] = weakref.WeakKeyDictionary()


def sqlite_url(folder: pathlib.Path) -> str:
    """The address of the embedded database inside a data folder."""
    return f"sqlite:///{folder / 'calotype.db'}"


def create_database_engine(url: str) -> Engine:
    """An engine for ``url``; opens no connection yet.

    Raises:
        InvalidRequest: the URL is malformed or its driver is not installed.
    """
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() != "sqlite":
            return _create_server_engine(parsed)
        engine = create_engine(
            parsed, connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False}
        )
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        raise InvalidRequest(f"The database URL cannot be used: {error}.") from None
    _TURNS[engine] = threading.Lock()
    if parsed.database not in (None, "", ":memory:"):
        _LOGS[engine] = WriteAheadLog(pathlib.Path(str(parsed.database)))
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _create_server_engine(url: URL) -> Engine:
    """For PostgreSQL. ``prepared_statements=false`` in the URL suits PgBouncer's transaction mode,
    where the next transaction may find another session, without what was prepared in the last.

    Raises:
        InvalidRequest: an option of the URL is not known.
    """
    options: dict[str, Any] = {}
    if _PREPARED in url.query:
        wanted = url.query[_PREPARED]
        if wanted not in ("true", "false"):
            raise InvalidRequest(
                f"The database URL's {_PREPARED} must be true or false, not {wanted!r}."
            )
        url = url.difference_update_query([_PREPARED])
        if wanted == "false":
            options["prepare_threshold"] = None
    engine = create_engine(url, pool_pre_ping=True, connect_args=options)
    if engine.driver == "psycopg":
        import psycopg
        import psycopg.conninfo

        try:
            psycopg.conninfo.make_conninfo(
                "",
                **{name: str(value) for name, value in url.query.items() if isinstance(value, str)},
            )
        except psycopg.ProgrammingError as error:
            raise InvalidRequest(
                f"The database URL has an option that PostgreSQL does not know: {error}. Those of "
                f"libpq are possible, such as sslmode, and {_PREPARED}."
            ) from None
    return engine


def _prepare_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # transactions are begun below, not by the driver
    cursor = connection.cursor()
    try:
        cursor.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
        _enter_wal(cursor)
        cursor.execute("PRAGMA synchronous = NORMAL")
        cursor.execute("PRAGMA foreign_keys = ON")
        # A deleted row is overwritten: the key of a rejected picture must not linger in the file.
        cursor.execute("PRAGMA secure_delete = ON")
    finally:
        cursor.close()


def _enter_wal(cursor: sqlite3.Cursor) -> None:
    # Turning WAL on needs the whole file for a moment, and SQLite does not wait for it: when
    # several processes start at once all but one are told "locked", though the mode is right soon.
    for remaining in range(100, -1, -1):
        if cursor.execute("PRAGMA journal_mode").fetchone()[0] == "wal":
            return
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if not remaining or "locked" not in str(error):
                raise
            time.sleep(0.02)


def _begin_sqlite(connection: Connection) -> None:
    read_only = connection.get_execution_options().get("calotype_read", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


@contextlib.contextmanager
def writing(engine: Engine, *, durable: bool = False) -> Iterator[Connection]:
    """One write transaction; any database fault becomes `StorageFailed`.

    Args:
        durable: it survives a power cut once this has returned. PostgreSQL does so by itself.
    """
    with _faults("written"), _turn(engine), engine.begin() as connection:
        yield connection
    if durable:
        flush(engine)


def flush(engine: Engine) -> None:
    """Returns when everything that was committed before the call survives a power cut.

    Raises:
        StorageFailed: the disk did not take it.
    """
    if (log := _LOGS.get(engine)) is not None:
        log.flush()


@contextlib.contextmanager
def _turn(engine: Engine) -> Iterator[None]:
    turns = _TURNS.get(engine)
    # Who waited for so long goes on without its turn: SQLite says then that it is busy.
    mine = turns is not None and turns.acquire(timeout=BUSY_SECONDS)
    try:
        yield
    finally:
        if turns is not None and mine:
            turns.release()


@contextlib.contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """One consistent read; any database fault becomes `StorageFailed`."""
    with (
        _faults("read"),
        engine.connect().execution_options(calotype_read=True) as connection,
        connection.begin(),
    ):
        yield connection


@contextlib.contextmanager
def _faults(verb: str) -> Iterator[None]:
    try:
        yield
    except IntegrityError:
        raise  # a broken promise of the caller, not of the disk
    except DBAPIError as error:
        raise StorageFailed(
            f"The job database cannot be {verb}: {error.orig}.", retry_after=2
        ) from error
    except SQLAlchemyError as error:
        raise StorageFailed(
            f"The job database cannot be {verb}: {error}.", retry_after=2
        ) from error
