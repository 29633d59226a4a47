"""Gateways and model apps speak HTTPS with their certificates, and believe only their authority."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import socket
import ssl
import threading
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI
from servers.certificates import authority_of, make_certificates

from calotype.serving.api.http.server import build_server, listening_socket
from calotype.serving.cluster.internal_server import serving_internally
from calotype.serving.cluster.remote_backend import RemoteBackend
from calotype.serving.cluster.remote_job_store import RemoteJobStore
from calotype.serving.cluster.stand_in import StandIn
from calotype.serving.cluster.supervisor import supervise_host
from calotype.serving.config.environment import DATA_DIR, INTERNAL_TOKEN, ClusterEnvironment
from calotype.serving.core.errors import InvalidRequest, ModelLoadFailed, Overloaded, StorageFailed
from calotype.serving.core.tls import CA, CERTIFICATE, KEY, TlsFiles, tls_files
from calotype.serving.database.database import Database
from calotype.serving.storage.gateway import GatewayBlobStore

HEALTH = "/-/healthz"


@pytest.fixture
def files(tmp_path: pathlib.Path) -> TlsFiles:
    return make_certificates(tmp_path)


@pytest.fixture
def authority(files: TlsFiles) -> str:
    return str(authority_of(files))


def test_the_server_speaks_https_with_its_certificate(files: TlsFiles, authority: str) -> None:
    app = FastAPI()
    app.add_api_route("/healthz", lambda: {"status": "ok"})
    server = build_server(app, 1, files)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        # Signals are for the main thread, and nobody sends one here.
        serving = threading.Thread(
            target=lambda: asyncio.run(server._serve([listener])), daemon=True
        )
        serving.start()
        trust = ssl.create_default_context(cafile=authority)
        with httpx.Client(verify=trust, trust_env=False, timeout=600) as client:
            answer = client.get(f"https://localhost:{port}/healthz")
        assert answer.json() == {"status": "ok"}
        server.should_exit = True
        serving.join(600)


def test_a_certificate_that_cannot_be_used_is_told_at_the_start(
    files: TlsFiles, authority: str, tmp_path: pathlib.Path
) -> None:
    assert tls_files(None, None) is None
    with pytest.raises(InvalidRequest, match="both"):
        tls_files(files.certificate, None)
    with pytest.raises(InvalidRequest, match="cannot be used as certificate and key"):
        tls_files(files.certificate, tmp_path / "missing.key")
    told = {INTERNAL_TOKEN: "token-of-tests", DATA_DIR: str(tmp_path)}
    assert ClusterEnvironment.read(told).tls is None
    shown = {CERTIFICATE: str(files.certificate), KEY: str(files.key)}
    assert ClusterEnvironment.read(told | shown).tls == files
    with pytest.raises(InvalidRequest, match=f"both {CERTIFICATE} and {KEY}"):
        ClusterEnvironment.read(told | {KEY: str(files.key)})


def test_a_model_app_believes_only_gateways_of_its_authority(
    files: TlsFiles, authority: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = FastAPI()
    app.add_api_route("/internal/v1/store/{name}", lambda: {"result": [2, 7]}, methods=["POST"])
    app.add_api_route("/internal/v1/blobs/{key:path}", lambda: "a picture")

    def ask(url: str) -> tuple[tuple[int, int], bytes]:
        with contextlib.closing(RemoteJobStore(url, "token")) as store:
            jobs = store.takedowns.stamp()
        with contextlib.closing(GatewayBlobStore(url, "token")) as blobs:
            return jobs, blobs.get("assets/one")

    def refused(url: str) -> str:
        with pytest.raises(StorageFailed) as refusal:
            ask(url)
        with contextlib.closing(GatewayBlobStore(url, "token")) as blobs:
            with pytest.raises(StorageFailed):
                blobs.get("assets/one")
        return refusal.value.message

    async def run() -> None:
        port = _free_port()
        async with serving_internally(app, "127.0.0.1", port, files):
            assert "certificate verify failed" in await asyncio.to_thread(
                refused, f"https://localhost:{port}"
            )
            monkeypatch.setenv(CA, authority)
            found = await asyncio.to_thread(ask, f"https://localhost:{port}")
            assert found == ((2, 7), b'"a picture"')
            await asyncio.to_thread(refused, f"http://localhost:{port}")
            # The certificate is not for this name.
            await asyncio.to_thread(refused, f"https://127.0.0.1:{port}")

    asyncio.run(run())


@pytest.mark.parametrize("running", [True, False])
def test_a_gateway_believes_only_model_apps_of_its_authority(
    files: TlsFiles,
    authority: str,
    file_database: Database,
    monkeypatch: pytest.MonkeyPatch,
    running: bool,
) -> None:
    """Both the model app and what stands in for it while it starts."""

    async def status(url: str) -> str:
        backend = RemoteBackend(file_database, "token")
        backend.endpoints["shapes"] = url
        try:
            (found,) = await backend.status()
            return found.message or ""
        finally:
            await backend.close()

    async def run() -> None:
        with listening_socket("127.0.0.1", 0) as listener:
            port = listener.getsockname()[1]
            opened = _model_app(listener, files) if running else _stand_in(listener, files)
            async with opened:
                answered = "It draws" if running else "being started"
                assert "cannot be reached" in await status(f"https://localhost:{port}")
                monkeypatch.setenv(CA, authority)
                assert answered in await status(f"https://localhost:{port}")
                assert "cannot be reached" in await status(f"http://localhost:{port}")
                assert "cannot be reached" in await status(f"https://127.0.0.1:{port}")
                await _ask_as_a_service(port, authority)

    asyncio.run(run())


def test_the_process_that_answers_for_a_model_is_given_the_certificate(files: TlsFiles) -> None:
    """Without its key it says so, before it starts Ray."""

    async def run() -> str:
        with listening_socket("127.0.0.1", 0) as listener:
            supervisor = supervise_host(
                *(listener, "token", os.environ, lambda sentence: None),
                start_seconds=60,
                log_to_driver=False,
                tls=files,
            )
            files.key.unlink()
            supervisor.want([])
            with pytest.raises(ModelLoadFailed) as refusal:
                await supervisor.run()
            await supervisor.on_change(True)  # what stands in for it answers no more
            return refusal.value.message

    sentence = asyncio.run(run())
    assert f"{files.certificate} and {files.key} cannot be used" in sentence


async def _ask_as_a_service(port: int, authority: str) -> None:
    """By the name of a Service, which one certificate for all of a namespace covers."""
    trust = ssl.create_default_context(cafile=authority)
    for name, believed in (("model-shapes.art.svc", True), ("model-shapes.lab.svc", False)):
        async with httpx.AsyncClient(verify=trust, trust_env=False, timeout=600) as client:
            request = client.build_request(
                "GET", f"https://localhost:{port}{HEALTH}", extensions={"sni_hostname": name}
            )
            with contextlib.nullcontext() if believed else pytest.raises(httpx.ConnectError):
                assert (await client.send(request)).status_code == 200


@contextlib.asynccontextmanager
async def _model_app(listener: socket.socket, files: TlsFiles) -> AsyncIterator[None]:
    from calotype.serving.deployments.ray_host.ingress import HostIngress, IngressServer

    server = IngressServer(HostIngress("token"), files)
    server.config.app = app = FastAPI()
    for path in (HEALTH, "/internal/v1/status"):
        app.add_api_route(path, lambda: {"message": "It draws."})
    serving = asyncio.create_task(server.answer_on(listener))
    try:
        yield
    finally:
        server.should_exit = True
        await serving


@contextlib.asynccontextmanager
async def _stand_in(listener: socket.socket, files: TlsFiles) -> AsyncIterator[None]:
    problem = Overloaded("The model is being started.", retry_after=3)
    stand_in = StandIn(listener, lambda: problem, lambda: True, files)
    await stand_in.open()
    try:
        yield
    finally:
        stand_in.close()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])
