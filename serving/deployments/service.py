"""`calotype serve`: the gateway and, in a child that is supervised, Ray with the model apps.

The gateway outlives Ray: it accepts jobs while there is none, and says when it is expected back.
Both speak as in a cluster, over the model apps' HTTP, here on loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pathlib
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator

from fastapi import FastAPI

from calotype.serving.api.app import create_app
from calotype.serving.api.http.server import build_server, listening_socket
from calotype.serving.api.state.catalog import Catalog
from calotype.serving.api.state.settings import read_settings
from calotype.serving.cluster.remote_backend import RemoteBackend
from calotype.serving.cluster.supervisor import Supervisor, supervise_host
from calotype.serving.cluster.training_worker import TrainableModel, TrainingWorker
from calotype.serving.config import ImageModel, Manifests
from calotype.serving.config.environment import BLOB_URL, DATA_DIR, DATABASE_URL
from calotype.serving.core.errors import CalotypeError, ModelLoadFailed
from calotype.serving.database.connection import sqlite_url
from calotype.serving.database.database import Database
from calotype.serving.deployments.preparation import ServeOptions, declare_teams, read_resources
from calotype.serving.deployments.serve_config import applications
from calotype.serving.observability.loops import Loop
from calotype.serving.storage import FolderBlobStore
from calotype.serving.weights.shelf import FOLDER as SHELF
from calotype.serving.weights.shelf import Shelf
from calotype.serving.weights.sources import model_folder

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
WATCH_SECONDS = 1.0
READY_POLL_SECONDS = 0.25
PROGRESS_SECONDS = 10.0


def run_service(options: ServeOptions, resources: Manifests, listener: socket.socket) -> None:
    """Serves on the listener until SIGINT or SIGTERM.

    Raises:
        CalotypeError: it cannot be started; one sentence.
    """
    with (
        contextlib.closing(Database.open(sqlite_url(options.data_dir))) as database,
        listening_socket(LOOPBACK, 0) as model_apps,
    ):
        first_key = database.api_keys.ensure_first(options.api_key)
        if first_key is not None:
            options.say(f"Your API key, shown this once: {first_key}")
        options.say("Starting Ray Serve and loading the model ...")
        token = secrets.token_hex(32)
        supervisor = supervise_host(
            *(model_apps, token, _environment(options.data_dir), options.say),
            start_seconds=options.ray_start_seconds,
            log_to_driver=False,
        )
        backend = RemoteBackend(database, token)
        base_url = f"http://{LOOPBACK}:{model_apps.getsockname()[1]}"
        service = Service(options, resources, database, backend, supervisor, base_url)
        asyncio.run(service.run(listener))


def _environment(data_dir: pathlib.Path) -> dict[str, str]:
    """Where the replicas find what outlives them: all of it in the data folder."""
    folder = data_dir.resolve()
    return os.environ | {
        DATA_DIR: str(folder),
        DATABASE_URL: sqlite_url(folder),
        BLOB_URL: (folder / "assets").as_uri(),
    }


class Service:
    """Args:
    backend: reaches the model apps; told here where they are.
    base_url: of the model apps, each below its name.
    """

    def __init__(
        self,
        options: ServeOptions,
        resources: Manifests,
        database: Database,
        backend: RemoteBackend,
        supervisor: Supervisor,
        base_url: str,
    ) -> None:
        self._options, self._resources = options, resources
        self._database, self._backend, self._supervisor = database, backend, supervisor
        self._base_url = base_url
        self._catalog = Catalog([])
        self._offer(resources)

    async def run(self, listener: socket.socket) -> None:
        """Raises CalotypeError when the service cannot be started."""
        blobs = FolderBlobStore(self._options.data_dir / "assets")
        app = create_app(
            read_settings().model_copy(update={"data_dir": self._options.data_dir}),
            self._database,
            blobs,
            self._backend,
            self._catalog,
            lifespan=self._living,
        )
        server = build_server(app)
        self._supervisor.want(applications(self._resources, self._options.threads))
        supervising = asyncio.create_task(self._supervisor.run())
        watching = asyncio.create_task(self._watch())
        trainer = self._trainer(blobs)
        training = asyncio.create_task(asyncio.to_thread(trainer.run))

        def end(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and task.exception() is not None:
                server.should_exit = True

        for task in (supervising, watching, training):
            task.add_done_callback(end)
        await server.serve(sockets=[listener])
        if not supervising.done():
            self._options.say("Draining ...")
        watching.cancel()
        trainer.stopping.set()
        with self._second_interrupt_kills():
            self._supervisor.end()
            ended = await asyncio.gather(supervising, watching, training, return_exceptions=True)
        await self._backend.close()
        for error in ended:
            if isinstance(error, Exception):
                raise _sentence(error) from error

    def _trainer(self, blobs: FolderBlobStore) -> TrainingWorker:
        """Trains adapters for the models that are served when the service starts."""
        models = [_trainable(model) for model in self._resources.models]
        return TrainingWorker(
            self._database,
            blobs,
            {model.name: model for model in models},
            self._options.data_dir / "trainings",
            Shelf(self._options.data_dir / SHELF),
        )

    @contextlib.asynccontextmanager
    async def _living(self, app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(declare_teams, self._database, [], self._resources.teams)
        yield

    async def _watch(self) -> None:
        """Says when the service is ready; then takes changed manifests."""
        seen = self._signature()
        await self._until_ready()
        url = f"http://{self._options.host}:{self._options.port}"
        names = ", ".join(model.name for model in self._catalog.models())
        self._options.say(f"calotype is ready: {url}/v1 serves {names}. Ctrl-C ends it.")

        async def look() -> float:
            nonlocal seen
            now = self._signature()
            if now != seen:
                await self._reload()
                seen = now
            return WATCH_SECONDS

        await Loop("manifests", look).run()

    async def _until_ready(self) -> None:
        begun = told = time.monotonic()
        while True:
            now = time.monotonic()
            if not self._supervisor.serving:  # it tells itself what it does
                begun = told = now
            elif now - told >= PROGRESS_SECONDS:
                self._options.say(f"Loading the model: {now - begun:.0f} s so far.")
                told = now
            statuses = await self._backend.status()
            for status in statuses:
                if status.answers and status.message and not status.ready:
                    raise ModelLoadFailed(status.message)
            if statuses and all(status.ready for status in statuses):
                return
            await asyncio.sleep(READY_POLL_SECONDS)

    async def _reload(self) -> None:
        """A changed manifest reaches every replica; a wrong one changes nothing and says why."""
        try:
            resources = read_resources(self._options.places())
            await self._supervisor.apply(applications(resources, self._options.threads))
        except CalotypeError as error:
            self._options.say(f"The changed manifests are not used: {error.message}")
            return
        before, self._resources = self._resources, resources
        self._offer(resources)
        await asyncio.to_thread(declare_teams, self._database, before.teams, resources.teams)
        self._options.say("The changed manifests are served now.")

    def _offer(self, resources: Manifests) -> None:
        self._backend.endpoints = {
            model.name: f"{self._base_url}/{model.name}" for model in resources.models
        }
        self._catalog.replace(resources.models, resources.adapters)

    def _signature(self) -> list[tuple[str, float, int]]:
        """What tells that a manifest, or a file that it names, has changed."""
        files: list[pathlib.Path] = []
        for path in self._options.places():
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
    def _second_interrupt_kills(self) -> Iterator[None]:
        """While draining, Ctrl-C must not break the shutdown half way: it ends it at once."""
        loop = asyncio.get_running_loop()

        async def kill() -> None:
            await self._supervisor.kill()
            os._exit(130)

        loop.add_signal_handler(signal.SIGINT, lambda: loop.create_task(kill()))
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGINT)


def _trainable(model: ImageModel) -> TrainableModel:
    built_in = model.spec.source.built_in
    place = built_in.name if built_in is not None else str(model_folder(model))
    return TrainableModel(model.name, place, model.spec.adapters.trainings_yield)


def _sentence(error: Exception) -> CalotypeError:
    if isinstance(error, CalotypeError):
        return error
    return CalotypeError(f"The service could not go on: {type(error).__name__}: {error}")
