"""What the gateway costs without any generation: a request, an open stream, a page, a lease.

The gateway is a process of its own over SQLite, as `calotype gateway` is; no generator is behind
it. Times are ratios to what the same machine needs in the same run for an HTTP request that is
answered with a constant, and for a row that is inserted into SQLite and flushed to the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any

import aiohttp
import psutil

from calotype.serving.core.errors import EngineError
from calotype.serving.core.protocols import ModelStatus, SystemClock
from calotype.serving.database.connection import sqlite_url
from calotype.serving.database.database import Database
from calotype.serving.dispatch.dispatcher import Dispatcher
from calotype.serving.jobs.records import NewJob, new_id
from calotype.serving.testing.in_memory import ScriptedSafety

RATE, SECONDS = 100, 15
STREAMS = 1000
QUEUED = 10_000
LEASES = 200
INSERTS = 300
REQUEST_UNIT = "x a bare request"
ACCEPT_UNIT = "x a bare request and insert"
REQUEST = {
    "prompt": "a red fox",
    "size": "128x128",
    "rendered_size": "128x128",
    "steps": 20,
    "guidance_scale": 2.5,
    "sampler": "flow-euler",
    "seed": 7,
    "n": 1,
    "loras": [],
}


def measure() -> dict[str, dict[str, Any]]:
    """name -> value, unit, bar, better."""
    # An accepted job is flushed to the disk, which must not be busy with what others wrote before.
    os.sync()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        database = Database.open(sqlite_url(folder))
        key, record = database.api_keys.create()
        insert = statistics.median(bare_inserts(folder))
        lease_ms = asyncio.run(insert_to_lease(database, record.team_id, record.id))
        with running(folder, "bare") as (url, _):
            times = asyncio.run(client_of(key, lambda client: at_rate(client, list_models(url))))
            bare = quantile(times, 0.5)
        with running(folder, "gateway") as (url, process):
            models = asyncio.run(client_of(key, lambda client: at_rate(client, list_models(url))))
            jobs = asyncio.run(client_of(key, lambda client: at_rate(client, make_job(url))))
            streams = asyncio.run(client_of(key, lambda client: open_streams(client, url, process)))
            fill(database, record.team_id, record.id)
            pages = asyncio.run(client_of(key, lambda client: walk(client, url)))
        database.close()
    accept = bare + insert
    return {
        "a bare HTTP request, p50 at 100/s": entry(bare, "ms", None),
        "a bare insert and flush, p50": entry(insert, "ms", None),
        "gateway, list models, p50 at 100/s": entry(quantile(models, 0.5) / bare, REQUEST_UNIT, 10),
        "gateway, list models, p99 at 100/s": entry(
            quantile(models, 0.99) / bare, REQUEST_UNIT, 50
        ),
        "gateway, accept a job, p50 at 100/s": entry(quantile(jobs, 0.5) / accept, ACCEPT_UNIT, 5),
        "gateway, accept a job, p99 at 100/s": entry(
            quantile(jobs, 0.99) / accept, ACCEPT_UNIT, 25
        ),
        "gateway with 1,000 open event streams": entry(streams / 1e6, "MB", 500),
        "a page of 100 of 10,000 queued jobs, p50": entry(
            quantile(pages, 0.5) / bare, REQUEST_UNIT, 60
        ),
        "a page of 100 of 10,000 queued jobs, slowest": entry(max(pages) / bare, REQUEST_UNIT, 120),
        "from a job's insert to its lease, p50": entry(
            quantile(lease_ms, 0.5) / insert, "x a bare insert and flush", 20
        ),
        "from a job's insert to its lease, p99": entry(
            quantile(lease_ms, 0.99) / insert, "x a bare insert and flush", None
        ),
    }


def bare_inserts(folder: pathlib.Path) -> list[float]:
    """Milliseconds of each insert of one row that is flushed to the disk, as SQLite does it."""
    found: list[float] = []
    with contextlib.closing(sqlite3.connect(folder / "bare.db", isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        database.execute("CREATE TABLE rows (id TEXT PRIMARY KEY, body TEXT)")
        body = json.dumps(REQUEST)
        for number in range(INSERTS):
            begun = time.perf_counter()
            database.execute("INSERT INTO rows VALUES (?, ?)", (str(number), body))
            found.append(1000 * (time.perf_counter() - begun))
    return found


def entry(value: float, unit: str, bar: float | None) -> dict[str, Any]:
    return {"value": round(value, 2), "unit": unit, "bar": bar, "better": "lower"}


def quantile(values: Sequence[float], share: float) -> float:
    return statistics.quantiles(values, n=1000, method="inclusive")[round(1000 * share) - 1]


async def insert_to_lease(database: Database, team_id: str, key_id: str) -> list[float]:
    """Milliseconds from before a job's row is written until a waiting generator has its lease."""
    dispatcher = Dispatcher(database, ScriptedSafety(), SystemClock())
    await dispatcher.start()
    found: list[float] = []
    for number in range(LEASES):
        waiting = asyncio.create_task(dispatcher.lease("replica", 1, 10))
        await asyncio.sleep(0)
        begun = time.perf_counter()
        job = new_job(team_id, key_id, number)
        await asyncio.to_thread(database.jobs.admit_job, job)
        await dispatcher.submit(job.id)
        [lease] = await waiting
        found.append(1000 * (time.perf_counter() - begun))
        await dispatcher.fail(lease.job_id, lease.fence, EngineError("measured"))
    await dispatcher.stop()
    return found


