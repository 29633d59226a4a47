"""Jobs of three teams while every process and the database are killed: none is lost.

On real Ray Serve with the packaged model. A picture whose generator died in the middle goes on from
its checkpoint and is, byte by byte, the file that nobody disturbed would have drawn.
"""

from __future__ import annotations

import hashlib
import pathlib
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from e2e.pods import Pods
from samples.images import same_pixels
from servers.postgres import PostgresServer, find_binaries, install_in_ci
from sqlalchemy import select

from calotype.serving.database.connection import sqlite_url
from calotype.serving.database.database import Database
from calotype.serving.database.schema.tables import assets, checkpoints, jobs, usage_records

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

TEAMS = ("a", "b", "c")
JOBS_PER_TEAM = 20
LONG_EVERY = 3
"""One job in so many takes long enough to leave checkpoints."""
LONG = {"width": 208, "height": 208, "steps": 50, "sampler": "flow-heun"}
SHORT = {"width": 64, "height": 64, "steps": 4}
COMPARED = 3
"""Pictures whose job was disturbed, and as many of others, that are drawn again."""

Crash = Callable[[], None]


@pytest.fixture(params=["sqlite", "postgresql"])
def database_server(
    request: pytest.FixtureRequest, tmp_path: pathlib.Path
) -> Iterator[tuple[str, Crash]]:
    """An address, and what crashes and restarts the server behind it."""
    (tmp_path / "data").mkdir()
    if request.param == "sqlite":
        yield sqlite_url(tmp_path / "data"), lambda: None
        return
    if find_binaries() is None:
        install_in_ci()
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    with PostgresServer.running(binaries) as server:

        def crash() -> None:
            server.stop(signal.SIGQUIT)
            server.start()

        yield server.url(server.create_database()), crash


@pytest.fixture
def pods(database_server: tuple[str, Crash], tmp_path: pathlib.Path) -> Iterator[Pods]:
    pods = Pods(tmp_path, database_server[0])
    try:
        yield pods
    finally:
        pods.close()


class Team:
    """A product team's client: it sends again what was not answered, under the same key."""

    def __init__(self, url: str, name: str, key: str) -> None:
        self.name, self.accepted = name, dict[str, str]()
        self._client = httpx.Client(
            base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=60
        )
        self._work = threading.Thread(target=self._submit_all)

    def submit(self) -> None:
        self._work.start()

    def submitted(self) -> bool:
        return not self._work.is_alive()

    def _submit_all(self) -> None:
        for number in range(JOBS_PER_TEAM):
            kind = LONG if number % LONG_EVERY == 0 else SHORT
            body = {"input": {"prompt": "a red circle", "seed": number, **kind}}
            name = f"{self.name}-{number}"
            self.accepted[name] = self._until_accepted(name, body)

    def _until_accepted(self, name: str, body: dict[str, Any]) -> str:
        end = time.monotonic() + 1200
        while True:
            try:
                answer = self._client.post("/v1/jobs", json=body, headers={"idempotency-key": name})
                if answer.status_code in (200, 202):
                    return str(answer.json()["id"])
                assert answer.status_code in (429, 503), answer.text
            except httpx.TransportError:
                pass
            assert time.monotonic() < end, "the gateway never came back"
            time.sleep(0.1)

    def close(self) -> None:
        self._client.close()

    def again(self, recipe: Any) -> bytes:
        """The file that the recipe gives when nobody disturbs it."""
        answer = self._client.post(
            "/v1/images/generations", json={"recipe": recipe, "response_format": "url"}, timeout=300
        )
        assert answer.status_code == 200, answer.text
        return httpx.get(answer.json()["data"][0]["url"], timeout=60).content


def test_no_accepted_job_is_lost_or_doubled(
    pods: Pods, database_server: tuple[str, Crash], tmp_path: pathlib.Path
) -> None:
    address, crash_database = database_server
    database = Database.open(address)
    keys = {name: database.api_keys.create(team=name)[0] for name in TEAMS}
    pods.start("gateway")
    pods.start("model-app")
    pods.until(pods.ready, "the model is loaded")
    teams = [Team(pods.url, name, key) for name, key in keys.items()]
    for team in teams:
        team.submit()
    pods.until(lambda: all(team.accepted for team in teams), "jobs are accepted")
    pods.kill("gateway")
    pods.start("gateway")
    for deployment in ("Moderator", "Dispatcher"):
        pods.until(lambda: open_jobs(database, "running"), "a job runs")
        kill_replica(pods, deployment)
    kill_generator_at_work(pods, database, crash_database)
    if not address.startswith("sqlite"):  # what a restart finds, either database has kept
        wait_until_restarts_are_harmless(pods, database)
        pods.until(lambda: half_drawn(database), "a running job has left a checkpoint")
        kill_head(pods)
    pods.until(lambda: all(team.submitted() for team in teams), "all jobs are accepted")
    pods.until(lambda: not open_jobs(database, "queued", "running"), "all jobs are over")
    check(database, teams, tmp_path / "data" / "assets")
    for team in teams:
        team.close()
    database.close()


