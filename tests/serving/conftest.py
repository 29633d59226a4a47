"""A job database, SQLite and PostgreSQL, and a dispatcher over it, with a clock that stands still.

There is one PostgreSQL server a session, and one database in it whose tables are emptied for each
test: making a database takes half a second and 8 MB of disk.
"""

from __future__ import annotations

import itertools
import pathlib
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from servers.postgres import (
    PostgresServer,
    empty_tables,
    find_binaries,
    install_in_ci,
)

from calotype.serving.database.connection import sqlite_url
from calotype.serving.database.database import Database
from calotype.serving.database.schema.upgrade import upgrade_database
from calotype.serving.dispatch.dispatcher import Dispatcher
from calotype.serving.dispatch.policy import DispatchPolicy
from calotype.serving.jobs.moderation_checks import CheckRetries
from calotype.serving.jobs.records import JobRecord, NewJob, new_id
from calotype.serving.testing.in_memory import ManualClock, ScriptedSafety


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("template")
    upgrade_database(sqlite_url(folder))
    return folder / "calotype.db"


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    if find_binaries() is None:
        install_in_ci()
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    with PostgresServer.running(binaries) as server:
        yield server


@pytest.fixture(scope="session")
def postgres_database(postgres: PostgresServer) -> str:
    """The address of a database with tables; tests empty it before they use it."""
    url = postgres.url(postgres.create_database())
    upgrade_database(url)
    return url


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(params=["sqlite", "postgresql"])
def new_database(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Callable[[], str]:
    """Makes empty databases, without tables, and returns their addresses."""
    if request.param == "sqlite":
        numbers = itertools.count()
        return lambda: sqlite_url(tmp_path / f"new folder {next(numbers)}")
    server: PostgresServer = request.getfixturevalue("postgres")
    return lambda: server.url(server.create_database())


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """The address of a database with tables and without rows."""
    if request.param == "sqlite":
        return str(request.getfixturevalue("sqlite_database"))
    url = str(request.getfixturevalue("postgres_database"))
    empty_tables(url)
    return url


@pytest.fixture
def sqlite_database(tmp_path: pathlib.Path, empty_database: pathlib.Path) -> str:
    """For tests of what only a file can suffer: a full disk, a lock that is held."""
    shutil.copy(empty_database, tmp_path / "calotype.db")
    return sqlite_url(tmp_path)


@pytest.fixture
def database(database_url: str, clock: ManualClock) -> Iterator[Database]:
    database = Database.connect(database_url, clock)
    yield database
    database.close()


@pytest.fixture
def file_database(sqlite_database: str, clock: ManualClock) -> Iterator[Database]:
    database = Database.connect(sqlite_database, clock)
    yield database
    database.close()


@pytest.fixture
def add_job(database: Database) -> Callable[..., JobRecord]:
    """Makes queued jobs in ``database``; ``team`` is a name."""
    return job_maker(database)


def job_maker(database: Database) -> Callable[..., JobRecord]:
    def add(
        prompt: str = "a dog",
        *,
        team: str = "default",
        n: int = 1,
        priority: int = 0,
        deadline: float | None = None,
        image: str | None = None,
        **more: Any,
    ) -> JobRecord:
        job_id = new_id("job")
        request = {
            "id": job_id,
            "prompt": prompt,
            "size": "128x128",
            "rendered_size": "128x128",
            "steps": 20,
            "guidance_scale": 3.0,
            "sampler": "flow-euler",
            "seed": 7,
            "n": n,
            "loras": [],
        } | ({} if image is None else {"image": image})
        return database.jobs.create_job(
            NewJob(
                id=job_id,
                team_id=database.teams.ensure_team(team).id,
                model="shapes",
                input={"request_id": "req_1", "output_format": "png"},
                request=request,
                priority=priority,
                deadline=deadline,
                **more,
            )
        )

    return add


@pytest.fixture
def add_to_file(file_database: Database) -> Callable[..., JobRecord]:
    return job_maker(file_database)


@pytest.fixture
def safety() -> ScriptedSafety:
    return ScriptedSafety()


@pytest.fixture
async def dispatcher(
    database: Database, safety: ScriptedSafety, clock: ManualClock
) -> AsyncIterator[Dispatcher]:
    """Sweeps only when it is told to."""
    retries = CheckRetries(delays=(0.0, 0.0, 0.0))
    policy = DispatchPolicy(sweep_seconds=None, check_retries=retries)
    dispatcher = Dispatcher(database, safety, clock, policy)
    await dispatcher.start()
    yield dispatcher
    await dispatcher.stop()
