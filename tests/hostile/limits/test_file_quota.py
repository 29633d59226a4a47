"""Files of a team expire, and have a bounded number of bytes together."""

from __future__ import annotations

import base64
import io
import pathlib
from collections.abc import Iterator

import pytest
from PIL import Image
from servers.gateway import QUICK, Service, running

from calotype.serving.api.state.settings import GatewaySettings

DAY = 86_400


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    still = QUICK | {"webhook_seconds": None, "batch_seconds": None, "sweep_seconds": None}
    settings = GatewaySettings(hangup_grace=0, team_file_bytes=2_000, **still)
    with running(tmp_path_factory.mktemp("files"), settings) as found:
        yield found


def upload(service: Service, key: str, content: bytes) -> dict[str, object]:
    answer = service.http(key).post(
        "/v1/files", files={"file": ("a.bin", content)}, data={"purpose": "user_data"}
    )
    found: dict[str, object] = answer.json() | {"status_code": answer.status_code}
    return found


def test_a_file_that_names_no_expiry_has_one(service: Service) -> None:
    key, _ = service.database.api_keys.create(team="plain")
    file = upload(service, key, b"x")
    kept = int(str(file["expires_at"])) - int(str(file["created_at"]))
    assert kept == 30 * DAY


def test_a_team_keeps_no_more_bytes_than_it_may(service: Service) -> None:
    key, _ = service.database.api_keys.create(team="full")
    first = upload(service, key, bytes(1_500))
    assert first["status_code"] == 200
    blobs = len(service.blobs.blobs)
    refused = upload(service, key, b"y" * 600)
    assert refused["status_code"] == 429
    assert "1,500 bytes and may keep 2,000" in str(refused["error"])
    same = upload(service, key, bytes(1_500))
    assert same["status_code"] == 429, "also what is stored already"
    assert len(service.blobs.blobs) == blobs, "what is refused is not stored"
    other, _ = service.database.api_keys.create(team="other")
    assert upload(service, other, b"y" * 600)["status_code"] == 200
    assert service.http(key).delete(f"/v1/files/{first['id']}").status_code == 200
    assert upload(service, key, b"y" * 600)["status_code"] == 200


def test_pictures_of_jobs_count_too(service: Service, tmp_path: pathlib.Path) -> None:
    key, _ = service.database.api_keys.create(team="painter")
    assert upload(service, key, bytes(1_900))["status_code"] == 200
    file = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    body = {"prompt": "x", "reference_images": [url]}
    answer = service.http(key).post("/v1/images/generations", json=body)
    assert answer.status_code == 429, answer.text
    assert answer.json()["error"]["code"] == "insufficient_quota"
