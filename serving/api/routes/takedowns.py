"""Takedowns: a picture that was found is searched among the stored ones, deleted, and kept away."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
from collections.abc import Sequence
from typing import Annotated, Literal, cast

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from typing_extensions import TypedDict

from calotype.moderation.errors import ImageError
from calotype.moderation.images.decode import count_pixels
from calotype.moderation.policy.categories import Category
from calotype.serving.api.http.auth import allowed
from calotype.serving.api.http.body import json_body, read_json, room_for_body
from calotype.serving.api.http.pages import Deleted, Page, list_object
from calotype.serving.api.http.schemas import parse
from calotype.serving.api.review.removal import carry_out
from calotype.serving.api.review.stored_images import fingerprint, index_stored, marking_keys
from calotype.serving.api.state.gateway import Gateway, gateway_of
from calotype.serving.core.errors import InvalidRequest, NotFound
from calotype.serving.database.review.cases import Reviewer
from calotype.serving.database.review.image_index import Fingerprint, StoredMatch
from calotype.serving.database.review.removals import Removal
from calotype.serving.database.review.takedowns import TakedownOrder, TakedownRecord
from calotype.serving.jobs.records import AssetRecord, KeyRecord

router = APIRouter(tags=["moderation"])

ReviewerKey = Annotated[KeyRecord, Depends(allowed("moderation"))]
SHOWN = 100
_BYTES_PER_PIXEL = 20
"""Of a picture that is looked for: its frame, its view and what is computed from it."""


class MatchObject(TypedDict):
    """A stored picture that is a copy of the one that was looked for."""

    asset_id: str
    job_id: str
    team_id: str
    by: str
    distance: int | None
    created_at: int


class AlsoObject(TypedDict):
    """What goes with the matches."""

    assets: int
    """Pictures that were drawn from them, and other copies."""
    files: int
    """Uploads, and outputs of batches, that hold one of them."""
    held: int
    previews: int


class TakedownAnswer(TypedDict):
    """What was found, and deleted unless it was a dry run."""

    id: str | None
    deleted: int
    """Files that are deleted already."""
    pending: int
    """Files that nobody is served any more and a sweep deletes."""
    also: AlsoObject
    dry_run: bool
    object: Literal["moderation.takedown"]
    watermark: str | None
    pdq: str | None
    matches: list[MatchObject]
    match_count: int
    unsearched: int


class TakedownObject(TypedDict):
    """A picture that is refused."""

    id: str
    object: Literal["moderation.takedown"]
    category: str
    reason: str
    watermark: str | None
    pdq: str | None
    by: str
    created_at: int


class TakedownBody(BaseModel):
    """A picture that must not exist."""

    model_config = ConfigDict(extra="forbid", strict=True)

    image: str | None = Field(
        None, description="The picture as somebody found it: base64, or a data URL."
    )
    asset_id: str | None = Field(None, max_length=64, description="Or a stored picture.")
    category: str = Field(description="What it is refused for from now on.")
    reason: str = Field(min_length=1, max_length=4000, description="For the record.")
    dry_run: bool = Field(False, description="Only say which stored pictures it is.")


@router.post("/v1/moderation/takedowns", openapi_extra=json_body(TakedownBody))
async def take_down(request: Request, key: ReviewerKey) -> TakedownAnswer:
    """Deletes every stored copy of a picture, its previews, what was drawn from it and the files
    that hold it, and refuses it from now on.

    Copies are known by the watermark and by PDQ. Where ``unsearched`` is not 0 there are stored
    pictures that were not looked at yet: nothing was done, ask again.
    """
    gateway = gateway_of(request)
    async with room_for_body(request, key.team_id, gateway.settings.max_body_bytes):
        return await _take_down(request, key)


async def _take_down(request: Request, key: KeyRecord) -> TakedownAnswer:
    gateway = gateway_of(request)
    body = parse(TakedownBody, await read_json(request, gateway.settings.max_body_bytes))
    category = _category(body.category)
    data = await _image(gateway, body)
    keys = await asyncio.to_thread(marking_keys, gateway)
    try:
        size = await asyncio.to_thread(count_pixels, data) * _BYTES_PER_PIXEL
        async with gateway.memory.pixels.reserve(key.team_id, size):
            looked_for = await asyncio.to_thread(fingerprint, data, keys)
    except ImageError as error:
        raise InvalidRequest(str(error), code="invalid_image", param="image") from error
    unsearched = await asyncio.to_thread(index_stored, gateway, keys)
    matches = await asyncio.to_thread(gateway.database.image_index.find_images, looked_for)
    if body.asset_id is not None and all(m.asset.id != body.asset_id for m in matches):
        named = await asyncio.to_thread(gateway.database.files.get_asset, body.asset_id)
        matches += [] if named is None else [StoredMatch(named, "asset_id", None)]
    found: TakedownAnswer = {
        "id": None,
        "deleted": 0,
        "pending": 0,
        "also": {"assets": 0, "files": 0, "held": 0, "previews": 0},
        "dry_run": True,
        "object": "moderation.takedown",
        "watermark": looked_for.payload,
        "pdq": looked_for.pdq,
        "matches": [_match(match) for match in matches[:SHOWN]],
        "match_count": len(matches),
        "unsearched": unsearched,
    }
    order = order_of(data, looked_for, matches, category, body.reason)
    if body.dry_run or unsearched:
        tried = await asyncio.to_thread(gateway.database.takedowns.try_out, order)
        return found | {"also": _beside(tried, matches)}
    taken, removal = await asyncio.to_thread(gateway.database.takedowns.take_down, order, key.id)
    deleted = await asyncio.to_thread(carry_out, gateway, removal)
    await asyncio.to_thread(index_stored, gateway, keys)  # what was stored in between
    found |= {
        "id": taken.id,
        "deleted": deleted,
        "pending": len(removal.blobs) - deleted,
        "also": _beside(removal, matches),
        "dry_run": False,
    }
    return found


@router.get("/v1/moderation/takedowns")
async def list_takedowns(request: Request, key: ReviewerKey) -> Page[TakedownObject]:
    """What is refused, the oldest first."""
    found = await asyncio.to_thread(gateway_of(request).database.takedowns.list_takedowns)
    return list_object([_described(record) for record in found], has_more=False)


@router.delete("/v1/moderation/takedowns/{takedown_id}")
async def lift_takedown(request: Request, takedown_id: str, key: ReviewerKey) -> Deleted:
    """Lets the picture come again; what was deleted stays so."""
    takedowns, reviewer = gateway_of(request).database.takedowns, Reviewer(key.id, key.team_id)
    await asyncio.to_thread(takedowns.lift_takedown, takedown_id, reviewer)
    return {"id": takedown_id, "object": "moderation.takedown", "deleted": True}


def order_for_report(gateway: Gateway, asset: AssetRecord, reason: str) -> TakedownOrder:
    """What a report of a stored picture takes down: its copies as far as they are known.

    Raises:
        StorageFailed: the database or the files cannot be read.
    """
    keys = marking_keys(gateway)
    try:
        data = gateway.blobs.get(asset.blob_key)
        looked_for = fingerprint(data, keys)
    except (NotFound, ImageError):
        data, looked_for = b"", Fingerprint(None, None)
    index_stored(gateway, keys)
    matches = gateway.database.image_index.find_images(looked_for)
    if all(match.asset.id != asset.id for match in matches):
        matches.append(StoredMatch(asset, "report", None))
    return order_of(data, looked_for, matches, Category.HARASSMENT, reason)


def order_of(
    data: bytes,
    found: Fingerprint,
    matches: Sequence[StoredMatch],
    category: Category,
    reason: str,
) -> TakedownOrder:
    same = {match.asset.sha256 for match in matches} | {hashlib.sha256(data).hexdigest()}
    return TakedownOrder(found, category, reason, [match.asset.id for match in matches], same)


def _category(name: str) -> Category:
    try:
        return Category(name)
    except ValueError:
        raise InvalidRequest(
            f"category {name[:80]!r} is none; write one of {', '.join(Category)}.",
            param="category",
        ) from None


async def _image(gateway: Gateway, body: TakedownBody) -> bytes:
    """The bytes that are looked for."""
    if (body.image is None) == (body.asset_id is None):
        raise InvalidRequest("Give either image or asset_id.", param="image")
    if body.asset_id is not None:
        asset = await asyncio.to_thread(gateway.database.files.get_asset, body.asset_id)
        if asset is None:
            raise NotFound(f"There is no asset '{body.asset_id}'.", param="asset_id")
        return await asyncio.to_thread(gateway.blobs.get, asset.blob_key)
    text = cast(str, body.image)
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(
            "image holds no valid base64.", code="invalid_image", param="image"
        ) from None


def _beside(removal: Removal, matches: Sequence[StoredMatch]) -> AlsoObject:
    return {
        "assets": len(removal.assets - {match.asset.id for match in matches}),
        "files": len(removal.files),
        "held": len(removal.held),
        "previews": removal.previews,
    }


def _match(match: StoredMatch) -> MatchObject:
    asset = match.asset
    return {
        "asset_id": asset.id,
        "job_id": asset.job_id,
        "team_id": asset.team_id,
        "by": match.by,
        "distance": match.distance,
        "created_at": int(asset.created),
    }


def _described(record: TakedownRecord) -> TakedownObject:
    return {
        "id": record.id,
        "object": "moderation.takedown",
        "category": record.category,
        "reason": record.reason,
        "watermark": record.payload,
        "pdq": record.pdq,
        "by": record.actor,
        "created_at": int(record.created),
    }
