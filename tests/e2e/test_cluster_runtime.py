"""`calotype gateway` and `calotype model-app`, as the pods of a cluster start them."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import pathlib
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import psutil
import pytest
from e2e.pods import MODEL, STRIPES, TOKEN, start_pod
from PIL import Image
from safetensors.torch import load, save
from samples.images import same_pixels

from calotype.serving.weights.sources import BUILT_IN
from calotype.serving.wire.config_hash import config_hash

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

KEY = "ct_live_cluster_runtime"
PROMPT = "a large red square on a white background"
READY_SECONDS = 900.0


def application(adapters: Sequence[dict[str, Any]] = (STRIPES,)) -> dict[str, Any]:
    """model.json as the operator renders it."""
    configs: dict[str, dict[str, Any]] = {
        "Dispatcher": {"model": "shapes"},
        "Moderator": {"policy": None},
        "TextEncoder": {"model": MODEL},
        "Generator": {"model": MODEL, "adapters": list(adapters)},
    }
    return {
        "name": "shapes",
        "route_prefix": "/",
        "import_path": "calotype.serving.deployments.cluster:build_app",
        "args": {"model": "shapes", "threads": 1, "gpus": 0},
        "runtime_env": {},
        "deployments": [{"name": n, "user_config": c} for n, c in configs.items()],
    }


@dataclass
class Cluster:
    """A gateway and, while it runs, a model app; one database and one folder of pictures."""

    folder: pathlib.Path
    gateway_port: int = field(default_factory=lambda: free_port())
    app_port: int = field(default_factory=lambda: free_port())
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.gateway_port}"

    def write(self, name: str, document: Any) -> None:
        """As a ConfigMap mount does: the new content appears whole."""
        fresh = self.folder / f".{name}.new"
        fresh.write_text(document if isinstance(document, str) else json.dumps(document))
        fresh.replace(self.folder / name)

    def gateway_json(self, **changed: Any) -> dict[str, Any]:
        url = f"http://127.0.0.1:{self.app_port}"
        return {
            "models": [{"manifest": MODEL, "url": url, "ready": True}],
            "adapters": [STRIPES],
            "policies": {},
            "teams": [],
        } | changed

    def start(self, command: str, config: str, port: int) -> None:
        told = {"CALOTYPE_API_KEY": KEY}
        self.running[command] = start_pod(command, self.folder / config, port, told)

    def start_gateway(self) -> None:
        self.start("gateway", "gateway.json", self.gateway_port)
        self.wait_for(lambda: self.get("/readyz") == 200, "the gateway accepts jobs")

    def start_app(self) -> None:
        self.start("model-app", "model.json", self.app_port)
        self.wait_for(lambda: self.ready_or_restarted(), "the model is loaded", READY_SECONDS)

    def ready_or_restarted(self) -> bool:
        """On a machine that is too busy Ray gives up; the kubelet starts the container again."""
        ended = self.running["model-app"].poll() is not None
        if ended and "Ray could not be started" in self.log("model-app"):
            self.start("model-app", "model.json", self.app_port)
        return bool(self.status().get("ready"))

    def end(self, command: str, number: int = signal.SIGTERM) -> int:
        """Sends the signal; returns the exit status when nothing of the process is left."""
        process = self.running.pop(command)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        code = process.wait(timeout=600)
        left = psutil.wait_procs(family, timeout=60)[1]
        for orphan in left:
            orphan.kill()
        assert not left, f"processes outlived {command}: {left}"
        return code

    def get(self, path: str) -> int:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}{path}", timeout=20).status_code
        return 0

    def status(self) -> dict[str, Any]:
        """GET /internal/v1/status; empty while the app does not answer."""
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.get(
                f"http://127.0.0.1:{self.app_port}/internal/v1/status",
                headers={"authorization": f"Bearer {TOKEN}"},
                timeout=20,
            )
            return dict(answer.json()) if answer.status_code == 200 else {}
        return {}

    def api(self, key: str = KEY) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=240)

    def draw(self, **body: Any) -> bytes:
        sdk = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=240)
        answer = sdk.images.generate(
            model="dall-e-3",
            prompt=PROMPT,
            response_format="b64_json",
            extra_body={"seed": 7, **body},
        )
        assert answer.data is not None
        return base64.b64decode(answer.data[0].b64_json or "")

    def log(self, command: str) -> str:
        return (self.folder / f"{command}.log").read_text()

    def wait_for(self, holds: Callable[[], Any], what: str, seconds: float = 600.0) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            logs = "\n".join(self.log(command) for command in self.running)
            ended = [command for command, p in self.running.items() if p.poll() is not None]
            assert not ended, f"{ended} ended\n{logs}"
            assert time.monotonic() < deadline, f"never came true: {what}\n{logs}"
            time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    cluster.write("model.json", application())
    cluster.write("gateway.json", cluster.gateway_json())
    try:
        cluster.start_gateway()
        cluster.start_app()
        yield cluster
        for command in list(cluster.running):
            assert cluster.end(command) == 0, cluster.log(command)
    finally:
        for process in cluster.running.values():
            process.kill()


def test_a_picture_is_drawn_by_another_process_than_answers(cluster: Cluster) -> None:
    plain = cluster.draw()
    striped = cluster.draw(loras=[{"id": "stripes", "scale": 1.0}])
    assert plain.startswith(b"\x89PNG") and striped.startswith(b"\x89PNG")
    assert not same_pixels(plain, striped)
    assert same_pixels(cluster.draw(), plain)


def test_the_status_tells_of_every_replica_and_its_adapters(cluster: Cluster) -> None:
    def ready(status: dict[str, Any]) -> bool:  # replicas tell it every two seconds
        told = status["replicaStates"][0]["adapters"].get("stripes", {})
        return bool(told.get("state") == "ready")

    cluster.wait_for(lambda: ready(cluster.status()), "the replica says that it has the adapter")
    status = cluster.status()
    assert (status["name"], status["ready"], status["replicas"]) == ("shapes", True, 1)
    replica = status["replicaStates"][0]
    assert replica["node"] == "node-1"
    assert replica["ready"]
    assert replica["configHash"] == status["configHash"]
    adapter = replica["adapters"]["stripes"]
    assert adapter["loadMilliseconds"] >= 0

    def model() -> dict[str, Any]:
        with cluster.api() as client:
            return dict(client.get("/v1/models").json()["data"][0]["status"])

    cluster.wait_for(lambda: model()["adapters"] == {"stripes": "ready"}, "the gateway says so")
    assert model()["ready"]


def test_the_ingress_answers_nobody_without_the_token(cluster: Cluster) -> None:
    for token in ("", "Bearer wrong", f"Bearer {TOKEN}x", f"Basic {TOKEN}"):
        for method, path in (("GET", "status"), ("POST", "judge"), ("POST", "jobs/job_1/cancel")):
            answer = httpx.request(
                method,
                f"http://127.0.0.1:{cluster.app_port}/internal/v1/{path}",
                headers={"authorization": token},
                timeout=20,
            )
            assert answer.status_code == 401, (token, path)


def test_texts_and_pictures_are_judged_through_the_gateway(cluster: Cluster) -> None:
    image = base64.b64encode(cluster.draw()).decode()
    parts = [
        {"type": "text", "text": "a quiet harbour"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
    ]
    with cluster.api() as client:
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


def test_a_revision_replaces_the_one_before_only_when_it_is_loaded(cluster: Cluster) -> None:
    files = {name: cluster.folder / f"{name}.safetensors" for name in ("v1", "v2", "broken")}
    whole = (BUILT_IN / "stripes.safetensors").read_bytes()
    files["v1"].write_bytes(whole)
    files["v2"].write_bytes(save({name: 0 * tensor for name, tensor in load(whole).items()}))
    files["broken"].write_bytes(whole[: len(whole) // 2])
    cluster.write("gateway.json", cluster.gateway_json(adapters=[STRIPES, look(files["v1"])]))
    replicas = {state["replica"] for state in cluster.status()["replicaStates"]}
    plain, striped = (
        pixels(cluster.draw(loras=loras)) for loras in ([], [{"id": "stripes", "scale": 1.0}])
    )

    def push(adapter: dict[str, Any], *states: str) -> dict[str, Any]:
        """Waits until the replicas have this configuration and say so of the adapter."""
        adapters = [STRIPES, adapter]
        cluster.write("model.json", application(adapters))
        wanted = config_hash({"model": MODEL, "adapters": adapters})
        cluster.wait_for(
            lambda: cluster.status().get("configHash") == wanted and told()["state"] in states,
            f"{adapter['spec']} is {states}",
        )
        return told()

    def told() -> dict[str, Any]:
        return dict(cluster.status()["replicaStates"][0]["adapters"].get("look", {"state": ""}))

    def draw() -> bytes:
        return pixels(cluster.draw(loras=[{"id": "look", "scale": 1.0}]))

    first, second = look(files["v1"]), look(files["v2"])
    assert push(first, "ready")["revision"] == first["spec"]["sha256"]
    cluster.wait_for(lambda: "look" in offered(cluster), "the gateway offers it")
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
    assert {state["replica"] for state in cluster.status()["replicaStates"]} == replicas


def pixels(image: bytes) -> bytes:
    """Without the recipe, which names the adapters."""
    with Image.open(io.BytesIO(image)) as opened:
        return opened.tobytes()


def offered(cluster: Cluster) -> set[str]:
    with cluster.api() as client:
        adapters = client.get("/v1/models/shapes").json()["adapters"]
    return {adapter["id"] for adapter in adapters}


def test_a_wrong_application_changes_nothing(cluster: Cluster) -> None:
    cluster.write("model.json", '{"name": "shapes", "deployment": []}')
    cluster.wait_for(lambda: "deployment" in cluster.log("model-app"), "the fault is told")
    assert cluster.draw().startswith(b"\x89PNG")
    cluster.write("model.json", application())


# -- a model app that ends and comes back ----------------------------------------------------------


def test_running_pictures_are_finished_and_waiting_ones_kept(cluster: Cluster) -> None:
    def submit(seed: int) -> str:
        body = {"input": {"prompt": PROMPT, "n": 2, "steps": 50, "seed": seed}}
        with cluster.api() as client:
            answer = client.post("/v1/jobs", json=body)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def states() -> list[str]:
        with cluster.api() as client:
            return [client.get(f"/v1/jobs/{job}").json()["status"] for job in jobs]

    jobs = [submit(seed) for seed in range(12)]  # more than run at once
    cluster.wait_for(lambda: "running" in states(), "some of them run")
    assert cluster.end("model-app") == 0
    assert set(states()) == {"succeeded", "queued"}, "none was cut off, none was lost"
    assert cluster.get("/readyz") == 200
    jobs.append(submit(99))
    cluster.start_app()
    cluster.wait_for(lambda: set(states()) == {"succeeded"}, "all are drawn", 180)
