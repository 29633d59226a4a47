"""What is compared to the last bit: batches, two devices, a sampler of another package."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest
from e2e.conftest import ModelFile
from PIL import Image
from servers.service_process import children

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PROMPT = "a large red circle on a blue background"


@pytest.fixture(scope="module")
def pair(service: Any, shapes: ModelFile) -> Iterator[Any]:
    """The shared service, told by its manifest to draw on two devices while these tests run."""
    shapes.write(acceleration={"devicesPerPicture": 2}, limits={"maxSteps": 1000})
    service.wait_for(
        lambda: len(followers(service)) == 1 and service.status().get("ready"),
        "a second device draws along",
    )
    yield service
    shapes.write()
    service.wait_for(
        lambda: not followers(service) and service.status().get("ready"), "one device draws again"
    )


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def followers(running: Any) -> list[psutil.Process]:
    """The processes of the second devices."""
    follower = "calotype.serving.engine.parallel.follower"
    return list(children(running.process.pid, lambda title: follower in title))


def begin(running: Any, **wanted: Any) -> str:
    """A job in the background; its name."""
    with running.http() as client:
        answer = client.post("/v1/jobs", json={"input": {"prompt": PROMPT, "seed": 7, **wanted}})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def job(running: Any, name: str) -> dict[str, Any]:
    with running.http() as client:
        return dict(client.get(f"/v1/jobs/{name}").json())


def test_pictures_of_a_batch_are_those_of_the_following_seeds(service: Any) -> None:
    answer = service.sdk().images.generate(
        model="dall-e-3",
        prompt="a red circle on a blue background",
        n=3,
        response_format="b64_json",
        extra_body={"seed": 7, "steps": 4},
    )
    batch = [base64.b64decode(image.b64_json) for image in answer.data]
    alone = [service.draw(seed=seed, steps=4) for seed in (7, 8, 9)]
    for one, other in zip(batch, alone, strict=True):
        # The same picture; a batch may round the last bit of a float otherwise.
        assert abs(pixels(one) - pixels(other)).max() <= 1
    assert abs(pixels(batch[0]) - pixels(batch[1])).max() > 4


def test_an_installed_package_adds_a_sampler(service: Any) -> None:
    theirs = pixels(service.draw(PROMPT, steps=4, sampler="acme.straight"))
    # It takes Euler's steps.
    euler = pixels(service.draw(PROMPT, steps=4, sampler="flow-euler"))
    assert abs(theirs - euler).max() <= 1


def test_previews_are_streamed_and_the_picture_is_drawn_by_both(pair: Any) -> None:
    assert len(followers(pair)) == 1
    found = list(
        pair.sdk().images.generate(
            prompt=PROMPT,
            stream=True,
            partial_images=2,
            extra_body={"seed": 7, "steps": 12},
        )
    )
    kinds = [event.type for event in found]
    assert kinds == [*["image_generation.partial_image"] * 2, "image_generation.completed"]
    last = base64.b64decode(found[-1].b64_json)
    assert pixels(last).std() > 10
    assert last == pair.draw(PROMPT, steps=12), "previews change nothing"


def test_an_adapter_is_drawn_by_both(pair: Any) -> None:
    striped = pixels(pair.draw(PROMPT, steps=4, loras=[{"id": "stripes"}]))
    assert abs(striped - pixels(pair.draw(PROMPT, steps=4))).max() > 8


def test_a_job_that_is_cancelled_leaves_the_devices_free(pair: Any) -> None:
    name = begin(pair, steps=1000)
    pair.wait_for(lambda: job(pair, name)["status"] == "running", "the job runs")
    with pair.http() as client:
        assert client.post(f"/v1/jobs/{name}/cancel").status_code == 200
    pair.wait_for(lambda: job(pair, name)["status"] == "canceled", "the job is cancelled")
    assert pixels(pair.draw(PROMPT, steps=4)).std() > 10


def test_a_device_that_dies_costs_a_replica_and_no_job(pair: Any) -> None:
    undisturbed = pixels(pair.draw(PROMPT, steps=300))
    (device,), replica = followers(pair), pair.replica("Generator")
    name = begin(pair, steps=300, response_format="b64_json")
    pair.wait_for(lambda: job(pair, name)["progress"] >= 5, "the job is being drawn")
    device.kill()
    pair.wait_for(lambda: not replica.is_running(), "the replica ends with its device")
    pair.wait_for(lambda: job(pair, name)["status"] not in ("queued", "running"), "it is over")
    ended = job(pair, name)
    assert ended["status"] == "succeeded", ended
    assert len(followers(pair)) == 1 and followers(pair)[0].pid != device.pid
    with pair.http() as client:
        address = ended["output"]["images"][0]["url"]
        drawn = pixels(client.get(address).content)
    assert abs(drawn - undisturbed).max() <= 1
