"""PostgreSQL behind PgBouncer in transaction mode, as managed databases offer it."""

from __future__ import annotations

import concurrent.futures
import shutil
from collections.abc import Iterator

import pytest
from servers.postgres import PostgresServer

from calotype.serving.core.errors import InvalidRequest
from calotype.serving.database.database import open_database

PROGRAM = shutil.which("pgbouncer") or "/usr/sbin/pgbouncer"


@pytest.fixture
def pooled(postgres: PostgresServer) -> Iterator[str]:
    if shutil.which(PROGRAM) is None:
        pytest.skip("PgBouncer is not installed (Debian: apt-get install pgbouncer)")
    with postgres.behind_pgbouncer(PROGRAM, postgres.create_database()) as url:
        yield url


def test_the_job_database_works_without_prepared_statements(pooled: str) -> None:
    database = open_database(f"{pooled}&prepared_statements=false", print)
    try:

        def make_and_read(number: int) -> bool:
            made = database.teams.ensure_team(f"team-{number}")
            # Often enough that psycopg would prepare what it sends.
            found = [database.teams.get_team(made.id) for _ in range(12)]
            return all(team is not None and team.name == made.name for team in found)

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert all(pool.map(make_and_read, range(16)))
    finally:
        database.close()


@pytest.mark.parametrize(
    ("option", "says"),
    [("sslmod=require", "sslmod"), ("prepared_statements=no", "true or false, not 'no'")],
)
def test_a_wrong_option_of_the_url_is_named(option: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        open_database(f"postgresql+psycopg://calotype@127.0.0.1/jobs?{option}", print)
