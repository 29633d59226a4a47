"""`calotype moderation takedown`: every copy of a picture goes, and it does not come again."""

from __future__ import annotations

import base64
import io
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from samples.images import drawing, texture
from sqlalchemy import text

from calotype.moderation.moderator import Moderator
from calotype.moderation.policy.categories import Verdict
from calotype.moderation.policy.policy import Policy
from calotype.moderation.testing import FixedImageClassifier
from calotype.serving.api.review import stored_images
from calotype.serving.commands.cli import cli
from calotype.serving.database.review.takedowns import TakenDown
from calotype.serving.images.encode import encode_image
from calotype.serving.images.provenance import payload_fingerprint

TAKEDOWNS = "/v1/moderation/takedowns"
WANTED, OTHER = texture(11, 256), texture(12, 256)


@pytest.fixture
def run(service: Any) -> Callable[..., Result]:
    key = service.database.api_keys.create(team="safety", scopes=("moderation",))[0]
    environment = {"CALOTYPE_URL": service.url, "CALOTYPE_API_KEY": key}

    def run(*words: str) -> Result:
        return CliRunner().invoke(cli, ["moderation", "takedown", *words], env=environment)

    return run


def stored(service: Any, pixels: Any, kind: str = "png", seed: int = 1) -> str:
    """The id of a stored picture that shows these pixels, with the marks of the installation."""
    drawn = service.generate(prompt="a fox", seed=seed, response_format="url").json()
    asset_id = str(drawn["data"][0]["url"].split("/assets/")[1].split("/")[0])
    data = encode_image(pixels, kind, None)
    service.blobs.put(service.database.files.get_asset(asset_id).blob_key, data)
    return asset_id


