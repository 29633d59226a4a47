"""Pictures that a request brings: as multipart files, data URLs, addresses, or uploaded files."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import dataclasses
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from calotype.moderation.errors import ImageError
from calotype.moderation.images.decode import count_pixels
from calotype.serving.api.generation.files import find_file, keep_file
from calotype.serving.api.http.body_parts import ReferenceOptions
from calotype.serving.api.http.multipart import Form, FormFile
from calotype.serving.api.http.schemas import EditBody, GenerationBody, parse
from calotype.serving.api.state.gateway import Gateway
from calotype.serving.core.conditions import USE_OF_ROLE, ReferenceUse
from calotype.serving.core.errors import InvalidRequest, NotFound
from calotype.serving.core.request import ImageSize
from calotype.serving.database.blob_refs import JOB_INPUT
from calotype.serving.images.uploaded import (
    MAX_FILE_BYTES,
    MAX_PIXELS,
    Upload,
    check_image,
)
from calotype.serving.jobs.records import FileRecord
from calotype.serving.webhooks.safe_http import fetch

BYTES_PER_PIXEL = 7
_SPOOLED_BYTES = 1024 * 1024
"""What is fetched from elsewhere comes slowly: beyond this it waits on the disk."""
_BARE_BASE64 = ("iVBORw0KGgo", "/9j/", "UklGR")
"""How PNG, JPEG and WebP files begin in base64: clients leave out the head of a data URL."""


@dataclass(frozen=True, slots=True)
class GivenControl:
    """A control map of a request: see `conditions.ControlRef`.

    Attributes:
        scale: None where the adapter's default counts.
    """

    name: str
    image: str
    type: str
    scale: float | None
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Images:
    """Stored pictures that a request brings, by blob key."""

    image: str | None = None
    """To start from."""
    mask: str | None = None
    references: tuple[str, ...] = ()
    size: ImageSize | None = None
    """Of ``image``, else of what an edit looks at first; where it is known."""
    uses: tuple[ReferenceUse, ...] = ()
    """How each reference is looked at; empty = as usual."""
    controls: tuple[GivenControl, ...] = ()


@dataclass(frozen=True, slots=True)
class Source:
    """Where a picture of a request comes from; its bytes are there while it is open."""

    param: str
    open: Callable[[], AbstractAsyncContextManager[bytes]]


@dataclass(frozen=True, slots=True)
class Sources:
    """The pictures of a request, before any of them is read.

    Attributes:
        uses: how each image is looked at; None where its body says nothing of it.
    """

    images: list[Source]
    mask: Source | None = None
    uses: tuple[ReferenceUse | None, ...] = ()


@contextlib.asynccontextmanager
async def open_source(
    gateway: Gateway, team_id: str, source: Any, param: str
) -> AsyncIterator[bytes]:
    """The bytes behind ``{"image_url"}``, ``{"file_id"}`` or a URL, while the context lasts.

    Raises:
        InvalidRequest: it is none of these, cannot be had or leads where we do not go.
        NotFound: the team has no such file.
        Overloaded: there is no memory for it.
    """
    if isinstance(source, str):
        source = {"image_url": source}
    fields = {k: v for k, v in source.items() if v is not None} if isinstance(source, dict) else {}
    if len(fields) != 1 or not set(fields) <= {"image_url", "file_id"}:
        raise InvalidRequest(
            f"{param} must be {{'image_url': ...}} or {{'file_id': ...}}, one of the two.",
            code="invalid_type",
            param=param,
        )
    name, value = next(iter(fields.items()))
    if isinstance(value, dict):  # {"image_url": {"url": ...}}, as in chat messages
        value = value.get("url")
    where = f"{param}.{name}"
    if not isinstance(value, str):
        raise InvalidRequest(f"{where} must be a string.", code="invalid_type", param=where)
    room = gateway.memory.pictures
    if name == "image_url" and value.startswith(_BARE_BASE64):
        value = f"data:image;base64,{value}"
    if value.startswith("data:") and name == "image_url":
        yield _read_data_url(value, where)  # there was room for it with the body
    elif name == "file_id":
        file = await _find_file(gateway, team_id, value, where)
        async with room.reserve(team_id, file.size):
            yield await asyncio.to_thread(gateway.blobs.get, file.blob_key)
    else:
        with tempfile.SpooledTemporaryFile(_SPOOLED_BYTES) as kept:
            await fetch(
                value,
                gateway.outbound,
                kept,
                seconds=gateway.settings.fetch_seconds,
                max_bytes=MAX_FILE_BYTES,
                param=where,
            )
            async with room.reserve(team_id, kept.tell()):
                kept.seek(0)
                yield kept.read()


async def checked_image(gateway: Gateway, team_id: str, data: bytes, param: str) -> Upload:
    """`check_image` when there is memory for its pixels, beside the event loop."""
    try:
        pixels = await asyncio.to_thread(count_pixels, data)
    except ImageError:
        pixels = 0  # `check_image` says what is wrong
    async with gateway.memory.pixels.reserve(team_id, min(pixels, MAX_PIXELS) * BYTES_PER_PIXEL):
        return await asyncio.to_thread(check_image, data, param)


def input_seconds(gateway: Gateway) -> float:
    """How long the pictures of a synchronous request are kept: as long as what it draws."""
    settings = gateway.settings
    return settings.asset_seconds + settings.request_timeout + settings.max_outage_seconds


def named_sources(gateway: Gateway, team_id: str, body: GenerationBody) -> Sources:
    """The pictures that a JSON body names.

    Raises:
        InvalidRequest: what is said of one of them is no `ReferenceOptions`.
    """
    named = [(f"reference_images[{i}]", s) for i, s in enumerate(body.reference_images or [])]
    mask: Any = None
    if isinstance(body, EditBody):
        named = [(f"images[{i}]", source) for i, source in enumerate(body.images)] + named
        mask = body.mask

    def opened(source: Any, where: str) -> Source:
        return Source(where, lambda: open_source(gateway, team_id, source, where))

    asked = [_split(source, where) for where, source in named]
    return Sources(
        [opened(source, where) for (where, _), (source, _) in zip(named, asked, strict=True)],
        None if mask is None else opened(mask, "mask"),
        tuple(use for _, use in asked),
    )


def control_sources(gateway: Gateway, team_id: str, body: GenerationBody) -> list[Source]:
    """The pictures of a body's control maps, in order."""

    def opened(source: Any, where: str) -> Source:
        return Source(where, lambda: open_source(gateway, team_id, source, where))

    return [opened(c.image, f"controlnets[{i}].image") for i, c in enumerate(body.controlnets)]


