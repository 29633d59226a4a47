"""Product teams' code: OpenAI's own clients, with only base URL and key changed."""

from __future__ import annotations

import base64
import io
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import openai
import pytest
from PIL import Image
from samples.images import same_pixels

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CLIENTS = pathlib.Path(sys.prefix) / "clients"
REFUSED = "a photograph of two people having explicit sexual intercourse"

SCRIPT = """
import base64, hashlib, io, json, sys
import openai
from PIL import Image
url, key, refused, seed = sys.argv[1:]
client = openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0, timeout=240)
def draw(seed):
    answer = client.images.generate(
        model="dall-e-3", prompt="a large red circle on a blue background", size="256x256",
        response_format="b64_json", extra_body={"seed": seed})
    image = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))
    return hashlib.sha256(image.tobytes()).hexdigest()
first, again, other = draw(int(seed)), draw(int(seed)), draw(int(seed) + 1)
try:
    client.images.generate(model="dall-e-3", prompt=refused, size="256x256")
    refusal = None
except openai.BadRequestError as error:
    refusal = {"code": error.code, "body": error.body}
print(json.dumps({"version": openai.__version__, "first": first, "again": again, "other": other,
                  "refusal": refusal}))
"""


@pytest.mark.parametrize(("version", "seed"), [("2.0.0", 100), ("2.54.0", 200), ("newest", 300)])
def test_seeds_repeat_and_blocked_prompts_raise(service: Any, version: str, seed: int) -> None:
    environment = dict(os.environ)
    if version != "newest":
        folder = CLIENTS / f"openai-{version}"
        assert folder.is_dir(), f"{folder} is missing: `make setup` installs it"
        environment["PYTHONPATH"] = str(folder)
    before = service.images()
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, service.url, "ct_live_end_to_end_tests", REFUSED, str(seed)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["version"] == (openai.__version__ if version == "newest" else version)
    assert found["first"] == found["again"]
    assert found["first"] != found["other"]
    refusal = found["refusal"]
    assert refusal["code"] == "moderation_blocked"
    assert refusal["body"]["moderation_details"]["moderation_stage"] == "input"
    assert "sexual" in refusal["body"]["moderation_details"]["categories"]
    # The refused image exists nowhere.
    assert len(service.images() - before) == 3


def test_sizes_of_dall_e_are_drawn_small_and_enlarged(service: Any) -> None:
    with service.http() as client:
        for size, rendered in (
            ("1024x1024", "128x128"),
            ("1024x1792", "128x224"),
            ("1792x1024", "224x128"),
        ):
            answer = client.post(
                "/v1/images/generations",
                json={"prompt": "a green star", "size": size, "response_format": "b64_json"},
            ).json()
            assert answer["metrics"]["rendered_size"] == rendered
            image = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
            assert f"{image.width}x{image.height}" == size == answer["size"]


@pytest.mark.parametrize("size", ["64x64", "80x64", "512x64", "144x272", "512x512"])
def test_any_multiple_of_16_is_drawn(service: Any, size: str) -> None:
    image = Image.open(io.BytesIO(service.draw(size=size, steps=2)))
    assert f"{image.width}x{image.height}" == size


def test_gateway_dispatcher_and_moderator_hold_no_torch(service: Any) -> None:
    import psutil

    light = [psutil.Process(service.process.pid)]
    light += [service.replica(name) for name in ("Dispatcher", "Moderator")]
    for process in light:
        assert not [m.path for m in process.memory_maps() if "libtorch" in m.path]
    heavy = service.replica("Generator")
    assert [m.path for m in heavy.memory_maps() if "libtorch" in m.path], "the probe works"


def test_without_a_size_the_model_chooses(service: Any) -> None:
    assert Image.open(io.BytesIO(service.draw())).size == (128, 128)


def test_a_url_answer_can_be_fetched_without_a_key(service: Any) -> None:
    import httpx

    answer = service.sdk().images.generate(
        model="dall-e-3", prompt="a blue ring", response_format="url", extra_body={"seed": 3}
    )
    fetched = httpx.get(answer.data[0].url, follow_redirects=True)
    assert fetched.status_code == 200
    assert same_pixels(fetched.content, service.draw("a blue ring", seed=3))


def test_nonsense_and_other_scripts_are_accepted(service: Any) -> None:
    for prompt in ("qwxz flurb", "一个红色的圆", "🦊🦊🦊", "Ünïcödé çirçle"):
        assert service.draw(prompt, steps=2).startswith(b"\x89PNG")
