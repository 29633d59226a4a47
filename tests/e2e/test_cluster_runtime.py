"""`calotype gateway` and `calotype model-app`, as the pods of a cluster start them."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import psutil
import pytest

from calotype.serving.config import BUILT_IN_ADAPTER, BUILT_IN_MODEL, ImageModel, LoRAAdapter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

KEY = "ct_live_cluster_runtime"
TOKEN = "internal-token-of-the-tests"
PROMPT = "a large red square on a white background"
READY_SECONDS = 240.0


def manifest(resource: ImageModel | LoRAAdapter) -> dict[str, Any]:
    return resource.model_dump(mode="json", by_alias=True, exclude_none=True)


MODEL, STRIPES = manifest(BUILT_IN_MODEL), manifest(BUILT_IN_ADAPTER)


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
        told = {
            "CALOTYPE_DATA_DIR": str(self.folder / "data"),
            "CALOTYPE_INTERNAL_TOKEN": TOKEN,
            "CALOTYPE_API_KEY": KEY,
            "CALOTYPE_NODE_NAME": "node-1",
        }
        with (self.folder / f"{command}.log").open("ab") as log:
            self.running[command] = subprocess.Popen(
                [
                    *(sys.executable, "-m", "calotype.serving.cli", command),
                    *("--config", str(self.folder / config)),
                    *("--host", "127.0.0.1", "--port", str(port)),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | told,
            )

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
        code = process.wait(timeout=240)
        left = psutil.wait_procs(family, timeout=30)[1]
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

    def wait_for(self, holds: Callable[[], Any], what: str, seconds: float = 60.0) -> None:
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
    assert plain != striped
    assert cluster.draw() == plain


def test_the_status_tells_of_every_replica_and_its_adapters(cluster: Cluster) -> None:
    status = cluster.status()
    assert (status["name"], status["ready"], status["replicas"]) == ("shapes", True, 1)
    replica = status["replicaStates"][0]
    assert replica["node"] == "node-1"
    assert replica["ready"]
    assert replica["configHash"] == status["configHash"]
    adapter = replica["adapters"]["stripes"]
    assert adapter["state"] == "ready"
    assert adapter["loadMilliseconds"] >= 0
    with cluster.api() as client:
        model = client.get("/v1/models").json()["data"][0]
    assert model["status"]["ready"]
    assert model["status"]["adapters"] == {"stripes": "ready"}


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
    picture = base64.b64encode(cluster.draw()).decode()
    parts = [
        {"type": "text", "text": "a quiet harbour"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
    ]
    with cluster.api() as client:
        answer = client.post("/v1/moderations", json={"input": parts}).json()
    assert answer["results"][0]["flagged"] is False
