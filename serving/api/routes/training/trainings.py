"""/v1/trainings: adapters from data sets, as jobs that take their time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Literal

from fastapi import APIRouter, Depends
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from typing_extensions import TypedDict

from calotype.serving.api.generation.access import check_open
from calotype.serving.api.http.auth import allowed
from calotype.serving.api.http.body import SMALL_BODY, json_body, read_json
from calotype.serving.api.http.body_parts import Body
from calotype.serving.api.http.events import KEEP_ALIVE, event_response, frame
from calotype.serving.api.http.failures import error_object
from calotype.serving.api.http.pages import Page, list_object, page_size
from calotype.serving.api.http.schemas import parse
from calotype.serving.api.state.gateway import Gateway, gateway_of
from calotype.serving.config import ImageModel
from calotype.serving.config.base import Name
from calotype.serving.config.model.acceptance import Acceptance
from calotype.serving.core.errors import Conflict, InvalidRequest, NotFound, error_from_payload
from calotype.serving.core.json_object import JsonObject
from calotype.serving.core.request import ImageSize
from calotype.serving.database.training.datasets import READY, DatasetRecord
from calotype.serving.database.training.training_records import TrainingRecord, Wanted
from calotype.serving.engine.sizing.training_plan import PresetName, preset_phases
from calotype.serving.jobs.events import parse_event_id
from calotype.serving.jobs.records import KeyRecord, new_id

router = APIRouter(tags=["training"])

Caller = Annotated[KeyRecord, Depends(allowed("trainings"))]
Writer = Annotated[KeyRecord, Depends(allowed("trainings", counted=True))]

_SHARED_SECONDS = 1.0
"""Pause between looks at a training whose events are read."""
_OWN = ("model", "dataset", "name", "method", "budget_seconds", "dry_run")
"""Fields of a body that are no settings of the trainer."""

Word = Annotated[str, Field(min_length=1, max_length=200)]


class TrainingBody(Body):
    """What is trained, on what, and what it must show before it serves."""

    model: str | None = Field(None, max_length=253, description="Default: the service's first.")
    dataset: str = Field(min_length=1, max_length=64, description="Id of a data set that is ready.")
    name: Name = Field(description="Of the adapter that it makes.")
    method: Literal["lora"] = Field("lora", description="How it learns.")
    trigger_word: Word | None = Field(
        None, description="Word that evokes the adapter. Default: the data set's."
    )
    class_words: list[Word] = Field(
        default_factory=list,
        max_length=8,
        description="What the trigger is one of: prompts with these keep what they drew.",
    )
    preset: PresetName = Field("balanced", description="How many steps, at which sizes.")
    style: bool = Field(False, description="It is a style, not a subject.")
    steps: int | None = Field(None, ge=1, le=100_000, description="In place of the preset's.")
    resolution: int | None = Field(None, ge=64, le=4096, multiple_of=16, description="In pixels.")
    rank: int | None = Field(None, ge=1, le=256, description="LoRA rank.")
    batch: int | None = Field(None, ge=1, le=256, description="Pictures a step.")
    learning_rate: float | None = Field(None, gt=0, le=1, description="At its peak.")
    seed: int = Field(0, ge=0, le=2**53, description="Of noise and order.")
    sample_prompts: list[Annotated[str, Field(min_length=1, max_length=4000)]] = Field(
        default_factory=list, max_length=8, description="Drawn on the way."
    )
    sample_every: int | None = Field(None, ge=1, description="Steps between samples.")
    checkpoint_every: int | None = Field(None, ge=1, description="Steps between checkpoints.")
    acceptance: Acceptance | None = Field(
        None, description="As spec.acceptance of a LoRAAdapter. Default: the package's set."
    )
    budget_seconds: float | None = Field(
        None, gt=0, description="Device seconds after which it is stopped. Default: no limit."
    )
    dry_run: bool = Field(False, description="Only say what it would take; nothing is made.")


class TrainingEstimate(TypedDict):
    """What a training would take; null where no training of the model has been measured."""

    steps: int
    step_seconds: float | None
    seconds: float | None
    cost: float | None


class TrainingQuote(TypedDict):
    """The answer to a dry run."""

    object: Literal["training.quote"]
    dataset: JsonObject | None
    estimate: TrainingEstimate


class TrainingUsage(TypedDict):
    device_seconds: float
    cost: float


class TrainingObject(TypedDict):
    """A training. ``status``: queued, running, suspended, succeeded, failed or canceled."""

    id: str
    object: Literal["training"]
    status: str
    model: str
    name: str
    dataset: str
    settings: JsonObject
    progress: JsonObject
    checkpoints: int
    samples: int
    acceptance: JsonObject | None
    adapter_file: str | None
    report_file: str | None
    adapter_sha256: str | None
    usage: TrainingUsage
    budget_seconds: float | None
    error: JsonObject | None
    created_at: int
    started_at: int | None
    ended_at: int | None
    promoted_at: int | None


@router.post("/v1/trainings", openapi_extra=json_body(TrainingBody))
async def create_training(request: Request, key: Writer) -> Response:
    """Makes a training, 202; with ``dry_run`` only says what it would take, 200."""
    gateway = gateway_of(request)
    raw = await read_json(request, SMALL_BODY, gateway.settings.body_seconds)
    body = parse(TrainingBody, raw)
    database, price = gateway.database, gateway.settings.gpu_second_price
    team = await asyncio.to_thread(database.teams.get_team, key.team_id)
    check_open(gateway.catalog, team)
    model = gateway.catalog.model(body.model, team)
    dataset = await asyncio.to_thread(_dataset, gateway, body.dataset, key.team_id)
    trigger = body.trigger_word or dataset.settings.get("trigger_word")
    if trigger is None and body.acceptance is not None:
        raise InvalidRequest(
            "An acceptance set draws the trigger word, and there is none: give trigger_word.",
            code="trigger_missing",
            param="trigger_word",
        )
    estimate = await asyncio.to_thread(_estimate, gateway, body, model, price)
    if body.dry_run:
        quote: TrainingQuote = {
            "object": "training.quote",
            "dataset": dataset.report,
            "estimate": estimate,
        }
        return JSONResponse(quote)
    if dataset.status != READY:
        raise Conflict(
            f"The data set '{dataset.id}' is {dataset.status}; GET /v1/datasets/{dataset.id} says "
            "why, and a training takes one that is ready.",
            code="dataset_not_ready",
            param="dataset",
        )
    acceptance = body.acceptance or (Acceptance() if trigger is not None else None)
    settings = body.model_dump(mode="json", exclude_none=True, exclude={*_OWN, "acceptance"})
    rights = {n: v for n, v in (dataset.settings.get("rights") or {}).items() if v is not None}
    shared = {n: v for n, v in dataset.settings.items() if n in ("holdout", "duplicates_within")}
    record = TrainingRecord(
        id=new_id("training"),
        team_id=key.team_id,
        api_key_id=key.id,
        model=model.name,
        name=body.name,
        dataset_id=dataset.id,
        settings={
            **rights,
            **shared,
            **settings,
            **({"trigger_word": trigger} if trigger is not None else {}),
            **(
                {"acceptance": acceptance.model_dump(mode="json", by_alias=True)}
                if acceptance is not None
                else {}
            ),
        },
        created=database.clock.time(),
        price=price,
        budget_seconds=body.budget_seconds,
    )
    await asyncio.to_thread(database.trainings.add_training, record)
    return JSONResponse(_described(record), status_code=202)


@router.get("/v1/trainings")
async def list_trainings(
    request: Request, key: Caller, limit: str = "20", after: str | None = None
) -> Page[TrainingObject]:
    """The team's trainings, newest first."""
    gateway, count = gateway_of(request), page_size(limit)
    trainings = gateway.database.trainings
    page = await asyncio.to_thread(
        lambda: trainings.list_trainings(key.team_id, limit=count + 1, after=after)
    )
    return list_object([_described(record) for record in page[:count]], len(page) > count)


