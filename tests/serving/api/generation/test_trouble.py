"""When clients leave, disks fill, the backend dies or time runs out: typed ends for every job."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from calotype.serving.api.state.settings import GatewaySettings
from calotype.serving.core.errors import AdapterLoadFailed, Overloaded, StorageFailed
from calotype.serving.core.protocols import ModelStatus
from calotype.serving.dispatch.policy import DispatchPolicy
from calotype.serving.jobs.moderation_checks import CheckRetries
from calotype.serving.testing.in_memory import PaintingBackend


def until(condition: Callable[[], bool], what: str) -> None:
    """Waits for another thread; the limit only ends a broken test."""
    end = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


class Wrapped:
    """A backend whose calls can be made to fail, as if its processes were gone."""

    def __init__(self, backend: PaintingBackend) -> None:
        self.backend = backend
        self.gone = False
        self.canceled: list[str] = []

    def _check(self) -> None:
        if self.gone:
            raise Overloaded("The model app does not answer.", retry_after=2)

    async def submit(self, job_id: str) -> None:
        self._check()
        await self.backend.submit(job_id)

    async def wait(self, job_id: str, timeout: float) -> None:
        self._check()
        await self.backend.wait(job_id, timeout)

    async def cancel(self, job_id: str) -> None:
        self.canceled.append(job_id)
        self._check()
        await self.backend.cancel(job_id)

    async def moderate(
        self, texts: Sequence[str], images: Sequence[Any], *more: Any
    ) -> list[dict[str, Any]]:
        self._check()
        return await self.backend.moderate(texts, images, *more)

    async def status(self) -> list[ModelStatus]:
        self._check()
        return await self.backend.status()


def hang_up(service: Any, **body: Any) -> None:
    """Asks for an image and closes the connection once there is a job, before the answer."""
    where, content, before = urlsplit(service.url), json.dumps(body), len(service.jobs())
    head = (
        f"POST /v1/images/generations HTTP/1.1\r\nhost: {where.netloc}\r\n"
        f"authorization: Bearer {service.key}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection((where.hostname or "", where.port or 0), timeout=600) as raw:
        raw.sendall((head + content).encode())
        until(lambda: len(service.jobs()) > before, "no job was recorded")


def test_the_job_of_a_client_that_hung_up_is_canceled(service: Any) -> None:
    service.backend.pause()
    hang_up(service, prompt="a dog")
    until(lambda: service.jobs()[0].status == "canceled", "the job was not canceled")
    service.backend.resume()
    assert service.generate(prompt="a dog").status_code == 200
    assert service.jobs()[1].status == "canceled"


def test_an_sdk_that_retries_within_the_grace_gets_the_same_job(
    start_service: Callable[..., Any],
) -> None:
    service = start_service(settings=GatewaySettings(hangup_grace=60))
    service.backend.pause()
    hang_up(service, prompt="a dog")
    assert len(service.jobs()) == 1
    threading.Timer(0.1, service.backend.resume).start()
    answer = service.http().post(
        "/v1/images/generations",
        json={"prompt": "a dog"},
        headers={"x-stainless-retry-count": "1"},
    )
    assert answer.status_code == 200
    [job] = service.jobs()
    assert answer.json()["job_id"] == job.id
    assert job.status == "succeeded"


def test_a_retry_of_another_body_or_without_the_header_is_a_new_job(service: Any) -> None:
    def draw(prompt: str, retry: str) -> str:
        headers = {"x-stainless-retry-count": retry}
        body = {"prompt": prompt}
        answer = service.http().post("/v1/images/generations", json=body, headers=headers)
        return str(answer.json()["job_id"])

    first = draw("a dog", "0")
    assert draw("a dog", "0") != first
    assert draw("a cat", "1") != first


def test_an_idempotency_key_makes_one_job_and_refuses_another_body(service: Any) -> None:
    def draw(prompt: str, key: str) -> httpx.Response:
        body, headers = {"prompt": prompt}, {"idempotency-key": key}
        answer: httpx.Response = service.http().post(
            "/v1/images/generations", json=body, headers=headers
        )
        return answer

    first, again = draw("a dog", "k1"), draw("a dog", "k1")
    assert first.json()["data"] == again.json()["data"]
    assert len(service.jobs()) == 1
    other = draw("a cat", "k1")
    assert other.status_code == 422
    assert other.json()["error"]["type"] == "idempotency_error"
    assert other.json()["error"]["code"] == "idempotency_key_mismatch"
    assert draw("a cat", "k2").status_code == 200
    assert draw("a cat", "x" * 256).status_code == 400


def test_a_request_that_takes_too_long_is_a_504_that_sdks_do_not_repeat(
    start_service: Callable[..., Any],
) -> None:
    service = start_service(settings=GatewaySettings(request_timeout=0.4))
    service.backend.pause()
    with pytest.raises(openai.InternalServerError) as caught:
        service.sdk(max_retries=2).images.generate(prompt="a dog")
    assert caught.value.status_code == 504
    assert caught.value.code == "generation_timeout"
    assert caught.value.response.headers["x-should-retry"] == "false"
    [job] = service.jobs()
    assert job.status == "failed"
    service.backend.resume()
    assert service.backend.dispatcher.backlog_seconds() == 0


def test_a_full_queue_is_a_429_with_a_time_to_come_back(start_service: Callable[..., Any]) -> None:
    service = start_service(settings=GatewaySettings(max_queue=1))
    service.backend.pause()
    waiting = threading.Thread(target=service.generate, kwargs={"prompt": "first"})
    waiting.start()
    until(lambda: service.backend.dispatcher.snapshot().queued == 1, "the first did not queue")
    answer = service.generate(prompt="second")
    assert answer.status_code == 429
    assert answer.json()["error"]["type"] == "requests"
    assert answer.json()["error"]["code"] == "queue_full"
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    service.backend.resume()
    waiting.join(600)
    assert [job.status for job in service.jobs()] == ["succeeded"]


def test_a_backend_that_is_away_delays_a_job_but_does_not_lose_it(
    start_service: Callable[..., Any],
) -> None:
    wrapped: list[Wrapped] = []

    def wrap(backend: PaintingBackend) -> Wrapped:
        wrapped.append(Wrapped(backend))
        return wrapped[0]

    service = start_service(wrap=wrap, settings=GatewaySettings(request_timeout=600))
    [backend] = wrapped
    backend.gone = True
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(service.generate(prompt="a dog")))
    asking.start()
    until(lambda: bool(service.jobs()), "no job was recorded")
    assert service.http().get("/healthz").status_code == 200
    ready = service.http().get("/readyz")
    assert ready.status_code == 503
    assert "does not answer" in ready.json()["reason"]
    assert service.http().get("/metrics").status_code == 200
    moderation = service.http().post("/v1/moderations", json={"input": "x"})
    assert moderation.status_code == 503
    assert moderation.json()["error"]["code"] == "model_not_ready"
    assert moderation.headers["retry-after"] == "2"
    backend.gone = False
    asking.join(600)
    assert answers[0].status_code == 200


def test_a_caller_who_gives_up_while_the_backend_is_away_keeps_its_job(
    start_service: Callable[..., Any],
) -> None:
    wrapped: list[Wrapped] = []

    def wrap(backend: PaintingBackend) -> Wrapped:
        wrapped.append(Wrapped(backend))
        wrapped[0].gone = True
        return wrapped[0]

    service = start_service(wrap=wrap, settings=GatewaySettings(request_timeout=0.3))
    service.backend.pause()  # its dispatcher would find the job without being told
    client, retried = service.http(), {"x-stainless-retry-count": "1"}
    answer = service.generate(prompt="a dog")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "model_not_ready"
    assert int(answer.headers["retry-after"]) >= 1
    [job] = service.jobs()
    assert job.status == "queued"
    assert answer.json()["error"]["job_id"] == job.id
    wrapped[0].gone = False
    service.backend.resume()
    until(lambda: service.jobs()[0].status == "succeeded", "the job was not drawn")
    again = client.post("/v1/images/generations", json={"prompt": "a dog"}, headers=retried)
    assert again.json()["job_id"] == job.id


def test_a_full_disk_delays_a_job_and_who_gives_up_is_told_why(
    start_service: Callable[..., Any],
) -> None:
    service = start_service(settings=GatewaySettings(request_timeout=0.5))
    service.blobs.failure = StorageFailed("No space left on device.", retry_after=10)
    answer = service.generate(prompt="a dog", n=2)
    assert answer.status_code == 503
    found = answer.json()["error"]
    assert (found["code"], found["type"]) == ("storage_unavailable", "server_error")
    assert found["reason"] == "storage_unavailable"
    assert int(answer.headers["retry-after"]) >= 1
    assert service.blobs.blobs == {}
    shown = service.http().get(f"/v1/jobs/{found['job_id']}").json()
    assert shown["status"] == "running" or shown["waiting_for"] == "storage"
    service.blobs.failure = None
    until(lambda: service.jobs()[0].status == "succeeded", "the job was not drawn")
    assert service.jobs()[0].id == found["job_id"]


def test_a_stream_ends_with_what_its_job_waits_for(
    start_service: Callable[..., Any], quick: Callable[..., GatewaySettings]
) -> None:
    service = start_service(settings=quick(keep_alive_seconds=0.1))
    service.blobs.failure = StorageFailed("No space left on device.")
    answer = service.generate(prompt="a dog", stream=True)
    assert "event: error" in answer.text and "storage_unavailable" in answer.text
    assert service.jobs()[0].status in ("queued", "running")


def test_a_job_that_cannot_be_recorded_is_refused_and_does_not_exist(
    service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*new: Any) -> Any:
        raise StorageFailed("The job database cannot be written: database or disk is full.")

    with monkeypatch.context() as patch:
        patch.setattr(service.database.jobs, "admit_job", full)
        answer = service.generate(prompt="a dog")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "storage_unavailable"
    assert int(answer.headers["retry-after"]) >= 1
    assert service.jobs() == []
    assert service.generate(prompt="a dog").status_code == 200


def test_a_store_that_cannot_be_read_for_a_moment_is_asked_again(
    service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = [StorageFailed("The job database cannot be read: locked.")] * 4
    get_job = service.database.jobs.get_job

    def sometimes(*arguments: Any) -> Any:
        if faults:
            raise faults.pop()
        return get_job(*arguments)

    monkeypatch.setattr(service.database.jobs, "get_job", sometimes)
    assert service.generate(prompt="a dog").status_code == 200
    assert not faults


def test_a_bug_is_a_500_that_says_nothing_and_is_not_repeated(
    service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(new: Any) -> Any:
        raise ZeroDivisionError("secret internals")

    with monkeypatch.context() as patch:
        patch.setattr(service.database.jobs, "admit_job", bug)
        answer = service.generate(prompt="a dog")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert answer.headers["x-should-retry"] == "false"
    assert len(answer.headers.get_list("x-request-id")) == 1
    assert "secret" not in answer.text
    assert service.generate(prompt="a dog").status_code == 200


def test_a_damaged_adapter_is_refused_by_name_and_the_next_works(
    service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(request: Any) -> Any:
        raise AdapterLoadFailed("The adapter 'stripes' is a pickle.", param="loras[0].id")

    with monkeypatch.context() as patch:
        patch.setattr("calotype.serving.testing.painter.begin", damaged)
        answer = service.generate(prompt="a dog", loras=[{"id": "stripes"}])
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "adapter_load_failed"
    assert "stripes" in answer.json()["error"]["message"]
    assert service.generate(prompt="a dog").status_code == 200


def test_pictures_that_cannot_be_checked_are_neither_stored_nor_shown(
    start_service: Callable[..., Any],
) -> None:
    service = start_service(policy=DispatchPolicy(check_retries=CheckRetries(delays=(0.0,))))

    def broken(pixels: Any) -> Any:
        raise ConnectionError("the moderator is gone")

    service.safety.image = broken
    answer = service.generate(prompt="a dog")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "moderation_unavailable"
    assert service.blobs.blobs == {}
