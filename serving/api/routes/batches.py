"""/v1/batches: many requests in one file, in OpenAI's shapes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal, cast

from fastapi import APIRouter, Depends
from pydantic import Field
from starlette.requests import Request
from typing_extensions import TypedDict

from calotype.serving.api.generation.files import find_file
from calotype.serving.api.http.auth import allowed
from calotype.serving.api.http.body import SMALL_BODY, json_body, parse_object, read_json
from calotype.serving.api.http.body_parts import Body
from calotype.serving.api.http.pages import Page, list_object, page_size
from calotype.serving.api.http.schemas import parse
from calotype.serving.api.state.gateway import gateway_of
from calotype.serving.core.errors import InvalidRequest, NotFound
from calotype.serving.database.batches import WORKING
from calotype.serving.jobs.records import (
    BatchLine,
    BatchRecord,
    FileRecord,
    KeyRecord,
    new_id,
)

router = APIRouter(tags=["OpenAI"])

Caller = Annotated[KeyRecord, Depends(allowed("images"))]
Writer = Annotated[KeyRecord, Depends(allowed("images", counted=True))]

MAX_LINES = 5_000
MAX_LINE_BYTES = 1024 * 1024
WINDOW_SECONDS = 24 * 3600.0
ENDPOINTS = ("/v1/images/generations", "/v1/images/edits")
_MAX_ERRORS = 100
_COPIES = 3.0
"""Of a batch's file in memory while its lines are read: the requests as values and as rows."""


class BatchError(TypedDict):
    """What is wrong with a line of the file, or with all of it."""

    code: str | None
    message: str
    param: str | None
    line: int | None


class BatchErrors(TypedDict):
    object: Literal["list"]
    data: list[BatchError]


class BatchCounts(TypedDict):
    total: int
    completed: int
    failed: int


class BatchObject(TypedDict):
    """OpenAI's batch object."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: Literal["24h"]
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    metadata: dict[str, str]


class BatchBody(Body):
    input_file_id: str = Field(max_length=64, description="A file of purpose batch.")
    endpoint: Literal["/v1/images/generations", "/v1/images/edits"]
    completion_window: Literal["24h"]
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] = (
        Field(default_factory=dict, max_length=16)
    )


@router.post("/v1/batches", openapi_extra=json_body(BatchBody))
async def create_batch(request: Request, key: Writer) -> BatchObject:
    """Takes a file of requests; its lines become jobs of low priority within a day."""
    gateway = gateway_of(request)
    raw = await read_json(request, SMALL_BODY, gateway.settings.body_seconds)
    body = parse(BatchBody, raw)
    try:
        file = await find_file(gateway, body.input_file_id, key.team_id)
    except NotFound as error:
        raise NotFound(error.message, error.code, "input_file_id") from None
    if file.purpose != "batch":
        raise InvalidRequest(
            f"The file '{file.id}' has the purpose '{file.purpose}'; upload it as 'batch'.",
            param="input_file_id",
        )
    async with gateway.memory.bodies.reserve(key.team_id, int(file.size * _COPIES)):
        return await _create(request, key, body, file)


async def _create(
    request: Request, key: KeyRecord, body: BatchBody, file: FileRecord
) -> BatchObject:
    gateway = gateway_of(request)
    found = await asyncio.to_thread(gateway.blobs.open, file.blob_key)
    now, batch_id = gateway.database.clock.time(), new_id("batch")
    lines, errors = await asyncio.to_thread(_read_lines, batch_id, found.parts, body.endpoint)
    status = "failed" if errors else "in_progress"
    batch = BatchRecord(
        id=batch_id,
        team_id=key.team_id,
        api_key_id=key.id,
        endpoint=body.endpoint,
        input_file_id=file.id,
        output_file_id=None,
        error_file_id=None,
        status=status,
        metadata=body.metadata,
        errors=[dict(error) for error in errors] or None,
        created=now,
        moments={status: now},
        deadline=now + WINDOW_SECONDS,
    )
    await asyncio.to_thread(gateway.database.batches.add_batch, batch, [] if errors else lines)
    return await _described(request, batch)


@router.get("/v1/batches")
async def list_batches(
    request: Request, key: Caller, limit: str = "20", after: str | None = None
) -> Page[BatchObject]:
    """The team's batches, newest first."""
    gateway = gateway_of(request)
    count = page_size(limit)
    page = await asyncio.to_thread(
        lambda: gateway.database.batches.list_batches(key.team_id, limit=count + 1, after=after)
    )
    shown = page[:count]
    counts = await asyncio.to_thread(
        gateway.database.batches.batch_counts, [batch.id for batch in shown]
    )
    found = [batch_object(batch, counts.get(batch.id, (0, 0, 0))) for batch in shown]
    return list_object(found, len(page) > count)


