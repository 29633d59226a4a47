"""Migrations: from nothing, twice, back, and by several processes at once."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable

import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from calotype.serving.database.connection import create_database_engine
from calotype.serving.database.database import Database
from calotype.serving.database.schema.training_tables import metadata
from calotype.serving.database.schema.upgrade import (
    alembic_config,
    downgrade_database,
    upgrade_database,
)


def tables(url: str) -> set[str]:
    engine = create_database_engine(url)
    try:
        return set(sqlalchemy.inspect(engine).get_table_names())
    finally:
        engine.dispose()


def test_up_from_nothing_up_again_down_and_up(new_database: Callable[[], str]) -> None:
    url = new_database()
    upgrade_database(url)
    upgrade_database(url)
    assert tables(url) == set(metadata.tables) | {"alembic_version"}
    downgrade_database(url, "base")
    assert tables(url) == {"alembic_version"}
    upgrade_database(url)
    assert tables(url) >= set(metadata.tables)


def test_every_migration_goes_down_and_up_again_with_rows_in_the_tables(
    new_database: Callable[[], str],
) -> None:
    url = new_database()
    scripts = ScriptDirectory.from_config(alembic_config()).walk_revisions()
    revisions = [script.revision for script in scripts][::-1]
    upgrade_database(url, revisions[0])
    _insert_a_job(url)
    for older, newer in itertools.pairwise(revisions):
        upgrade_database(url, newer)
        downgrade_database(url, older)
        upgrade_database(url, newer)
    database = Database.connect(url)
    job = database.jobs.get_job("job_1", "team_1")
    database.close()
    assert job is not None and (job.status, job.reserved_seconds, job.recipe) == ("queued", 0, None)


def _insert_a_job(url: str) -> None:
    """As the first version of the tables wrote it."""
    engine = create_database_engine(url)
    with engine.begin() as connection:
        connection.execute(
            sqlalchemy.text(
                "INSERT INTO teams (id, name, weight, created) VALUES ('team_1', 'a', 1, 0)"
            )
        )
        connection.execute(
            sqlalchemy.text(
                "INSERT INTO jobs (id, team_id, type, model, status, input, request, metadata, "
                "priority, fence, attempts, step, steps, created) VALUES ('job_1', 'team_1', "
                "'image.generate', 'shapes', 'queued', '{}', '{}', '{}', 0, 0, 0, 0, 20, 0)"
            )
        )
    engine.dispose()


def test_the_migrations_make_what_the_code_expects(database_url: str) -> None:
    engine = create_database_engine(database_url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        differences = compare_metadata(context, metadata)
    engine.dispose()
    assert differences == []


def test_there_is_one_newest_migration() -> None:
    assert len(ScriptDirectory.from_config(alembic_config()).get_heads()) == 1


@pytest.mark.slow
def test_three_processes_that_start_at_once_all_find_the_tables(
    new_database: Callable[[], str],
) -> None:
    url = new_database()
    program = (
        "import sys; from calotype.serving.database.database import Database; "
        "database = Database.open(sys.argv[1]); database.teams.ensure_team('t'); "
        "print(database.secrets.service_secret('x').hex())"
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
    answers = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [0] * 3, answers
    assert len({out for out, _ in answers}) == 1
