"""/v1/files: uploaded pictures and batches, in OpenAI's shapes."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from calotype.serving.api.generation.files import find_file, keep_file
from calotype.serving.api.generation.uploads import checked_image
from calotype.serving.api.http.auth import allowed
from calotype.serving.api.http.body import room_for_body
from calotype.serving.api.http.multipart import FORM_COPIES, Form, is_multipart, read_form
from calotype.serving.api.http.pages import Deleted, Page, list_object, page_size
from calotype.serving.api.http.stored import file_response
from calotype.serving.api.state.gateway import Gateway, gateway_of
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.json_object import JsonObject
from calotype.serving.jobs.records import FileRecord, KeyRecord

router = APIRouter(tags=["OpenAI"])

Caller = Annotated[KeyRecord, Depends(allowed("images"))]
Writer = Annotated[KeyRecord, Depends(allowed("images", counted=True))]

PURPOSES = ("batch", "vision", "user_data", "assistants", "fine-tune", "evals")
_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
_MIN_SECONDS, _MAX_SECONDS = 3600, 30 * 86_400
_MAX_PAGE = 10_000


class FileObject(TypedDict):
    """OpenAI's file object."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"]
    sha256: str


_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": _MIN_SECONDS,
                            "maximum": _MAX_SECONDS,
                        },
                    },
                }
            }
        },
    }
}


@router.post("/v1/files", openapi_extra=_FORM)
async def create_file(request: Request, key: Writer) -> FileObject:
    """Keeps a file, for a batch or as an image of later requests."""
    gateway = gateway_of(request)
    settings = gateway.settings
    if not is_multipart(request):
        raise InvalidRequest(
            "Content-Type must be multipart/form-data.", code="unsupported_content_type"
        )
    async with room_for_body(request, key.team_id, settings.max_upload_bytes, FORM_COPIES):
        form = await read_form(request, settings.max_upload_bytes, settings.body_seconds)
        return file_object(await _keep(gateway, key, form))


async def _keep(gateway: Gateway, key: KeyRecord, form: Form) -> FileRecord:
    for name in form.fields:
        if name not in _FIELDS:
            raise InvalidRequest(
                f"Unknown parameter: '{name[:80]}'.", code="unknown_parameter", param=name[:80]
            )
    purpose = form.fields.get("purpose")
    if purpose not in PURPOSES:
        raise InvalidRequest(
            f"purpose must be one of {', '.join(PURPOSES)}.",
            code="missing_required_parameter" if purpose is None else "invalid_value",
            param="purpose",
        )
    upload = form.file("file")
    if upload is None:
        raise InvalidRequest(
            "Missing required parameter: 'file'.", code="missing_required_parameter", param="file"
        )
    if not upload.data:
        raise InvalidRequest("file is empty.", code="empty_file", param="file")
    kind, content_type = "bin", "application/octet-stream"
    if purpose == "vision":
        kind = (await checked_image(gateway, key.team_id, upload.data, "file")).kind
        content_type = f"image/{kind}"
    elif purpose == "batch":
        kind, content_type = "jsonl", "application/jsonl"
    return await asyncio.to_thread(
        keep_file,
        gateway,
        key.team_id,
        upload.data,
        kind,
        purpose=purpose,
        filename=upload.filename or "upload",
        content_type=content_type,
        expires=_expires(form.fields, gateway.database.clock.time(), gateway.settings.file_seconds),
    )


@router.get("/v1/files")
async def list_files(
    request: Request,
    key: Caller,
    limit: str = "10000",
    after: str | None = None,
    purpose: str | None = None,
    order: str = "desc",
) -> Page[FileObject]:
    """The team's files."""
    gateway = gateway_of(request)
    count = page_size(limit, _MAX_PAGE)
    if order not in ("asc", "desc"):
        raise InvalidRequest("order must be asc or desc.", param="order")
    page = await asyncio.to_thread(
        lambda: gateway.database.files.list_files(
            key.team_id,
            limit=count + 1,
            after=after,
            purpose=purpose,
            oldest_first=order == "asc",
        )
    )
    return list_object([file_object(file) for file in page[:count]], len(page) > count)


@router.get("/v1/files/{file_id}")
async def get_file(request: Request, file_id: str, key: Caller) -> FileObject:
    return file_object(await find_file(gateway_of(request), file_id, key.team_id))


@router.get("/v1/files/{file_id}/content")
async def get_file_content(request: Request, file_id: str, key: Caller) -> Response:
    """The file's bytes."""
    gateway = gateway_of(request)
    file = await find_file(gateway, file_id, key.team_id)
    found = await asyncio.to_thread(gateway.blobs.open, file.blob_key)
    return file_response(found, file.content_type)


@router.delete("/v1/files/{file_id}")
async def delete_file(request: Request, file_id: str, key: Caller) -> Deleted:
    """Forgets the file; jobs that use it already go on."""
    gateway = gateway_of(request)
    await asyncio.to_thread(gateway.database.files.delete_file, file_id, key.team_id)
    return {"id": file_id, "object": "file", "deleted": True}


def file_object(file: FileRecord) -> FileObject:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size,
        "created_at": int(file.created),
        "expires_at": None if file.expires is None else int(file.expires),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "sha256": file.sha256,
    }


def _expires(fields: JsonObject, now: float, usual_seconds: float) -> float:
    anchor = fields.get("expires_after[anchor]")
    seconds = fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return now + usual_seconds
    digits = isinstance(seconds, str) and seconds.isascii() and seconds.isdigit()
    after = int(str(seconds)[:9]) if digits else 0
    if anchor != "created_at" or not _MIN_SECONDS <= after <= _MAX_SECONDS:
        raise InvalidRequest(
            "expires_after must have anchor 'created_at' and seconds from "
            f"{_MIN_SECONDS} to {_MAX_SECONDS}.",
            param="expires_after",
        )
    return now + after
