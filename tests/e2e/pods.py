"""A gateway and a model app as the processes of two pods, on real Ray Serve, for tests that kill.

What the kubelet does with pods that died is done here: they are started again.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import psutil

from calotype.serving.config import BUILT_IN_ADAPTER, BUILT_IN_MODEL

TOKEN = "internal-token-of-the-tests"
MODEL, STRIPES = (
    resource.model_dump(mode="json", by_alias=True, exclude_none=True)
    for resource in (BUILT_IN_MODEL, BUILT_IN_ADAPTER)
)


def start_pod(
    command: str, config: pathlib.Path, port: int, told: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """The process of a pod as the operator would start it; its log and data lie beside the file."""
    folder = config.parent
    environment = {
        "CALOTYPE_DATA_DIR": str(folder / "data"),
        "CALOTYPE_INTERNAL_TOKEN": TOKEN,
        "CALOTYPE_NODE_NAME": "node-1",
    }
    with (folder / f"{command}.log").open("ab") as log:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "calotype.serving", command),
                *("--config", str(config)),
                *("--host", "127.0.0.1", "--port", str(port)),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | environment | told,
        )


class Pods:
    """Both are started by `start`; a pod is named ``gateway`` or ``model-app``.

    Args:
        database: URL of the job database.
    """

    def __init__(self, folder: pathlib.Path, database: str) -> None:
        self.folder, self.database = folder, database
        with contextlib.ExitStack() as probes:
            found = [probes.enter_context(socket.socket()) for _ in range(2)]
            for probe in found:
                probe.bind(("127.0.0.1", 0))
            gateway, model_app = (int(probe.getsockname()[1]) for probe in found)
        self._ports = {"gateway": gateway, "model-app": model_app}
        self.url = f"http://127.0.0.1:{gateway}"
        self._app_url = f"http://127.0.0.1:{model_app}"
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
        served = {
            "models": [{"manifest": MODEL, "url": self._app_url, "ready": True}],
            "adapters": [STRIPES],
            "policies": {},
            "teams": [],
        }
        (folder / "model-app.json").write_text(json.dumps(app))
        (folder / "gateway.json").write_text(json.dumps(served))
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        told = {"CALOTYPE_DATABASE_URL": self.database}
        config = self.folder / f"{name}.json"
        self._running[name] = start_pod(name, config, self._ports[name], told)

    def kill(self, name: str) -> None:
        """kill -9 of every process of the pod."""
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

    def replica(self, deployment: str) -> psutil.Process | None:
        return self.child(
            lambda title: title.startswith("ray::ServeReplica") and f":{deployment}" in title
        )

    def until(self, holds: Callable[[], Any], what: str, seconds: float = 1500) -> None:
        """Polls until the condition holds; a pod that ended meanwhile is started again."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, f"never came true: {what}"
            for name, process in list(self._running.items()):
                if process.poll() is not None:
                    self.start(name)
            time.sleep(0.2)

    def ready(self) -> bool:
        """Whether the model app draws."""
        headers = {"authorization": f"Bearer {TOKEN}"}
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.get(f"{self._app_url}/internal/v1/status", headers=headers, timeout=10)
            return answer.status_code == 200 and bool(answer.json()["ready"])
        return False

    def close(self) -> None:
        for name in self._running:
            with contextlib.suppress(psutil.NoSuchProcess):
                self.kill(name)
