"""Pictures between a model's pods and the gateways go through in parts."""

from __future__ import annotations

import contextlib
import pathlib
import tracemalloc
from collections.abc import Iterator

import pytest
from servers.internal_port import INTERNAL, OURS, House, refused, token
from servers.loopback import served

from calotype.serving.cluster.job_store_api import build_job_store_api
from calotype.serving.database.database import Database
from calotype.serving.storage import FolderBlobStore
from calotype.serving.storage.gateway import GatewayBlobStore


def test_no_picture_is_whole_in_memory_on_its_way(tmp_path: pathlib.Path) -> None:
    Database.open(f"sqlite:///{tmp_path}/jobs.db").close()
    house = House(tmp_path / "jobs.db")
    size, part = 64 * 2**20, b"x" * 2**16
    files = FolderBlobStore(tmp_path / "pictures")
    app = build_job_store_api(house.database, files, house.catalog, INTERNAL)
    job_id = house.running("shapes")
    key = f"{house.team}/checkpoints/{job_id}-1"
    with served(app) as url, contextlib.closing(GatewayBlobStore(url, token(OURS))) as mine:
        mine.put(f"{key}-warm", b"x")
        tracemalloc.start()
        try:
            mine.put_parts(key, (part for _ in range(size // len(part))))
            found = mine.open(key)
            assert found.size == size == sum(len(part) for part in found.parts)
            assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
        finally:
            tracemalloc.stop()
        stored = files.open(key)
        stored.parts.close()
        assert stored.size == size

        def broken() -> Iterator[bytes]:
            yield part
            raise ValueError("the writer was stopped")

        with pytest.raises(ValueError, match="stopped"):
            mine.put_parts(f"{key}-half", broken())
        mine.open(key).parts.close()  # who wants nothing of it takes no connection with them
        assert refused(lambda: mine.get(f"{key}-half"))
        picture = f"{house.team}/ab/mine.png"
        mine.put(picture, b"mine" * 10**6)
        mine.put(picture, b"mine" * 10**6)
        assert refused(lambda: mine.put_parts(picture, [b"mine" * 10**6, b"!"]))
    house.close()