def as_found(pixels: Any, quality: int = 80) -> bytes:
    """A copy from somewhere: half the size, saved again, without any metadata."""
    marked = Image.open(io.BytesIO(encode_image(pixels, "png", None))).convert("RGB")
    file = io.BytesIO()
    marked.resize((marked.width // 2, marked.height // 2)).save(file, "JPEG", quality=quality)
    return file.getvalue()


def moderator_of(service: Any) -> Moderator:
    return Moderator(
        Policy.default(),
        text_classifiers=[],
        image_classifiers=[FixedImageClassifier({"sexual": 0.0})],
        known=[TakenDown(service.database.takedowns)],
        fingerprint=payload_fingerprint,
    )


def test_every_copy_goes_and_the_picture_is_refused_until_it_is_lifted(
    service: Any, run: Callable[..., Result], tmp_path: pathlib.Path
) -> None:
    first, copy = stored(service, WANTED), stored(service, WANTED[::-1, ::-1], "jpeg", seed=2)
    other = stored(service, OTHER, seed=3)
    found = tmp_path / "found.jpg"
    found.write_bytes(as_found(WANTED))
    moderator = moderator_of(service)
    assert moderator.check_image(WANTED).verdict is Verdict.ALLOW

    looked = run(str(found))
    assert looked.exit_code == 0, looked.output
    assert first in looked.stdout and copy in looked.stdout and other not in looked.stdout
    assert service.database.files.get_asset(first) is not None, "only looked for"
    assert list(service.database.reviewer_audit.actions()) == []

    blobs = [service.database.files.get_asset(name).blob_key for name in (first, copy)]
    done = run(str(found), "--reason", "That is me.", "--yes")
    assert done.exit_code == 0 and "2 files deleted" in done.stdout, done.output
    assert [service.database.files.get_asset(name) is None for name in (first, copy, other)] == [
        True, True, False,
    ]  # fmt: skip
    assert not set(blobs) & set(service.blobs.blobs), "at once, not with the next sweep"
    (deed,) = service.database.reviewer_audit.actions()
    assert deed["action"] == "takedown.made" and sorted(deed["details"]["assets"]) == sorted(
        [first, copy]
    )
    for again in (WANTED, WANTED[:, ::-1], np.asarray(Image.open(io.BytesIO(found.read_bytes())))):
        decision = moderator.check_image(again)
        assert decision.verdict is Verdict.BLOCK
        assert decision.categories == ("real_person_intimate",)
        assert decision.findings[0].rule == f"pictures.taken-down.{deed['subject']}"
    assert moderator.check_image(OTHER).verdict is Verdict.ALLOW

    assert "That is me." in run("--list").stdout
    assert run("--lift", deed["subject"]).exit_code == 0
    assert moderator.check_image(WANTED).verdict is Verdict.ALLOW
    assert [row["action"] for row in service.database.reviewer_audit.actions()] == [
        "takedown.made",
        "takedown.lifted",
    ]
    gone = run("--lift", deed["subject"])
    assert gone.exit_code == 2 and "no takedown" in gone.stderr


def test_a_flat_drawing_is_known_by_its_mark_and_not_drawn_again(
    service: Any, run: Callable[..., Result]
) -> None:
    """PDQ knows nothing of two flat tones; the payload of the mark follows from the pixels."""
    image, asset_id = drawing(0, 256), stored(service, drawing(0, 256))
    done = run("--asset", asset_id, "--reason", "r", "--yes", "--json")
    answer = json.loads(done.stdout)
    assert answer["pdq"] is None and answer["watermark"]
    assert answer["matches"][0]["by"] == "watermark"
    assert service.database.files.get_asset(asset_id) is None
    moderator = moderator_of(service)
    assert moderator.check_image(image).findings[0].classifier == "fingerprint"
    assert moderator.check_image(drawing(5, 256)).verdict is Verdict.ALLOW


def test_nothing_is_done_before_every_stored_picture_was_looked_at(
    service: Any, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With many pictures one call looks at some of them, and the client calls again."""
    monkeypatch.setattr(stored_images, "INDEX_SECONDS", -1.0)  # one picture a call
    found = [stored(service, WANTED, seed=seed) for seed in range(3)]
    encoded = base64.b64encode(as_found(WANTED)).decode()
    key = service.database.api_keys.create(team="safety", scopes=("moderation",))[0]
    body = {"image": encoded, "category": "sexual", "reason": "r"}
    first = service.http(key).post(TAKEDOWNS, json=body).json()
    assert (first["id"], first["deleted"], first["unsearched"]) == (None, 0, 2)
    assert service.database.takedowns.list_takedowns() == []
    done = run("--asset", found[0], "--reason", "r", "--yes")
    assert done.exit_code == 0 and "3 files deleted" in done.stdout, done.output
    assert [service.database.files.get_asset(name) for name in found] == [None] * 3


def test_without_the_list_nothing_is_shown(service: Any) -> None:
    moderator = moderator_of(service)
    with service.database.engine.begin() as connection:
        connection.execute(text("ALTER TABLE taken_down RENAME TO away"))
    decision = moderator.check_image(OTHER)
    assert decision.verdict is Verdict.ERROR and "taken down" in (decision.reason or "")
    with service.database.engine.begin() as connection:
        connection.execute(text("ALTER TABLE away RENAME TO taken_down"))
    assert moderator.check_image(OTHER).verdict is Verdict.ALLOW


def test_a_reported_picture_takes_its_copies_along(service: Any) -> None:
    first, copy = stored(service, WANTED), stored(service, WANTED, "webp", seed=2)
    case = service.http().post(
        "/v1/moderation/reports", json={"asset_id": first, "reason": "Mine."}
    )
    reviewer = service.http(
        service.database.api_keys.create(team="safety", scopes=("moderation",))[0]
    )
    reviewer.post("/v1/moderation/cases/take")
    done = reviewer.post(
        f"/v1/moderation/cases/{case.json()['id']}/decide", json={"verdict": "taken_down"}
    )
    assert done.status_code == 200
    assert (
        service.database.files.get_asset(first) is None
        and service.database.files.get_asset(copy) is None
    )
    assert moderator_of(service).check_image(WANTED).verdict is Verdict.BLOCK


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        ({}, "image", "either image or asset_id"),
        ({"image": "!"}, "image", "base64"),
        ({"image": base64.b64encode(b"no picture").decode()}, "image", "no picture"),
        ({"asset_id": "asset_none"}, "asset_id", "no asset"),
        ({"asset_id": "a", "category": "ugly"}, "category", "ugly"),
    ],
)
def test_what_cannot_be_taken_down_is_said(
    shared_service: Any, body: dict[str, Any], param: str, told: str
) -> None:
    key = shared_service.database.api_keys.create(team="safety", scopes=("moderation",))[0]
    whole = {"category": "sexual", "reason": "r"} | body
    answer = shared_service.http(key).post(TAKEDOWNS, json=whole)
    assert answer.status_code in (400, 404)
    error = answer.json()["error"]
    assert error["param"] == param and told in error["message"]
    images = shared_service.database.api_keys.create(team="shop", scopes=("images",))[0]
    assert shared_service.http(images).post(TAKEDOWNS, json=whole).status_code == 403
