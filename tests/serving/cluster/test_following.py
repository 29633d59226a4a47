"""How a gateway hears of what was declared: from the API server, from the file, and in time."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import pathlib
import time
from typing import Any, cast

import pytest

from calotype.serving.api.state.catalog import Catalog
from calotype.serving.cluster import config_sync
from calotype.serving.cluster.config_map import ConfigMapReader
from calotype.serving.cluster.config_sync import ConfigFollower
from calotype.serving.cluster.followed_file import FollowedFile
from calotype.serving.cluster.remote_backend import RemoteBackend
from calotype.serving.database.database import Database

from .conftest import House


@pytest.fixture
def slow(house: House, monkeypatch: pytest.MonkeyPatch) -> House:
    """A gateway that looks at its file when somebody asks for what is not there, and never else."""
    house.configure(house.document(adapters=[]))
    house.wait_for(
        lambda: house.said.count("The configuration is used: shapes.") == 2, "no adapter"
    )
    monkeypatch.setattr(config_sync, "POLL_SECONDS", 3600.0)
    time.sleep(0.2)
    return house


def test_an_adapter_that_was_declared_a_moment_ago_is_known(slow: House) -> None:
    striped = {"loras": [{"id": "stripes"}]}
    assert slow.submit(**striped).status_code == 404
    slow.configure(slow.document())
    assert slow.submit(**striped).status_code == 202


def test_a_key_that_was_declared_a_moment_ago_opens(slow: House) -> None:
    key = "ct_live_shoes"
    assert slow.get("/v1/models", key).status_code == 401
    team = {"name": "shoes", "keyHashes": [hashlib.sha256(key.encode()).hexdigest()]}
    slow.configure(slow.document(teams=[team]))
    assert slow.get("/v1/models", key).status_code == 200


def test_what_is_never_declared_does_not_keep_the_gateway_looking(
    slow: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0
    read = pathlib.Path.read_bytes

    def counted(path: pathlib.Path) -> bytes:
        nonlocal looks
        looks += path == slow.config
        return read(path)

    monkeypatch.setattr(pathlib.Path, "read_bytes", counted)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(slow.submit, loras=[{"id": "nothing"}]) for _ in range(24)]
        assert {future.result().status_code for future in asked} == {404}
    assert 1 <= looks < 12, "those who wait share a look"


class Server:
    """What a ConfigMapReader finds out, test by test."""

    content: bytes | None = None

    async def read(self) -> bytes | None:
        return self.content


async def test_the_api_server_is_believed_and_the_file_is_for_when_it_never_answered(
    house: House, tmp_path: pathlib.Path
) -> None:
    def document(adapters: list[Any]) -> bytes:
        return json.dumps(house.document(adapters=adapters)).encode()

    with_one = house.document()["adapters"]
    file, server, catalog = tmp_path / "mounted.json", Server(), Catalog([])
    file.write_bytes(document([]))
    database = Database.connect(house.environment.database_url)
    follower = ConfigFollower(
        FollowedFile(file, cast(ConfigMapReader, server)),
        FollowedFile(tmp_path / "teams.json"),
        *(catalog, RemoteBackend(database, "internal-token"), database, house.said.append),
    )
    await follower.look()
    assert catalog.models() and not catalog.adapters("shapes")
    server.content = document(with_one)
    await follower.look()
    assert catalog.adapters("shapes")
    server.content = None  # it is away, and the file is behind
    await follower.look()
    assert catalog.adapters("shapes")
    database.close()
