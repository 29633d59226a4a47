"""`calotype gateway` and `calotype model-app`, as the pods of a cluster start them."""

from __future__ import annotations

import base64
import hashlib
import io
import pathlib
from typing import Any

import httpx
import pytest
from PIL import Image
from safetensors.torch import load, save
from samples.images import same_pixels
from servers.pods import GATEWAY, MODEL, MODEL_APP, STRIPES, TOKEN, Pods, application

from calotype.serving.weights.sources import BUILT_IN
from calotype.serving.wire.config_hash import config_hash

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PROMPT = "a large red square on a white background"


def drawn(pods: Pods, **body: Any) -> bytes:
    answer = pods.sdk().images.generate(
        model="dall-e-3",
        prompt=PROMPT,
        response_format="b64_json",
        extra_body={"seed": 7, **body},
    )
    assert answer.data is not None
    return base64.b64decode(answer.data[0].b64_json or "")


def test_a_picture_is_drawn_by_another_process_than_answers(pods: Pods) -> None:
    plain = drawn(pods)
    striped = drawn(pods, loras=[{"id": "stripes", "scale": 1.0}])
    assert plain.startswith(b"\x89PNG") and striped.startswith(b"\x89PNG")
    assert not same_pixels(plain, striped)
    assert same_pixels(drawn(pods), plain)


def test_the_status_tells_of_every_replica_and_its_adapters(pods: Pods) -> None:
    def ready(status: dict[str, Any]) -> bool:  # replicas tell it every two seconds
        told = status["replicaStates"][0]["adapters"].get("stripes", {})
        return bool(told.get("state") == "ready")

    pods.until(lambda: ready(pods.status()), "the replica says that it has the adapter")
    status = pods.status()
    assert (status["name"], status["ready"], status["replicas"]) == ("shapes", True, 1)
    replica = status["replicaStates"][0]
    assert replica["node"] == "node-1"
    assert replica["ready"]
    assert replica["configHash"] == status["configHash"]
    adapter = replica["adapters"]["stripes"]
    assert adapter["loadMilliseconds"] >= 0

    def model() -> dict[str, Any]:
        with pods.api() as client:
            return dict(client.get("/v1/models").json()["data"][0]["status"])

    pods.until(lambda: model()["adapters"] == {"stripes": "ready"}, "the gateway says so")
    assert model()["ready"]


def test_every_format_says_that_a_model_made_it(pods: Pods) -> None:
    for kind, output in (("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")):
        more = {} if kind == "png" else {"output_compression": 80}
        data = drawn(pods, output_format=kind, steps=4, **more)
        assert Image.open(io.BytesIO(data)).format == output
        assert b"trainedAlgorithmicMedia" in data


def test_the_ingress_answers_nobody_without_the_token(pods: Pods) -> None:
    for token in ("", "Bearer wrong", f"Bearer {TOKEN}x", f"Basic {TOKEN}"):
        for method, path in (
            ("GET", "status"),
            ("POST", "moderate"),
            ("POST", "jobs/job_1/cancel"),
        ):
            answer = httpx.request(
                method,
                f"{pods.app_url}/internal/v1/{path}",
                headers={"authorization": token},
                timeout=20,
            )
            assert answer.status_code == 401, (token, path)


