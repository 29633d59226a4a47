"""Takedowns: a picture that was found is searched among the stored ones, deleted, and kept away."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import os
import time
from collections.abc import Sequence
from typing import Annotated, Literal, cast

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from typing_extensions import TypedDict

from calotype.moderation.errors import ImageError
from calotype.moderation.images import pdq
from calotype.moderation.images.decode import decode_image
from calotype.moderation.images.pdq import Pixels
from calotype.moderation.policy.categories import Category
from calotype.moderation.provenance import watermark
from calotype.moderation.provenance.installation_keys import InstallationKeys
from calotype.serving.api.http.auth import allowed
from calotype.serving.api.http.body import json_body, read_json
from calotype.serving.api.http.pages import Deleted, Page, list_object
from calotype.serving.api.http.schemas import parse
from calotype.serving.api.state.gateway import Gateway, gateway_of
from calotype.serving.config.environment import DATA_DIR
from calotype.serving.core.errors import InvalidRequest, NotFound
from calotype.serving.database.takedowns import Fingerprint, StoredMatch, TakedownRecord
from calotype.serving.images.provenance import installation_keys
from calotype.serving.jobs.records import AssetRecord, KeyRecord

router = APIRouter(tags=["moderation"])

Reviewer = Annotated[KeyRecord, Depends(allowed("moderation"))]
INDEX_SECONDS = 20.0
"""One call reads stored pictures for so long; another call goes on."""
SHOWN = 100
_PAGE = 20


class MatchObject(TypedDict):
    """A stored picture that is a copy of the one that was looked for."""

    asset_id: str
    job_id: str
    team_id: str
    by: str
    distance: int | None
    created_at: int


class TakedownAnswer(TypedDict):
    """What was found, and deleted unless it was a dry run."""

    id: str | None
    deleted: int
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
async def take_down(request: Request, key: Reviewer) -> TakedownAnswer:
    """Deletes every stored copy of a picture and refuses it from now on.

    Copies are known by the watermark and by PDQ. Where ``unsearched`` is not 0 there are stored
    pictures that were not looked at yet: nothing was done, ask again.
    """
    gateway = gateway_of(request)
    body = parse(TakedownBody, await read_json(request, gateway.settings.max_body_bytes))
    category = _category(body.category)
    data = await _image(gateway, body)
    keys = await asyncio.to_thread(_keys, gateway)
    try:
        looked_for = await asyncio.to_thread(fingerprint, data, keys)
    except ImageError as error:
        raise InvalidRequest(str(error), code="invalid_image", param="image") from error
    unsearched = await asyncio.to_thread(index_stored, gateway, keys)
    matches = await asyncio.to_thread(gateway.database.takedowns.find_images, looked_for)
    if body.asset_id is not None and all(m.asset.id != body.asset_id for m in matches):
        named = await asyncio.to_thread(gateway.database.files.get_asset, body.asset_id)
        matches += [] if named is None else [StoredMatch(named, "asset_id", None)]
    found: TakedownAnswer = {
        "id": None,
        "deleted": 0,
        "dry_run": True,
        "object": "moderation.takedown",
        "watermark": looked_for.payload,
        "pdq": looked_for.pdq,
        "matches": [_match(match) for match in matches[:SHOWN]],
        "match_count": len(matches),
        "unsearched": unsearched,
    }
    if body.dry_run or unsearched:
        return found
    taken, deleted = await asyncio.to_thread(
        remove, gateway, data, looked_for, matches, category, body.reason, key.id
    )
    found.update({"id": taken.id, "deleted": deleted, "dry_run": False})
    return found


@router.get("/v1/moderation/takedowns")
async def list_takedowns(request: Request, key: Reviewer) -> Page[TakedownObject]:
    """What is refused, the oldest first."""
    found = await asyncio.to_thread(gateway_of(request).database.takedowns.list_takedowns)
    return list_object([_described(record) for record in found], has_more=False)


@router.delete("/v1/moderation/takedowns/{takedown_id}")
async def lift_takedown(request: Request, takedown_id: str, key: Reviewer) -> Deleted:
    """Lets the picture come again; what was deleted stays so."""
    database = gateway_of(request).database
    await asyncio.to_thread(database.takedowns.lift_takedown, takedown_id)
    await asyncio.to_thread(
        database.reviewer_audit.record_action, key.id, "takedown.lifted", takedown_id
    )
    return {"id": takedown_id, "object": "moderation.takedown", "deleted": True}


def take_down_asset(gateway: Gateway, asset: AssetRecord, reason: str, actor: str) -> None:
    """Takes down a stored picture that somebody reported, and its copies as far as they are known.

    Raises:
        StorageFailed: the database or the files cannot be written.
    """
    keys = _keys(gateway)
    try:
        data = gateway.blobs.get(asset.blob_key)
        looked_for = fingerprint(data, keys)
    except (NotFound, ImageError):
        data, looked_for = b"", Fingerprint(None, None)
    index_stored(gateway, keys)
    matches = gateway.database.takedowns.find_images(looked_for)
    if all(match.asset.id != asset.id for match in matches):
        matches.append(StoredMatch(asset, "report", None))
    remove(gateway, data, looked_for, matches, Category.HARASSMENT, reason, actor)


def remove(
    gateway: Gateway,
    data: bytes,
    found: Fingerprint,
    matches: Sequence[StoredMatch],
    category: Category,
    reason: str,
    actor: str,
) -> tuple[TakedownRecord, int]:
    """Keeps a picture away, deletes its copies and writes it down; how many files were deleted."""
    database = gateway.database
    record = database.takedowns.take_down(found, category, reason, actor)
    ids = [match.asset.id for match in matches]
    same = {match.asset.sha256 for match in matches} | {hashlib.sha256(data).hexdigest()}
    blobs = database.takedowns.remove_copies(ids, same)
    for blob_key in blobs:
        gateway.blobs.delete(blob_key)
    database.takedowns.forget_blobs(blobs)
    done = {"assets": ids, "files_deleted": len(blobs), "category": category.value}
    database.reviewer_audit.record_action(actor, "takedown.made", record.id, done)
    return record, len(blobs)


def fingerprint(
    data: bytes, keys: InstallationKeys | None, *, as_made: bool = False
) -> Fingerprint:
    """What a picture file is recognised by.

    Args:
        as_made: a stored file, whose watermark is where it was put.

    Raises:
        ImageError: it is no picture that can be read.
    """
    pixels: Pixels = decode_image(data)[0]
    payload = None
    for secret in (keys.watermark, *keys.former) if keys is not None else ():
        mark = watermark.detect(pixels, secret, as_made=as_made)
        if mark is not None:
            payload = mark.payload
            break
    hashed = pdq.pdq(pixels)
    if hashed.quality < pdq.USABLE_QUALITY:
        return Fingerprint(None, payload)
    turned = None if as_made else pdq.pdq_turned(pixels)[0]
    return Fingerprint(hashed.hexadecimal, payload, turned)


def index_stored(gateway: Gateway, keys: InstallationKeys | None) -> int:
    """Notes what stored pictures are recognised by; how many are left when the time is over."""
    end = time.monotonic() + INDEX_SECONDS
    while pending := gateway.database.takedowns.unindexed_assets(_PAGE):
        for asset in pending:
            try:
                found = fingerprint(gateway.blobs.get(asset.blob_key), keys, as_made=True)
            except (NotFound, ImageError):
                found = Fingerprint(None, None)  # its file is gone: there is nothing to find
            gateway.database.takedowns.index_image(asset.id, found)
            if time.monotonic() > end:
                return len(gateway.database.takedowns.unindexed_assets(SHOWN))
    return 0


def _keys(gateway: Gateway) -> InstallationKeys | None:
    folder = gateway.settings.data_dir
    own = {} if folder is None else {DATA_DIR: str(folder)}
    return installation_keys(dict(os.environ) | own, make=False)


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
