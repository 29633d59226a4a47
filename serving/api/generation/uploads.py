"""Pictures that a request brings: as multipart files, data URLs, addresses, or uploaded files.

Whatever they claim to be, their first bytes decide what they are.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from calotype.serving.api.generation.files import find_file, keep_file
from calotype.serving.api.http.schemas import EditBody, GenerationBody, VariationBody
from calotype.serving.api.state.gateway import Gateway
from calotype.serving.core.errors import InvalidRequest, NotFound
from calotype.serving.core.request import MAX_REFERENCES, ImageSize
from calotype.serving.database.blob_refs import JOB_INPUT
from calotype.serving.webhooks.safe_http import fetch

MAX_FILE_BYTES = 50 * 1024 * 1024
MAX_PIXELS = 50_000_000
_KINDS = {"PNG": "png", "JPEG": "jpeg", "WEBP": "webp", "MPO": "jpeg"}
"""Cameras put a thumbnail behind a JPEG, which is then called MPO."""
_FORMATS = ("PNG", "JPEG", "WEBP")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "La", "RGBa", "RGBX")
_PNG_DEPTH_AT = 24
"""Where a PNG file says how many bits a channel has."""
_ORIENTATION, _LYING = 0x0112, range(5, 9)
"""The EXIF entry that tells how a camera was held, and its values for a turned picture."""
_OPAQUE_BELOW = 128


@dataclass(frozen=True, slots=True)
class Upload:
    """A picture that was read and looks sound."""

    data: bytes
    kind: str
    """``png``, ``jpeg`` or ``webp``."""
    width: int
    """As it is seen: turned as its EXIF data says."""
    height: int


@dataclass(frozen=True, slots=True)
class Images:
    """Stored pictures that a request brings, by blob key."""

    image: str | None = None
    """To start from."""
    mask: str | None = None
    references: tuple[str, ...] = ()
    size: ImageSize | None = None
    """Of ``image``, where it is known."""


async def read_source(gateway: Gateway, team_id: str, source: Any, param: str) -> bytes:
    """The bytes behind ``{"image_url"}``, ``{"file_id"}`` or a URL.

    Raises:
        InvalidRequest: it is none of these, cannot be had or leads where we do not go.
        NotFound: the team has no such file.
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
    if name == "file_id":
        return await _read_file(gateway, team_id, value, where)
    if value.startswith("data:"):
        return _read_data_url(value, where)
    return await fetch(
        value,
        gateway.outbound,
        seconds=gateway.settings.fetch_seconds,
        max_bytes=MAX_FILE_BYTES,
        param=where,
    )


def check_image(data: bytes, param: str) -> Upload:
    """Reads the head of a picture.

    Raises:
        InvalidRequest: empty, too large, no png, jpeg or webp, more than `MAX_PIXELS`, animated, or
            not of 8 bits of grey or RGB.
    """
    if not data:
        raise InvalidRequest(f"{param} is empty.", code="empty_image_file", param=param)
    if len(data) > MAX_FILE_BYTES:
        raise InvalidRequest(
            f"{param} has {len(data):,} bytes; at most {MAX_FILE_BYTES:,} are possible.",
            code="image_file_too_large",
            param=param,
        )
    unreadable = InvalidRequest(
        f"{param} is no readable png, jpeg or webp picture of at most {MAX_PIXELS:,} pixels.",
        code="invalid_image",
        param=param,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # bounded just below
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                kind, (width, height) = _KINDS[str(image.format)], image.size
                if width * height > MAX_PIXELS:
                    raise unreadable
                _check_kind(image, data, param)
                image.load()
                if image.getexif().get(_ORIENTATION) in _LYING:
                    width, height = height, width
    except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError):
        raise unreadable from None
    return Upload(data, kind, width, height)


def _check_kind(image: Image.Image, data: bytes, param: str) -> None:
    """Raises InvalidRequest for sound files that no model can be shown."""
    wrong = ""
    if getattr(image, "is_animated", False) and image.format != "MPO":
        wrong = "is animated; send one frame of it"
    elif (image.format == "PNG" and data[_PNG_DEPTH_AT] > 8) or image.mode[0] in "IF":
        wrong = "has 16 bits per channel; convert it to 8 bits"
    elif image.mode not in _MODES:
        wrong = f"is a {image.mode} picture; convert it to RGB"
    if wrong:
        raise InvalidRequest(f"{param} {wrong}.", code="invalid_image", param=param)


