"""Jobs outlive every process of a real cluster that is killed, the head of Ray among them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from calotype.serving.config import BUILT_IN_ADAPTER, BUILT_IN_MODEL
from calotype.serving.jobs.database import sqlite_url
from calotype.serving.jobs.keys import create_key
from calotype.serving.jobs.store import JobStore
from calotype.serving.jobs.tables import assets, jobs, usage_records

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TEAMS = ("a", "b", "c")
JOBS_PER_TEAM = 10
TOKEN = "internal-token-of-the-tests"
MODEL, STRIPES = (
    resource.model_dump(mode="json", by_alias=True, exclude_none=True)
    for resource in (BUILT_IN_MODEL, BUILT_IN_ADAPTER)
)


class Pods:
    """A gateway and a model app as processes, and what the kubelet does with those that died."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        with contextlib.ExitStack() as probes:
            found = [probes.enter_context(socket.socket()) for _ in range(2)]
            for probe in found:
                probe.bind(("127.0.0.1", 0))
            self.ports = dict(
                zip(("gateway", "model-app"), [p.getsockname()[1] for p in found], strict=True)
            )
        configs: dict[str, Any] = {
            "Dispatcher": {"model": "shapes"},
            "Moderator": {"policy": None},
            "TextEncoder": {"model": MODEL},
            "Generator": {"model": MODEL, "adapters": []},
        }
        app = {
            "name": "shapes",
            "route_prefix": "/",
            "import_path": "calotype.serving.deployments.cluster:build_app",
            "args": {"model": "shapes", "threads": 1, "gpus": 0},
            "runtime_env": {},
            "deployments": [{"name": n, "user_config": c} for n, c in configs.items()],
        }
        url = f"http://127.0.0.1:{self.ports['model-app']}"
        served = {"models": [{"manifest": MODEL, "url": url, "ready": True}], "adapters": [STRIPES]}
        (folder / "model-app.json").write_text(json.dumps(app))
        (folder / "gateway.json").write_text(json.dumps(served | {"policies": {}, "teams": []}))
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        told = {
            "CALOTYPE_DATA_DIR": str(self.folder / "data"),
            "CALOTYPE_INTERNAL_TOKEN": TOKEN,
            "CALOTYPE_NODE_NAME": "node-1",
            # A watermark follows from the pixels: the last bit of one changes it everywhere.
            "CALOTYPE_MARKS": "none",
        }
        with (self.folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                [
                    *(sys.executable, "-m", "calotype.serving.cli", name),
                    *("--config", str(self.folder / f"{name}.json")),
                    *("--host", "127.0.0.1", "--port", str(self.ports[name])),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | told,
            )

    def kill(self, name: str) -> None:
        """The whole pod, and the pod that takes its place."""
        process = psutil.Process(self._running[name].pid)
        family = [process, *process.children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        self._running[name].wait(30)
        psutil.wait_procs(family, timeout=30)

    def child(self, holds: Callable[[str], bool]) -> psutil.Process | None:
        """A process of the model app by its command line."""
        for process in psutil.Process(self._running["model-app"].pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if holds(" ".join(process.cmdline())):
                    return process
        return None

    def ready(self) -> bool:
        """Whether the model app draws; one that ended while it started is started again."""
        if self._running["model-app"].poll() is not None:
            self.start("model-app")
        headers = {"authorization": f"Bearer {TOKEN}"}
        url = f"http://127.0.0.1:{self.ports['model-app']}/internal/v1/status"
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.get(url, headers=headers, timeout=10)
            return answer.status_code == 200 and bool(answer.json()["ready"])
        return False

    def close(self) -> None:
        for name in self._running:
            with contextlib.suppress(psutil.NoSuchProcess):
                self.kill(name)


@pytest.fixture
def pods(tmp_path: pathlib.Path) -> Iterator[Pods]:
    pods = Pods(tmp_path)
    try:
        yield pods
    finally:
        pods.close()


def test_accepted_jobs_outlive_every_death(pods: Pods, tmp_path: pathlib.Path) -> None:
    (tmp_path / "data").mkdir()
    store = JobStore.open(sqlite_url(tmp_path / "data"))
    keys = {name: create_key(store, team=name)[0] for name in TEAMS}
    pods.start("gateway")
    pods.start("model-app")
    until(pods.ready, "the model is loaded")
    accepted = [
        submit(pods, key, name, n) for name, key in keys.items() for n in range(JOBS_PER_TEAM)
    ]
    assert len(set(accepted)) == JOBS_PER_TEAM * len(TEAMS)
    for deployment in ("Generator", "Moderator", "Dispatcher"):
        until(lambda: open_jobs(store, "running"), "a job runs")
        kill_replica(pods, deployment)
    pods.kill("gateway")
    pods.start("gateway")
    until(lambda: open_jobs(store, "running"), "a job runs")
    head = pods.child(lambda title: "gcs_server" in title)
    assert head is not None
    head.kill()
    # Without its head the pod answers no probe; the kubelet replaces it.
    until(lambda: not pods.ready(), "the pod is not ready")
    pods.kill("model-app")
    pods.start("model-app")
    until(lambda: not open_jobs(store, "queued", "running"), "all jobs are over", 400)
    check(store, accepted, tmp_path, pods, keys["a"])
    store.close()


def submit(pods: Pods, key: str, team: str, number: int) -> str:
    answer = httpx.post(
        f"http://127.0.0.1:{pods.ports['gateway']}/v1/jobs",
        headers={"authorization": f"Bearer {key}", "idempotency-key": f"{team}-{number}"},
        json={"input": {"prompt": "a red circle", "seed": number, "steps": 50}},
        timeout=60,
    )
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def kill_replica(pods: Pods, deployment: str) -> None:
    found: list[psutil.Process] = []

    def look() -> bool:
        victim = pods.child(
            lambda title: title.startswith("ray::ServeReplica") and f":{deployment}" in title
        )
        found.extend([] if victim is None else [victim])
        return bool(found)

    until(look, f"a replica of {deployment} runs")
    found[0].kill()


def open_jobs(store: JobStore, *states: str) -> list[Any]:
    with store.engine.connect() as connection:
        return list(connection.execute(jobs.select().where(jobs.c.status.in_(states))))


def until(holds: Callable[[], Any], what: str, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"never came true: {what}"
        time.sleep(0.1)


def check(store: JobStore, accepted: list[str], folder: pathlib.Path, pods: Pods, key: str) -> None:
    with store.engine.connect() as connection:
        rows = connection.execute(jobs.select()).mappings().all()
        pictures = connection.execute(assets.select()).mappings().all()
        usage = connection.execute(usage_records.select()).mappings().all()
    assert {row["id"] for row in rows} == set(accepted)
    assert Counter(row["status"] for row in rows) == {"succeeded": len(accepted)}
    assert Counter(p["job_id"] for p in pictures) == Counter(dict.fromkeys(accepted, 1))
    assert Counter(u["job_id"] for u in usage) == Counter(dict.fromkeys(accepted, 1))
    disturbed = [row for row in rows if row["fence"] > 1]
    assert disturbed, "nobody was killed at work"
    keys_of = {p["job_id"]: p["blob_key"] for p in pictures}
    for row in disturbed[:3]:
        again = httpx.post(
            f"http://127.0.0.1:{pods.ports['gateway']}/v1/images/generations",
            headers={"authorization": f"Bearer {key}"},
            json={"recipe": row["recipe"], "response_format": "url"},
            timeout=240,
        ).json()
        drawn = pixels(httpx.get(again["data"][0]["url"], timeout=60).content)
        given = pixels((folder / "data" / "assets" / keys_of[row["id"]]).read_bytes())
        # Alone they are the same to the byte (tests/serving/test_generation.py); in other company
        # the last bit of a float may be rounded otherwise.
        assert abs(drawn - given).max() <= 2


def pixels(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
