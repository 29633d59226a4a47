"""300 jobs of three teams while every service and the database are killed: none is lost."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from calotype.serving.jobs.database import sqlite_url
from calotype.serving.jobs.keys import create_key
from calotype.serving.jobs.leases import Lease
from calotype.serving.jobs.store import JobStore
from calotype.serving.jobs.tables import assets, checkpoints, jobs, usage_records
from calotype.serving.pictures import encode_picture
from calotype.serving.request import GenerationRequest
from calotype.serving.testing_painter import advance, begin, flat
from calotype.serving.testing_postgres import PostgresServer, find_binaries, install_in_ci

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ACTORS = pathlib.Path(__file__).parent / "actors.py"
JOBS_PER_TEAM = 100
TEAMS = ("a", "b", "c")
STEPS = 12


class Cluster:
    """The processes, started again when they are killed."""

    def __init__(self, folder: pathlib.Path, database: str, ports: list[int]) -> None:
        self.gateway_port, dispatcher, moderator = ports
        self.url = f"http://127.0.0.1:{self.gateway_port}"
        common = {
            "database": database,
            "blobs": (folder / "blobs").as_uri(),
            "dispatcher": dispatcher,
            "moderator": moderator,
            "alive": str(folder / "alive"),
            "seconds_per_step": 0.02,
        }
        self._specs: dict[str, tuple[str, dict[str, Any]]] = {
            "moderator": ("moderator", common | {"port": moderator}),
            "dispatcher": ("dispatcher", common | {"port": dispatcher}),
            "gateway": ("gateway", common | {"port": self.gateway_port}),
            "generator-1": ("generator", common | {"name": "generator-1"}),
            "generator-2": ("generator", common | {"name": "generator-2"}),
            "generator-3": ("generator", common | {"name": "generator-3"}),
        }
        self._log = (folder / "actors.log").open("wb")
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self.killed: Counter[str] = Counter()
        for name in self._specs:
            self._start(name)

    def kill(self, name: str) -> None:
        """kill -9, and what a cluster does about it."""
        self._running[name].send_signal(signal.SIGKILL)
        self._running[name].wait(20)
        self.killed[name] += 1
        self._start(name)

    def names(self) -> list[str]:
        return list(self._specs)

    def close(self) -> None:
        for process in self._running.values():
            process.kill()
            process.wait(20)
        self._log.close()

    def _start(self, name: str) -> None:
        role, options = self._specs[name]
        self._running[name] = subprocess.Popen(
            [sys.executable, str(ACTORS), role, json.dumps(options)],
            stdout=self._log,
            stderr=self._log,
        )


@pytest.fixture(params=["sqlite", "postgresql"])
def database(
    request: pytest.FixtureRequest, tmp_path: pathlib.Path
) -> Iterator[tuple[str, Callable[[], None]]]:
    """An address, and what crashes and restarts the server behind it."""
    if request.param == "sqlite":
        yield sqlite_url(tmp_path), lambda: None
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


class Team:
    """A product team's client: it sends again what was not answered, under the same key."""

    def __init__(self, url: str, name: str, key: str) -> None:
        self.name, self.accepted = name, dict[str, str]()
        self._client = httpx.Client(
            base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=30
        )

    def close(self) -> None:
        self._client.close()

    def submit_all(self) -> None:
        for number in range(JOBS_PER_TEAM):
            body = {
                "input": {"prompt": f"{self.name} {number}", "seed": number, "steps": STEPS},
                "metadata": {"number": str(number)},
            }
            name = f"{self.name}-{number}"
            answer = self._until(
                lambda body=body, name=name: self._client.post(
                    "/v1/jobs", json=body, headers={"idempotency-key": name}
                ),
                (200, 202),
            )
            self.accepted[name] = answer.json()["id"]

    def finished(self) -> dict[str, dict[str, Any]]:
        """Every accepted job that is over."""
        found = {}
        for job_id in self.accepted.values():
            job = self._until(lambda job_id=job_id: self._client.get(f"/v1/jobs/{job_id}"), (200,))
            if job.json()["status"] not in ("queued", "running"):
                found[job_id] = job.json()
        return found

    def _until(self, ask: Callable[[], httpx.Response], good: tuple[int, ...]) -> httpx.Response:
        end = time.monotonic() + 120
        while True:
            try:
                answer = ask()
                if answer.status_code in good:
                    return answer
                assert answer.status_code in (429, 503), answer.text
            except httpx.TransportError:
                pass
            assert time.monotonic() < end, "the gateway never came back"
            time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def test_no_job_is_lost_and_none_is_doubled(
    tmp_path: pathlib.Path, database: tuple[str, Callable[[], None]]
) -> None:
    address, crash_database = database
    store = JobStore.open(address)
    keys = {name: create_key(store, team=name)[0] for name in TEAMS}
    cluster = Cluster(tmp_path, address, _free_ports(3))
    try:
        teams = [Team(cluster.url, name, key) for name, key in keys.items()]
        submitting = [threading.Thread(target=team.submit_all) for team in teams]
        for thread in submitting:
            thread.start()
        for number, victim in enumerate(2 * cluster.names()):
            if victim.startswith("generator"):
                _wait_until_at_work(store, victim)
            cluster.kill(victim)
            if number == len(cluster.names()):
                crash_database()
        for thread in submitting:
            thread.join(200)
            assert not thread.is_alive()
        ended = _wait_for_all(teams)
        for team in teams:
            team.close()
    finally:
        cluster.close()
    assert min(cluster.killed[name] for name in cluster.names()) >= 2
    _check(store, ended, tmp_path)
    store.close()


