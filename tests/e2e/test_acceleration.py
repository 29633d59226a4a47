"""What is compared to the last bit, on a service without marks: batches, two devices, a sampler."""

from __future__ import annotations

import base64
import io
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PROMPT = "a large red circle on a blue background"
MANIFEST = """
apiVersion: calotype.dev/v1alpha1
kind: ImageModel
metadata: {name: unmarked}
spec:
  source: {builtIn: {name: shapes}}
  precision: float32
  device: cpu
  acceleration: {devicesPerPicture: DEVICES}
  aliases: [dall-e-3]
  defaults: {steps: 4, guidanceScale: 2.5, size: 128x128}
  limits: {maxSteps: 1000}
---
apiVersion: calotype.dev/v1alpha1
kind: LoRAAdapter
metadata: {name: stripes}
spec:
  modelRef: {name: unmarked}
  source: {builtIn: {name: stripes}}
"""
PACKAGE = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "acme-samplers"
version = "1.0"

[project.entry-points."calotype.samplers"]
"acme.straight" = "acme_samplers:build"
"""


def sampler_of_the_documentation() -> str:
    """The class that docs/engine.md shows, so that it is no other one that is tried."""
    text = (pathlib.Path(__file__).parents[2] / "docs" / "engine.md").read_text()
    return "class Straight:" + text.partition("class Straight:")[2].partition("```")[0]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder into which pip has installed a package with a sampler."""
    project = tmp_path_factory.mktemp("acme")
    (project / "pyproject.toml").write_text(PACKAGE)
    (project / "acme_samplers").mkdir()
    (project / "acme_samplers" / "__init__.py").write_text(sampler_of_the_documentation())
    target = tmp_path_factory.mktemp("installed")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"),
            *("--no-build-isolation", "--disable-pip-version-check"),
            *("--target", str(target), str(project)),
        ],
        check=True,
    )
    return target


@pytest.fixture(scope="module")
def unmarked(
    start: Callable[..., Any], packages: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A service on one device."""
    folder = tmp_path_factory.mktemp("unmarked")
    write_model(folder, devices=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(packages), prepend=":")
        # The watermark follows from the pixels: the last bit of one would change it everywhere.
        patch.setenv("CALOTYPE_MARKS", "none")
        with start(folder, "-f", str(folder / "model.yaml")) as running:
            yield running


@pytest.fixture(scope="module")
def pair(unmarked: Any) -> Any:
    """The same service, told by its manifest to draw on two devices from now on."""
    write_model(unmarked.data_dir.parent, devices=2)
    unmarked.wait_for(
        lambda: len(followers(unmarked)) == 1 and unmarked.status().get("ready"),
        "a second device draws along",
    )
    return unmarked


def write_model(folder: pathlib.Path, devices: int) -> None:
    (folder / "model.yaml").write_text(MANIFEST.replace("DEVICES", str(devices)))


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def followers(running: Any) -> list[psutil.Process]:
    """The processes of the second devices."""
    family = psutil.Process(running.process.pid).children(recursive=True)
    return [
        p for p in family if "calotype.serving.engine.parallel.follower" in " ".join(p.cmdline())
    ]


def begin(running: Any, **wanted: Any) -> str:
    """A job in the background; its name."""
    with running.http() as client:
        answer = client.post("/v1/jobs", json={"input": {"prompt": PROMPT, "seed": 7, **wanted}})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def job(running: Any, name: str) -> dict[str, Any]:
    with running.http() as client:
        return dict(client.get(f"/v1/jobs/{name}").json())


def test_pictures_of_a_batch_are_those_of_the_following_seeds(unmarked: Any) -> None:
    answer = unmarked.sdk().images.generate(
        model="dall-e-3",
        prompt="a red circle on a blue background",
        n=3,
        response_format="b64_json",
        extra_body={"seed": 7},
    )
    batch = [base64.b64decode(image.b64_json) for image in answer.data]
    alone = [unmarked.draw(seed=seed) for seed in (7, 8, 9)]
    for one, other in zip(batch, alone, strict=True):
        # The same picture; a batch may round the last bit of a float otherwise.
        assert abs(pixels(one) - pixels(other)).max() <= 1
    assert abs(pixels(batch[0]) - pixels(batch[1])).max() > 4


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
    striped = pixels(pair.draw(PROMPT, loras=[{"id": "stripes"}]))
    assert abs(striped - pixels(pair.draw(PROMPT))).max() > 8


def test_a_job_that_is_cancelled_leaves_the_devices_free(pair: Any) -> None:
    name = begin(pair, steps=1000)
    pair.wait_for(lambda: job(pair, name)["status"] == "running", "the job runs")
    with pair.http() as client:
        assert client.post(f"/v1/jobs/{name}/cancel").status_code == 200
    pair.wait_for(lambda: job(pair, name)["status"] == "canceled", "the job is cancelled")
    assert pixels(pair.draw(PROMPT)).std() > 10


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


def test_an_installed_package_adds_a_sampler(pair: Any) -> None:
    theirs = pixels(pair.draw(PROMPT, sampler="acme.straight"))
    # It takes Euler's steps.
    assert abs(theirs - pixels(pair.draw(PROMPT, sampler="flow-euler"))).max() <= 1