@router.get("/v1/trainings/{training_id}")
async def get_training(request: Request, training_id: str, key: Caller) -> TrainingObject:
    return _described(await _find(request, training_id, key))


@router.get("/v1/trainings/{training_id}/checkpoints")
async def list_checkpoints(request: Request, training_id: str, key: Caller) -> JsonObject:
    """The last checkpoints, oldest first."""
    record = await _find(request, training_id, key)
    return {"object": "list", "data": record.checkpoints}


@router.get("/v1/trainings/{training_id}/samples")
async def list_samples(request: Request, training_id: str, key: Caller) -> JsonObject:
    """The last samples, oldest first."""
    record = await _find(request, training_id, key)
    return {"object": "list", "data": record.samples}


@router.get("/v1/trainings/{training_id}/events")
async def stream_events(request: Request, training_id: str, key: Caller) -> Response:
    """What happens to it, as server-sent events; goes on after ``Last-Event-ID``."""
    await _find(request, training_id, key)
    last = parse_event_id(request.headers.get("last-event-id"))
    return event_response(_stream(gateway_of(request), training_id, last or 0), {})


@router.post("/v1/trainings/{training_id}/cancel")
async def cancel_training(request: Request, training_id: str, key: Caller) -> TrainingObject:
    """Ends it; the device time until then is charged."""
    return await _want(request, training_id, key, "cancel")