def _wait_until_at_work(store: JobStore, generator: str) -> None:
    """Until it is in the middle of a job and has left a checkpoint of it."""
    at_work = (
        select(jobs.c.id)
        .join(checkpoints, checkpoints.c.job_id == jobs.c.id)
        .where(jobs.c.lease_replica == generator, jobs.c.status == "running")
    )
    end = time.monotonic() + 150
    while True:
        with store.engine.connect() as connection:
            if connection.execute(at_work).first() is not None:
                return
        assert time.monotonic() < end, f"{generator} never worked"
        time.sleep(0.01)


def _wait_for_all(teams: list[Team]) -> dict[str, dict[str, Any]]:
    end = time.monotonic() + 180
    while True:
        ended = {job_id: job for team in teams for job_id, job in team.finished().items()}
        if len(ended) == JOBS_PER_TEAM * len(TEAMS):
            return ended
        assert time.monotonic() < end, f"only {len(ended)} jobs are over"
        time.sleep(0.5)


def _check(store: JobStore, ended: dict[str, dict[str, Any]], folder: pathlib.Path) -> None:
    wanted = JOBS_PER_TEAM * len(TEAMS)
    assert Counter(job["status"] for job in ended.values()) == {"succeeded": wanted}
    with store.engine.connect() as connection:
        rows = connection.execute(jobs.select()).mappings().all()
        pictures = connection.execute(assets.select()).mappings().all()
        usage = connection.execute(usage_records.select()).mappings().all()
    assert {row["id"] for row in rows} == set(ended), "exactly the accepted jobs exist"
    assert Counter(picture["job_id"] for picture in pictures) == Counter(dict.fromkeys(ended, 1))
    assert Counter(record["job_id"] for record in usage) == Counter(dict.fromkeys(ended, 1))
    resumed = [row for row in rows if row["fence"] > 1]
    assert len(resumed) >= 3, "too few jobs lost their generator: nobody was killed at work"
    by_job = {picture["job_id"]: picture for picture in pictures}
    for job_id in ended:
        job = store.get_job(job_id)
        assert job is not None
        data = (folder / "blobs" / by_job[job_id]["blob_key"]).read_bytes()
        assert data == _undisturbed(job), "a resumed picture is the undisturbed one"
        assert hashlib.sha256(data).hexdigest() == by_job[job_id]["sha256"]


def _undisturbed(job: Any) -> bytes:
    """The file that a painter makes whom nobody interrupts."""
    request = GenerationRequest.from_payload(job.request)
    states = begin(request)
    for _ in range(request.sampling.steps):
        states = advance(states)
    recipe = Lease.of(job, 0.0).stamp_for(0)
    assert recipe is not None
    return encode_picture(flat(states[0], request.size), "png", 100, recipe=recipe)