def _split(source: Any, where: str) -> tuple[Any, ReferenceUse | None]:
    """Where a reference image comes from, and how it is looked at where that is said."""
    options = ReferenceOptions.model_fields
    given = {k: v for k, v in source.items() if k in options} if isinstance(source, dict) else {}
    if not given:
        return source, None
    try:
        found = parse(ReferenceOptions, given)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, error.code, f"{where}.{error.param}") from None
    usual = ReferenceUse() if found.role is None else USE_OF_ROLE[found.role]
    use = dataclasses.replace(usual, **found.model_dump(exclude_none=True))
    return {k: v for k, v in source.items() if k not in options}, use


def sent_sources(form: Form) -> Sources:
    """The pictures that came as parts of a multipart body."""

    def opened(file: FormFile, where: str) -> Source:
        return Source(where, lambda: contextlib.nullcontext(file.data))

    form.check_files(("image", "mask"))
    masked = form.file("mask")
    return Sources(
        [opened(file, f"image[{place}]") for place, file in enumerate(form.images())],
        None if masked is None else opened(masked, "mask"),
    )


def store_upload(gateway: Gateway, team_id: str, upload: Upload, expires: float) -> str:
    """Puts the picture and notes that it is in use; its blob key."""
    file = keep_file(
        gateway,
        team_id,
        upload.data,
        upload.kind,
        purpose=JOB_INPUT,
        filename=f"upload.{upload.kind}",
        content_type=f"image/{upload.kind}",
        expires=expires,
    )
    return file.blob_key


async def _find_file(gateway: Gateway, team_id: str, file_id: str, where: str) -> FileRecord:
    try:
        return await find_file(gateway, file_id, team_id)
    except NotFound as error:
        raise NotFound(error.message, error.code, where) from None


def _read_data_url(url: str, where: str) -> bytes:
    head, comma, encoded = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise InvalidRequest(
            f"{where} must be a data URL such as 'data:image/png;base64,...'.",
            code="invalid_image",
            param=where,
        )
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(
            f"{where} holds no valid base64.", code="invalid_base64_image", param=where
        ) from None
