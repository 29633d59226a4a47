"""A real gateway on a real port, over SQLite, with a worker that paints flat pictures."""

from __future__ import annotations

import atexit
import contextlib
import functools
import pathlib
import shutil
import ssl
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
from servers.loopback import served

from calotype.serving.api.app import create_app
from calotype.serving.api.state.catalog import Catalog
from calotype.serving.api.state.gateway import Gateway
from calotype.serving.api.state.settings import GatewaySettings
from calotype.serving.config import BUILT_IN_ADAPTER, BUILT_IN_CONTROL, BUILT_IN_MODEL
from calotype.serving.core.protocols import GenerationBackend, SystemClock
from calotype.serving.database.connection import sqlite_url
from calotype.serving.database.database import Database
from calotype.serving.database.schema.upgrade import upgrade_database
from calotype.serving.dispatch.policy import DispatchPolicy
from calotype.serving.jobs.moderation_checks import CheckRetries
from calotype.serving.jobs.records import JobRecord
from calotype.serving.testing.in_memory import (
    MemoryBlobStore,
    PaintingBackend,
    ScriptedSafety,
    decision,
)
from calotype.serving.testing.painter import PainterSettings

QUICK: dict[str, Any] = {
    "watch_seconds": 0.02,
    "webhook_seconds": 0.05,
    "batch_seconds": 0.05,
    "dataset_seconds": 0.05,
    "forecast_seconds": 0.0,
    "outage_patience_seconds": 0.0,
}
"""Pauses that make tests short."""


NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For clients of loopback: reading the machine's certificates takes longer than most tests."""


def check_text(text: str) -> dict[str, Any]:
    return decision("input", blocked=["sexual"] if "forbidden" in text else [])


class ShiftedClock(SystemClock):
    """The machine's clock, set forward by what was added with `advance`."""

    def __init__(self) -> None:
        self._ahead = 0.0

    def time(self) -> float:
        return super().time() + self._ahead

    def advance(self, *, hours: float = 0.0, seconds: float = 0.0) -> None:
        self._ahead += hours * 3600 + seconds


@dataclass
class Service:
    """A running gateway and everything behind it."""

    url: str
    key: str
    database: Database
    blobs: MemoryBlobStore
    backend: PaintingBackend
    catalog: Catalog
    safety: ScriptedSafety
    clock: ShiftedClock
    app: Any = None
    clients: list[httpx.Client] = field(default_factory=list)

    def gateway(self) -> Gateway:
        found: Gateway = self.app.state.gateway
        return found

    def http(self, key: str | None = None) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.key if key is None else key}"}
        client = httpx.Client(base_url=self.url, headers=headers, timeout=600, verify=NO_TLS)
        self.clients.append(client)
        return client

    def sdk(self, key: str | None = None, max_retries: int = 0) -> openai.OpenAI:
        client = openai.DefaultHttpxClient(verify=NO_TLS)
        self.clients.append(client)
        return openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key=key or self.key,
            max_retries=max_retries,
            http_client=client,
        )

    def generate(self, **body: Any) -> httpx.Response:
        return self.http().post("/v1/images/generations", json=body)

    def fetch(self, url: str) -> httpx.Response:
        """A GET without a key, as whoever knows the address sends it."""
        return httpx.get(url, verify=NO_TLS, timeout=600)

    def jobs(self) -> list[JobRecord]:
        team = self.database.teams.ensure_team("default")
        return self.database.jobs.list_jobs(team.id, limit=100)


@functools.cache
def _empty_database() -> pathlib.Path:
    """Upgrading takes longer than all else that a gateway does at its start, so it is done once."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="calotype-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    upgrade_database(sqlite_url(folder))
    return folder / "calotype.db"


@contextlib.contextmanager
def running(
    folder: pathlib.Path,
    settings: GatewaySettings | None = None,
    policy: DispatchPolicy | None = None,
    wrap: Callable[[PaintingBackend], GenerationBackend] = lambda backend: backend,
    painter: PainterSettings | None = None,
) -> Iterator[Service]:
    """A gateway over ``folder``; arguments replace the parts of the usual one."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(_empty_database(), folder / "calotype.db")
    clock = ShiftedClock()
    database = Database.connect(sqlite_url(folder), clock)
    safety, blobs = ScriptedSafety(check_text), MemoryBlobStore()
    quick = policy or DispatchPolicy(
        check_retries=CheckRetries(delays=(0.0, 0.0)), storage_delays=(0.0, 0.0, 0.0)
    )
    backend = PaintingBackend(database, blobs, safety, policy=quick, settings=painter)
    catalog = Catalog([BUILT_IN_MODEL], [BUILT_IN_ADAPTER, BUILT_IN_CONTROL])
    app = create_app(
        settings or GatewaySettings(hangup_grace=0, **QUICK),
        database,
        blobs,
        wrap(backend),
        catalog,
        backend.lifespan,
    )
    with served(app) as url:
        key, _ = database.api_keys.create()
        service = Service(url, key, database, blobs, backend, catalog, safety, clock, app)
        yield service
        for client in service.clients:
            client.close()
    database.close()
