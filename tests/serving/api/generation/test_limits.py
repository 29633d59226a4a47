"""Limits, promises, expiry and isolation as clients meet them."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from calotype.serving.api.background.tasks import Sweeper
from calotype.serving.dispatch.policy import DispatchPolicy
from calotype.serving.testing.painter import PainterSettings


def test_a_rate_limit_is_told_in_headers_and_then_enforced(service: Any) -> None:
    service.database.teams.set_team("default", requests_per_minute=3)
    for remaining in ("2", "1", "0"):
        answer = service.generate(prompt="a dog")
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-limit-requests"] == "3"
        assert answer.headers["x-ratelimit-remaining-requests"] == remaining
        assert answer.headers["x-ratelimit-reset-requests"].endswith("s")
    refused = service.generate(prompt="a dog")
    assert refused.status_code == 429
    assert refused.json()["error"]["type"] == "requests"
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 20
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert len(service.jobs()) == 3


def test_a_spent_quota_is_not_retried_by_the_sdk(service: Any) -> None:
    for _ in range(2):
        service.generate(prompt="a dog")
    service.database.teams.set_team("default", gpu_seconds_per_day=0.0)
    until_measured(service)
    with pytest.raises(openai.RateLimitError) as caught:
        service.sdk(max_retries=3).images.generate(prompt="a dog")
    assert caught.value.code == "insufficient_quota"
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert len(service.jobs()) == 2


def until_measured(service: Any) -> None:
    end = time.monotonic() + 600
    while not service.database.forecasts.get_forecast("shapes").measured:
        assert time.monotonic() < end
        time.sleep(0.02)


def until_told(service: Any, jobs: int) -> None:
    """Until the dispatcher's forecast counts so many jobs that wait."""
    end = time.monotonic() + 600
    while service.database.forecasts.get_forecast("shapes").queued < jobs:
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def slow(start_service: Callable[..., Any], quick: Callable[..., Any]) -> Any:
    """A service that takes 0.4 s for a job of the usual 20 steps, and has measured it."""
    service = start_service(
        settings=quick(),
        painter=PainterSettings(seconds_per_step=0.02),
        policy=DispatchPolicy(sweep_seconds=0.05),
    )
    for _ in range(4):
        service.generate(prompt="a dog")
    until_measured(service)
    return service


def test_a_deadline_that_cannot_be_met_is_refused_with_the_estimate(slow: Any) -> None:
    client = slow.http()
    slow.backend.pause()
    made = [client.post("/v1/jobs", json={"input": {"prompt": "a dog"}}) for _ in range(10)]
    assert {answer.status_code for answer in made} == {202}
    until_told(slow, len(made))
    refused = client.post("/v1/jobs", json={"input": {"prompt": "a dog"}, "deadline_seconds": 0.5})
    assert refused.status_code == 429
    error = refused.json()["error"]
    assert (error["code"], error["param"]) == ("deadline_unreachable", "deadline_seconds")
    assert error["estimated_seconds"] > 0.5
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    kept = client.post("/v1/jobs", json={"input": {"prompt": "a dog"}, "deadline_seconds": 600})
    assert kept.status_code == 202


def test_a_job_tells_its_place_its_end_and_its_promise(slow: Any) -> None:
    client = slow.http()
    slow.backend.pause()
    ids = [
        client.post("/v1/jobs", json={"input": {"prompt": "a dog"}}).json()["id"] for _ in range(8)
    ]
    until_told(slow, len(ids))
    shown = [client.get(f"/v1/jobs/{job_id}").json() for job_id in ids]
    waiting = [job for job in shown if job["status"] == "queued"]
    assert [job["queue_position"] for job in waiting] == list(range(len(ids)))
    ends = [job["estimated_seconds"] for job in waiting]
    assert ends == sorted(ends) and ends[-1] > ends[0] > 0
    assert all(job["promised_by"] > job["created_at"] for job in shown)
    last = client.get(f"/v1/jobs/{ids[-1]}").json()
    for job_id in ids:
        slow.http().post(f"/v1/jobs/{job_id}/cancel")
    assert last["queue_position"] is not None
    over = client.get(f"/v1/jobs/{ids[-1]}").json()
    assert (over["queue_position"], over["estimated_seconds"]) == (None, None)