@router.get("/v1/batches/{batch_id}")
async def get_batch(request: Request, batch_id: str, key: Caller) -> BatchObject:
    database = gateway_of(request).database
    return await _described(
        request, await asyncio.to_thread(database.batches.get_batch, batch_id, key.team_id)
    )


@router.post("/v1/batches/{batch_id}/cancel")
async def cancel_batch(request: Request, batch_id: str, key: Caller) -> BatchObject:
    """Ends the lines that are not over; answers that are there stay."""
    database = gateway_of(request).database
    await asyncio.to_thread(database.batches.get_batch, batch_id, key.team_id)
    batch = await asyncio.to_thread(
        lambda: database.batches.change_batch(
            batch_id, "cancelling", only_from=WORKING[:1], claimed_until=None
        )
    )
    return await _described(request, batch)


async def _described(request: Request, batch: BatchRecord) -> BatchObject:
    counts = await asyncio.to_thread(gateway_of(request).database.batches.batch_counts, [batch.id])
    return batch_object(batch, counts.get(batch.id, (0, 0, 0)))


def batch_object(batch: BatchRecord, counts: tuple[int, int, int]) -> BatchObject:
    def moment(state: str) -> int | None:
        found = batch.moments.get(state)
        return None if found is None else int(found)

    errors: BatchErrors | None = None
    if batch.errors is not None:
        errors = {"object": "list", "data": cast(list[BatchError], batch.errors)}
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": errors,
        "input_file_id": batch.input_file_id,
        "completion_window": "24h",
        "status": batch.status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": int(batch.created),
        "in_progress_at": moment("in_progress"),
        "expires_at": int(batch.deadline),
        "finalizing_at": moment("completed"),
        "completed_at": moment("completed"),
        "failed_at": moment("failed"),
        "expired_at": moment("expired"),
        "cancelling_at": moment("cancelling"),
        "cancelled_at": moment("cancelled"),
        "request_counts": {"total": counts[0], "completed": counts[1], "failed": counts[2]},
        "metadata": batch.metadata,
    }


def _read_lines(
    batch_id: str, parts: Iterable[bytes], endpoint: str
) -> tuple[list[BatchLine], list[BatchError]]:
    """The requests of a file, and what is wrong with it."""
    lines: list[BatchLine] = []
    errors: list[BatchError] = []
    seen: set[str] = set()
    count = 0
    for number, text in enumerate(_split(parts), start=1):
        if not text.strip() or len(errors) >= _MAX_ERRORS:
            continue
        try:
            line = _read_line(batch_id, number, text, endpoint)
            if line.custom_id in seen:
                raise InvalidRequest("custom_id was used before.", param="custom_id")
            seen.add(line.custom_id)
            count += 1
            if count <= MAX_LINES:
                lines.append(line)
        except InvalidRequest as error:
            errors.append(
                {
                    "code": error.code,
                    "message": error.message,
                    "param": error.param,
                    "line": number,
                }
            )
    if not lines and not errors:
        errors.append(_fault("empty_file", "The file has no requests."))
    if count > MAX_LINES:
        errors.append(_fault("too_many_tasks", f"{count:,} requests; at most {MAX_LINES:,} fit."))
    return lines, errors


def _fault(code: str, message: str) -> BatchError:
    return {"code": code, "message": message, "param": None, "line": None}


def _split(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a file; one that is too long comes cut off, and is refused."""
    rest = bytearray()
    for part in parts:
        *whole, last = part.split(b"\n")
        for text in whole:
            yield bytes(rest + text)
            rest.clear()
        if len(rest) <= MAX_LINE_BYTES:
            rest += last
    yield bytes(rest)


def _read_line(batch_id: str, number: int, text: bytes, endpoint: str) -> BatchLine:
    if len(text) > MAX_LINE_BYTES:
        raise InvalidRequest(f"The line has more than {MAX_LINE_BYTES:,} bytes.")
    found = parse_object(text)
    custom_id, body = found.get("custom_id"), found.get("body")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= 512:
        raise InvalidRequest("custom_id must have 1 to 512 characters.", param="custom_id")
    if found.get("method", "POST") != "POST":
        raise InvalidRequest("method must be POST.", param="method")
    if found.get("url") != endpoint:
        raise InvalidRequest(f"url must be the batch's endpoint {endpoint}.", param="url")
    if not isinstance(body, dict):
        raise InvalidRequest("body must be an object.", code="invalid_type", param="body")
    return BatchLine(batch_id, number, custom_id, body)
