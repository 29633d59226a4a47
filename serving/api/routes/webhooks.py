"""/v1/webhook_endpoints in OpenAI's shapes, the log of deliveries, and sending again."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal, NotRequired

from fastapi import APIRouter, Depends
from pydantic import Field
from starlette.requests import Request
from typing_extensions import TypedDict

from calotype.serving.api.http.auth import allowed
from calotype.serving.api.http.body import SMALL_BODY, json_body, read_json
from calotype.serving.api.http.body_parts import Body
from calotype.serving.api.http.pages import Deleted, Page, list_object, page_size
from calotype.serving.api.http.schemas import parse
from calotype.serving.api.state.gateway import gateway_of
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.json_object import JsonObject
from calotype.serving.jobs.events import EVENT_TYPES, TEST_EVENT, EventType
from calotype.serving.jobs.records import (
    AttemptRecord,
    DeliveryRecord,
    EndpointRecord,
    KeyRecord,
)
from calotype.serving.webhooks.safe_http import check_url
from calotype.serving.webhooks.sender import event_body

router = APIRouter(tags=["webhooks"])

Caller = Annotated[KeyRecord, Depends(allowed("jobs"))]
Writer = Annotated[KeyRecord, Depends(allowed("jobs", counted=True))]

MAX_ENDPOINTS = 50
_STATES = ("pending", "delivered", "failed")


class EventTypeObject(TypedDict):
    id: str
    object: Literal["webhook_event_type"]


class EventTypeList(TypedDict):
    object: Literal["list"]
    data: list[EventTypeObject]


class EndpointObject(TypedDict):
    """OpenAI's webhook endpoint."""

    id: str
    object: Literal["webhook_endpoint"]
    created_at: int
    updated_at: int
    event_types: list[str]
    name: str
    url: str
    signing_secret_hint: str
    signing_secret: NotRequired[str]
    """Told once: when the endpoint is made, and when its secret is rotated."""
    enabled: bool
    disabled_reason: str | None


class AttemptObject(TypedDict):
    number: int
    at: int
    seconds: float
    http_status: int | None
    error: str | None


class DeliveryObject(TypedDict):
    """An event on its way to one address."""

    id: str
    object: Literal["webhook_delivery"]
    event_type: str
    job_id: str | None
    endpoint_id: str | None
    url: str
    status: str
    created_at: int
    completed_at: int | None
    next_attempt_at: int | None
    attempts: list[AttemptObject]


class EndpointBody(Body):
    url: str = Field(max_length=2048, description="https address that events are posted to.")
    name: str = Field("", max_length=255)
    event_types: list[EventType] = Field(min_length=1, max_length=16)


class EndpointChange(Body):
    url: str | None = Field(None, max_length=2048)
    name: str | None = Field(None, max_length=255)
    event_types: list[EventType] | None = Field(None, min_length=1, max_length=16)
    enabled: bool | None = Field(None, description="True takes a disabled one back into service.")


class RotationBody(Body):
    keep_old_secret_active_for_24_hours: bool = True


class TestBody(Body):
    event_type: str = Field(TEST_EVENT, max_length=64)


@router.get("/v1/webhook_event_types")
async def list_event_types(request: Request, key: Caller) -> EventTypeList:
    """What an endpoint may ask for."""
    return {
        "object": "list",
        "data": [{"id": name, "object": "webhook_event_type"} for name in EVENT_TYPES],
    }


@router.get("/v1/webhooks/default/secret")
async def get_default_secret(request: Request, key: Caller) -> dict[str, str]:
    """What signs the webhooks that this team's jobs name themselves."""
    database = gateway_of(request).database
    return {"key": await asyncio.to_thread(database.secrets.webhook_secret, key.team_id)}