def test_promises_that_are_kept_and_broken_are_visible(slow: Any) -> None:
    client = slow.http()
    body = {"input": {"prompt": "a dog"}}
    client.post("/v1/jobs", json=body, headers={"prefer": "wait=20"})
    slow.backend.pause()
    late = client.post("/v1/jobs", json=body).json()
    slow.clock.advance(seconds=late["promised_by"] - late["created_at"] + 2)
    slow.backend.resume()
    client.post("/v1/jobs", json=body, headers={"prefer": "wait=20"})
    text = client.get("/metrics").text
    assert 'calotype_promises{model="shapes",result="broken"} 1.0' in text
    kept = re.search(r'calotype_promises{model="shapes",result="kept"} (\d+)', text)
    assert kept is not None and int(kept[1]) >= 2


@pytest.mark.slow
def test_hundreds_of_jobs_of_one_key_at_once_are_accepted_or_refused_and_none_is_lost(
    start_service: Callable[..., Any], quick: Callable[..., Any]
) -> None:
    service = start_service(settings=quick(max_queue=50))
    service.backend.pause()
    with (
        httpx.Client(
            base_url=service.url, headers={"authorization": f"Bearer {service.key}"}, timeout=600
        ) as client,
        ThreadPoolExecutor(16) as pool,
    ):
        answers = list(
            pool.map(
                lambda _: client.post("/v1/jobs", json={"input": {"prompt": "x", "steps": 1}}),
                range(300),
            )
        )
    service.backend.resume()
    assert {answer.status_code for answer in answers} == {202, 429}
    accepted = {answer.json()["id"] for answer in answers if answer.status_code == 202}
    assert len(accepted) >= 50
    for answer in answers:
        if answer.status_code == 429:
            assert answer.json()["error"]["code"] == "queue_full"
            assert 1 <= int(answer.headers["retry-after"]) <= 60
    end = time.monotonic() + 600
    while service.database.jobs.count_jobs().get(("shapes", "succeeded"), 0) < len(accepted):
        assert time.monotonic() < end, service.database.jobs.count_jobs()
        time.sleep(0.05)
    for job_id in list(accepted)[:20]:
        assert service.database.jobs.get_job(job_id).status == "succeeded"


def test_a_rotated_key_works_for_its_overlap_and_then_no_more(service: Any) -> None:
    old, record = service.database.api_keys.create(name="ci")
    new, _ = service.database.api_keys.rotate(record.id, overlap_seconds=60.0)
    for key in (old, new):
        assert service.http(key).get("/v1/models").status_code == 200
    service.clock.advance(seconds=61)
    assert service.http(old).get("/v1/models").status_code == 401
    assert service.http(new).get("/v1/models").status_code == 200


def test_usage_is_reported_by_day_model_and_adapter(service: Any) -> None:
    service.generate(prompt="a dog", n=2)
    service.generate(prompt="a dog", loras=[{"id": "stripes"}])
    client = service.http()
    shown = client.get("/v1/usage", params={"group_by": "model,adapter"}).json()
    assert [(row["adapter"], row["images"]) for row in shown["data"]] == [("", 2), ("stripes", 1)]
    assert all(row["gpu_seconds"] > 0 for row in shown["data"])
    own, _ = service.database.api_keys.create(team="strangers", scopes=["jobs"])
    assert service.http(own).get("/v1/usage").json()["data"] == []
    assert service.http(own).get("/v1/usage", params={"team": "*"}).status_code == 403
    whole = client.get("/v1/usage", params={"team": "*", "group_by": "team"}).json()
    assert [row["team"] for row in whole["data"]] == ["default"]
    for query in ({"group_by": "colour"}, {"start": "yesterday"}, {"end": "2026-13-01"},
                  {"start": "2026-02-02", "end": "2026-02-01"}, {"team": "other"}):  # fmt: skip
        assert client.get("/v1/usage", params=query).status_code == 400, query


