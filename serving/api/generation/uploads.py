"""Pictures that a request brings: as multipart files, data URLs, addresses, or uploaded files."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from calotype.moderation.errors import ImageError
from calotype.moderation.images.decode import count_pixels
from calotype.serving.api.generation.files import find_file, keep_file
from calotype.serving.api.http.multipart import Form, FormFile
from calotype.serving.api.http.schemas import EditBody, GenerationBody, VariationBody
from calotype.serving.api.state.gateway import Gateway
from calotype.serving.core.errors import InvalidRequest, NotFound
from calotype.serving.core.request import MAX_REFERENCES, ImageSize, check_reference
from calotype.serving.database.blob_refs import JOB_INPUT
from calotype.serving.images.uploaded import (
    MAX_FILE_BYTES,
    MAX_PIXELS,
    Upload,
    check_image,
    read_mask,
)
from calotype.serving.jobs.records import FileRecord
from calotype.serving.webhooks.safe_http import fetch

_BYTES_PER_PIXEL = 7
_SPOOLED_BYTES = 1024 * 1024
"""What is fetched from elsewhere comes slowly: beyond this it waits on the disk."""
_BARE_BASE64 = ("iVBORw0KGgo", "/9j/", "UklGR")
"""How PNG, JPEG and WebP files begin in base64: clients leave out the head of a data URL."""


@dataclass(frozen=True, slots=True)
class Images:
    """Stored pictures that a request brings, by blob key."""

    image: str | None = None
    """To start from."""
    mask: str | None = None
    references: tuple[str, ...] = ()
    size: ImageSize | None = None
    """Of ``image``, else of what an edit looks at first; where it is known."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a picture of a request comes from; its bytes are there while it is open."""

    param: str
    open: Callable[[], AbstractAsyncContextManager[bytes]]


@dataclass(frozen=True, slots=True)
class Sources:
    """The pictures of a request, before any of them is read."""

    images: list[Source]
    mask: Source | None = None


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
        pixels = await asyncio.to_thread(count_pixels, data, param)
    except ImageError:
        pixels = 0  # `check_image` says what is wrong
    async with gateway.memory.pixels.reserve(team_id, min(pixels, MAX_PIXELS) * _BYTES_PER_PIXEL):
        return await asyncio.to_thread(check_image, data, param)


def input_seconds(gateway: Gateway) -> float:
    """How long the pictures of a synchronous request are kept: as long as what it draws."""
    settings = gateway.settings
    return settings.asset_seconds + settings.request_timeout + settings.max_outage_seconds


def named_sources(gateway: Gateway, team_id: str, body: GenerationBody) -> Sources:
    """The pictures that a JSON body names."""
    named = [(f"reference_images[{i}]", s) for i, s in enumerate(body.reference_images or [])]
    mask: Any = None
    if isinstance(body, EditBody):
        named = [(f"images[{i}]", source) for i, source in enumerate(body.images)] + named
        mask = body.mask

    def opened(source: Any, where: str) -> Source:
        return Source(where, lambda: open_source(gateway, team_id, source, where))

    return Sources(
        [opened(source, where) for where, source in named],
        None if mask is None else opened(mask, "mask"),
    )


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


async def keep_images(
    gateway: Gateway, team_id: str, body: GenerationBody, sources: Sources, kept_seconds: float
) -> Images | None:
    """Loads, checks and stores the pictures of a request, one after the other.

    A generation looks at all of them. An edit without a mask does too; with one, or with a
    strength, it starts from the first. A variation starts from its only one.

    Raises:
        InvalidRequest: see `open_source` and `check_image`; or there is none where one must be.
    """
    if not isinstance(body, EditBody) and not sources.images:
        return None
    variation = isinstance(body, VariationBody)
    drawn_over = sources.mask is not None or (
        isinstance(body, EditBody) and (body.strength is not None or body.expand is not None)
    )
    starts = isinstance(body, EditBody) and (variation or drawn_over)
    _check_count(body, len(sources.images), len(sources.images) - int(starts))
    expires = gateway.database.clock.time() + kept_seconds
    kept: list[tuple[str, ImageSize]] = []
    for source in sources.images:
        async with source.open() as data:
            found = await checked_image(gateway, team_id, data, source.param)
            if kept or not starts:
                check_reference(ImageSize(found.width, found.height), source.param)
            key = await asyncio.to_thread(store_upload, gateway, team_id, found, expires)
            kept.append((key, ImageSize(found.width, found.height)))
            del data, found
    first, size = kept[0]
    if not starts:
        shape = size if isinstance(body, EditBody) else None
        return Images(references=tuple(key for key, _ in kept), size=shape)
    mask = None
    if sources.mask is not None:
        mask = await _keep_mask(gateway, team_id, sources.mask, size, expires)
    return Images(first, mask, tuple(key for key, _ in kept[1:]), size)


def _check_count(body: GenerationBody, images: int, references: int) -> None:
    if isinstance(body, EditBody) and not images:
        name = "image" if isinstance(body, VariationBody) else "images"
        raise InvalidRequest(
            f"Missing required parameter: '{name}'.",
            code="missing_required_parameter",
            param=name,
        )
    if isinstance(body, VariationBody) and images > 1:
        raise InvalidRequest("A variation has exactly one image.", param="image")
    if references > MAX_REFERENCES:
        raise InvalidRequest(
            f"There are {references} images to look at; at most {MAX_REFERENCES} are possible.",
            param="images" if isinstance(body, EditBody) else "reference_images",
        )


async def _keep_mask(
    gateway: Gateway, team_id: str, source: Source, size: ImageSize, expires: float
) -> str:
    async with source.open() as data:
        given = await checked_image(gateway, team_id, data, source.param)
        if (given.width, given.height) != (size.width, size.height):
            raise InvalidRequest(
                f"mask is {given.width}x{given.height}, but the image is {size.width}x"
                f"{size.height}; they must have one size.",
                code="invalid_image",
                param="mask",
            )
        pixels = given.width * given.height
        async with gateway.memory.pixels.reserve(team_id, pixels * _BYTES_PER_PIXEL):
            grey = await asyncio.to_thread(read_mask, given)
        found = Upload(grey, "png", given.width, given.height)
        return await asyncio.to_thread(store_upload, gateway, team_id, found, expires)


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