@router.post("/v1/trainings/{training_id}/suspend")
async def suspend_training(request: Request, training_id: str, key: Caller) -> TrainingObject:
    """Stops it at a checkpoint; resume goes on from there."""
    return await _want(request, training_id, key, "suspend")


@router.post("/v1/trainings/{training_id}/resume")
async def resume_training(request: Request, training_id: str, key: Caller) -> TrainingObject:
    return await _want(request, training_id, key, "run")


@router.post("/v1/trainings/{training_id}/promote")
async def promote_training(request: Request, training_id: str, key: Caller) -> TrainingObject:
    """Lets an adapter serve that passed its acceptance set, and was staged or kept."""
    trainings = gateway_of(request).database.trainings
    return _described(await asyncio.to_thread(trainings.promote, training_id, key.team_id))


async def _want(
    request: Request, training_id: str, key: KeyRecord, wanted: Wanted
) -> TrainingObject:
    trainings = gateway_of(request).database.trainings
    return _described(await asyncio.to_thread(trainings.want, training_id, key.team_id, wanted))


async def _find(request: Request, training_id: str, key: KeyRecord) -> TrainingRecord:
    trainings = gateway_of(request).database.trainings
    return await asyncio.to_thread(trainings.get_training, training_id, key.team_id)


async def _stream(gateway: Gateway, training_id: str, last: int) -> AsyncIterator[str | bytes]:
    trainings, quiet = gateway.database.trainings, 0.0
    while True:
        # Read before the events: an end that is seen here has its event below.
        record = await asyncio.to_thread(trainings.get_training, training_id)
        found = await asyncio.to_thread(trainings.events_after, training_id, last)
        for event in found:
            last, quiet = event.number, 0.0
            data = {"training_id": training_id, "created_at": event.created, **event.data}
            yield frame(f"training.{event.type}", data, event.number)
        if record.over and not found:
            return
        if found:
            continue
        if quiet >= gateway.settings.keep_alive_seconds:
            quiet = 0.0
            yield KEEP_ALIVE
        await asyncio.sleep(min(_SHARED_SECONDS, gateway.settings.watch_seconds))
        quiet += gateway.settings.watch_seconds


def _dataset(gateway: Gateway, dataset_id: str, team_id: str) -> DatasetRecord:
    try:
        return gateway.database.datasets.get_dataset(dataset_id, team_id)
    except NotFound as error:
        raise NotFound(error.message, error.code, "dataset") from None


def _estimate(
    gateway: Gateway, body: TrainingBody, model: ImageModel, price: float
) -> TrainingEstimate:
    size = ImageSize.parse(model.spec.defaults.size)
    small = min(size.width, size.height)
    built_in = model.spec.source.built_in is not None
    phases = preset_phases(body.preset, small_side=small if built_in else None)
    steps = body.steps or sum(phase.steps for phase in phases)
    each = gateway.database.trainings.step_seconds(model.name)
    return {
        "steps": steps,
        "step_seconds": each,
        "seconds": None if each is None else steps * each,
        "cost": None if each is None else steps * each * price,
    }


def _described(record: TrainingRecord) -> TrainingObject:
    def moment(at: float | None) -> int | None:
        return None if at is None else int(at)

    return {
        "id": record.id,
        "object": "training",
        "status": record.status,
        "model": record.model,
        "name": record.name,
        "dataset": record.dataset_id,
        "settings": record.settings,
        "progress": record.progress,
        "checkpoints": len(record.checkpoints),
        "samples": len(record.samples),
        "acceptance": record.acceptance,
        "adapter_file": record.adapter_file_id,
        "report_file": record.report_file_id,
        "adapter_sha256": record.adapter_sha256,
        "usage": {"device_seconds": record.device_seconds, "cost": record.cost},
        "budget_seconds": record.budget_seconds,
        "error": None if record.error is None else error_object(error_from_payload(record.error)),
        "created_at": int(record.created),
        "started_at": moment(record.started),
        "ended_at": moment(record.ended),
        "promoted_at": moment(record.promoted),
    }