def test_texts_and_pictures_are_checked_through_the_gateway(pods: Pods) -> None:
    image = base64.b64encode(drawn(pods)).decode()
    parts = [
        {"type": "text", "text": "a quiet harbour"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
    ]
    with pods.api() as client:
        answer = client.post("/v1/moderations", json={"input": parts}).json()
    assert answer["results"][0]["flagged"] is False


# -- revisions of an adapter -----------------------------------------------------------------------


def look(file: pathlib.Path, sha256: str | None = None) -> dict[str, Any]:
    """The adapter `look` as a fetch Job left it."""
    digest = sha256 or hashlib.sha256(file.read_bytes()).hexdigest()
    return {
        "apiVersion": "calotype.dev/v1alpha1",
        "kind": "LoRAAdapter",
        "metadata": {"name": "look", "namespace": "shop"},
        "spec": {
            "modelRef": {"name": "shapes"},
            "source": {"path": str(file)},
            "sha256": digest,
        },
    }


def test_a_revision_replaces_the_one_before_only_when_it_is_loaded(pods: Pods) -> None:
    files = {name: pods.folder / f"{name}.safetensors" for name in ("v1", "v2", "broken")}
    whole = (BUILT_IN / "stripes.safetensors").read_bytes()
    files["v1"].write_bytes(whole)
    files["v2"].write_bytes(save({name: 0 * tensor for name, tensor in load(whole).items()}))
    files["broken"].write_bytes(whole[: len(whole) // 2])
    pods.write(GATEWAY, pods.gateway_json(adapters=[STRIPES, look(files["v1"])]))
    replicas = {state["replica"] for state in pods.status()["replicaStates"]}
    plain, striped = (
        pixels(drawn(pods, loras=loras)) for loras in ([], [{"id": "stripes", "scale": 1.0}])
    )

    def push(adapter: dict[str, Any], *states: str) -> dict[str, Any]:
        """Waits until the replicas have this configuration and say so of the adapter."""
        adapters = [STRIPES, adapter]
        pods.write(MODEL_APP, application(adapters))
        wanted = config_hash({"model": MODEL, "adapters": adapters})
        pods.until(
            lambda: pods.status().get("configHash") == wanted and told()["state"] in states,
            f"{adapter['spec']} is {states}",
        )
        return told()

    def told() -> dict[str, Any]:
        return dict(pods.status()["replicaStates"][0]["adapters"].get("look", {"state": ""}))

    def draw() -> bytes:
        return pixels(drawn(pods, loras=[{"id": "look", "scale": 1.0}]))

    first, second = look(files["v1"]), look(files["v2"])
    assert push(first, "ready")["revision"] == first["spec"]["sha256"]
    pods.until(lambda: "look" in offered(pods), "the gateway offers it")
    assert draw() == striped
    assert push(second, "ready")["revision"] == second["spec"]["sha256"]
    assert draw() == plain, "an adapter of zeros changes nothing"
    broken = push(look(files["broken"]), "failed")
    assert "truncated" in broken["message"]
    assert broken["servingRevision"] == second["spec"]["sha256"]
    assert draw() == plain, "the revision before it is served on"
    swapped = push(look(files["v1"], sha256="0" * 64), "failed")
    assert "pins" in swapped["message"]
    assert swapped["servingRevision"] == second["spec"]["sha256"]
    assert draw() == plain
    assert push(first, "ready")["message"] == ""
    assert draw() == striped
    assert {state["replica"] for state in pods.status()["replicaStates"]} == replicas


def pixels(image: bytes) -> bytes:
    """Without the recipe, which names the adapters."""
    with Image.open(io.BytesIO(image)) as opened:
        return opened.tobytes()


def offered(pods: Pods) -> set[str]:
    with pods.api() as client:
        adapters = client.get("/v1/models/shapes").json()["adapters"]
    return {adapter["id"] for adapter in adapters}


def test_a_wrong_application_changes_nothing(pods: Pods) -> None:
    pods.write(MODEL_APP, '{"name": "shapes", "deployment": []}')
    pods.until(lambda: "is not used" in pods.log(MODEL_APP), "the fault is told")
    assert drawn(pods).startswith(b"\x89PNG")
    pods.write(MODEL_APP, application())


# -- a model app that ends and comes back ----------------------------------------------------------


def test_running_pictures_are_finished_and_waiting_ones_kept(pods: Pods) -> None:
    def submit(seed: int) -> str:
        slow = {"n": 2, "steps": 50, "size": "256x256"}
        body = {"input": {"prompt": PROMPT, "seed": seed, **slow}}
        with pods.api() as client:
            answer = client.post("/v1/jobs", json=body)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def states() -> list[str]:
        with pods.api() as client:
            return [client.get(f"/v1/jobs/{job}").json()["status"] for job in jobs]

    jobs = [submit(seed) for seed in range(20)]  # more than run at once
    pods.until(lambda: "running" in states(), "some of them run")
    assert pods.end(MODEL_APP) == 0
    assert set(states()) == {"succeeded", "queued"}, "none was cut off, none was lost"
    assert pods.get("/readyz") == 200
    jobs.append(submit(99))
    pods.start(MODEL_APP)
    pods.until(lambda: set(states()) == {"succeeded"}, "all are drawn")
