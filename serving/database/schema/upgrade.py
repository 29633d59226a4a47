"""Brings the job database to the newest table layout.

Every process that opens the database calls this first. It is safe when several do so at once: the
whole upgrade is one transaction behind the database's own lock, and who comes second finds
nothing to do.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable

from alembic import command
from alembic.config import Config
from sqlalchemy import text
from sqlalchemy.engine import make_url

from calotype.serving.core.errors import StorageFailed
from calotype.serving.database.connection import create_database_engine, writing

_OWNER_ONLY = 0o600
MIGRATIONS = pathlib.Path(__file__).parent / "migrations"
_POSTGRES_LOCK = 0x63616C6F  # "calo": any number that nobody else locks


def alembic_config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    return config


def upgrade_database(url: str, revision: str = "head") -> None:
    """Creates or upgrades the tables behind ``url``.

    Raises:
        StorageFailed: the file cannot be created or the database cannot be reached.
    """
    _run(url, revision, command.upgrade)


def downgrade_database(url: str, revision: str) -> None:
    """Takes migrations back to ``revision`` (``base`` removes every table)."""
    _run(url, revision, command.downgrade)


def _run(url: str, revision: str, change: Callable[[Config, str], None]) -> None:
    engine = create_database_engine(url)
    _make_file(url)
    try:
        with writing(engine) as connection:
            if engine.dialect.name == "postgresql":
                connection.execute(text(f"SELECT pg_advisory_xact_lock({_POSTGRES_LOCK})"))
            config = alembic_config()
            config.attributes["connection"] = connection
            change(config, revision)
    finally:
        engine.dispose()


def _make_file(url: str) -> None:
    """The file of SQLite, readable by its owner alone: it holds prompts and hashes of keys."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite" or not parsed.database:
        return
    file = pathlib.Path(parsed.database)
    if parsed.database == ":memory:":
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=_OWNER_ONLY)
        if file.stat().st_uid == os.geteuid():
            file.chmod(_OWNER_ONLY)
    except OSError as error:
        raise StorageFailed(
            f"The job database {file} cannot be made: {error.strerror or error}."
        ) from error
