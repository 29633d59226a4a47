"""Refusals speak the caller's language, and their shape does not depend on it."""

from __future__ import annotations

from typing import Any

import pytest

from calotype.moderation.policy.refusals import sentences

FORBIDDEN = {"prompt": "a forbidden thing"}


@pytest.mark.parametrize("language", ["en", "de", "fr", "es", "pt", "it", "ja", "zh"])
def test_a_refusal_is_said_in_the_language_of_the_caller(
    shared_service: Any, language: str
) -> None:
    client = shared_service.http()
    localized = {"accept-language": f"{language}-XX, en;q=0.5"}
    error = client.post("/v1/images/generations", json=FORBIDDEN, headers=localized).json()["error"]
    assert error["moderation"]["user_message"] == sentences()["sexual"][language]
    assert error["message"].startswith("Your request was rejected as a result of the safety system")

    job = client.post("/v1/jobs", json={"input": FORBIDDEN}, headers={"prefer": "wait=20"}).json()
    seen = client.get(f"/v1/jobs/{job['id']}", headers=localized).json()
    assert seen["error"]["moderation"]["user_message"] == sentences()["sexual"][language]


def test_a_job_is_told_of_in_the_language_of_who_made_it(shared_service: Any) -> None:
    client = shared_service.http()
    made = {"accept-language": "de-CH", "prefer": "wait=20"}
    job = client.post("/v1/jobs", json={"input": FORBIDDEN}, headers=made).json()
    assert "language" not in job["input"]
    path = f"/v1/jobs/{job['id']}"
    for answer in (client.get(path).text, client.get(f"{path}/events").text):
        assert sentences()["sexual"]["de"] in answer
    asked = client.get(f"{path}/events", headers={"accept-language": "it"}).text
    assert sentences()["sexual"]["it"] in asked


def test_the_shape_is_the_same_in_every_language(shared_service: Any) -> None:
    client = shared_service.http()

    def shape(value: Any) -> Any:
        return {k: shape(v) for k, v in value.items()} if isinstance(value, dict) else type(value)

    answers = [
        client.post("/v1/images/generations", json=FORBIDDEN, headers={"accept-language": given})
        for given in ("", "de", "zh-CN", "xx", "*;q=0", "de;q=much")
    ]
    assert {answer.status_code for answer in answers} == {400}
    shapes = [shape(answer.json()) for answer in answers]
    assert all(found == shapes[0] for found in shapes)
