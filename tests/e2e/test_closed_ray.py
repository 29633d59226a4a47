"""Ray listens on every interface; only the service that started it may tell it what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

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
