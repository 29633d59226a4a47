"""A gateway and a model app as the processes of two pods, on real Ray Serve.

What the kubelet does with pods that died is done here: they are started again.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import openai
import psutil

from calotype.serving.config import BUILT_IN_ADAPTER, BUILT_IN_MODEL
from calotype.serving.wire.model_token import ModelIdentity, make_model_token, marks_secret

KEY = "ct_live_cluster_runtime"
INTERNAL_TOKEN = "internal-token-of-the-tests"
MODEL, STRIPES = (
    resource.model_dump(mode="json", by_alias=True, exclude_none=True)
    for resource in (BUILT_IN_MODEL, BUILT_IN_ADAPTER)
)
TOKEN = make_model_token(
    INTERNAL_TOKEN, ModelIdentity(MODEL["metadata"]["namespace"], MODEL["metadata"]["name"])
)
"""All that the pod of the model knows of the release's secrets."""
GATEWAY, MODEL_APP = "gateway", "model-app"
READY_SECONDS = 900.0


def application(adapters: Sequence[dict[str, Any]] = (STRIPES,)) -> dict[str, Any]:
    """The model app's configuration as the operator renders it."""
    configs: dict[str, dict[str, Any]] = {
        "Dispatcher": {"model": "shapes"},
        "Moderator": {"policy": None},
        "TextEncoder": {"model": MODEL},
        "Generator": {"model": MODEL, "adapters": list(adapters)},
    }
    return {
        "name": "shapes",
        "route_prefix": "/",
        "import_path": "calotype.serving.deployments.cluster:build_parts",
        "args": {"model": "shapes", "threads": 1, "gpus": 0},
        "runtime_env": {},
        "deployments": [{"name": n, "user_config": c} for n, c in configs.items()],
    }


class Pods:
    """Both pods; one database and one folder of pictures.

    Args:
        database: URL of the job database.
    """

    def __init__(self, folder: pathlib.Path, database: str) -> None:
        self.folder, self.database = folder, database
        (folder / "data").mkdir(exist_ok=True)
        with contextlib.ExitStack() as probes:
            found = [probes.enter_context(socket.socket()) for _ in range(3)]
            for probe in found:
                probe.bind(("127.0.0.1", 0))
            gateway, model_app, self._internal = (int(one.getsockname()[1]) for one in found)
        self._ports = {GATEWAY: gateway, MODEL_APP: model_app}
        self.url = f"http://127.0.0.1:{gateway}"
        self.app_url = f"http://127.0.0.1:{model_app}"
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self.write(MODEL_APP, application())
        self.write(GATEWAY, self.gateway_json())

    def gateway_json(self, **changed: Any) -> dict[str, Any]:
        """The gateway's configuration as the operator renders it."""
        return {
            "models": [{"manifest": MODEL, "url": self.app_url, "ready": True}],
            "adapters": [STRIPES],
        } | changed

    def write(self, name: str, document: Any) -> None:
        """The configuration of a pod. As a ConfigMap mount does: the new content appears whole."""
        fresh = self.folder / f".{name}.new"
        fresh.write_text(document if isinstance(document, str) else json.dumps(document))
        fresh.replace(self.folder / f"{name}.json")

    def start(self, name: str) -> None:
        """As the operator would; the log and the data lie beside the configuration."""
        if name == GATEWAY:
            options = ["--internal-port", str(self._internal)]
            environment = {
                "CALOTYPE_API_KEY": KEY,
                "CALOTYPE_DATABASE_URL": self.database,
                "CALOTYPE_DATA_DIR": str(self.folder / "data"),
                "CALOTYPE_INTERNAL_TOKEN": INTERNAL_TOKEN,
            }
        else:
            options, store = [], f"http://127.0.0.1:{self._internal}"
            environment = {
                "CALOTYPE_DATABASE_URL": store,
                "CALOTYPE_BLOB_URL": store,
                "CALOTYPE_DATA_DIR": str(self.folder / "model"),
                "CALOTYPE_INTERNAL_TOKEN": TOKEN,
                "CALOTYPE_MARKS_SECRET": marks_secret(INTERNAL_TOKEN),
                "CALOTYPE_NODE_NAME": "node-1",
            }
        command = [sys.executable, "-m", "calotype.serving", name, *options]
        config = ["--config", str(self.folder / f"{name}.json")]
        address = ["--host", "127.0.0.1", "--port", str(self._ports[name])]
        with (self.folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                [*command, *config, *address],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
            )

    def start_both(self) -> None:
        self.start(GATEWAY)
        self.until(lambda: self.get("/readyz") == 200, "the gateway accepts jobs")
        self.start(MODEL_APP)
        self.until(self.ready, "the model is loaded", READY_SECONDS)

    def kill(self, name: str) -> None:
        """kill -9 of every process of the pod."""
        process = psutil.Process(self._running[name].pid)
        family = [process, *process.children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        self._running[name].wait(30)
        psutil.wait_procs(family, timeout=30)

    def end(self, name: str) -> int:
        """Sends SIGTERM; returns the exit status when nothing of the pod is left."""
        process = self._running.pop(name)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=600)
        left = psutil.wait_procs(family, timeout=60)[1]
        for orphan in left:
            orphan.kill()
        assert not left, f"processes outlived {name}: {left}"
        return code

    def root(self) -> int:
        """The process id of the model app."""
        return self._running[MODEL_APP].pid

    def until(self, holds: Callable[[], Any], what: str, seconds: float = 600) -> None:
        """Polls until the condition holds; a pod that ended meanwhile is started again."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, f"never came true: {what}\n{self.log(MODEL_APP)}"
            for name, process in list(self._running.items()):
                if process.poll() is not None:
                    self.start(name)
            time.sleep(0.2)

    def get(self, path: str) -> int:
        """The gateway's status code; 0 while it does not answer."""
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}{path}", timeout=20).status_code
        return 0

    def status(self) -> dict[str, Any]:
        """GET /internal/v1/status; empty while the app does not answer."""
        headers = {"authorization": f"Bearer {TOKEN}"}
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.get(f"{self.app_url}/internal/v1/status", headers=headers, timeout=20)
            return dict(answer.json()) if answer.status_code == 200 else {}
        return {}

    def ready(self) -> bool:
        """Whether the model app draws."""
        return bool(self.status().get("ready"))

    def api(self, key: str = KEY) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=240)

    @functools.cached_property
    def _sdk(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=240)

    def sdk(self) -> openai.OpenAI:
        """One client for all tests, closed with the pods."""
        return self._sdk

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def close(self) -> None:
        self._sdk.close()
        for name in self._running:
            with contextlib.suppress(psutil.NoSuchProcess):
                self.kill(name)
