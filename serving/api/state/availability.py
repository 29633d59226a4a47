"""What a gateway that outlives its models says of itself and of them.

`calotype serve` is not ready before its model draws. A gateway of a cluster is ready as soon as it
can accept jobs: they are kept while a model is away. How each model is, /v1/models tells.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse

from calotype.serving.api.routes import models
from calotype.serving.api.state.gateway import Gateway, gateway_of
from calotype.serving.core.errors import CalotypeError
from calotype.serving.core.protocols import ModelStatus

router = APIRouter(include_in_schema=False)


def answer_for_absent_models(app: FastAPI) -> None:
    """Puts the routes of this file before those of `create_app`, whose description stays."""
    app.router.routes[:0] = router.routes


@router.get("/readyz")
async def readyz(request: Request) -> JSONResponse:
    """200 when the job database answers: then jobs can be accepted."""
    gateway = gateway_of(request)
    reason = None
    try:
        await asyncio.to_thread(gateway.database.jobs.queued_job_ids, "")
    except (CalotypeError, OSError) as error:
        reason = str(error)
    body = {
        "status": "ready" if reason is None else "unavailable",
        "reason": reason,
        "models": [_payload(status) for status in await gateway.backend.status()],
    }
    headers = {} if reason is None else {"retry-after": "2"}
    return JSONResponse(body, status_code=200 if reason is None else 503, headers=headers)


@router.get("/v1/models")
async def list_models(request: Request, key: models.Caller) -> dict[str, Any]:
    answer = await models.list_models(request, key)
    answer["data"] = [await _with_status(gateway_of(request), model) for model in answer["data"]]
    return answer


@router.get("/v1/models/{name:path}")
async def get_model(request: Request, name: str, key: models.Caller) -> dict[str, Any]:
    gateway = gateway_of(request)
    found = await models.get_model(request, name, key)
    return await _with_status(gateway, found, gateway.catalog.model(name).name)


async def _with_status(
    gateway: Gateway, model: dict[str, Any], name: str | None = None
) -> dict[str, Any]:
    statuses = {status.name: status for status in await gateway.backend.status()}
    wanted = name or str(model["id"])
    status = statuses.get(wanted) or ModelStatus(wanted, ready=False, message="It has no app yet.")
    return model | {"status": _payload(status)}


def _payload(status: ModelStatus) -> dict[str, Any]:
    return {
        "name": status.name,
        "ready": status.ready,
        "replicas": status.replicas,
        "queue_seconds": round(status.queue_seconds, 1),
        "adapters": status.adapters,
        "message": status.message,
    }
