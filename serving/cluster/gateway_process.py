"""The gateway as a process of its own, without Ray and without torch (`calotype gateway`).

It outlives the GPUs: models, teams and adapters come from a file that the operator keeps, jobs go
into the database whether their model is there or not.
"""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from fastapi import FastAPI

from calotype.serving.api.app import create_app, create_operations_app
from calotype.serving.api.http.connections import ConnectionLimits
from calotype.serving.api.http.server import build_server, listening_socket
from calotype.serving.api.state.catalog import Catalog
from calotype.serving.api.state.gateway import Gateway
from calotype.serving.api.state.settings import GatewaySettings
from calotype.serving.cluster.config_map import ConfigMapReader
from calotype.serving.cluster.config_sync import ConfigFollower
from calotype.serving.cluster.followed_file import FollowedFile
from calotype.serving.cluster.internal_server import serving_internally
from calotype.serving.cluster.job_store_api import build_job_store_api
from calotype.serving.cluster.remote_backend import RemoteBackend
from calotype.serving.config.environment import ClusterEnvironment
from calotype.serving.core.tls import TlsFiles
from calotype.serving.database.database import Database, open_database
from calotype.serving.observability.logs import set_up_logs
from calotype.serving.observability.loops import Loop
from calotype.serving.storage import open_blobs

SHUTDOWN_SECONDS = 300
"""Longer than a synchronous request may take: a rolling update cuts none of them off."""
TEAMS_FILE = "teams.json"


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    config: pathlib.Path
    """gateway.json; teams.json lies beside it."""
    host: str
    port: int
    environment: ClusterEnvironment
    settings: GatewaySettings = field(default_factory=GatewaySettings)
    api_key: str | None = field(default=None, repr=False)
    """Recorded as a valid key when given; none is made up."""
    signing_secret: str | None = field(default=None, repr=False)
    """Signs asset URLs; without it the job database has one."""
    config_map: str | None = None
    """The ConfigMap that ``config`` comes from, where this pod may read it."""
    teams_config_map: str | None = None
    """The one that teams.json comes from."""
    tls: TlsFiles | None = None
    """Of the public port."""
    internal_port: int | None = None
    """Where model apps reach their jobs; None = they have a way of their own to the database."""
    operations_port: int | None = None
    """Where /healthz, /readyz, /metrics and /docs are; None = beside the API."""
    say: Callable[[str], None] = field(default=print)
    """Where sentences for whoever reads the log go."""


def run_gateway(options: GatewayOptions) -> None:
    """Serves until SIGINT or SIGTERM, then lets open requests finish.

    Raises:
        CalotypeError: the port is taken, the job database or the environment cannot be used.
    """
    set_up_logs(default="json")
    with listening_socket(options.host, options.port) as listener:
        database = open_database(options.environment.database_url, options.say)
        try:
            app = build_gateway(options, database)
            limits = ConnectionLimits(options.settings.connections_per_address)
            server = build_server(app, SHUTDOWN_SECONDS, options.tls, limits)
            asyncio.run(server.serve(sockets=[listener]))
        finally:
            database.close()


def build_gateway(options: GatewayOptions, database: Database) -> FastAPI:
    """The application, which follows its configuration file while it runs."""
    environment = options.environment
    if options.api_key is not None:
        database.api_keys.ensure_first(options.api_key)
    catalog = Catalog([])
    backend = RemoteBackend(database, environment.internal_token)
    follower = ConfigFollower(
        _followed(options.config, options.config_map),
        _followed(options.config.with_name(TEAMS_FILE), options.teams_config_map),
        catalog,
        backend,
        database,
        options.say,
    )

    blobs = open_blobs(environment.blob_url)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await follower.look()
        gateway: Gateway = app.state.gateway
        gateway.loops.start(Loop("configuration", follower.work))
        options.say(f"The gateway listens on {options.host}, port {options.port}.")
        async with contextlib.AsyncExitStack() as stack:
            if options.internal_port is not None:
                store = build_job_store_api(database, blobs, catalog, environment.internal_token)
                internal = serving_internally(
                    store, options.host, options.internal_port, environment.tls
                )
                await stack.enter_async_context(internal)
            if options.operations_port is not None:
                apart = create_operations_app(app)
                operations = serving_internally(apart, options.host, options.operations_port)
                await stack.enter_async_context(operations)
            yield
        await gateway.loops.stop()
        await backend.close()
        await follower.close()

    return create_app(
        options.settings,
        database,
        blobs,
        backend,
        catalog,
        lifespan=lifespan,
        url_secret=options.signing_secret.encode() if options.signing_secret else None,
        refresh=follower.refresh,
        outlives_models=True,
        operations_apart=options.operations_port is not None,
    )


def _followed(path: pathlib.Path, config_map: str | None) -> FollowedFile:
    newest = None if config_map is None else ConfigMapReader(config_map, path.name)
    return FollowedFile(path, newest)