def test_what_expires_is_removed_and_the_job_is_410_and_then_404(
    start_service: Callable[..., Any], quick: Callable[..., Any]
) -> None:
    service = start_service(settings=quick(sweep_seconds=None, garbage_seconds=3600))
    client = service.http()
    ended = [service.generate(prompt="same", seed=1).json()["job_id"] for _ in range(2)]
    kept = client.post(
        "/v1/jobs",
        json={"input": {"prompt": "same", "seed": 1}, "expires_after_seconds": 5 * 86_400},
        headers={"prefer": "wait=20"},
    ).json()
    other = service.generate(prompt="other", seed=1).json()["job_id"]
    sweeper = Sweeper(service.gateway())
    service.clock.advance(hours=25)
    asyncio.run(sweeper.sweep())
    for job_id in (*ended, other):
        assert client.get(f"/v1/jobs/{job_id}").status_code == 410
        found = service.database.jobs.get_job(job_id)
        assert "prompt" not in found.request and found.recipe is None
    assert len(service.blobs.blobs) == 4, "a file waits before it goes"
    service.clock.advance(hours=2)
    asyncio.run(sweeper.sweep())
    assert len(service.blobs.blobs) == 1
    image = client.get(f"/v1/jobs/{kept['id']}").json()["output"]["images"][0]
    assert service.fetch(image["url"]).status_code == 200, "it is named still"
    service.clock.advance(hours=1413)
    for _ in range(2):
        asyncio.run(sweeper.sweep())
    assert client.get(f"/v1/jobs/{other}").status_code == 404
    service.clock.advance(hours=2)
    asyncio.run(sweeper.sweep())
    assert service.blobs.blobs == {}
    assert service.database.usage.report(None, "2000-01-01", "2999-01-01", [])[0]["jobs"] == 4


def test_files_that_a_killed_writer_left_are_found(service: Any) -> None:
    service.generate(prompt="a dog")
    service.blobs.put("team_x/ab/left.png", b"x")
    sweeper = Sweeper(service.gateway())
    assert sweeper.note_orphans(time.time()) == 0, "it may still be named"
    assert sweeper.note_orphans(time.time() + 2 * 86_400) == 1
    assert len(service.blobs.blobs) == 1


def test_a_deleted_picture_is_gone_for_everybody(service: Any) -> None:
    client = service.http()
    job = service.generate(prompt="a dog", response_format="url").json()
    [image] = client.get(f"/v1/jobs/{job['job_id']}").json()["output"]["images"]
    stranger, _ = service.database.api_keys.create(team="strangers")
    path = f"/v1/assets/{image['asset_id']}"
    assert service.http(stranger).delete(path).status_code == 404
    assert client.delete(path).json()["deleted"]
    assert client.delete(path).status_code == 404
    assert service.fetch(job["data"][0]["url"]).status_code == 404


def test_jobs_are_found_by_their_metadata(service: Any) -> None:
    client = service.http()
    for ticket in ("A-1", "A-2"):
        client.post("/v1/jobs", json={"input": {"prompt": "x"}, "metadata": {"ticket": ticket}})
    found = client.get("/v1/jobs", params={"metadata[ticket]": "A-2"}).json()["data"]
    assert [job["metadata"] for job in found] == [{"ticket": "A-2"}]
    assert client.get("/v1/jobs", params={"metadata[ticket]": "' OR 1=1 --"}).json()["data"] == []


def test_no_key_and_no_secret_is_ever_logged(
    start_service: Callable[..., Any], quick: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    service = start_service(settings=quick())
    secret = service.http().get("/v1/webhooks/default/secret").json()["key"]
    service.generate(prompt="a dog")
    service.http("ct_live_wrong_but_secret").get("/v1/models")
    url = service.generate(prompt="a dog", response_format="url").json()["data"][0]["url"]
    service.fetch(url)
    signature = url.partition("signature=")[2]
    ours = [r for r in caplog.records if not r.name.startswith(("httpx", "httpcore", "openai"))]
    text = "\n".join(f"{r.getMessage()} {r.exc_text or ''}" for r in ours)
    for word in (service.key, "ct_live_wrong_but_secret", secret, signature):
        assert word not in text


def test_a_drip_of_a_body_is_given_up(
    start_service: Callable[..., Any], quick: Callable[..., Any]
) -> None:
    service = start_service(settings=quick(body_seconds=0.3))

    def drip() -> Any:
        for _ in range(40):
            yield b" "
            threading.Event().wait(0.02)

    headers = {"content-type": "application/json"}
    for path in ("/v1/images/generations", "/v1/jobs", "/v1/images/edits"):
        try:
            answer = service.http().post(path, content=drip(), headers=headers)
        except httpx.WriteError:
            continue  # it hung up before all was sent
        assert answer.status_code == 408
        assert answer.json()["error"]["code"] == "request_timeout"
        assert answer.headers["x-should-retry"] == "false"
    assert service.generate(prompt="a dog").status_code == 200
