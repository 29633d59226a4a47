"""GET /v1/models: what `model=` may say, and how each model is."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection
from typing import Annotated, Literal, NotRequired

from fastapi import APIRouter, Depends
from pydantic.alias_generators import to_camel
from starlette.requests import Request
from typing_extensions import TypedDict

from calotype.serving.api.generation.recipes import model_digest, resolved_digest
from calotype.serving.api.http.auth import allowed
from calotype.serving.api.state.catalog import is_open
from calotype.serving.api.state.gateway import Gateway, gateway_of
from calotype.serving.config import ImageModel
from calotype.serving.config.lora_adapter import Scale
from calotype.serving.core.json_object import JsonObject
from calotype.serving.core.protocols import ModelStatus
from calotype.serving.jobs.records import KeyRecord, TeamRecord

router = APIRouter(tags=["OpenAI"])

Caller = Annotated[KeyRecord, Depends(allowed("images"))]


class ScaleObject(TypedDict):
    default: float
    min: float
    max: float


class AdapterObject(TypedDict):
    id: str
    type: Literal["lora", "control"]
    scale: ScaleObject
    trigger_words: list[str]


class StatusObject(TypedDict):
    """How a model is."""

    name: str
    ready: bool
    replicas: int
    queue_seconds: float
    adapters: dict[str, str]
    """Adapter -> ``loading``, ``ready``, or why it failed."""
    message: str


class WeightsObject(TypedDict):
    """Where a model's weights come from."""

    source: str
    """The field of `spec.source`: ``builtIn``, ``huggingFace``, ``s3`` ..."""
    name: str | None
    """Of a package or a public repository; addresses and paths of the installation are not told."""
    digest: str | None
    """Of the files that are served, where it was resolved; or the repository's commit."""
    pinned: bool
    """The same weights tomorrow: no branch, and no folder that may change."""


class ModelObject(TypedDict):
    """OpenAI's model object, and what may be asked of the model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    aliases: list[str]
    adapters: list[AdapterObject]
    defaults: JsonObject
    limits: JsonObject
    weights: WeightsObject
    shutdown_date: str | None
    """When a provider ends it; own weights have no such day."""
    status: NotRequired[StatusObject]


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelObject]


# OpenAI's clients want a creation time; a manifest has none, so it is the format's own.
_CREATED = 1_764_028_800
_COMMIT = re.compile(r"[0-9a-f]{40}")


def _describe(gateway: Gateway, model: ImageModel, team: TeamRecord | None) -> ModelObject:
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
                "type": adapter.spec.type,
                "scale": _scale(adapter.spec.scale),
                "trigger_words": adapter.spec.trigger_words,
            }
            for adapter in gateway.catalog.adapters(model.name)
            if is_open(adapter, team)
        ],
        "defaults": spec.defaults.model_dump(),
        "limits": spec.limits.model_dump(),
        "weights": _weights(model),
        "shutdown_date": None,
    }


def _weights(model: ImageModel) -> WeightsObject:
    source = model.spec.source
    kind = next(n for n in type(source).model_fields if getattr(source, n) is not None)
    hub, built_in = source.hugging_face, source.built_in
    digest = model_digest(model) if built_in is not None else resolved_digest(model)
    if digest is None and hub is not None and _COMMIT.fullmatch(hub.revision):
        digest = hub.revision
    return {
        "source": to_camel(kind),
        "name": built_in.name if built_in else hub.repo if hub else None,
        "digest": digest,
        "pinned": digest is not None,
    }


def _scale(scale: Scale) -> ScaleObject:
    return {"default": scale.default, "min": scale.min, "max": scale.max}


@router.get("/v1/models")
async def list_models(request: Request, key: Caller) -> ModelList:
    gateway = gateway_of(request)
    team = await asyncio.to_thread(gateway.database.teams.get_team, key.team_id)
    offered = gateway.catalog.models(team)
    models = [await _with_status(gateway, model, team) for model in offered]
    return {"object": "list", "data": models}


@router.get("/v1/models/{name:path}")
async def get_model(request: Request, name: str, key: Caller) -> ModelObject:
    """One model, by name or alias; ``id`` is what was asked for."""
    gateway = gateway_of(request)
    team = await asyncio.to_thread(gateway.database.teams.get_team, key.team_id)
    found = await _with_status(gateway, gateway.catalog.model(name, team), team)
    found["id"] = name
    return found


async def _with_status(gateway: Gateway, model: ImageModel, team: TeamRecord | None) -> ModelObject:
    """The model, and whether it is there."""
    described = _describe(gateway, model, team)
    statuses = {status.name: status for status in await gateway.backend.status()}
    absent = ModelStatus(model.name, ready=False, message="It has no app yet.")
    open_to_it = [adapter["id"] for adapter in described["adapters"]]
    described["status"] = status_object(statuses.get(model.name, absent), open_to_it)
    return described


def status_object(status: ModelStatus, adapters: Collection[str] = ()) -> StatusObject:
    """How a model is, as /v1/models and /readyz say it.

    Args:
        adapters: those that whoever asks may know of.
    """
    return {
        "name": status.name,
        "ready": status.ready,
        "replicas": status.replicas,
        "queue_seconds": round(status.queue_seconds, 1),
        "adapters": {name: how for name, how in status.adapters.items() if name in adapters},
        "message": status.message,
    }