def check_mask(mask: Upload, image: Upload) -> Upload:
    """OpenAI's mask, where transparent means "draw anew", as a grey picture: white = anew.

    Raises:
        InvalidRequest: of another size than the image, or it marks nothing.
    """
    if (mask.width, mask.height) != (image.width, image.height):
        raise InvalidRequest(
            f"mask is {mask.width}x{mask.height}, but the image is {image.width}x{image.height}; "
            "they must have one size.",
            code="invalid_image",
            param="mask",
        )
    with Image.open(io.BytesIO(mask.data)) as file_image:
        picture = ImageOps.exif_transpose(file_image)
        if picture.has_transparency_data:
            alpha = np.asarray(picture.convert("RGBA").getchannel("A"))
            marked = alpha < _OPAQUE_BELOW
        else:
            marked = np.asarray(picture.convert("L")) >= _OPAQUE_BELOW
    if not marked.any():
        raise InvalidRequest(
            "mask marks nothing: make the region that shall be drawn anew transparent.",
            code="invalid_image",
            param="mask",
        )
    file = io.BytesIO()
    Image.fromarray(marked.astype(np.uint8) * 255, "L").save(file, "PNG")
    return Upload(file.getvalue(), "png", mask.width, mask.height)


def input_seconds(gateway: Gateway) -> float:
    """How long the pictures of a synchronous request are kept: as long as what it draws."""
    settings = gateway.settings
    return settings.asset_seconds + settings.request_timeout + settings.max_outage_seconds


async def read_images(
    gateway: Gateway, team_id: str, body: GenerationBody, kept_seconds: float
) -> Images | None:
    """Loads, checks and stores the pictures that a JSON body names.

    Raises:
        InvalidRequest: see `read_source` and `check_image`; or there is none where one must be.
    """
    named = [(f"reference_images[{i}]", s) for i, s in enumerate(body.reference_images or [])]
    mask: Any = None
    if isinstance(body, EditBody):
        named = [(f"images[{i}]", source) for i, source in enumerate(body.images)] + named
        mask = body.mask
    found = [
        check_image(await read_source(gateway, team_id, source, where), where)
        for where, source in named
    ]
    marked = None
    if mask is not None:
        marked = check_image(await read_source(gateway, team_id, mask, "mask"), "mask")
    return await keep_images(gateway, team_id, body, found, marked, kept_seconds)


async def keep_images(
    gateway: Gateway,
    team_id: str,
    body: GenerationBody,
    images: Sequence[Upload],
    mask: Upload | None,
    kept_seconds: float,
) -> Images | None:
    """Stores the pictures of a request in the roles that its kind gives them.

    A generation looks at all of them. An edit without a mask does too; with one, or with a
    strength, it starts from the first. A variation starts from its only one.
    """
    if not isinstance(body, EditBody) and not images:
        return None
    first: Upload | None = None
    others = list(images)
    if isinstance(body, EditBody):
        if not images:
            name = "image" if isinstance(body, VariationBody) else "images"
            raise InvalidRequest(
                f"Missing required parameter: '{name}'.",
                code="missing_required_parameter",
                param=name,
            )
        variation = isinstance(body, VariationBody)
        if variation and len(images) > 1:
            raise InvalidRequest("A variation has exactly one image.", param="image")
        drawn_over = mask is not None or body.strength is not None or body.expand is not None
        if variation or drawn_over:
            first, others = images[0], list(images[1:])
    if len(others) > MAX_REFERENCES:
        raise InvalidRequest(
            f"There are {len(others)} images to look at; at most {MAX_REFERENCES} are possible.",
            param="images" if isinstance(body, EditBody) else "reference_images",
        )
    if mask is not None and first is not None:
        mask = await asyncio.to_thread(check_mask, mask, first)
    expires = gateway.database.clock.time() + kept_seconds
    return await keep(gateway, team_id, expires, image=first, mask=mask, references=others)


async def keep(
    gateway: Gateway,
    team_id: str,
    expires: float,
    *,
    image: Upload | None = None,
    mask: Upload | None = None,
    references: Sequence[Upload] = (),
) -> Images:
    """Stores the pictures of a request for as long as its job is kept."""

    async def one(upload: Upload | None) -> str | None:
        if upload is None:
            return None
        return await asyncio.to_thread(store_upload, gateway, team_id, upload, expires)

    found = [await one(upload) for upload in references]
    return Images(
        await one(image),
        await one(mask),
        tuple(key for key in found if key),
        None if image is None else ImageSize(image.width, image.height),
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


async def _read_file(gateway: Gateway, team_id: str, file_id: str, where: str) -> bytes:
    try:
        file = await find_file(gateway, file_id, team_id)
    except NotFound as error:
        raise NotFound(error.message, error.code, where) from None
    return await asyncio.to_thread(gateway.blobs.get, file.blob_key)


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