@router.post("/v1/webhook_endpoints", openapi_extra=json_body(EndpointBody))
async def create_endpoint(request: Request, key: Writer) -> EndpointObject:
    """Registers an address; the answer holds its signing secret, for the only time."""
    gateway = gateway_of(request)
    body = parse(EndpointBody, await _read(request))
    check_url(body.url, gateway.outbound)
    known = await asyncio.to_thread(gateway.database.webhooks.list_endpoints, key.team_id)
    if len(known) >= MAX_ENDPOINTS:
        raise InvalidRequest(
            f"A team may have {MAX_ENDPOINTS} webhook endpoints; delete one first.", param="url"
        )
    endpoint = await asyncio.to_thread(
        gateway.database.webhooks.add_endpoint,
        key.team_id,
        body.name,
        body.url,
        list(body.event_types),
    )
    return {**endpoint_object(endpoint), "signing_secret": endpoint.secret}


@router.get("/v1/webhook_endpoints")
async def list_endpoints(request: Request, key: Caller) -> Page[EndpointObject]:
    database = gateway_of(request).database
    found = await asyncio.to_thread(database.webhooks.list_endpoints, key.team_id)
    return list_object([endpoint_object(endpoint) for endpoint in found], False)


@router.get("/v1/webhook_endpoints/{endpoint_id}")
async def get_endpoint(request: Request, endpoint_id: str, key: Caller) -> EndpointObject:
    database = gateway_of(request).database
    return endpoint_object(
        await asyncio.to_thread(database.webhooks.get_endpoint, endpoint_id, key.team_id)
    )


@router.post("/v1/webhook_endpoints/{endpoint_id}", openapi_extra=json_body(EndpointChange))
async def update_endpoint(request: Request, endpoint_id: str, key: Caller) -> EndpointObject:
    """Changes what is named; ``enabled: true`` ends a disablement."""
    gateway = gateway_of(request)
    body = parse(EndpointChange, await _read(request))
    changes = {k: v for k, v in body.model_dump().items() if v is not None and k != "enabled"}
    if "url" in changes:
        check_url(changes["url"], gateway.outbound)
    if body.enabled is True:
        changes |= {"disabled": None, "disabled_reason": None}
    elif body.enabled is False:
        changes |= {"disabled": gateway.database.clock.time(), "disabled_reason": "By its team."}
    endpoint = await asyncio.to_thread(
        lambda: gateway.database.webhooks.change_endpoint(endpoint_id, key.team_id, **changes)
    )
    return endpoint_object(endpoint)


@router.delete("/v1/webhook_endpoints/{endpoint_id}")
async def delete_endpoint(request: Request, endpoint_id: str, key: Caller) -> Deleted:
    """Forgets the address; what was on its way there is given up."""
    database = gateway_of(request).database
    await asyncio.to_thread(database.webhooks.delete_endpoint, endpoint_id, key.team_id)
    return {"id": endpoint_id, "object": "webhook_endpoint.deleted", "deleted": True}


@router.post(
    "/v1/webhook_endpoints/{endpoint_id}/rotate_secret", openapi_extra=json_body(RotationBody)
)
async def rotate_secret(request: Request, endpoint_id: str, key: Caller) -> EndpointObject:
    """Gives the endpoint a new secret; for a day the old one may sign beside it."""
    database = gateway_of(request).database
    body = parse(RotationBody, await _read(request))
    endpoint = await asyncio.to_thread(
        database.webhooks.rotate_endpoint,
        endpoint_id,
        key.team_id,
        body.keep_old_secret_active_for_24_hours,
    )
    return {**endpoint_object(endpoint), "signing_secret": endpoint.secret}


@router.post("/v1/webhook_endpoints/{endpoint_id}/test", openapi_extra=json_body(TestBody))
async def test_endpoint(request: Request, endpoint_id: str, key: Writer) -> DeliveryObject:
    """Sends an event that says nothing, signed like any other."""
    database = gateway_of(request).database
    body = parse(TestBody, await _read(request))
    if body.event_type not in (TEST_EVENT, *EVENT_TYPES):
        raise InvalidRequest(
            f"event_type must be one of {', '.join((TEST_EVENT, *EVENT_TYPES))}.",
            param="event_type",
        )
    endpoint = await asyncio.to_thread(database.webhooks.get_endpoint, endpoint_id, key.team_id)
    text = event_body(body.event_type, database.clock.time(), {"id": "job_test", "test": True})
    delivery = await asyncio.to_thread(
        database.webhooks.add_delivery,
        key.team_id,
        endpoint.id,
        endpoint.url,
        body.event_type,
        text,
    )
    return delivery_object(delivery, [])


