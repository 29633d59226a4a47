"""A replica that dies at the worst moment: its request ends, and the next one works."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("deployment", ["Generator", "TextEncoder", "Moderator", "Dispatcher"])
def test_kill_nine_during_a_request(service: Any, deployment: str) -> None:
    answers: list[httpx.Response] = []

    def ask() -> None:
        with service.http() as client:
            answers.append(
                client.post(
                    "/v1/images/generations",
                    json={"prompt": "a red circle", "n": 10, "steps": 50, "seed": 5},
                )
            )

    asking = threading.Thread(target=ask)
    victim = service.replica(deployment)
    asking.start()
    service.wait_for(lambda: _in_hand(service), "the job is in hand")
    victim.kill()
    asking.join(timeout=900)
    assert answers, "the request never ended"
    answer = answers[0]
    if answer.status_code != 200:
        assert answer.json()["error"]["code"] in (
            "moderation_unavailable",
            "model_not_ready",
            "generation_timeout",
        ), answer.text
    service.wait_for(lambda: bool(service.status().get("ready")), "the replica is back")
    assert service.draw().startswith(b"\x89PNG")
    assert not _open_jobs(service)


def _in_hand(service: Any) -> bool:
    return bool(_open_jobs(service))


def _open_jobs(service: Any) -> list[Any]:
    with service.http() as client:
        jobs = client.get("/v1/jobs", params={"limit": 100}).json()["data"]
    return [job for job in jobs if job["status"] in ("queued", "running")]
