"""Ray, the model apps and the gateway on this machine, until Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import pathlib
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve

from calotype.serving.api.app import create_app
from calotype.serving.api.http.server import build_server
from calotype.serving.api.state.catalog import Catalog
from calotype.serving.api.state.settings import GatewaySettings
from calotype.serving.config import Manifests
from calotype.serving.core.errors import CalotypeError, ModelLoadFailed
from calotype.serving.database.connection import sqlite_url
from calotype.serving.database.database import Database
from calotype.serving.deployments.app import QUIET_LOG, build_model_app
from calotype.serving.deployments.backend import RayBackend, app_name
from calotype.serving.deployments.gpu_shares import local_shares
from calotype.serving.deployments.preparation import (
    ServeOptions,
    declare_teams,
    moderation_of,
    read_resources,
)
from calotype.serving.deployments.ray_node import start_ray, stop_ray
from calotype.serving.storage import FolderBlobStore

log = logging.getLogger(__name__)

WATCH_SECONDS = 1.0
READY_POLL_SECONDS = 0.25


class Service:
    def __init__(
        self, options: ServeOptions, resources: Manifests, listener: socket.socket
    ) -> None:
        self._options, self._resources, self._listener = options, resources, listener
        self._database = Database.open(sqlite_url(options.data_dir))
        self._catalog = Catalog(resources.models, resources.adapters)
        self._backend = RayBackend(self._database, {})
        self._failure: CalotypeError | None = None
        self._ray_started = False

    def start(self) -> None:
        """Starts Ray, from the main thread: its processes die with the thread that made them."""
        first_key = self._database.api_keys.ensure_first(self._options.api_key)
        if first_key is not None:
            self._options.say(f"Your API key, shown this once: {first_key}")
        self._options.say("Starting Ray Serve and loading the model ...")
        self._start_ray()

    async def run(self) -> None:
        app = create_app(
            GatewaySettings(data_dir=self._options.data_dir),
            self._database,
            FolderBlobStore(self._options.data_dir / "assets"),
            self._backend,
            self._catalog,
            lifespan=self._living,
        )
        self._server = build_server(app)
        await self._server.serve(sockets=[self._listener])
        self._options.say("Draining ...")
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Drains the generators, then ends Serve and Ray."""
        if self._ray_started:
            # Ray reports the end of its own processes as errors: nobody at the terminal asked.
            with _second_interrupt_kills(), contextlib.redirect_stderr(io.StringIO()):
                for app in self._backend.models.values():
                    serve.delete(app, _blocking=True)
                with contextlib.redirect_stdout(io.StringIO()):
                    serve.shutdown()
                    stop_ray()
        self._database.close()

    @contextlib.asynccontextmanager
    async def _living(self, app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._start())]
        tasks[0].add_done_callback(self._stop_on_failure)
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _stop_on_failure(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is None:
            return
        error = task.exception()
        self._failure = (
            error
            if isinstance(error, CalotypeError)
            else CalotypeError(f"The service could not start: {type(error).__name__}: {error}")
        )
        self._server.should_exit = True

    async def _start(self) -> None:
        seen = self._signature()
        await self._deploy(self._resources)
        await self._until_ready()
        url = f"http://{self._options.host}:{self._options.port}"
        names = ", ".join(model.name for model in self._catalog.models())
        self._options.say(f"calotype is ready: {url}/v1 serves {names}. Ctrl-C ends it.")
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now = self._signature()
            if now != seen:
                seen = now
                await self._reload()

    def _start_ray(self) -> None:
        start_ray(log_to_driver=False)
        self._ray_started = True
        try:
            serve.start(proxy_location="Disabled", logging_config=QUIET_LOG)
        except Exception as error:  # Ray raises whatever its processes could not do
            raise ModelLoadFailed(f"Ray Serve could not be started: {error}") from error

    async def _deploy(self, resources: Manifests) -> None:
        for model in resources.models:
            app = build_model_app(
                model,
                resources.adapters,
                moderation_of(model, resources),
                self._options.data_dir.resolve(),
                threads=self._options.threads,
                gpus=local_shares(
                    model.spec.device,
                    model.spec.acceleration.devices_per_picture,
                    int(ray.cluster_resources().get("GPU", 0)),
                ),
            )
            name = app_name(model.name)
            await asyncio.to_thread(
                serve.run,
                app,
                name=name,
                route_prefix=None,
                logging_config=QUIET_LOG,
            )
            self._backend.models[model.name] = name
        for gone in set(self._backend.models) - {model.name for model in resources.models}:
            await asyncio.to_thread(serve.delete, self._backend.models.pop(gone))
        self._catalog.replace(resources.models, resources.adapters)
        before = self._resources.teams
        await asyncio.to_thread(declare_teams, self._database, before, resources.teams)

    async def _until_ready(self) -> None:
        while True:
            statuses = await self._backend.status()
            for status in statuses:
                if status.message and not status.ready:
                    raise ModelLoadFailed(status.message)
            if statuses and all(status.ready for status in statuses):
                return
            await asyncio.sleep(READY_POLL_SECONDS)

    async def _reload(self) -> None:
        """A changed manifest reaches every replica; a wrong one changes nothing and says why."""
        try:
            resources = read_resources(self._options.manifests)
        except CalotypeError as error:
            self._options.say(f"The changed manifests are not used: {error.message}")
            return
        await self._deploy(resources)
        self._resources = resources
        self._options.say("The changed manifests are served now.")

    def _signature(self) -> list[tuple[str, float, int]]:
        """What tells that a manifest, or a file that it names, has changed."""
        files: list[pathlib.Path] = []
        for path in self._options.manifests:
            files += sorted(path.iterdir()) if path.is_dir() else [path]
        files += [
            pathlib.Path(a.spec.source.path) for a in self._resources.adapters if a.spec.source.path
        ]
        found = []
        for file in files:
            with contextlib.suppress(OSError):
                stat = file.stat()
                found.append((str(file), stat.st_mtime, stat.st_size))
        return found


@contextlib.contextmanager
def _second_interrupt_kills() -> Iterator[None]:
    """While draining, Ctrl-C must not break the shutdown half way: it ends it at once."""

    def kill(*_: Any) -> None:
        stop_ray()
        os._exit(130)

    previous = signal.signal(signal.SIGINT, kill)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
