"""What clients see of a job's row: the fields that are named, and never a new one by accident."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from calotype.serving.api.http.job_object import describe_job
from calotype.serving.jobs.records import JobRecord, NewJob

PRIVATE = {"new_field": "for the service only"}


def leaks(found: Any) -> bool:
    return PRIVATE["new_field"] in json.dumps(found)


def test_a_new_field_of_a_job_s_input_reaches_no_client(
    start_service: Callable[..., Any], quick: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = start_service(
        settings=quick(
            outbound_http=True, outbound_networks=("127.0.0.0/8",), public_url="http://a"
        )
    )
    admit = service.database.jobs.admit_job

    def admit_with_more(new: NewJob, *more: Any) -> Any:
        return admit(dataclasses.replace(new, input=new.input | PRIVATE), *more)

    monkeypatch.setattr(service.database.jobs, "admit_job", admit_with_more)
    client = service.http()
    made = client.post(
        "/v1/jobs",
        json={"input": {"prompt": "a dog"}, "webhook": {"url": "http://127.0.0.1:9/hook"}},
        headers={"prefer": "wait=30"},
    )
    job = made.json()
    assert job["status"] == "succeeded" and job["input"]["prompt"] == "a dog"
    stored = service.database.jobs.get_job(job["id"])
    assert leaks(stored.input)
    answers = [
        job,
        client.get(f"/v1/jobs/{job['id']}").json(),
        client.get("/v1/jobs").json(),
        client.get(f"/v1/jobs/{job['id']}/events").text,
        service.generate(prompt="a dog").json(),
        service.http().post("/v1/images/generations", json={"prompt": "a", "stream": True}).text,
        written_webhook(service, stored.team_id),
    ]
    assert not any(leaks(answer) for answer in answers)
    assert "traceparent" in stored.input and "traceparent" not in job["input"]


def written_webhook(service: Any, team_id: str) -> str:
    """The body of the only webhook, once it was tried."""
    end = time.monotonic() + 600
    while True:
        [delivery] = service.database.webhooks.list_deliveries(team_id, limit=10)
        if delivery.body is not None:
            assert '"status":"succeeded"' in delivery.body
            return str(delivery.body)
        assert time.monotonic() < end, "the webhook was not tried"
        time.sleep(0.02)


@pytest.mark.parametrize(
    "column", ["output", "moderation", "usage", "metrics", "error", "request", "webhook"]
)
def test_a_new_field_of_any_column_reaches_no_client(finished: JobRecord, column: str) -> None:
    stored = getattr(finished, column) or {}
    changed = {name: with_more(value) for name, value in (stored | PRIVATE).items()}
    told = describe_job(dataclasses.replace(finished, **{column: changed}), "http://a", str)
    assert told["id"] == finished.id and not leaks(told)


def with_more(value: Any) -> Any:
    """Objects in a column, and in its lists, get the field as well."""
    if isinstance(value, list):
        return [item | PRIVATE if isinstance(item, dict) else item for item in value]
    return value


@pytest.fixture(scope="module")
def finished(shared_service: Any) -> JobRecord:
    """A job with something in every column of JSON."""
    job_id = shared_service.generate(prompt="a dog").json()["job_id"]
    job: JobRecord = shared_service.database.jobs.get_job(job_id)
    held = {
        "index": 0,
        "case_id": "case_1",
        "asset_id": "asset_1",
        "categories": [],
        "status": "held",
    }
    error = {"class": "EngineError", "message": "m", "code": "internal_error", "details": PRIVATE}
    return dataclasses.replace(
        job,
        error=error,
        moderation=(job.moderation or {}) | {"held": [held]},
        webhook={"url": "https://a", "events": []},
    )
