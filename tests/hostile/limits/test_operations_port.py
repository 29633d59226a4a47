"""What operators ask without a key can be kept off the port that clients reach."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest
from servers.routes import routes_of
from starlette.testclient import TestClient

from calotype.serving.api.app import create_app, create_operations_app
from calotype.serving.api.state.catalog import Catalog
from calotype.serving.api.state.settings import GatewaySettings
from calotype.serving.config import BUILT_IN_MODEL
from calotype.serving.database.connection import sqlite_url
from calotype.serving.database.database import Database
from calotype.serving.testing.in_memory import MemoryBlobStore, PaintingBackend

OPERATIONS = ("/healthz", "/readyz", "/metrics", "/docs", "/openapi.json")


@pytest.fixture
def database(tmp_path: pathlib.Path) -> Iterator[Database]:
    database = Database.open(sqlite_url(tmp_path))
    yield database
    database.close()


def test_the_port_of_the_api_answers_nobody_without_a_key(database: Database) -> None:
    blobs = MemoryBlobStore()
    backend, catalog = PaintingBackend(database, blobs), Catalog([BUILT_IN_MODEL])
    app = create_app(GatewaySettings(), database, blobs, backend, catalog, operations_apart=True)
    assert {path for _, path in routes_of(app.routes) if not path.startswith("/v1/")} == set()
    public, apart = TestClient(app), TestClient(create_operations_app(app))
    for path in OPERATIONS:
        assert public.get(path).status_code == 404, path
        assert apart.get(path).status_code == 200, path
    assert "/v1/images/generations" in apart.get("/openapi.json").json()["paths"]
    assert apart.get("/v1/jobs").status_code == 404
