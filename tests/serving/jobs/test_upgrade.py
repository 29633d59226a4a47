"""Migrations: from nothing, twice, back, and by several processes at once."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from calotype.serving.jobs.database import create_database_engine, sqlite_url
from calotype.serving.jobs.tables import metadata
from calotype.serving.jobs.upgrade import alembic_config, downgrade_database, upgrade_database


def tables(url: str) -> set[str]:
    engine = create_database_engine(url)
    try:
        return set(sqlalchemy.inspect(engine).get_table_names())
    finally:
        engine.dispose()


def test_up_from_nothing_up_again_down_and_up(tmp_path: pathlib.Path) -> None:
    url = sqlite_url(tmp_path / "new folder")
    upgrade_database(url)
    upgrade_database(url)
    assert tables(url) == set(metadata.tables) | {"alembic_version"}
    downgrade_database(url, "base")
    assert tables(url) == {"alembic_version"}
    upgrade_database(url)
    assert tables(url) >= set(metadata.tables)


def test_the_migrations_make_what_the_code_expects(empty_database: pathlib.Path) -> None:
    engine = create_database_engine(f"sqlite:///{empty_database}")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        differences = compare_metadata(context, metadata)
    engine.dispose()
    assert differences == []


def test_there_is_one_newest_migration() -> None:
    assert len(ScriptDirectory.from_config(alembic_config()).get_heads()) == 1


def test_three_processes_that_start_at_once_all_find_the_tables(tmp_path: pathlib.Path) -> None:
    url = sqlite_url(tmp_path / "data")
    program = (
        "import sys; from calotype.serving.jobs.store import JobStore; "
        "s = JobStore.open(sys.argv[1]); s.ensure_team('t'); print(s.service_secret('x').hex())"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, url],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    answers = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [0] * 3, answers
    assert len({out for out, _ in answers}) == 1
