"""/v1/datasets: uploaded, then checked by the service's safety stage; owned by a team."""

from __future__ import annotations

import io
import json
import time
import zipfile
from typing import Any

import httpx
import pytest
from samples.training_pictures import RIGHTS, encoded, photo

SETTINGS = {"resolution": "96", "trigger_word": "zorbl", "rights": json.dumps(RIGHTS)}


def archive(pictures: int = 6, caption: str = "a toy", **more: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for number in range(pictures):
            made.writestr(f"{number}.png", encoded(photo(number)))
            made.writestr(f"{number}.txt", f"{caption} {number}")
        for name, data in more.items():
            made.writestr(name, data)
    return file.getvalue()


def upload(client: httpx.Client, data: bytes, name: str = "toys.zip", **fields: str) -> Any:
    return client.post("/v1/datasets", files={"file": (name, data)}, data=SETTINGS | fields)


def checked(client: httpx.Client, made: httpx.Response) -> dict[str, Any]:
    """The data set when its check has ended."""
    assert made.status_code == 200, made.text
    assert made.json()["status"] == "checking"
    give_up = time.monotonic() + 120
    while time.monotonic() < give_up:
        found: dict[str, Any] = client.get(f"/v1/datasets/{made.json()['id']}").json()
        if found["status"] != "checking":
            return found
        time.sleep(0.05)
    raise AssertionError("it was never checked")


def test_an_archive_is_checked_and_reported(service: Any) -> None:
    client = service.http()
    found = checked(client, upload(client, archive(broken=b"no picture", name="x"), name="t.zip"))
    assert found["status"] == "ready" and found["error"] is None
    assert found["name"] == "t.zip"
    report = found["report"]
    assert (report["pictures"], len(report["used"])) == (6, 6)
    assert report["used"][0]["caption"] == "zorbl, a toy 0"
    assert report["used"][0]["rights"] == RIGHTS
    (listed,) = client.get("/v1/datasets").json()["data"]
    assert listed["report"]["used"] == 6 and listed["report"]["digest"] == report["digest"]
    gone = client.delete(f"/v1/datasets/{found['id']}")
    assert gone.json()["deleted"] is True
    assert client.get(f"/v1/datasets/{found['id']}").status_code == 404
    assert client.get("/v1/datasets").json()["data"] == []


def test_single_pictures_are_taken_too(service: Any) -> None:
    client = service.http()
    parts = [("file", (f"{n}.png", encoded(photo(n)))) for n in range(6)]
    parts.append(("file", ("0.txt", b"the first")))
    found = checked(client, client.post("/v1/datasets", files=parts, data=SETTINGS))
    assert found["status"] == "ready"
    captions = [one["caption"] for one in found["report"]["used"]]
    assert captions == ["zorbl, the first", *["zorbl"] * 5]


def test_pictures_are_prepared_for_the_size_that_the_default_model_draws(service: Any) -> None:
    client = service.http()
    parts = [("file", (f"{n}.png", encoded(photo(n)))) for n in range(5)]
    settings = {name: value for name, value in SETTINGS.items() if name != "resolution"}
    made = client.post("/v1/datasets", files=parts, data=settings).json()
    assert made["settings"]["resolution"] == 128, "as the embedded model, not 1024"
    kept = client.post("/v1/datasets", files=parts, data=settings | {"resolution": "1024"})
    assert kept.json()["settings"]["resolution"] == 1024


def test_an_uploaded_file_becomes_a_data_set_that_outlives_it(service: Any) -> None:
    client = service.http()
    sent = {"file": ("toys.zip", archive())}
    file = client.post("/v1/files", files=sent, data={"purpose": "fine-tune"}).json()
    body = {"file_id": file["id"], "resolution": 96, "name": "toys", "rights": RIGHTS}
    made = client.post("/v1/datasets", json=body)
    assert client.delete(f"/v1/files/{file['id']}").status_code == 200
    found = checked(client, made)
    assert (found["status"], found["name"]) == ("ready", "toys")


def test_what_the_safety_stage_refuses_refuses_the_set(service: Any) -> None:
    client = service.http()
    found = checked(client, upload(client, archive(caption="forbidden")))
    assert found["status"] == "refused"
    problem = found["report"]["problems"][0]
    assert (problem["code"], problem["file"], problem["field"]) == (
        *("content_refused", "0.png", "text"),
    )


def test_an_archive_that_cannot_be_read_says_why(service: Any) -> None:
    client = service.http()
    found = checked(client, upload(client, b"PK no archive"))
    assert found["status"] == "refused" and found["report"] is None
    error = found["error"]
    assert (error["code"], error["param"]) == ("archive_unreadable", "toys.zip")
    few = checked(client, upload(client, archive(3)))
    assert [one["code"] for one in few["report"]["problems"]] == ["dataset_too_small"]


def test_a_revoked_picture_is_left_out(service: Any) -> None:
    client, keeper = service.http(), service.database.api_keys.create(scopes=("moderation",))[0]
    first = checked(client, upload(client, archive(7)))
    sha256 = first["report"]["used"][2]["sha256"]
    body = {"picture_sha256": sha256, "reason": "asked"}
    assert service.http(keeper).post("/v1/rights/revocations", json=body).status_code == 200
    again = checked(client, upload(client, archive(7)))
    assert [(one["file"], one["code"]) for one in again["report"]["refused"]] == [
        ("2.png", "rights_revoked")
    ]


def test_a_data_set_is_its_teams_alone(service: Any) -> None:
    made = upload(service.http(), archive())
    other = service.http(service.database.api_keys.create(team="other")[0])
    for method in ("GET", "DELETE"):
        assert other.request(method, f"/v1/datasets/{made.json()['id']}").status_code == 404
    assert other.get("/v1/datasets").json()["data"] == []
    assert httpx.get(f"{service.url}/v1/datasets", timeout=60).status_code == 401


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"resolution": "100"}, "resolution"),
        ({"resolution": "big"}, "resolution"),
        ({"holdout": "2"}, "holdout"),
        ({"rights": json.dumps({"basis": "consent", "holder": "Ada"})}, "rights"),
        ({"rights": "not JSON"}, "rights"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_wrong_field_is_named(shared_service: Any, fields: dict[str, str], param: str) -> None:
    refused = upload(shared_service.http(), archive(1), **fields)
    assert refused.status_code == 400, refused.text
    assert str(refused.json()["error"]["param"]).startswith(param)


def test_a_missing_file_is_named(shared_service: Any) -> None:
    client = shared_service.http()
    for body in ({"file_id": "file_unknown"}, {}):
        refused = client.post("/v1/datasets", json=body)
        assert refused.status_code in (400, 404)
        assert refused.json()["error"]["param"] == "file_id"
    unknown = client.post("/v1/datasets", files={"picture": ("a.png", b"x")}, data=SETTINGS)
    assert unknown.json()["error"]["param"] == "picture"
