"""A hub and a web server on loopback, and orders to fetch from them."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import pathlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from calotype.serving.config import BUILT_IN_MODEL
from calotype.serving.fetching import hub, transfer
from calotype.serving.fetching.order import FetchOrder

BASE = BUILT_IN_MODEL.model_dump(mode="json", by_alias=True, exclude_none=True)


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
                entry["lfs"] = {"sha256": digest, "size": len(content)}
            siblings.append(entry)
            self.files[f"/{repo}/resolve/{commit}/{name}"] = content
        about = {"sha": commit, "siblings": siblings, "gated": False, **told}
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
