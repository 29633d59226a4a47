"""The gateway as a process of its own, without Ray and without torch (`calotype gateway`).

It outlives the GPUs: models, teams and adapters come from a file that the operator keeps, jobs go
into the store whether their model is there or not.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import pathlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from fastapi import FastAPI

from calotype.serving.api.app import create_app
from calotype.serving.api.availability import answer_for_absent_models
from calotype.serving.api.catalog import Catalog
from calotype.serving.api.gateway import Gateway
from calotype.serving.api.gateway_config import parse_gateway_config
from calotype.serving.api.remote_backend import RemoteBackend
from calotype.serving.api.server import build_server, listening_socket
from calotype.serving.api.settings import GatewaySettings
from calotype.serving.environment import ClusterEnvironment
from calotype.serving.errors import CalotypeError, InvalidRequest
from calotype.serving.jobs.keys import ensure_first_key
from calotype.serving.jobs.store import JobStore
from calotype.serving.storage import open_blobs

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0
"""A changed ConfigMap switches a symbolic link, which no file watcher follows reliably."""


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    config: pathlib.Path
    host: str
    port: int
    environment: ClusterEnvironment
    api_key: str | None = field(default=None, repr=False)
    """Recorded as a valid key when given; none is made up."""
    signing_secret: str | None = field(default=None, repr=False)
    """Signs asset URLs; without it the job database has one."""
    say: Callable[[str], None] = field(default=print)
    """Where sentences for whoever reads the log go."""


def run_gateway(options: GatewayOptions) -> None:
    """Serves until SIGINT or SIGTERM, then lets open requests finish.

    Raises:
        CalotypeError: the port is taken, the job database or the environment cannot be used.
    """
    with listening_socket(options.host, options.port) as listener:
        gateway = StandaloneGateway(options)
        try:
            asyncio.run(build_server(gateway.app).serve(sockets=[listener]))
        finally:
            gateway.close()


class StandaloneGateway:
    """A gateway over a job store, and the file that tells it what is on offer."""

    def __init__(self, options: GatewayOptions) -> None:
        self._options = options
        environment = options.environment
        self._store = JobStore.open(environment.database_url)
        if options.api_key is not None:
            ensure_first_key(self._store, options.api_key)
        self._catalog = Catalog([])
        self._backend = RemoteBackend(self._store, environment.internal_token)
        self._seen: bytes | None = None
        self._problem = ""
        self.app = create_app(
            GatewaySettings(),
            self._store,
            open_blobs(environment.blob_url),
            self._backend,
            self._catalog,
            lifespan=self._living,
        )
        answer_for_absent_models(self.app)
        if options.signing_secret:
            gateway: Gateway = self.app.state.gateway
            secret = options.signing_secret.encode()
            self.app.state.gateway = dataclasses.replace(gateway, url_secret=secret)

    def close(self) -> None:
        self._store.close()

    async def look(self) -> None:
        """Takes the file if its content changed; what cannot be used changes nothing."""
        path = self._options.config
        try:
            raw = await asyncio.to_thread(path.read_bytes)
        except OSError as error:
            self._complain(f"{path} cannot be read ({error.strerror}).")
            return
        if raw == self._seen:
            return
        try:
            config = parse_gateway_config(raw, path)
            self._catalog.replace([served.manifest for served in config.models], config.adapters)
        except InvalidRequest as error:
            self._seen = raw
            self._complain(error.message)
            return
        self._backend.endpoints = {served.manifest.name: served.url for served in config.models}
        self._seen, self._problem = raw, ""
        names = ", ".join(served.manifest.name for served in config.models)
        self._options.say(f"Serving now: {names or 'no model'}.")

    def _complain(self, problem: str) -> None:
        if problem != self._problem:
            self._problem = problem
            self._options.say(f"The configuration is not used: {problem} The last good one stays.")

    @contextlib.asynccontextmanager
    async def _living(self, app: FastAPI) -> AsyncIterator[None]:
        await self.look()
        following = asyncio.create_task(self._follow())
        self._options.say(
            f"The gateway listens on {self._options.host}, port {self._options.port}."
        )
        yield
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await self._backend.close()

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                await self.look()
            except CalotypeError as error:  # the job store, for instance: tried again
                self._complain(error.message)
