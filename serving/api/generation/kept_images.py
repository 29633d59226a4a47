"""The pictures of a request, loaded, checked and stored before its job is made."""

from __future__ import annotations

import asyncio
import dataclasses

from calotype.serving.api.generation.uploads import (
    BYTES_PER_PIXEL,
    GivenControl,
    Images,
    Source,
    Sources,
    checked_image,
    control_sources,
    named_sources,
    store_upload,
)
from calotype.serving.api.http.schemas import EditBody, GenerationBody, VariationBody
from calotype.serving.api.state.gateway import Gateway
from calotype.serving.core.conditions import ReferenceUse
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.request import MAX_REFERENCES, ImageSize, check_reference
from calotype.serving.images.uploaded import Upload, read_mask

_NO_DIGEST = "0" * 64


async def keep_images(
    gateway: Gateway, team_id: str, body: GenerationBody, sources: Sources, kept_seconds: float
) -> Images | None:
    """Loads, checks and stores the pictures of a request, one after the other.

    A generation looks at all of them. An edit without a mask does too; with one, or with a
    strength, it starts from the first. A variation starts from its only one. Any of them may bring
    control maps.

    Raises:
        InvalidRequest: see `open_source` and `check_image`; or there is none where one must be.
    """
    expires = gateway.database.clock.time() + kept_seconds
    found = await _keep_pictures(gateway, team_id, body, sources, expires)
    controls = []
    for source, control in zip(
        control_sources(gateway, team_id, body), body.controlnets, strict=True
    ):
        key, _ = await _keep(gateway, team_id, source, expires)
        controls.append(
            GivenControl(control.id, key, control.type, control.scale, control.start, control.end)
        )
    if not controls:
        return found
    return dataclasses.replace(found or Images(), controls=tuple(controls))


async def measure_images(
    gateway: Gateway, team_id: str, body: GenerationBody
) -> tuple[Images, list[ImageSize]]:
    """The pictures of a generation as if they were stored, and the sizes of its references.

    Raises:
        InvalidRequest: as `keep_images`.
    """
    sources = named_sources(gateway, team_id, body)
    _check_count(body, len(sources.images), len(sources.images))
    sizes: list[ImageSize] = []
    for source in (*sources.images, *control_sources(gateway, team_id, body)):
        async with source.open() as data:
            found = await checked_image(gateway, team_id, data, source.param)
        sizes.append(ImageSize(found.width, found.height))
    references = tuple(f"estimate/{_NO_DIGEST}" for _ in sources.images)
    controls = tuple(
        GivenControl(c.id, f"estimate/{_NO_DIGEST}", c.type, c.scale, c.start, c.end)
        for c in body.controlnets
    )
    images = Images(references=references, uses=_uses(sources.uses), controls=controls)
    return images, sizes[: len(sources.images)]


async def _keep_pictures(
    gateway: Gateway, team_id: str, body: GenerationBody, sources: Sources, expires: float
) -> Images | None:
    if not isinstance(body, EditBody) and not sources.images:
        return None
    variation = isinstance(body, VariationBody)
    drawn_over = sources.mask is not None or (
        isinstance(body, EditBody) and (body.strength is not None or body.expand is not None)
    )
    starts = isinstance(body, EditBody) and (variation or drawn_over)
    _check_count(body, len(sources.images), len(sources.images) - int(starts))
    if starts and sources.uses[:1] not in ((), (None,)):
        raise InvalidRequest(
            "images[0] is drawn over, not looked at, so it has no role or strength of its own; "
            "leave them out, or give strength for the whole request.",
            param="images[0]",
        )
    kept = [
        await _keep(gateway, team_id, source, expires, seen=place >= int(starts))
        for place, source in enumerate(sources.images)
    ]
    references = tuple(key for key, _ in kept[int(starts) :])
    uses = _uses(sources.uses[int(starts) :])
    first, size = kept[0]
    if not starts:
        shape = size if isinstance(body, EditBody) else None
        return Images(references=references, size=shape, uses=uses)
    mask = None
    if sources.mask is not None:
        mask = await _keep_mask(gateway, team_id, sources.mask, size, expires)
    return Images(first, mask, references, size, uses)


def _uses(given: tuple[ReferenceUse | None, ...]) -> tuple[ReferenceUse, ...]:
    """One for each reference; none where nothing is said of any."""
    if all(use is None for use in given):
        return ()
    return tuple(ReferenceUse() if use is None else use for use in given)


async def _keep(
    gateway: Gateway, team_id: str, source: Source, expires: float, *, seen: bool = False
) -> tuple[str, ImageSize]:
    """Args:
    seen: the model looks at it.
    """
    async with source.open() as data:
        found = await checked_image(gateway, team_id, data, source.param)
        if seen:
            check_reference(ImageSize(found.width, found.height), source.param)
        key = await asyncio.to_thread(store_upload, gateway, team_id, found, expires)
        return key, ImageSize(found.width, found.height)


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
        async with gateway.memory.pixels.reserve(team_id, pixels * BYTES_PER_PIXEL):
            grey = await asyncio.to_thread(read_mask, given)
        found = Upload(grey, "png", given.width, given.height)
        return await asyncio.to_thread(store_upload, gateway, team_id, found, expires)
