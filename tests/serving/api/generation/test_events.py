"""Streams: OpenAI's events on the image routes, the job's own events with resume."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from PIL import Image
from samples.images import same_pixels

from calotype.moderation.policy.refusals import sentences
from calotype.serving.testing.in_memory import decision
from calotype.serving.testing.painter import PainterSettings

STEPWISE = PainterSettings(seconds_per_step=0.02, beat_seconds=0.02)


@pytest.fixture
def previewing(start_service: Callable[..., Any], quick: Callable[..., Any]) -> Any:
    """A service whose painter takes its time and shows previews."""
    return start_service(settings=quick(features={"previews"}), painter=STEPWISE)


def read_events(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    """``{"id", "event", "data"}`` of each event, ``{"comment"}`` of each comment."""
    found: dict[str, Any] = {}
    for line in answer.iter_lines():
        if not line:
            if found:
                yield found
            found = {}
        elif line.startswith(":"):
            found["comment"] = line[1:].strip()
        else:
            name, _, value = line.partition(": ")
            found[name] = json.loads(value) if name == "data" else value


# -- OpenAI's events ---------------------------------------------------------------------------


def test_partial_images_come_before_the_picture(previewing: Any) -> None:
    stream = previewing.sdk().images.generate(
        prompt="a dog", stream=True, partial_images=2, extra_body={"seed": 3, "steps": 12}
    )
    events = list(stream)
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    for event in events:
        assert Image.open(io.BytesIO(base64.b64decode(event.b64_json))).size
        assert (event.size, event.quality, event.background) == ("128x128", "medium", "opaque")
    assert events[-1].usage.output_tokens == 64
    plain = previewing.generate(prompt="a dog", seed=3, steps=12).json()
    assert same_pixels(plain["data"][0]["b64_json"], events[-1].b64_json), (
        "a preview changes nothing"
    )


def test_without_partial_images_there_is_one_event(shared_service: Any) -> None:
    [event] = list(shared_service.sdk().images.generate(prompt="a dog", stream=True))
    assert event.type == "image_generation.completed"
    assert event.job_id and event.recipe_hash


async def test_the_asynchronous_client_streams_too(shared_service: Any) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{shared_service.url}/v1", api_key=shared_service.key, max_retries=0
    ) as client:
        stream = await client.images.generate(prompt="a dog", stream=True, n=2)
        events = [event async for event in stream]
    assert [event.image_index for event in events] == [0, 1]
    assert events[0].usage.total_tokens == 0, "the whole is on the last"
    assert events[1].usage.output_tokens == 128


def test_a_refused_prompt_is_a_plain_400_also_for_streams(shared_service: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        list(shared_service.sdk().images.generate(prompt="something forbidden", stream=True))
    assert caught.value.code == "moderation_blocked"


def test_an_error_in_the_middle_of_a_stream_is_raised_by_the_sdk(previewing: Any) -> None:
    verdicts = iter([decision("output")])  # the first preview passes, the rest is refused
    previewing.safety.image = lambda pixels: next(verdicts, decision("output", blocked=["sexual"]))
    stream = previewing.sdk().images.generate(
        prompt="a dog",
        stream=True,
        partial_images=1,
        extra_body={"steps": 6},
        extra_headers={"accept-language": "fr"},
    )
    seen = []
    with pytest.raises(openai.APIError) as caught:
        for event in stream:
            seen.append(event.type)
    assert seen == ["image_generation.partial_image"]
    assert caught.value.code == "moderation_blocked"
    assert sentences()["sexual"]["fr"] in str(caught.value.body)


def test_a_preview_that_is_refused_is_not_shown(previewing: Any) -> None:
    small = (32, 32, 3)
    previewing.safety.image = lambda pixels: decision(
        "output", blocked=["sexual"] if pixels.shape == small else []
    )
    events = list(
        previewing.sdk().images.generate(
            prompt="a dog", stream=True, partial_images=3, extra_body={"steps": 8}
        )
    )
    assert [event.type for event in events] == ["image_generation.completed"]


def test_a_client_that_leaves_a_stream_has_its_job_canceled(previewing: Any) -> None:
    body = {"prompt": "a dog", "stream": True, "steps": 50}
    with previewing.http().stream("POST", "/v1/images/generations", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert next(read_events(answer))["comment"]
    for _ in range(500):
        if previewing.jobs()[0].status == "canceled":
            break
        threading.Event().wait(0.02)
    assert previewing.jobs()[0].status == "canceled"


# -- the job's own events ----------------------------------------------------------------------


def test_a_jobs_events_tell_its_whole_way_in_growing_numbers(previewing: Any) -> None:
    client = previewing.http()
    body = {"input": {"prompt": "a dog", "steps": 20}}
    job = client.post("/v1/jobs", json=body).json()
    with client.stream("GET", f"/v1/jobs/{job['id']}/events") as answer:
        events = list(read_events(answer))
    kinds = [event["event"] for event in events if "event" in event]
    assert kinds[:2] == ["job.queued", "job.started"]
    assert kinds[-1] == "job.succeeded"
    assert "job.progress" in kinds
    numbers = [int(event["id"]) for event in events if "id" in event]
    assert numbers == sorted(set(numbers))
    steps = [event["data"]["step"] for event in events if event.get("event") == "job.progress"]
    assert steps == sorted(steps) and all(step <= 20 for step in steps)
    assert events[-1]["data"]["id"] == job["id"]
    assert events[-1]["data"]["output"]["images"]


def test_a_stream_goes_on_after_the_last_event_that_was_seen(previewing: Any) -> None:
    client = previewing.http()
    job = client.post("/v1/jobs", json={"input": {"prompt": "a dog", "steps": 10}}).json()
    path = f"/v1/jobs/{job['id']}/events"
    with client.stream("GET", path) as answer:
        first = [next(found) for found in [read_events(answer)] for _ in range(2)]
    last = first[-1]["id"]
    with client.stream("GET", path, headers={"last-event-id": last}) as answer:
        rest = [event for event in read_events(answer) if "event" in event]
    assert rest and all(int(event["id"]) > int(last) for event in rest)
    assert rest[-1]["event"] == "job.succeeded"
    with client.stream("GET", path, headers={"last-event-id": rest[-1]["id"]}) as answer:
        assert list(read_events(answer)) == [], "there is nothing more, so the stream ends"


@pytest.mark.parametrize("bad", ["x", "-1", "9" * 30, "\u0661", "1e3", "", "1; DROP TABLE jobs"])
def test_a_last_event_id_that_is_none_begins_anew(shared_service: Any, bad: str) -> None:
    client = shared_service.http()
    job = client.post(
        "/v1/jobs", json={"input": {"prompt": "a dog"}}, headers={"prefer": "wait=20"}
    ).json()
    headers = {"last-event-id": bad.encode()}
    with client.stream("GET", f"/v1/jobs/{job['id']}/events", headers=headers) as answer:
        assert answer.status_code == 200
        kinds = [event["event"] for event in read_events(answer) if "event" in event]
    assert kinds == ["job.queued", "job.started", "job.succeeded"]


def test_a_quiet_stream_says_something_now_and_then(
    start_service: Callable[..., Any], quick: Callable[..., Any]
) -> None:
    service = start_service(settings=quick(keep_alive_seconds=0.05))
    service.backend.pause()
    client = service.http()
    job = client.post("/v1/jobs", json={"input": {"prompt": "a dog"}}).json()
    with client.stream("GET", f"/v1/jobs/{job['id']}/events") as answer:
        events = read_events(answer)
        assert next(events)["event"] == "job.queued"
        assert next(events)["comment"] == "keep-alive"
        service.backend.resume()
        assert [e["event"] for e in events if "event" in e][-1] == "job.succeeded"


def test_a_failed_and_a_canceled_job_end_their_streams(service: Any) -> None:
    client = service.http()
    refused = client.post("/v1/jobs", json={"input": {"prompt": "forbidden"}}).json()
    with client.stream("GET", f"/v1/jobs/{refused['id']}/events") as answer:
        last = list(read_events(answer))[-1]
    assert last["event"] == "job.failed"
    assert last["data"]["error"]["code"] == "moderation_blocked"
    service.backend.pause()
    held = client.post("/v1/jobs", json={"input": {"prompt": "a dog"}}).json()
    with client.stream("GET", f"/v1/jobs/{held['id']}/events") as answer:
        events = read_events(answer)
        next(events)
        service.http().post(f"/v1/jobs/{held['id']}/cancel")
        assert list(events)[-1]["event"] == "job.canceled"


def test_events_of_nobodys_job_are_404(shared_service: Any) -> None:
    assert shared_service.http().get("/v1/jobs/job_none/events").status_code == 404
