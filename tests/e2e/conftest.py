"""`calotype serve` as a user starts it: a process, a port, the packaged model, real Ray Serve.

Most tests share one service, and tell it by manifests in its folder what they need of it.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import httpx
import openai
import psutil
import pytest
import yaml
from e2e import sampler_package
from servers.pods import GATEWAY, MODEL, MODEL_APP, STRIPES, Pods
from servers.postgres import PostgresServer, find_binaries, install_in_ci
from servers.service_process import replica_of
from servers.trace_collector import Collector

from calotype.serving.database.connection import sqlite_url

KEY = "ct_live_end_to_end_tests"
READY_SECONDS = 600.0


@dataclass
class Running:
    """A service and its process."""

    folder: pathlib.Path
    options: Sequence[str] = ()
    port: int = field(default_factory=lambda: free_port())
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    process: subprocess.Popen[bytes] = field(init=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def data_dir(self) -> pathlib.Path:
        return self.folder / "data"

    @property
    def log(self) -> pathlib.Path:
        return self.folder / "serve.log"

    def start(self) -> None:
        """As a user would, and waits until it draws."""
        address = ["--port", str(self.port), "--data-dir", str(self.data_dir)]
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [*calotype(), "serve", *address, *self.options],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**self.environment, "CALOTYPE_API_KEY": KEY},
            )
        self.wait_for(lambda: _ready(self), "the service is ready", READY_SECONDS)

    @contextlib.contextmanager
    def served(self) -> Iterator[Self]:
        """The service, for as long as the context is open."""
        try:
            self.start()
            yield self
            assert self.process.poll() is None, self.log.read_text()
        finally:
            self.end()

    def crash(self) -> None:
        """kill -9 of the command, which leaves none of its processes behind; starts it again."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait()
        left = psutil.wait_procs(family, timeout=60)[1]
        for orphan in left:
            orphan.kill()
        assert not left, f"processes outlived the killed service: {left}\n{self.log.read_text()}"
        self.start()

    def end(self) -> None:
        """Ctrl-C."""
        self._sdk.close()
        running = self.process.poll() is None
        family = psutil.Process(self.process.pid).children(recursive=True) if running else []
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(timeout=300)
        finally:
            if self.process.poll() is None:
                self.process.kill()
        left = psutil.wait_procs(family, timeout=60)[1]
        for orphan in left:
            orphan.kill()
        assert self.process.returncode == 0, self.log.read_text()
        assert not left, f"processes outlived the service: {left}\n{self.log.read_text()}"

    @functools.cached_property
    def _sdk(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=240)

    def sdk(self) -> openai.OpenAI:
        """One client for all tests, closed with the service."""
        return self._sdk

    def http(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {KEY}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=240)

    def draw(self, prompt: str = "a red circle on a blue background", **body: Any) -> bytes:
        """The picture's file, through plain HTTP."""
        with self.http() as client:
            answer = client.post(
                "/v1/images/generations",
                json={"prompt": prompt, "response_format": "b64_json", "seed": 7, **body},
            )
        assert answer.status_code == 200, answer.text
        return base64.b64decode(answer.json()["data"][0]["b64_json"])

    def status(self) -> dict[str, Any]:
        with self.http() as client:
            models = client.get("/v1/models").json()["data"]
        return dict(models[0]["status"]) if models else {}

    def wait_for(self, holds: Callable[[], Any], what: str, seconds: float = 600.0) -> None:
        """Polls until the condition holds."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"never came true: {what}\n{self.log.read_text()}"
            time.sleep(0.1)

    def replica(self, deployment: str) -> psutil.Process:
        """The process of a deployment's replica."""
        self.wait_for(lambda: self._replica(deployment), f"a replica of {deployment} runs")
        found = self._replica(deployment)
        assert found is not None
        return found

    def _replica(self, deployment: str) -> psutil.Process | None:
        return replica_of(self.process.pid, deployment)

    def images(self) -> set[pathlib.Path]:
        """Every picture file that exists in the data folder."""
        kinds = {".png", ".jpg", ".jpeg", ".webp"}
        return {p for p in (self.data_dir / "assets").rglob("*") if p.suffix in kinds}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ready(running: Running) -> bool:
    assert running.process.poll() is None, running.log.read_text()
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{running.url}/readyz", timeout=10).status_code == 200
    return False


def calotype() -> Sequence[str]:
    return (sys.executable, "-m", "calotype.serving")


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Where the shared service sends its traces."""
    with Collector.listening() as collector:
        yield collector


class ModelFile:
    """The manifest of the shared service's model; a test that changed it writes it anew."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.write()

    def write(self, **changed: Any) -> None:
        """The built-in model, as `calotype serve` has it without a manifest, but for `changed`."""
        model = {**MODEL, "spec": {**MODEL["spec"], **changed}}
        (self.folder / "shapes.yaml").write_text(yaml.safe_dump_all([model, STRIPES]))

    def clear(self) -> None:
        """Takes away what tests put beside it, and what they changed in it."""
        for file in self.folder.iterdir():
            if file.name != "shapes.yaml":
                file.unlink()
        self.write()


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    """The manifest of the shared service's model, in the folder that it follows."""
    return ModelFile(tmp_path_factory.mktemp("manifests"))


@pytest.fixture(scope="session")
def service(
    shapes: ModelFile, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """The service with the built-in model, which traces and knows another package's sampler."""
    packages = tmp_path_factory.mktemp("packages")
    sampler_package.install(tmp_path_factory.mktemp("acme"), packages)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        patch.setenv("PYTHONPATH", str(packages), prepend=":")
        # The watermark follows from the pixels: the last bit of one would change it everywhere.
        patch.setenv("CALOTYPE_MARKS", "none")
        running = Running(tmp_path_factory.mktemp("service"), ["-f", str(shapes.folder)])
    with running.served():
        yield running


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer | None]:
    """A PostgreSQL server; None where it is not installed (Debian: apt-get install postgresql)."""
    if find_binaries() is None:
        install_in_ci()
    binaries = find_binaries()
    if binaries is None:
        yield None
        return
    with PostgresServer.running(binaries) as server:
        yield server


@pytest.fixture(scope="session")
def pods(
    postgres: PostgresServer | None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pods]:
    """A gateway and a model app, which share a database and nothing else."""
    folder = tmp_path_factory.mktemp("pods")
    if postgres is None:
        (folder / "data").mkdir()
        database = sqlite_url(folder / "data")
    else:
        database = postgres.url(postgres.create_database())
    pods = Pods(folder, database)
    try:
        pods.start_both()
        yield pods
        for name in (MODEL_APP, GATEWAY):
            assert pods.end(name) == 0, pods.log(name)
    finally:
        pods.close()
