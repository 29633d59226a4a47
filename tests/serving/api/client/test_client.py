"""The package's own client, synchronous and not, against a real gateway."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from calotype.serving.client import ApiError, AsyncClient, Client, ServiceUnreachable
from calotype.serving.testing.painter import PainterSettings

SLOW = PainterSettings(seconds_per_step=0.05, beat_seconds=0.02)


@pytest.fixture
def client(shared_service: Any) -> Iterator[Client]:
    with Client(f"{shared_service.url}/v1/", shared_service.key) as client:
        yield client


class Flaky(httpx.BaseTransport):
    """A network that does something to each request in turn, and nothing afterwards."""

    def __init__(self, *faults: Any) -> None:
        self._plain, self._faults = httpx.HTTPTransport(), iter(faults)
        self.requests: list[httpx.Request] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        fault = next(self._faults, None)
        if fault == "no connection":
            raise httpx.ConnectError("nobody is there")
        answer = self._plain.handle_request(request)
        if fault == "answer lost" or isinstance(fault, int):
            answer.read()
            answer.close()
        if fault == "answer lost":
            raise httpx.ReadError("the connection broke")
        if isinstance(fault, int):
            return httpx.Response(fault, headers={"retry-after": "0"}, json={"error": {}})
        if isinstance(fault, bytes):
            return httpx.Response(answer.status_code, content=Cut(answer, fault))
        return answer

    def close(self) -> None:
        self._plain.close()


class Cut(httpx.SyncByteStream):
    """A body that breaks off after the first chunk with these bytes."""

    def __init__(self, answer: httpx.Response, after: bytes) -> None:
        self._answer, self._after = answer, after

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._answer.iter_raw():
            yield chunk
            if self._after in chunk:
                self._answer.close()
                raise httpx.ReadError("the connection broke")


def test_a_job_is_made_followed_and_fetched(client: Client) -> None:
    job = client.submit({"prompt": "a red fox", "seed": 7, "n": 2}, metadata={"ticket": "A-1"})
    done = client.wait(job.id)
    assert (done.id, done.status, done.over) == (job.id, "succeeded", True)
    assert done.metadata == {"ticket": "A-1"} and done.recipe_hash
    assert [image.seed for image in done.images] == [7, 8]
    pictures = [client.download(image) for image in done.images]
    assert all(data.startswith(b"\x89PNG") for data in pictures)
    assert pictures[0] != pictures[1]
    again = client.get(job.id)
    assert (again.id, again.status, again.recipe_hash) == (job.id, done.status, done.recipe_hash)
    assert [image.asset_id for image in again.images] == [image.asset_id for image in done.images]


def test_jobs_are_listed_page_by_page(client: Client) -> None:
    made = [
        client.submit({"prompt": f"{n}"}, metadata={"list": "pages"}, wait_seconds=5).id
        for n in range(3)
    ]
    first = client.list(limit=2, metadata={"list": "pages"})
    second = client.list(limit=2, after=first.last_id, metadata={"list": "pages"})
    assert [job.id for job in (*first.jobs, *second.jobs)] == made[::-1]
    assert (first.has_more, second.has_more) == (True, False)
    assert client.list(status="failed", metadata={"list": "pages"}).jobs == []


def test_a_refusal_says_what_and_where(client: Client) -> None:
    with pytest.raises(ApiError) as caught:
        client.submit({"prompt": "a fox", "steps": 0})
    error = caught.value
    assert (error.status, error.code, error.param) == (400, "invalid_value", "steps")
    assert "steps" in str(error) and error.request_id
    with pytest.raises(ApiError) as caught:
        client.get("job_unknown")
    assert caught.value.status == 404


def test_a_failed_job_carries_its_error(client: Client) -> None:
    job = client.wait(client.submit({"prompt": "something forbidden"}).id)
    assert job.status == "failed" and job.images == []
    assert (job.error or {})["code"] == "moderation_blocked"


@pytest.mark.parametrize("fault", ["no connection", "answer lost", 503, 429])
def test_a_request_that_failed_by_the_way_makes_one_job(shared_service: Any, fault: Any) -> None:
    network = Flaky(fault)
    with Client(shared_service.url, shared_service.key, network) as client:
        before = len(shared_service.jobs())
        job = client.submit({"prompt": "once"})
        assert client.wait(job.id).status == "succeeded"
    assert len(network.requests) >= 3
    assert len({r.headers["idempotency-key"] for r in network.requests[:2]}) == 1
    assert len(shared_service.jobs()) - before == 1


def test_nobody_there_is_said_after_some_attempts(shared_service: Any) -> None:
    network = Flaky(*["no connection"] * 9)
    with (
        Client("http://127.0.0.1:9", "ct_live_nothing", network) as client,
        pytest.raises(ServiceUnreachable, match=r"127\.0\.0\.1:9.*does not answer"),
    ):
        client.get("job_1")
    assert len(network.requests) == 4


def test_a_broken_stream_is_taken_up_where_it_broke(start_service: Callable[..., Any]) -> None:
    service = start_service(painter=SLOW)
    network = Flaky(None, b"job.started", "no connection")
    with Client(service.url, service.key, network) as client:
        job = client.submit({"prompt": "a fox", "steps": 20})
        seen = list(client.events(job.id))
    numbers = [event.id for event in seen]
    assert numbers == sorted(set(numbers)), "none is missing at the end and none comes twice"
    assert seen[-1].terminal and seen[-1].job is not None
    again = [r for r in network.requests if "last-event-id" in r.headers]
    assert again, "the stream was asked for again, from where it broke"


def test_pictures_are_fetched_without_the_key(shared_service: Any) -> None:
    network = Flaky()
    with Client(shared_service.url, shared_service.key, network) as client:
        job = client.wait(client.submit({"prompt": "a fox"}).id)
        client.download(job.images[0])
    assert "authorization" not in network.requests[-1].headers
    assert "authorization" in network.requests[0].headers


async def test_the_asynchronous_client_does_the_same(shared_service: Any) -> None:
    async with AsyncClient(shared_service.url, shared_service.key) as client:
        jobs = await asyncio.gather(
            *(client.submit({"prompt": f"fox {n}", "seed": n}) for n in range(3))
        )
        ended = await asyncio.gather(*(client.wait(job.id) for job in jobs))
        assert {job.status for job in ended} == {"succeeded"}
        assert (await client.download(ended[0].images[0])).startswith(b"\x89PNG")
        assert {job.id for job in (await client.list(limit=3)).jobs} == {j.id for j in jobs}
        kinds = [event.type async for event in client.events(jobs[0].id)]
        assert (kinds[0], kinds[-1]) == ("job.queued", "job.succeeded")
        with pytest.raises(ApiError) as caught:
            await client.submit({"prompt": ""})
        assert caught.value.param == "prompt"


async def test_a_job_is_canceled_while_it_is_watched(start_service: Callable[..., Any]) -> None:
    service = start_service(painter=SLOW)
    async with AsyncClient(service.url, service.key) as client:
        job = await client.submit({"prompt": "a fox", "steps": 50})
        watching = asyncio.create_task(client.wait(job.id))
        assert (await client.cancel(job.id)).status == "canceled"
        assert (await asyncio.wait_for(watching, 20)).status == "canceled"
        assert (await client.cancel(job.id)).status == "canceled"


def test_one_client_serves_several_threads(client: Client) -> None:
    numbers, found = itertools.count(), list[str]()

    def ask() -> None:
        found.append(client.submit({"prompt": f"{next(numbers)}"}, wait_seconds=10).status)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == ["succeeded"] * 4
