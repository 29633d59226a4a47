"""A sweep at the worst moment deletes nothing that somebody is about to name."""

from __future__ import annotations

import asyncio
import base64
import pathlib
from collections.abc import Iterator

import pytest
from servers.gateway import QUICK, Service, running

from calotype.serving.api.background.tasks import Sweeper
from calotype.serving.api.state.settings import GatewaySettings
from calotype.serving.images.provenance import MARKS, installation_marks


@pytest.fixture
def service(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    # Without Content Credentials, whose signatures differ, equal pictures are equal files.
    monkeypatch.setenv(MARKS, "xmp,watermark")
    installation_marks.cache_clear()
    settings = GatewaySettings(hangup_grace=0, **(QUICK | {"sweep_seconds": None}))
    with running(tmp_path, settings) as service:
        yield service
    installation_marks.cache_clear()


def sweep_after_each_put(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the moment at which bytes are stored and the one at which a row names them."""
    put = service.blobs.put

    def put_and_sweep(key: str, data: bytes) -> None:
        put(key, data)
        asyncio.run(Sweeper(service.gateway()).sweep())

    monkeypatch.setattr(service.blobs, "put", put_and_sweep)


def test_a_picture_that_was_deleted_before_is_drawn_again(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = service.generate(prompt="a fox", seed=1, response_format="url").json()
    asset_id = first["data"][0]["url"].split("/assets/")[1].split("/")[0]
    assert service.http().delete(f"/v1/assets/{asset_id}").status_code == 200
    service.clock.advance(hours=2)
    sweep_after_each_put(service, monkeypatch)
    again = service.generate(prompt="a fox", seed=1, response_format="url").json()
    assert service.fetch(again["data"][0]["url"]).status_code == 200


def test_an_upload_that_was_deleted_before_is_kept_again(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    http, given = service.http(), {"file": ("a.bin", b"the same bytes")}
    first = http.post("/v1/files", files=given, data={"purpose": "user_data"}).json()
    second = http.post("/v1/files", files=given, data={"purpose": "user_data"}).json()
    assert len(service.blobs.blobs) == 1, "equal uploads lie there once"
    assert http.delete(f"/v1/files/{first['id']}").status_code == 200
    assert http.get(f"/v1/files/{second['id']}/content").content == b"the same bytes"
    http.delete(f"/v1/files/{second['id']}")
    service.clock.advance(hours=2)
    sweep_after_each_put(service, monkeypatch)
    third = http.post("/v1/files", files=given, data={"purpose": "user_data"}).json()
    assert http.get(f"/v1/files/{third['id']}/content").content == b"the same bytes"


def test_a_picture_that_a_recipe_names_is_kept_for_its_job(service: Service) -> None:
    """Also where the file that it was found in expires before the job is drawn."""
    http = service.http()
    drawn = service.generate(prompt="a fox", seed=1).json()["data"][0]["b64_json"]
    source = {"image_url": f"data:image/png;base64,{drawn}"}
    edited = http.post("/v1/images/edits", json={"prompt": "in blue", "images": [source]}).json()
    service.clock.advance(hours=23)
    service.backend.pause()
    wanted = {"input": {"recipe": edited["recipe"]}, "type": "image.edit"}
    job = http.post("/v1/jobs", json=wanted).json()
    assert "id" in job, job
    service.clock.advance(hours=0.9)
    service.database.files.expire_files()
    service.clock.advance(hours=0.05)
    for _ in range(2):
        asyncio.run(Sweeper(service.gateway()).sweep())
    kept = [base64.b64encode(data).decode() for data in service.blobs.blobs.values()]
    assert drawn in kept
    service.backend.resume()
