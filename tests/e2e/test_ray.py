"""Ray under `calotype serve`: closed to others, and started again when it dies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import httpx
import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ASK = "import ray; ray.init(address='127.0.0.1:{port}', log_to_driver=False); print('let in')"


def port_of(service: Any, program: str) -> int:
    """Where a program of Ray's listens."""
    for process in psutil.Process(service.process.pid).children(recursive=True):
        if program in process.name() or program in " ".join(process.cmdline()[:1]):
            for connection in process.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN:
                    return int(connection.laddr.port)
    raise AssertionError(f"{program} does not run")


def ask(service: Any, **environment: str) -> str:
    """What another process is told that wants to use the service's Ray."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    answer = subprocess.run(
        [sys.executable, "-c", ASK.format(port=port_of(service, "gcs_server"))],
        env=plain | environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    return answer.stdout + answer.stderr


def test_others_cannot_use_the_services_ray(service: Any) -> None:
    guess = ask(service, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64)
    assert "let in" not in guess
    assert "InvalidAuthToken" in guess
    assert service.draw().startswith(b"\x89PNG")


def test_its_own_processes_can(service: Any) -> None:
    own = service.replica("Moderator").environ()
    token = {name: own[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    assert "let in" in ask(service, **token)


# -- Ray dies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["gcs_server", "raylet", "ray_host.process"])
def test_the_gateway_outlives_ray(service: Any, program: str) -> None:
    before = ray_of(service)
    begun = submit(service, steps=50, n=10)
    service.wait_for(lambda: job(service, begun)["status"] == "running", "a job is being drawn")
    process_of(service, program).kill()
    killed = time.monotonic()
    service.wait_for(lambda: readyz(service).status_code == 503, "it is noticed")
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