def new_job(team_id: str, key_id: str, number: int) -> NewJob:
    job_id = new_id("job")
    return NewJob(
        id=job_id,
        team_id=team_id,
        api_key_id=key_id,
        type="image.generate",
        model="shapes",
        input={"prompt": "a red fox", "output_format": "png"},
        request=REQUEST | {"id": job_id, "seed": number},
        metadata={},
        priority=0,
        deadline=None,
        expires=4e9,
        body_sha256="",
    )


def fill(database: Database, team_id: str, key_id: str) -> None:
    """So many queued jobs as the bar names; written in one transaction, which is not measured."""
    from calotype.serving.database.schema.tables import jobs

    rows = []
    for number in range(QUEUED):
        job = new_job(team_id, key_id, number)
        values = {name: getattr(job, name) for name in job.__dataclass_fields__}
        state = {"status": "queued", "fence": 0, "attempts": 0, "step": 0, "steps": 20}
        rows.append(values | state | {"created": time.time() + number / 1e4})
    with database.engine.begin() as connection:
        connection.execute(jobs.insert(), rows)


async def client_of(
    key: str, work: Callable[[aiohttp.ClientSession], Coroutine[Any, Any, Any]]
) -> Any:
    headers = {"authorization": f"Bearer {key}"}
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(
        headers=headers, connector=connector, timeout=timeout
    ) as client:
        return await work(client)


def list_models(url: str) -> Callable[[aiohttp.ClientSession], Any]:
    return lambda client: client.get(f"{url}/v1/models")


def make_job(url: str) -> Callable[[aiohttp.ClientSession], Any]:
    body = {"input": {"prompt": "a red fox", "steps": 20}}
    return lambda client: client.post(f"{url}/v1/jobs", json=body)


async def at_rate(
    client: aiohttp.ClientSession, ask: Callable[[aiohttp.ClientSession], Any]
) -> list[float]:
    """Milliseconds of each answer to requests that come at a steady rate, whatever they find."""
    found: list[float] = []

    async def once() -> None:
        begun = time.perf_counter()
        async with ask(client) as answer:
            await answer.read()
            answer.raise_for_status()
        found.append(1000 * (time.perf_counter() - begun))

    for _ in range(20):
        await once()  # connections, and code that runs for the first time
    found.clear()
    begin = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(RATE * SECONDS):
            pause = begin + number / RATE - time.perf_counter()
            await asyncio.sleep(max(0.0, pause))
            group.create_task(once())
    return found


