"""The services of a cluster as plain processes, for tests that kill them.

    python tests/e2e/actors.py gateway|dispatcher|moderator|generator '{"port": ..., ...}'

Store, dispatcher, gateway, leases, heartbeats, checkpoints and blobs are the real ones; only the
pictures are painted, and calls between processes go over plain HTTP instead of Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import pathlib
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from calotype.serving.api.app import create_app
from calotype.serving.api.catalog import Catalog
from calotype.serving.api.settings import GatewaySettings
from calotype.serving.config import BUILT_IN_ADAPTER, BUILT_IN_MODEL
from calotype.serving.errors import CalotypeError, Overloaded, error_from_payload
from calotype.serving.jobs.dispatch_policy import DispatchPolicy
from calotype.serving.jobs.dispatcher import Dispatcher
from calotype.serving.jobs.leases import Lease
from calotype.serving.jobs.store import JobStore
from calotype.serving.protocols import ModelStatus, SystemClock
from calotype.serving.storage import open_blobs
from calotype.serving.testing import decision
from calotype.serving.testing_painter import Painter, PainterSettings

POLICY = DispatchPolicy(
    lease_seconds=1.5,
    sweep_seconds=0.2,
    rescan_seconds=2.0,
    max_queue=10_000,
    # The test kills more often than a job deserves to be given up for.
    max_attempts=20,
    storage_delays=(0.1, 0.3, 0.5, 1.0, 1.0, 1.0, 1.0),
)


class Remote:
    """Calls a method of another process; a process that is away raises Overloaded."""

    def __init__(self, port: int) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        self._client = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", timeout=30, limits=limits
        )

    async def call(self, method: str, *arguments: Any) -> Any:
        try:
            answer = await self._client.post(f"/{method}", json=list(arguments))
        except httpx.TransportError as error:
            raise Overloaded(f"The other process is away: {error}.", retry_after=1) from error
        if answer.status_code == 422:
            raise error_from_payload(answer.json())
        answer.raise_for_status()
        return answer.json()


class RemoteLeases(Remote):
    """`testing_painter.Leases`; what ends a lease is repeated until somebody hears it."""

    async def lease(self, replica: str, limit: int, wait_seconds: float) -> list[Lease]:
        found = await self.call("lease", replica, limit, wait_seconds)
        return [Lease.from_payload(payload) for payload in found]

    async def heartbeat(self, replica: str, progress: Mapping[str, Sequence[int]]) -> Sequence[str]:
        return list(await self.call("heartbeat", replica, dict(progress)))

    async def complete(self, job_id: str, fence: int, result: Mapping[str, Any]) -> bool:
        return await self._patiently("complete", job_id, fence, dict(result))

    async def fail(self, job_id: str, fence: int, error: Mapping[str, Any]) -> bool:
        return await self._patiently("fail", job_id, fence, dict(error))

    async def checkpoint(self, job_id: str, fence: int, step: int, blob_key: str) -> bool:
        return await self._patiently("checkpoint", job_id, fence, step, blob_key)

    async def preview(self, job_id: str, fence: int, preview: Mapping[str, Any]) -> bool:
        return await self._patiently("preview", job_id, fence, dict(preview))

    async def _patiently(self, method: str, *arguments: Any) -> bool:
        for _ in range(100):
            with contextlib.suppress(CalotypeError):
                return bool(await self.call(method, *arguments))
            await asyncio.sleep(0.1)
        raise Overloaded("The dispatcher did not come back.")


class RemoteSafety(Remote):
    async def judge_prompt(self, text: str, scope: Any = None) -> dict[str, Any]:
        return dict(await self.call("judge_prompt", text))

    async def judge_image(self, pixels: Any, scope: Any = None) -> dict[str, Any]:
        return dict(await self.call("judge_image", list(pixels.shape)))


class RemoteBackend(Remote):
    """`protocols.GenerationBackend`."""

    async def submit(self, job_id: str) -> None:
        await self.call("submit", job_id)

    async def wait(self, job_id: str, timeout: float) -> None:
        await self.call("wait", job_id, min(5.0, timeout))

    async def cancel(self, job_id: str) -> None:
        await self.call("cancel", job_id)

    async def judge(self, texts: Sequence[str], images: Sequence[Any]) -> list[dict[str, Any]]:
        return [decision("input") for _ in texts] + [decision("output") for _ in images]

    async def status(self) -> list[ModelStatus]:
        return [ModelStatus("shapes", True, 1)]


def serve(app: Any, port: int) -> None:
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


def methods(target: Any, names: Sequence[str], lifespan: Any = None) -> Starlette:
    """An application that calls these methods of ``target``."""

    async def call(request: Request) -> JSONResponse:
        method = getattr(target, request.path_params["name"])
        try:
            found = await method(*(await request.json()))
        except CalotypeError as error:
            return JSONResponse(error.to_payload(), status_code=422)
        if isinstance(found, list) and found and isinstance(found[0], Lease):
            found = [lease.to_payload() for lease in found]
        return JSONResponse(found)

    routes = [Route("/{name}", call, methods=["POST"])]
    assert all(hasattr(target, name) for name in names)
    return Starlette(routes=routes, lifespan=lifespan)


def run_dispatcher(options: dict[str, Any]) -> None:
    store = JobStore.connect(options["database"])
    dispatcher = Dispatcher(
        store, RemoteSafety(options["moderator"]), SystemClock(), POLICY, model="shapes"
    )

    @contextlib.asynccontextmanager
    async def living(app: Starlette) -> AsyncIterator[None]:
        await dispatcher.start()
        yield
        await dispatcher.stop()

    names = ("submit", "wait", "cancel", "lease", "heartbeat", "complete", "fail", "checkpoint")
    serve(methods(dispatcher, names, living), options["port"])


class Moderator:
    async def judge_prompt(self, text: str) -> dict[str, Any]:
        return decision("input", blocked=["sexual"] if "forbidden" in text else [])

    async def judge_image(self, shape: Sequence[int]) -> dict[str, Any]:
        return decision("output")


def run_gateway(options: dict[str, Any]) -> None:
    store = JobStore.connect(options["database"])
    app = create_app(
        GatewaySettings(job_deadline=600, batch_seconds=None),
        store,
        open_blobs(options["blobs"]),
        RemoteBackend(options["dispatcher"]),
        Catalog([BUILT_IN_MODEL], [BUILT_IN_ADAPTER]),
    )
    serve(app, options["port"])


async def run_generator(options: dict[str, Any]) -> None:
    painter = Painter(
        options["name"],
        RemoteLeases(options["dispatcher"]),
        RemoteSafety(options["moderator"]),
        open_blobs(options["blobs"]),
        PainterSettings(
            seconds_per_step=options["seconds_per_step"], checkpoint_every=4, beat_seconds=0.3
        ),
    )
    while True:
        try:
            await painter.work(1.0)
        except CalotypeError:
            await asyncio.sleep(0.1)


def main() -> None:
    role, options = sys.argv[1], json.loads(sys.argv[2])
    pathlib.Path(options["alive"]).touch()
    if role == "gateway":
        run_gateway(options)
    elif role == "dispatcher":
        run_dispatcher(options)
    elif role == "moderator":
        serve(methods(Moderator(), ("judge_prompt", "judge_image")), options["port"])
    else:
        asyncio.run(run_generator(options))


if __name__ == "__main__":
    main()
