"""Files and batches through OpenAI's SDK."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from typing import Any

import openai
import pytest
from samples.images import same_pixels

from calotype.serving.api.background.batch_runner import BatchRunner
from calotype.serving.api.state.settings import GatewaySettings
from calotype.serving.database.accounts.api_keys import TEAM_SCOPES, key_digest


def lines(*bodies: Any, url: str = "/v1/images/generations") -> bytes:
    found = [
        {"custom_id": f"c{i}", "method": "POST", "url": url, "body": body}
        for i, body in enumerate(bodies)
    ]
    return b"\n".join(json.dumps(line).encode() for line in found)


def start(service: Any, data: bytes, *key: str) -> Any:
    sdk = service.sdk(*key)
    file = sdk.files.create(file=("in.jsonl", data), purpose="batch")
    return sdk.batches.create(
        input_file_id=file.id,
        endpoint="/v1/images/generations",
        completion_window="24h",
        metadata={"t": "1"},
    )


def until_over(service: Any, batch_id: str) -> Any:
    end = time.monotonic() + 600
    while True:
        batch = service.sdk().batches.retrieve(batch_id)
        if batch.status in ("completed", "failed", "cancelled", "expired"):
            return batch
        assert time.monotonic() < end, batch
        time.sleep(0.02)


def read(service: Any, file_id: str) -> dict[str, dict[str, Any]]:
    text = service.sdk().files.content(file_id).text
    return {line["custom_id"]: line for line in map(json.loads, text.splitlines())}


def test_a_file_is_kept_listed_read_and_forgotten(service: Any) -> None:
    sdk = service.sdk()
    made = sdk.files.create(
        file=("notes.bin", b"hello"),
        purpose="user_data",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert (made.bytes, made.filename, made.purpose) == (5, "notes.bin", "user_data")
    assert made.expires_at == made.created_at + 3600
    other = sdk.files.create(file=("b.bin", b"other"), purpose="evals")
    assert [file.id for file in sdk.files.list()] == [other.id, made.id]
    assert [file.id for file in sdk.files.list(order="asc", limit=1)] == [made.id, other.id]
    assert [file.id for file in sdk.files.list(purpose="evals")] == [other.id]
    assert sdk.files.content(made.id).read() == b"hello"
    assert sdk.files.retrieve(made.id) == made
    stranger, _ = service.database.api_keys.create(team="strangers")
    for call in (service.sdk(stranger).files.retrieve, service.sdk(stranger).files.delete):
        with pytest.raises(openai.NotFoundError):
            call(made.id)
    assert sdk.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        sdk.files.content(made.id)


@pytest.mark.parametrize(
    ("data", "files", "param"),
    [
        ({}, {"file": b"x"}, "purpose"),
        ({"purpose": "spying"}, {"file": b"x"}, "purpose"),
        ({"purpose": "evals"}, {"other": b"x"}, "file"),
        ({"purpose": "evals"}, {"file": b""}, "file"),
        ({"purpose": "vision"}, {"file": b"no picture"}, "file"),
        ({"purpose": "evals", "x": "1"}, {"file": b"x"}, "x"),
        ({"purpose": "evals", "expires_after[seconds]": "5"}, {"file": b"x"}, "expires_after"),
    ],
)
def test_a_bad_upload_is_named(
    shared_service: Any, data: dict[str, str], files: dict[str, bytes], param: str
) -> None:
    answer = shared_service.http().post("/v1/files", data=data, files=files)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_the_lines_of_a_batch_become_pictures_and_errors(service: Any) -> None:
    data = lines(
        {"prompt": "a dog", "seed": 1},
        {"prompt": "something forbidden"},
        {"prompt": "a cat", "seed": 2, "n": 2},
        {"prompt": "x", "size": "99x99"},
        {"promt": "x"},
    )
    batch = start(service, data)
    assert batch.status in ("in_progress", "completed")
    over = until_over(service, batch.id)
    assert over.status == "completed"
    assert (over.request_counts.completed, over.request_counts.failed) == (2, 3)
    assert over.metadata == {"t": "1"}
    good, bad = read(service, over.output_file_id), read(service, over.error_file_id)
    assert set(good) == {"c0", "c2"}
    plain = service.generate(prompt="a dog", seed=1).json()["data"][0]["b64_json"]
    assert same_pixels(good["c0"]["response"]["body"]["data"][0]["b64_json"], plain)
    assert good["c0"]["response"]["status_code"] == 200
    assert len(good["c2"]["response"]["body"]["data"]) == 2
    codes = {name: line["error"]["code"] for name, line in bad.items()}
    assert codes == {"c1": "moderation_blocked", "c3": "invalid_value", "c4": "unknown_parameter"}
    assert bad["c3"]["response"]["status_code"] == 400
    assert [found.id for found in service.sdk().batches.list()] == [batch.id]
    jobs = [job for job in service.jobs() if job.batch_id == batch.id]
    assert len(jobs) == 3 and all(job.priority == -1 for job in jobs)


def test_a_canceled_batch_keeps_the_answers_that_it_has(service: Any) -> None:
    service.backend.pause()
    batch = start(service, lines(*({"prompt": "a dog"} for _ in range(40))))
    end = time.monotonic() + 600
    while not [job for job in service.jobs() if job.batch_id]:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert service.sdk().batches.cancel(batch.id).status in ("cancelling", "cancelled")
    over = until_over(service, batch.id)
    service.backend.resume()
    assert over.status == "cancelled"
    assert over.request_counts.total == 40
    assert over.request_counts.completed + over.request_counts.failed == 40
    assert not [job for job in service.jobs() if not job.over]
    assert service.generate(prompt="a dog").status_code == 200


def test_a_batch_waits_for_its_teams_quota(service: Any) -> None:
    service.database.teams.set_team("default", concurrent_jobs=1)
    over = until_over(service, start(service, lines(*[{"prompt": "a dog"}] * 3)).id)
    assert (over.status, over.request_counts.completed) == ("completed", 3)


@pytest.mark.parametrize(
    ("data", "code", "line"),
    [
        (b"\n\n", "empty_file", None),
        (b"not json", "invalid_json", 1),
        (lines({"prompt": "x"}) + b"\n" + lines({"prompt": "x"}), "invalid_value", 2),
        (lines({"prompt": "x"}, url="/v1/chat/completions"), "invalid_value", 1),
        (lines("a string"), "invalid_type", 1),
        (b'{"custom_id": 7}', "invalid_value", 1),
        (lines(*[{}] * 5001), "too_many_tasks", None),
    ],
    ids=["empty", "no json", "an id twice", "another url", "no body", "no id", "too many"],
)
def test_a_file_that_is_no_batch_fails_and_says_where(
    shared_service: Any, data: bytes, code: str, line: int | None
) -> None:
    batch = start(shared_service, data)
    assert batch.status == "failed"
    assert (batch.errors.data[0].code, batch.errors.data[0].line) == (code, line)


def test_a_batch_of_no_file_or_of_another_purpose_is_refused(shared_service: Any) -> None:
    sdk = shared_service.sdk()
    wrong = sdk.files.create(file=("x", io.BytesIO(b"x")), purpose="evals")
    for file_id, error in (("file_none", openai.NotFoundError), (wrong.id, openai.BadRequestError)):
        with pytest.raises(error) as caught:
            sdk.batches.create(
                input_file_id=file_id,
                endpoint="/v1/images/generations",
                completion_window="24h",
            )
        assert caught.value.param == "input_file_id"


def test_a_pictures_bytes_in_a_batch_are_a_picture(service: Any) -> None:
    over = until_over(service, start(service, lines({"prompt": "x", "output_format": "webp"})).id)
    [line] = read(service, over.output_file_id).values()
    data = base64.b64decode(line["response"]["body"]["data"][0]["b64_json"])
    assert data[8:12] == b"WEBP"


@pytest.mark.parametrize("declared", [False, True], ids=["by-command", "by-configuration"])
def test_a_batch_goes_on_when_its_key_is_rotated(start_service: Any, declared: bool) -> None:
    service = start_service(settings=GatewaySettings(hangup_grace=0, batch_seconds=None))
    keys = service.database.api_keys
    old, new = "sk-old-key-of-the-team", "sk-new-key-of-the-team"
    if declared:
        keys.declare_keys("painters", [key_digest(old)], TEAM_SCOPES)
    else:
        old, made = keys.create(team="painters")
    batch = start(service, lines({"prompt": "a fox"}, {"prompt": "a hare"}), old)
    if declared:
        keys.declare_keys("painters", [key_digest(new)], TEAM_SCOPES)
    else:
        new, _ = keys.rotate(made.id, overlap_seconds=0)
    with pytest.raises(openai.AuthenticationError, match="rotated"):
        service.sdk(old).batches.retrieve(batch.id)
    asyncio.run(BatchRunner(service.gateway()).work_once())
    found = service.sdk(new).batches.retrieve(batch.id)
    assert (found.status, found.request_counts.failed) == ("in_progress", 0)
    if declared:
        keys.declare_keys("painters", [], TEAM_SCOPES)
        with pytest.raises(openai.AuthenticationError, match="revoked"):
            service.sdk(new).batches.retrieve(batch.id)


def test_a_revoked_key_draws_nothing_more_of_its_batch(start_service: Any) -> None:
    service = start_service(settings=GatewaySettings(hangup_grace=0, batch_seconds=None))
    batch = start(service, lines({"prompt": "a fox"}, {"prompt": "a hare"}))
    [key] = service.database.api_keys.list_keys()
    other, _ = service.database.api_keys.create()
    assert service.database.api_keys.revoke_key(key.id)
    asyncio.run(BatchRunner(service.gateway()).work_once())
    found = service.sdk(other).batches.retrieve(batch.id)
    assert (found.request_counts.failed, found.request_counts.completed) == (2, 0)
    assert service.jobs() == []
