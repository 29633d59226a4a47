"""Ray's head is killed under `calotype serve`: the gateway stays, and no job is lost."""

from __future__ import annotations

import time
from typing import Any

import httpx
import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("program", ["gcs_server", "raylet", "ray_host.process"])
def test_the_gateway_outlives_ray(service: Any, program: str) -> None:
    before = ray_of(service)
    begun = submit(service, steps=1000, n=4)
    service.wait_for(lambda: job(service, begun)["status"] == "running", "a job is being drawn")
    process_of(service, program).kill()
    killed = time.monotonic()
    service.wait_for(lambda: readyz(service).status_code == 503, "it is noticed", 10)
    away = readyz(service)
    assert away.json()["reason"] and int(away.headers["retry-after"]) >= 1
    refused = generate(service, deadline_seconds=0.5)
    assert refused.status_code == 503, refused.text
    assert refused.json()["error"]["code"] == "model_not_ready"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    waiting = [submit(service, steps=2, seed=seed) for seed in range(3)]
    assert readyz(service).status_code == 503, "those were accepted while Ray was away"
    service.wait_for(lambda: readyz(service).status_code == 200, "the model is back")
    print(f"{program}: away for {time.monotonic() - killed:.0f} s")
    for name in (begun, *waiting):
        service.wait_for(lambda name=name: job(service, name)["status"] == "succeeded", name)
    assert service.draw().startswith(b"\x89PNG")
    assert service.process.poll() is None
    assert not psutil.wait_procs(before, timeout=10)[1], "nothing of the Ray before is left"


def ray_of(service: Any) -> list[psutil.Process]:
    """Every process under the service."""
    return psutil.Process(service.process.pid).children(recursive=True)


def process_of(service: Any, program: str) -> psutil.Process:
    found = [p for p in ray_of(service) if any(program in word for word in p.cmdline()[:3])]
    assert len(found) == 1, found
    return found[0]


def readyz(service: Any) -> httpx.Response:
    return httpx.get(f"{service.url}/readyz", timeout=10)


def submit(service: Any, **wanted: Any) -> str:
    with service.http() as client:
        answer = client.post("/v1/jobs", json={"input": {"prompt": "a red circle", **wanted}})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def generate(service: Any, **wanted: Any) -> httpx.Response:
    with service.http() as client:
        return client.post("/v1/images/generations", json={"prompt": "a red circle", **wanted})


def job(service: Any, name: str) -> dict[str, Any]:
    with service.http() as client:
        return dict(client.get(f"/v1/jobs/{name}").json())
