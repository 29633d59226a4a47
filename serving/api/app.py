"""The gateway: one FastAPI application over a job database, a blob store and a backend.

Stateless: any number of them may run over one database. The table from errors to HTTP statuses is
in `calotype.serving.api.http.failures`.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from calotype.serving.api.background.tasks import background_tasks
from calotype.serving.api.http.failures import error_response, localized
from calotype.serving.api.http.middleware import PlainPaths, RequestFrame
from calotype.serving.api.routes import (
    assets,
    batches,
    case_images,
    cases,
    files,
    images,
    jobs,
    models,
    moderations,
    ops,
    takedowns,
    usage,
    webhooks,
)
from calotype.serving.api.routes.training import datasets, rights, trainings
from calotype.serving.api.state.catalog import Catalog
from calotype.serving.api.state.change_poller import ChangePoller
from calotype.serving.api.state.disconnects import ClientWaits
from calotype.serving.api.state.eta import Estimates
from calotype.serving.api.state.gateway import Gateway, Refresh, nothing_new
from calotype.serving.api.state.request_rates import RequestRates
from calotype.serving.api.state.settings import GatewaySettings
from calotype.serving.api.state.working_memory import WorkingMemory
from calotype.serving.core.errors import CalotypeError, EngineError, InvalidRequest, NotFound
from calotype.serving.core.protocols import BlobStore, GenerationBackend
from calotype.serving.database.database import Database
from calotype.serving.webhooks.safe_http import OutboundPolicy

ROUTES = (
    *(images, models, moderations, cases, case_images, takedowns, files, batches),
    *(jobs, assets, datasets, rights, trainings, webhooks, usage, ops),
)
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def create_app(
    settings: GatewaySettings,
    database: Database,
    blobs: BlobStore,
    backend: GenerationBackend,
    catalog: Catalog,
    lifespan: Lifespan | None = None,
    *,
    url_secret: bytes | None = None,
    refresh: Refresh = nothing_new,
    outlives_models: bool = False,
    operations_apart: bool = False,
) -> FastAPI:
    """Builds the gateway.

    Args:
        catalog: may be changed at any time with `Catalog.replace`.
        lifespan: what must live as long as the application, such as a backend's own tasks.
        url_secret: signs asset URLs; None = the one that the database keeps.
        refresh, outlives_models: see `Gateway`.
        operations_apart: without the routes for operators and without the description of the API:
            those are on a port of their own (`create_operations_app`).

    Raises:
        StorageFailed: the job database cannot be read.
    """
    gateway = make_gateway(
        *(settings, database, blobs, backend, catalog),
        url_secret=url_secret,
        refresh=refresh,
        outlives_models=outlives_models,
    )

    @contextlib.asynccontextmanager
    async def run(app: FastAPI) -> AsyncIterator[None]:
        async with lifespan(app) if lifespan else contextlib.nullcontext():
            async with background_tasks(gateway):
                yield
            await gateway.waits.close()

    described: dict[str, Any] = {
        "title": "calotype",
        "description": "Image generation behind the API of OpenAI's SDKs.",
        "lifespan": run,
    }
    if operations_apart:
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, **described)
    else:
        app = FastAPIOffline(**described)  # its pages need nothing of the internet
    app.state.gateway = gateway
    for module in ROUTES:
        if not (operations_apart and module is ops):
            app.include_router(module.router)
    app.add_exception_handler(CalotypeError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_middleware(PlainPaths, resources=_resources())
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-trace-id", "retry-after"],
        )
    app.add_middleware(RequestFrame, on_bug=_on_bug)
    return app


def _resources() -> set[str]:
    paths = [str(getattr(route, "path", "")) for module in ROUTES for route in module.router.routes]
    return {path.split("/")[2] for path in paths if path.startswith("/v1/")}


def create_operations_app(gateway_app: FastAPI) -> FastAPI:
    """What operators and their machines ask of a gateway without a key, for a port of its own."""
    app = FastAPIOffline(title="calotype operations")
    app.state.gateway = gateway_app.state.gateway
    app.include_router(ops.router)
    app.openapi = gateway_app.openapi  # type: ignore[method-assign]  # /docs are the gateway's
    return app


def make_gateway(
    settings: GatewaySettings,
    database: Database,
    blobs: BlobStore,
    backend: GenerationBackend,
    catalog: Catalog,
    *,
    url_secret: bytes | None = None,
    refresh: Refresh = nothing_new,
    outlives_models: bool = False,
) -> Gateway:
    """What the routes and the background tasks of one gateway share; see `create_app`."""
    return Gateway(
        settings=settings,
        database=database,
        blobs=blobs,
        backend=backend,
        catalog=catalog,
        waits=ClientWaits(settings, database, backend),
        url_secret=url_secret or database.secrets.service_secret("asset-urls"),
        estimates=Estimates(database, settings.forecast_seconds),
        change_poller=ChangePoller(database, settings.watch_seconds),
        outbound=OutboundPolicy(
            allow_http=settings.outbound_http, allowed_networks=settings.outbound_networks
        ),
        rates=RequestRates(settings.team_requests_per_second),
        memory=WorkingMemory(settings.memory_bytes),
        refresh=refresh,
        outlives_models=outlives_models,
    )


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, CalotypeError)
    return error_response(localized(error, request.headers.get("accept-language", "")))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """What the router itself refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    method, path = request.method[:20], request.url.path[:200]
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        answer = error_response(
            InvalidRequest(f"Not allowed method: {method} {path}.", code="method_not_allowed")
        )
    elif error.status_code == HTTPStatus.NOT_FOUND:
        answer = error_response(NotFound(f"Invalid URL ({method} {path}).", code="unknown_url"))
    else:
        answer = error_response(InvalidRequest(str(error.detail)))
        answer.status_code = error.status_code
    answer.headers.update(error.headers or {})
    return answer


async def _on_validation_error(request: Request, error: Exception) -> Response:
    """FastAPI's own checks of path and query."""
    assert isinstance(error, RequestValidationError)
    fault = error.errors()[0]
    param = str(fault["loc"][-1])
    return error_response(
        InvalidRequest(f"Invalid value for '{param}': {fault['msg']}.", param=param)
    )


def _on_bug() -> JSONResponse:
    return error_response(
        EngineError(
            "The server had an error while processing your request. The reason is in its log "
            "under the request ID in the x-request-id header."
        )
    )