def kill_generator_at_work(pods: Pods, database: Database, crash_database: Crash) -> None:
    """Kills it until that has cost a job its lease: what was running may end just before."""
    while True:
        wait_until_restarts_are_harmless(pods, database)
        pods.until(lambda: half_drawn(database), "a running job has left a checkpoint")
        held = {job.id: job.fence for job in open_jobs(database, "running")}
        kill_replica(pods, "Generator")
        crash_database()

        def leased_again(held: dict[str, int] = held) -> set[str]:
            return {job.id for job in disturbed(database) if job.fence > held.get(job.id, 1 << 30)}

        def settled(held: dict[str, int] = held) -> bool:
            still = {job.id for job in open_jobs(database, "queued", "running")}
            return not (still & set(held)) - leased_again(held)

        pods.until(settled, "the jobs of the dead one are over or leased again")
        if leased_again():
            return


def wait_until_restarts_are_harmless(pods: Pods, database: Database) -> None:
    """A job that two generators die over is given up: those that were disturbed end first."""
    pods.until(lambda: not disturbed(database, "queued", "running"), "no disturbed job is left")


def kill_replica(pods: Pods, deployment: str) -> None:
    pods.until(lambda: pods.replica(deployment), f"a replica of {deployment} runs")
    victim = pods.replica(deployment)
    assert victim is not None
    victim.kill()


def kill_head(pods: Pods) -> None:
    head = pods.child(lambda title: "gcs_server" in title)
    assert head is not None
    head.kill()
    # Without its head the pod answers no probe; the kubelet replaces it.
    pods.until(lambda: not pods.ready(), "the pod is not ready")
    pods.kill("model-app")
    pods.start("model-app")


def open_jobs(database: Database, *states: str) -> list[Any]:
    with database.engine.connect() as connection:
        return list(connection.execute(jobs.select().where(jobs.c.status.in_(states))))


def half_drawn(database: Database) -> bool:
    """Whether a job runs that has left a checkpoint."""
    found = (
        select(jobs.c.id)
        .join(checkpoints, checkpoints.c.job_id == jobs.c.id)
        .where(jobs.c.status == "running")
    )
    with database.engine.connect() as connection:
        return connection.execute(found).first() is not None


def disturbed(database: Database, *states: str) -> list[Any]:
    """Jobs that were leased more than once."""
    chosen = jobs.select().where(jobs.c.fence > 1)
    if states:
        chosen = chosen.where(jobs.c.status.in_(states))
    with database.engine.connect() as connection:
        return list(connection.execute(chosen))


def check(database: Database, teams: list[Team], folder: pathlib.Path) -> None:
    accepted = [job_id for team in teams for job_id in team.accepted.values()]
    assert len(set(accepted)) == JOBS_PER_TEAM * len(TEAMS)
    with database.engine.connect() as connection:
        rows = connection.execute(jobs.select().order_by(jobs.c.id)).mappings().all()
        images = connection.execute(assets.select()).mappings().all()
        usage = connection.execute(usage_records.select()).mappings().all()
    assert {row["id"] for row in rows} == set(accepted), "exactly the accepted jobs exist"
    assert Counter(row["status"] for row in rows) == {"succeeded": len(accepted)}
    assert Counter(p["job_id"] for p in images) == Counter(dict.fromkeys(accepted, 1))
    assert Counter(u["job_id"] for u in usage) == Counter(dict.fromkeys(accepted, 1))
    by_job = {image["job_id"]: image for image in images}
    files = {job_id: (folder / by_job[job_id]["blob_key"]).read_bytes() for job_id in accepted}
    for job_id, data in files.items():
        assert hashlib.sha256(data).hexdigest() == by_job[job_id]["sha256"]
    resumed = [row for row in rows if row["fence"] > 1 and row["steps"] == LONG["steps"]]
    assert len(resumed) >= 2, "too few jobs lost their generator: nobody was killed at work"
    others = [row for row in rows if row["fence"] == 1]
    for row in [*resumed[:COMPARED], *others[:COMPARED]]:
        assert same_pixels(teams[0].again(row["recipe"]), files[row["id"]])
