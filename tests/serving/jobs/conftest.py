"""A dispatcher over a store on a fresh SQLite file, with a clock that stands still."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from calotype.serving.jobs.database import sqlite_url
from calotype.serving.jobs.dispatch_policy import DispatchPolicy
from calotype.serving.jobs.dispatcher import Dispatcher
from calotype.serving.jobs.judging import JudgingPolicy
from calotype.serving.jobs.records import JobRecord, NewJob, new_id
from calotype.serving.jobs.store import JobStore
from calotype.serving.jobs.upgrade import upgrade_database
from calotype.serving.testing import ManualClock, ScriptedSafety


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("template")
    upgrade_database(sqlite_url(folder))
    return folder / "calotype.db"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(
    tmp_path: pathlib.Path, clock: ManualClock, empty_database: pathlib.Path
) -> Iterator[JobStore]:
    shutil.copy(empty_database, tmp_path / "calotype.db")
    store = JobStore.connect(sqlite_url(tmp_path), clock)
    yield store
    store.close()


@pytest.fixture
def add_job(store: JobStore) -> Callable[..., JobRecord]:
    """Makes queued jobs; ``team`` is a name."""

    def add(
        prompt: str = "a dog",
        *,
        team: str = "default",
        n: int = 1,
        priority: int = 0,
        deadline: float | None = None,
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
        }
        return store.create_job(
            NewJob(
                id=job_id,
                team_id=store.ensure_team(team).id,
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
def safety() -> ScriptedSafety:
    return ScriptedSafety()


@pytest.fixture
async def dispatcher(
    store: JobStore, safety: ScriptedSafety, clock: ManualClock
) -> AsyncIterator[Dispatcher]:
    """Sweeps only when it is told to, and takes five jobs."""
    judging = JudgingPolicy(delays=(0.0, 0.0, 0.0))
    policy = DispatchPolicy(sweep_seconds=None, max_queue=5, judging=judging)
    dispatcher = Dispatcher(store, safety, clock, policy)
    await dispatcher.start()
    yield dispatcher
    await dispatcher.stop()