async def open_streams(
    client: aiohttp.ClientSession, url: str, process: subprocess.Popen[bytes]
) -> int:
    """Resident bytes of the gateway while so many streams are open, each of a job of its own."""

    async def open_one() -> aiohttp.ClientResponse:
        async with client.post(f"{url}/v1/jobs", json={"input": {"prompt": "a fox"}}) as made:
            made.raise_for_status()
            job_id = (await made.json())["id"]
        stream = await client.get(f"{url}/v1/jobs/{job_id}/events")
        stream.raise_for_status()
        await stream.content.readline()
        return stream

    async with contextlib.AsyncExitStack() as stack:
        for _ in range(0, STREAMS, 20):
            for stream in await asyncio.gather(*(open_one() for _ in range(20))):
                stack.callback(stream.close)
        await asyncio.sleep(3)  # the gateway looks at all of them now and then
        async with client.get(f"{url}/metrics") as figures:
            text = await figures.text()
        if f"calotype_event_streams {STREAMS:.1f}" not in text:
            raise SystemExit("not all event streams are open")
        return int(psutil.Process(process.pid).memory_info().rss)


async def walk(client: aiohttp.ClientSession, url: str) -> list[float]:
    """Milliseconds of each of a hundred pages, from the newest job to the oldest."""
    found: list[float] = []
    query = {"limit": "100", "status": "queued"}
    for _ in range(QUEUED // 100):
        begun = time.perf_counter()
        async with client.get(f"{url}/v1/jobs", params=query) as answer:
            answer.raise_for_status()
            page = await answer.json()
        found.append(1000 * (time.perf_counter() - begun))
        query["after"] = page["last_id"]
    return found


class Nobody:
    """A `protocols.GenerationBackend` that takes every job and draws none."""

    async def submit(self, job_id: str) -> None:
        return

    async def wait(self, job_id: str, timeout: float) -> None:
        await asyncio.sleep(timeout)

    async def cancel(self, job_id: str) -> None:
        return

    async def check(
        self, texts: Sequence[str], images: Sequence[Any], *more: Any
    ) -> list[dict[str, Any]]:
        return []

    async def status(self) -> list[ModelStatus]:
        return [ModelStatus("shapes", True, 1)]


async def constant(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI application that answers every request with the same bytes."""
    if scope["type"] == "http":
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})


def serve_constant(port: int) -> None:
    """The child process that costs nothing but the request."""
    import uvicorn

    uvicorn.run(constant, host="127.0.0.1", port=port, log_level="warning", lifespan="off")


def serve(folder: pathlib.Path, port: int) -> None:
    """The child process of the gateway."""
    from calotype.serving.api.app import create_app
    from calotype.serving.api.http.server import build_server, listening_socket
    from calotype.serving.api.state.catalog import Catalog
    from calotype.serving.api.state.settings import GatewaySettings
    from calotype.serving.config import BUILT_IN_ADAPTER, BUILT_IN_MODEL
    from calotype.serving.storage import FolderBlobStore

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        yield

    app = create_app(
        GatewaySettings(),
        Database.connect(sqlite_url(folder)),
        FolderBlobStore(folder / "assets"),
        Nobody(),
        Catalog([BUILT_IN_MODEL], [BUILT_IN_ADAPTER]),
        lifespan=lifespan,
    )
    with listening_socket("127.0.0.1", port) as listener:
        asyncio.run(build_server(app, 1).serve(sockets=[listener]))


@contextlib.contextmanager
def running(folder: pathlib.Path, kind: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # -P: the folder of this file holds names of standard modules.
    process = subprocess.Popen([sys.executable, "-P", __file__, kind, str(folder), str(port)])
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if process.poll() is not None:
                raise SystemExit("the gateway ended while starting")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait(20)


if __name__ == "__main__":
    kind, folder, port = sys.argv[1:]
    if kind == "bare":
        serve_constant(int(port))
    else:
        serve(pathlib.Path(folder), int(port))
