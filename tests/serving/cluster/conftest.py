"""Servers on loopback with orders to fetch from them; a gateway and the place of a model app."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import http.server
import json
import pathlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx
import pytest
from servers.loopback import served

from calotype.serving.api.state.settings import GatewaySettings
from calotype.serving.cluster import config_sync
from calotype.serving.cluster.gateway_process import GatewayOptions, build_gateway
from calotype.serving.cluster.model_ingress import build_ingress
from calotype.serving.config import BUILT_IN_ADAPTER, BUILT_IN_MODEL
from calotype.serving.config.environment import ClusterEnvironment
from calotype.serving.database.database import Database, open_database
from calotype.serving.storage import open_blobs
from calotype.serving.testing.in_memory import PaintingBackend, ScriptedSafety, decision
from calotype.serving.weights import hub, transfer
from calotype.serving.wire.fetch_order import FetchOrder
from calotype.serving.wire.model_status import ModelAppStatus

TOKEN = "internal-token"
BASE = BUILT_IN_MODEL.model_dump(mode="json", by_alias=True, exclude_none=True)


STRIPES = BUILT_IN_ADAPTER.model_dump(mode="json", by_alias=True, exclude_none=True)


@dataclass
class Web:
    """What a server on loopback serves, and how badly.

    Attributes:
        files: path -> content.
        token: when set, requests need it as a bearer token.
        cut_after: connections break after so many bytes of a body, each entry once.
        statuses: answered before anything else, each once.
        failing: path -> status that it is answered with.
        moved: paths that redirect to this address.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    token: str | None = None
    ranges: bool = True
    etags: bool = True
    cut_after: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    failing: dict[str, int] = field(default_factory=dict)
    moved: str | None = None
    seen: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def requests(self, path: str) -> list[dict[str, str]]:
        """Headers of the requests for one path, in order."""
        return [headers for seen, headers in self.seen if seen == path]

    def publish(
        self, repo: str, files: dict[str, bytes], revision: str = "main", **told: Any
    ) -> str:
        """Puts a repository on the hub that this is; returns its commit."""
        commit = hashlib.sha1(f"{repo} {revision}".encode()).hexdigest()
        siblings: list[dict[str, Any]] = []
        for name, content in files.items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(content)}
            if name.endswith(".safetensors"):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
            siblings.append(entry)
            self.files[f"/{repo}/resolve/{commit}/{name}"] = content
        about = {"id": repo, "sha": commit, "siblings": siblings, "gated": False, **told}
        self.files[f"/api/models/{repo}/revision/{revision}"] = json.dumps(about).encode()
        return commit


