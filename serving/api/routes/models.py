"""GET /v1/models: what `model=` may say, and how each model is."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.requests import Request

from calotype.serving.api.generation.access import is_open
from calotype.serving.api.http.auth import allowed
from calotype.serving.api.state.gateway import Gateway, gateway_of
from calotype.serving.config import ImageModel
from calotype.serving.core.protocols import ModelStatus
from calotype.serving.jobs.records import KeyRecord, TeamRecord

router = APIRouter(tags=["OpenAI"])

Caller = Annotated[KeyRecord, Depends(allowed("images"))]

# OpenAI's clients want a creation time; a manifest has none, so it is the format's own.
_CREATED = 1_764_028_800


def _describe(gateway: Gateway, model: ImageModel, team: TeamRecord | None) -> dict[str, Any]:
    spec = model.spec
    return {
        "id": model.name,
        "object": "model",
        "created": _CREATED,
        "owned_by": "calotype",
        "aliases": spec.aliases,
        "adapters": [
            {
                "id": adapter.name,
                "scale": adapter.spec.scale.model_dump(),
                "trigger_words": adapter.spec.trigger_words,
            }
            for adapter in gateway.catalog.adapters(model.name)
            if is_open(adapter, team)
        ],
        "defaults": spec.defaults.model_dump(),
        "limits": spec.limits.model_dump(),
    }


@router.get("/v1/models")
async def list_models(request: Request, key: Caller) -> dict[str, Any]:
    gateway = gateway_of(request)
    team = await asyncio.to_thread(gateway.database.teams.get_team, key.team_id)
    offered = gateway.catalog.models()
    models = [await _with_status(gateway, model, team) for model in offered]
    return {"object": "list", "data": models}


@router.get("/v1/models/{name:path}")
async def get_model(request: Request, name: str, key: Caller) -> dict[str, Any]:
    """One model, by name or alias; ``id`` is what was asked for."""
    gateway = gateway_of(request)
    team = await asyncio.to_thread(gateway.database.teams.get_team, key.team_id)
    return await _with_status(gateway, gateway.catalog.model(name), team) | {"id": name}


async def _with_status(
    gateway: Gateway, model: ImageModel, team: TeamRecord | None
) -> dict[str, Any]:
    """The model; from a gateway that outlives its models also whether it is there."""
    described = _describe(gateway, model, team)
    if not gateway.outlives_models:
        return described
    statuses = {status.name: status for status in await gateway.backend.status()}
    absent = ModelStatus(model.name, ready=False, message="It has no app yet.")
    return described | {"status": status_object(statuses.get(model.name, absent))}


def status_object(status: ModelStatus) -> dict[str, Any]:
    """How a model is, as /v1/models and /readyz say it."""
    return {
        "name": status.name,
        "ready": status.ready,
        "replicas": status.replicas,
        "queue_seconds": round(status.queue_seconds, 1),
        "adapters": status.adapters,
        "message": status.message,
    }
