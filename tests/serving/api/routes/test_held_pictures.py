"""Pictures that a policy holds for a person: sealed, blurred, then the team's or gone."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from calotype.moderation.policy.refusals import sentences
from calotype.serving.database.review.held_images import HELD_SECONDS
from calotype.serving.testing.in_memory import decision

CASES = "/v1/moderation/cases"


def held(stage: str, *categories: str) -> dict[str, Any]:
    return decision(stage, blocked=categories or ["violence"]) | {"verdict": "REVIEW"}


@pytest.fixture
def reviewer(service: Any) -> Any:
    return service.http(service.database.api_keys.create(team="safety", scopes=("moderation",))[0])


def hold_images(service: Any, *indices: int) -> None:
    """The safety stage holds the pictures of these numbers, counted from now."""
    count = iter(range(1000))
    service.safety.image = lambda pixels: (
        held("output") if next(count) in indices else decision("output")
    )


@contextlib.contextmanager
def taken(reviewer: Any) -> Iterator[dict[str, Any]]:
    answer = reviewer.post(f"{CASES}/take")
    assert answer.status_code == 200, answer.text
    yield answer.json()


def decided(reviewer: Any, case: dict[str, Any], verdict: str) -> Any:
    body = {"verdict": verdict, "note": "seen"}
    return reviewer.post(f"{CASES}/{case['id']}/decide", json=body)


def job_of(service: Any, answer: Any) -> dict[str, Any]:
    found: dict[str, Any] = service.http().get(f"/v1/jobs/{answer.json()['job_id']}").json()
    return found


def test_one_picture_of_two_waits_and_is_released(service: Any, reviewer: Any) -> None:
    hold_images(service, 1)
    answer = service.generate(prompt="a dog", n=2)
    assert answer.status_code == 200 and len(answer.json()["data"]) == 1
    (told,) = answer.json()["moderation"]["held"]
    assert (told["index"], told["status"], told["categories"]) == (1, "held", ["violence"])
    asset = f"/v1/assets/{told['asset_id']}"
    assert service.http().get(asset).status_code == 404, "nobody sees it"
    assert service.http().get(f"{asset}/content").status_code == 404
    assert 'calotype_moderation_cases{kind="review"} 1.0' in reviewer.get("/metrics").text
    with taken(reviewer) as case:
        assert (case["object"], case["asset_id"]) == ("moderation.review", told["asset_id"])
        assert "violence" in case["reason"]
        assert decided(reviewer, case, "approved").json()["status"] == "approved"
    (now,) = job_of(service, answer)["moderation"]["held"]
    assert now["status"] == "released"
    http = service.http()
    assert http.get(asset).json()["job_id"] == answer.json()["job_id"]
    assert http.get(now["url"].removeprefix(service.url)).content.startswith(b"\x89PNG")
    assert 'calotype_moderation_cases{kind="review"} 0.0' in http.get("/metrics").text
    other = service.http(service.database.api_keys.create(team="other")[0])
    assert other.get(asset).status_code == 404
    assert reviewer.post(f"{CASES}/take").status_code == 204


def test_when_all_wait_the_job_says_so_and_the_picture_may_still_come(
    service: Any, reviewer: Any
) -> None:
    hold_images(service, 0)
    answer = service.generate(prompt="a dog")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "held_for_review")
    assert error["type"] == "image_generation_user_error"
    (told,) = error["moderation"]["held"]
    job = service.jobs()[0]
    assert job.status == "failed" and not job.output
    with taken(reviewer) as case:
        assert decided(reviewer, case, "approved").status_code == 200
    assert service.http().get(f"/v1/assets/{told['asset_id']}").status_code == 200
    shown = service.http().get(f"/v1/jobs/{job.id}").json()
    assert shown["status"] == "failed", "a job ends once"
    german = service.http().get(f"/v1/jobs/{job.id}", headers={"accept-language": "de"}).json()
    assert german["error"]["moderation"]["user_message"] == sentences()["held"]["de"]
    assert shown["moderation"]["held"][0]["url"]


def test_a_rejected_picture_is_gone(service: Any, reviewer: Any) -> None:
    hold_images(service, 0)
    told = service.generate(prompt="a dog").json()["error"]["moderation"]["held"][0]
    (held_row,) = [service.database.held_images.get_held(told["asset_id"])]
    with taken(reviewer) as case:
        assert decided(reviewer, case, "rejected").json()["status"] == "rejected"
    assert service.http().get(f"/v1/assets/{told['asset_id']}").status_code == 404
    assert service.database.held_images.get_held(told["asset_id"]) is None
    assert service.database.files.garbage(service.database.clock.time()) == [held_row.blob_key]
    job = service.http().get(f"/v1/jobs/{service.jobs()[0].id}").json()
    assert job["moderation"]["held"][0]["status"] == "rejected"
    assert "url" not in job["moderation"]["held"][0]


def test_the_file_is_sealed_and_shown_blurred_unless_on_record(service: Any, reviewer: Any) -> None:
    hold_images(service, 0)
    told = service.generate(prompt="a dog", seed=3).json()["error"]["moderation"]["held"][0]
    row = service.database.held_images.get_held(told["asset_id"])
    stored = service.blobs.get(row.blob_key)
    assert row.seal not in str(service.jobs()[0].request) and b"PNG" not in stored[:64]
    with pytest.raises(OSError), Image.open(io.BytesIO(stored)):
        pass
    with taken(reviewer) as case:
        image = f"{CASES}/{case['id']}/picture"
        with Image.open(io.BytesIO(reviewer.get(image).content)) as small:
            assert max(small.size) <= 256
        shown = reviewer.get(image, params={"reveal": True})
        with Image.open(io.BytesIO(shown.content)) as whole:
            assert np.asarray(whole).shape == (row.height, row.width, 3)
        reviewer_actions = [
            (d["action"], d["subject"]) for d in service.database.reviewer_audit.actions()
        ]
        assert reviewer_actions == [("picture.revealed", case["id"])]
        decided(reviewer, case, "rejected")
    assert [d["action"] for d in service.database.reviewer_audit.actions()] == [
        "picture.revealed",
        "case.decided",
    ]
    someone = service.http(service.database.api_keys.create(scopes=("images",))[0])
    assert someone.get(f"{CASES}/{case['id']}/picture").status_code == 403


def test_a_changed_file_is_not_released(service: Any, reviewer: Any) -> None:
    hold_images(service, 0)
    told = service.generate(prompt="a dog").json()["error"]["moderation"]["held"][0]
    row = service.database.held_images.get_held(told["asset_id"])
    data = bytearray(service.blobs.get(row.blob_key))
    data[20] ^= 1
    service.blobs.put(row.blob_key, bytes(data))
    with taken(reviewer) as case:
        answer = decided(reviewer, case, "approved")
        assert answer.status_code >= 500
        assert "was changed since it was stored" in answer.json()["error"]["message"]
        assert decided(reviewer, case, "rejected").status_code == 200


def test_a_held_prompt_is_drawn_and_every_picture_waits(service: Any, reviewer: Any) -> None:
    service.safety.prompt = lambda text: held("input", "public_figure")
    answer = service.generate(prompt="the mayor", n=2)
    assert answer.json()["error"]["code"] == "held_for_review"
    told = answer.json()["error"]["moderation"]["held"]
    assert [entry["categories"] for entry in told] == [["public_figure"]] * 2
    with taken(reviewer) as first:
        assert decided(reviewer, first, "approved").status_code == 200
    with taken(reviewer) as second:
        assert second["id"] != first["id"]
    shown = service.http().get(f"/v1/jobs/{service.jobs()[0].id}").json()
    now = {entry["case_id"]: entry["status"] for entry in shown["moderation"]["held"]}
    assert now == {first["id"]: "released", second["id"]: "held"}


def test_only_whoever_took_a_case_decides_it_and_in_its_words(service: Any, reviewer: Any) -> None:
    hold_images(service, 0)
    service.generate(prompt="a dog")
    (case,) = reviewer.get(CASES).json()["data"]
    untaken = decided(reviewer, case, "approved")
    assert untaken.status_code == 409 and "take it first" in untaken.json()["error"]["message"]
    with taken(reviewer):
        wrong = decided(reviewer, case, "upheld")
        assert wrong.status_code == 409
        assert "ends as approved or rejected" in wrong.json()["error"]["message"]
        assert decided(reviewer, case, "approved").status_code == 200
        assert decided(reviewer, case, "approved").status_code == 409


def test_what_nobody_decides_on_is_rejected_in_time(service: Any, reviewer: Any) -> None:
    hold_images(service, 0)
    told = service.generate(prompt="a dog").json()["error"]["moderation"]["held"][0]
    assert service.database.held_images.expire_held() == 0
    service.clock.advance(seconds=HELD_SECONDS + 1)
    assert service.database.held_images.expire_held() == 1
    assert service.database.held_images.get_held(told["asset_id"]) is None
    assert service.database.cases.get_case(told["case_id"]).note == "Nobody decided in time."


def test_the_team_is_told_when_its_picture_is_released(service: Any, reviewer: Any) -> None:
    team = service.database.teams.ensure_team("default")
    service.database.webhooks.add_endpoint(
        team.id, "hook", "https://127.0.0.1:9/hook", ["image.asset.released"]
    )
    hold_images(service, 0)
    service.generate(prompt="a dog")
    with taken(reviewer) as case:
        decided(reviewer, case, "approved")
    told = service.database.webhooks.list_deliveries(team.id, limit=10)
    assert [delivery.event_type for delivery in told] == ["image.asset.released"]