class Handler(http.server.BaseHTTPRequestHandler):
    web: Web
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        web, path = self.web, unquote(urlsplit(self.path).path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        web.seen.append((path, headers))
        if web.statuses:
            return self._answer(web.statuses.pop(0))
        if web.token is not None and headers.get("authorization") != f"Bearer {web.token}":
            return self._answer(401)
        if path in web.failing:
            return self._answer(web.failing[path])
        content = web.files.get(path)
        if content is None:
            return self._answer(404)
        if web.moved is not None and not path.startswith("/api/"):
            return self._answer(302, location=f"{web.moved}{path}")
        etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        start, wanted = 0, headers.get("range", "")
        same = headers.get("if-range", etag) == etag
        if web.ranges and same and wanted.startswith("bytes="):
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        extra = {"etag": etag} if web.etags else {}
        if start:
            extra["content-range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._answer(206 if start else 200, content[start:], **extra)

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if body and self.web.cut_after:
            self.wfile.write(body[: self.web.cut_after.pop(0)])
            self.close_connection = True
            return
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""


@pytest.fixture
def start_web() -> Iterator[Callable[[], Web]]:
    """Starts web servers."""
    with contextlib.ExitStack() as stack:

        def start() -> Web:
            web = Web()
            handler = type("Bound", (Handler,), {"web": web})
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            thread.start()
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            web.url = f"http://127.0.0.1:{server.server_address[1]}"
            return web

        yield start


@pytest.fixture
def web(start_web: Callable[[], Web]) -> Web:
    return start_web()


@pytest.fixture
def hugging_face(web: Web, monkeypatch: pytest.MonkeyPatch) -> Web:
    """The hub that HF_ENDPOINT names."""
    monkeypatch.setenv("HF_ENDPOINT", web.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return web


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other at once."""
    monkeypatch.setattr(transfer, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(hub, "PAUSES", (0.0, 0.0))


@pytest.fixture
def order(tmp_path: pathlib.Path) -> Callable[..., FetchOrder]:
    """Orders of an adapter for the built-in model; arguments replace its fields."""

    def make(**fields: Any) -> FetchOrder:
        document = {
            "kind": "adapter",
            "name": "sneaker",
            "namespace": "shoes",
            "cacheDir": str(tmp_path / "cache"),
            "maxBytes": 10_000_000,
            "model": BASE,
        }
        return FetchOrder.model_validate(document | fields)

    return make


class PaintingApp:
    """`api.ingress.ModelApp` with a painter: what a model app is, without a model."""

    def __init__(self, backend: PaintingBackend) -> None:
        self._backend = backend

    async def submit(self, job_id: str) -> None:
        await self._backend.submit(job_id)

    async def wait(self, job_id: str, seconds: float) -> None:
        await self._backend.wait(job_id, seconds)

    async def cancel(self, job_id: str) -> None:
        await self._backend.cancel(job_id)

    async def moderate(
        self, texts: Sequence[str], images: Sequence[Any], scope: Any = None
    ) -> list[dict[str, Any]]:
        return await self._backend.moderate(texts, images, scope)

    async def status(self) -> ModelAppStatus:
        return ModelAppStatus(name="shapes", ready=True, replicas=1, adapters={"stripes": "ready"})


def check_text(text: str) -> dict[str, Any]:
    return decision("input", blocked=["sexual"] if "forbidden" in text else [])


def check_image(pixels: Any) -> dict[str, Any]:
    """White pictures are blocked; the painter's are of one colour that the seed says."""
    return decision("output", blocked=["sexual"] if pixels.min() == 255 else [])


@dataclass
class House:
    """A gateway, and the place where a model app may be."""

    folder: pathlib.Path
    environment: ClusterEnvironment
    app_port: int
    url: str = ""
    key: str = ""
    said: list[str] = field(default_factory=list)

    @property
    def config(self) -> pathlib.Path:
        return self.folder / "gateway.json"

    def document(self, **changed: Any) -> dict[str, Any]:
        url = f"http://127.0.0.1:{self.app_port}"
        models = [{"manifest": BASE, "url": url, "ready": True}]
        whole = {"models": models, "adapters": [STRIPES], "teams": []}
        whole["defaultModel"] = "shapes"
        return copy.deepcopy(whole | changed)

    def configure(self, document: Any) -> None:
        """Writes gateway.json; its teams, where it has any, go into teams.json."""
        if isinstance(document, dict) and "teams" in document:
            self._write("teams.json", json.dumps({"teams": document["teams"]}))
            if len(document) == 1:
                return
        self._write("gateway.json", document if isinstance(document, str) else json.dumps(document))

    def _write(self, name: str, text: str) -> None:
        fresh = self.folder / "fresh.json"
        fresh.write_text(text)
        fresh.replace(self.folder / name)

    def http(self, key: str | None = None) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.key if key is None else key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=600)

    def get(self, path: str, key: str | None = None) -> httpx.Response:
        with self.http(key) as client:
            return client.get(path)

    def generate(self, key: str | None = None, **body: Any) -> httpx.Response:
        with self.http(key) as client:
            return client.post("/v1/images/generations", json={"prompt": "a fox", **body})

    def submit(self, **body: Any) -> httpx.Response:
        with self.http() as client:
            return client.post("/v1/jobs", json={"input": {"prompt": "a fox", **body}})

    def wait_for(self, holds: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + 600
        while not holds():
            assert time.monotonic() < deadline, f"never came true: {what}; {self.said}"
            time.sleep(0.02)

    @contextlib.contextmanager
    def model_app(self) -> Iterator[PaintingBackend]:
        """The model is there."""
        database = Database.connect(self.environment.database_url)
        safety = ScriptedSafety(check_text, check_image)
        backend = PaintingBackend(database, open_blobs(self.environment.blob_url), safety)
        app = build_ingress(PaintingApp(backend), TOKEN)
        app.router.lifespan_context = backend.lifespan
        with served(app, self.app_port):
            yield backend
        database.close()


@pytest.fixture
def house(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    monkeypatch.setattr(config_sync, "POLL_SECONDS", 0.05)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = ClusterEnvironment.read(
        {"CALOTYPE_DATA_DIR": str(tmp_path / "data"), "CALOTYPE_INTERNAL_TOKEN": TOKEN}
    )
    house = House(tmp_path, environment, port)
    house.configure(house.document())
    database = open_database(environment.database_url, house.said.append)
    settings = GatewaySettings(hangup_grace=0, wait_slice=1)
    options = GatewayOptions(
        house.config, "127.0.0.1", 0, environment, settings, say=house.said.append
    )
    with served(build_gateway(options, database)) as url:
        house.url, house.key = url, database.api_keys.create()[0]
        yield house
    database.close()