@router.get("/v1/webhook_deliveries")
async def list_deliveries(
    request: Request,
    key: Caller,
    limit: str = "20",
    after: str | None = None,
    job_id: str | None = None,
    endpoint_id: str | None = None,
    status: str | None = None,
) -> Page[DeliveryObject]:
    """What was sent or is on its way, newest first, with every attempt."""
    database = gateway_of(request).database
    count = page_size(limit)
    if status is not None and status not in _STATES:
        raise InvalidRequest(f"status must be one of {', '.join(_STATES)}.", param="status")
    page = await asyncio.to_thread(
        lambda: database.webhooks.list_deliveries(
            key.team_id,
            limit=count + 1,
            after=after,
            job_id=job_id,
            endpoint_id=endpoint_id,
            status=status,
        )
    )
    shown = page[:count]
    attempts = await asyncio.to_thread(
        database.webhooks.list_attempts, [found.id for found in shown]
    )
    found = [delivery_object(delivery, attempts.get(delivery.id, [])) for delivery in shown]
    return list_object(found, len(page) > count)


@router.get("/v1/webhook_deliveries/{delivery_id}")
async def get_delivery(request: Request, delivery_id: str, key: Caller) -> DeliveryObject:
    database = gateway_of(request).database
    delivery = await asyncio.to_thread(database.webhooks.get_delivery, delivery_id, key.team_id)
    attempts = await asyncio.to_thread(database.webhooks.list_attempts, [delivery.id])
    return delivery_object(delivery, attempts.get(delivery.id, []))


@router.post("/v1/webhook_deliveries/{delivery_id}/redeliver")
async def redeliver(request: Request, delivery_id: str, key: Writer) -> DeliveryObject:
    """Sends it again: the same id and body, a new signature."""
    database = gateway_of(request).database
    delivery = await asyncio.to_thread(database.webhooks.redeliver, delivery_id, key.team_id)
    attempts = await asyncio.to_thread(database.webhooks.list_attempts, [delivery.id])
    return delivery_object(delivery, attempts.get(delivery.id, []))


async def _read(request: Request) -> JsonObject:
    settings = gateway_of(request).settings
    # OpenAI's SDKs send no body at all where every field has a default.
    if request.headers.get("content-length", "0") == "0" and not request.headers.get(
        "transfer-encoding"
    ):
        return {}
    return await read_json(request, SMALL_BODY, settings.body_seconds)


def endpoint_object(endpoint: EndpointRecord) -> EndpointObject:
    return {
        "id": endpoint.id,
        "object": "webhook_endpoint",
        "created_at": int(endpoint.created),
        "updated_at": int(endpoint.updated),
        "event_types": endpoint.event_types,
        "name": endpoint.name,
        "url": endpoint.url,
        "signing_secret_hint": f"whsec_...{endpoint.secret[-4:]}",
        "enabled": endpoint.disabled is None,
        "disabled_reason": endpoint.disabled_reason,
    }


def delivery_object(delivery: DeliveryRecord, attempts: list[AttemptRecord]) -> DeliveryObject:
    due = delivery.due if delivery.status == "pending" else None
    return {
        "id": delivery.id,
        "object": "webhook_delivery",
        "event_type": delivery.event_type,
        "job_id": delivery.job_id,
        "endpoint_id": delivery.endpoint_id,
        "url": delivery.url,
        "status": delivery.status,
        "created_at": int(delivery.created),
        "completed_at": None if delivery.completed is None else int(delivery.completed),
        "next_attempt_at": None if due is None else int(due),
        "attempts": [
            {
                "number": attempt.number,
                "at": int(attempt.time),
                "seconds": attempt.seconds,
                "http_status": attempt.http_status,
                "error": attempt.error,
            }
            for attempt in attempts
        ],
    }
